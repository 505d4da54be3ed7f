//! Memory files, mapped, and who they are: memory of driver VMs and of appliances, and dirty logs.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};
use vvu_protocol::window::FileId;

/// Device and inode.
pub(crate) fn identity(file: impl AsFd) -> FileId {
    let status = fstat(file).unwrap();
    FileId { device: status.st_dev, inode: status.st_ino }
}

/// A sealed memory file, as VMMs make them.
pub(crate) fn sealed(len: u64) -> OwnedFd {
    let file = memfd_create("simulated", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, len).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
    file
}

/// A file that is mapped.
#[derive(Debug)]
pub(crate) struct MappedFile {
    pub(crate) id: FileId,
    pub(crate) file: OwnedFd,
    pub(crate) len: u64,
    map: MmapRegion,
}

impl MappedFile {
    pub(crate) fn new(len: u64) -> Self {
        Self::adopt(sealed(len))
    }

    /// A file that somebody else has made.
    pub(crate) fn adopt(file: OwnedFd) -> Self {
        let len = fstat(&file).unwrap().st_size.unsigned_abs();
        let backing = FileOffset::new(File::from(file.try_clone().unwrap()), 0);
        let map = MmapRegion::from_file(backing, usize::try_from(len).unwrap()).unwrap();
        Self { id: identity(&file), file, len, map }
    }

    pub(crate) fn duplicate(&self) -> OwnedFd {
        self.file.try_clone().unwrap()
    }

    /// What lies at this offset.
    pub(crate) fn load<T: AtomicAccess>(&self, offset: u64) -> T {
        self.map.as_volatile_slice().load(usize::try_from(offset).unwrap(), Ordering::Acquire).unwrap()
    }

    pub(crate) fn store<T: AtomicAccess>(&self, offset: u64, value: T) {
        self.map.as_volatile_slice().store(value, usize::try_from(offset).unwrap(), Ordering::Release).unwrap();
    }

    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) {
        self.map.as_volatile_slice().read_slice(bytes, usize::try_from(offset).unwrap()).unwrap();
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        self.map.as_volatile_slice().write_slice(bytes, usize::try_from(offset).unwrap()).unwrap();
    }
}
