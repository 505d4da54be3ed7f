//! The appliance's own memory, mapped for the queues of the control device. Nothing of the window is ever mapped, neither its
//! header nor driver memory: the table of the control device lists both once they are there, and this module leaves them out.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::fs::{SealFlags, fcntl_get_seals};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::window::FileId;

use super::{ApplianceError, file_identity};

/// Which files are the appliance's own memory, and their mapping.
#[derive(Debug)]
pub(crate) struct ApplianceMemory {
    window_header: FileId,
    files: BTreeSet<FileId>,
    sealed: bool,
    layout: Vec<(FileId, MemoryRegion)>,
    map: GuestMemoryMmap,
}

impl ApplianceMemory {
    /// Nothing is mapped. `window_header` is the one file of the window that may be there before [`ApplianceMemory::seal`].
    pub(crate) fn new(window_header: FileId) -> Self {
        let (files, layout) = (BTreeSet::new(), Vec::new());
        Self { window_header, files, sealed: false, layout, map: GuestMemoryMmap::default() }
    }

    /// From now on no further file is taken for the appliance's own: driver memory is about to be mapped into the window.
    pub(crate) fn seal(&mut self) {
        self.sealed = true;
    }

    /// The mapping.
    pub(crate) fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// Takes over a checked memory table. Files that were not there before [`ApplianceMemory::seal`] are left out.
    pub(crate) fn update(&mut self, table: Vec<(MemoryRegion, OwnedFd)>) -> Result<(), ApplianceError> {
        let mut own = Vec::new();
        for (region, descriptor) in table {
            let (file, _) = file_identity(&descriptor)?;
            if !self.sealed && file != self.window_header {
                self.files.insert(file);
            }
            if self.files.contains(&file) {
                own.push((file, region, descriptor));
            }
        }
        own.sort_by_key(|(_, region, _)| region.guest_address);
        let layout: Vec<_> = own.iter().map(|(file, region, _)| (*file, *region)).collect();
        if layout == self.layout {
            return Ok(());
        }
        let regions =
            own.into_iter().map(|(_, region, descriptor)| map_region(&region, descriptor)).collect::<Result<_, _>>()?;
        self.map = GuestMemoryMmap::from_regions(regions).map_err(|error| map_error(&error))?;
        self.layout = layout;
        Ok(())
    }
}

fn map_region(region: &MemoryRegion, descriptor: OwnedFd) -> Result<GuestRegionMmap, ApplianceError> {
    // A file that can shrink would let its owner kill this process with SIGBUS.
    let seals = fcntl_get_seals(&descriptor).unwrap_or(SealFlags::empty());
    if !seals.contains(SealFlags::SHRINK) {
        let problem =
            "it is no memfd sealed against shrinking; start QEMU with memory-backend-memfd,seal=on".to_owned();
        return Err(ApplianceError::Map { problem });
    }
    let (_, file_len) = file_identity(&descriptor)?;
    if file_len < region.file_end() {
        let problem = format!("a region ends behind the end of its file, at {:#x}", region.file_end());
        return Err(ApplianceError::Map { problem });
    }
    let len = usize::try_from(region.size).map_err(|error| map_error(&error))?;
    let offset = FileOffset::new(File::from(descriptor), region.mmap_offset.0);
    let map = MmapRegion::from_file(offset, len).map_err(|error| map_error(&error))?;
    let beyond = || ApplianceError::Map { problem: "a region ends beyond the address space".to_owned() };
    GuestRegionMmap::new(map, GuestAddress(region.guest_address.0)).ok_or_else(beyond)
}

fn map_error(error: &dyn std::error::Error) -> ApplianceError {
    ApplianceError::Map { problem: error.to_string() }
}
