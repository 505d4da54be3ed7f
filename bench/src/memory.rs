//! Memory that driver and device share: one file in memory, one region.
//!
//! All accesses are single atomic ones at checked places, so no reference to plain data ever exists while the device, which
//! may do what it likes, writes there.

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{AtomicInteger, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::error::Error;

/// Difference of front-end addresses, which stand in messages, to guest-physical ones, which stand in descriptors.
const USER_BASE: u64 = 0x7a00_0000_0000;

/// The length is a multiple of this, so that huge pages fit wherever the memory is mapped again.
const LENGTH_UNIT: usize = 2 << 20;

/// Number of bytes that are touched one by one before a load, so that none of its requests meets a page fault of ours.
const PAGE: usize = 4096;

/// See the module's text. Guest-physical addresses begin at 0 and are offsets in the file.
#[derive(Debug)]
pub struct Memory {
    region: MmapRegion,
    file: File,
}

impl Memory {
    /// At least `len` bytes of zeros, all of them present.
    ///
    /// # Errors
    /// If the system has no such memory.
    pub fn new(len: usize) -> Result<Self, Error> {
        let len = len.next_multiple_of(LENGTH_UNIT);
        let file = memfd_create("driver memory", MemfdFlags::CLOEXEC)
            .map_err(|source| Error::System { what: "create a file in memory", source })?;
        ftruncate(&file, len as u64).map_err(|source| Error::System { what: "size a file in memory", source })?;
        let file = File::from(file);
        let place = file.try_clone().map_err(|error| Error::System {
            what: "duplicate a descriptor",
            source: rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO),
        })?;
        let region =
            MmapRegion::from_file(FileOffset::new(place, 0), len).map_err(|source| Error::Map { len, source })?;
        let memory = Self { region, file };
        for page in (0..len).step_by(PAGE) {
            memory.at::<std::sync::atomic::AtomicU8>(page)?.store(0, std::sync::atomic::Ordering::Relaxed);
        }
        Ok(memory)
    }

    /// The number at a guest-physical address, which has to be a multiple of its size.
    ///
    /// # Errors
    /// If it is outside of the memory, or not aligned.
    #[inline]
    pub fn at<T: AtomicInteger>(&self, address: usize) -> Result<&T, Error> {
        Ok(self.region.get_atomic_ref(address)?)
    }

    /// Bytes that the kernel is to write.
    ///
    /// # Errors
    /// If they are outside of the memory.
    pub fn slice(&self, address: usize, len: usize) -> Result<VolatileSlice<'_>, Error> {
        Ok(self.region.get_slice(address, len)?)
    }

    /// What a front-end announces.
    #[must_use]
    pub fn announcement(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: self.region.size() as u64,
            userspace_addr: USER_BASE,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// The front-end's address of a guest-physical one, as messages about rings have it.
    #[must_use]
    pub fn user_address(address: usize) -> u64 {
        USER_BASE + address as u64
    }
}

/// Hands out parts of a memory that is not there yet, one after the other.
#[derive(Debug, Default)]
pub struct Layout {
    end: usize,
}

impl Layout {
    /// The start of `len` further bytes; `alignment` is a power of two.
    pub fn take(&mut self, len: usize, alignment: usize) -> usize {
        let start = self.end.next_multiple_of(alignment);
        self.end = start + len;
        start
    }

    /// Bytes so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.end
    }

    /// Whether nothing was handed out.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.end == 0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU16, AtomicU32};

    use super::*;

    #[test]
    fn parts_are_aligned_and_do_not_overlap() {
        let mut layout = Layout::default();
        assert_eq!((layout.take(6, 2), layout.take(8, 4), layout.take(1, 4096)), (0, 8, 4096));
        assert_eq!(layout.len(), 4097);
    }

    #[test]
    fn places_outside_and_unaligned_places_are_refused() {
        let memory = Memory::new(1).unwrap();
        assert_eq!(memory.announcement().memory_size, LENGTH_UNIT as u64);
        assert!(memory.at::<AtomicU16>(LENGTH_UNIT - 2).is_ok());
        assert!(memory.at::<AtomicU16>(LENGTH_UNIT - 1).is_err());
        assert!(memory.at::<AtomicU32>(2).is_err());
    }
}
