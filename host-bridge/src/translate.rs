//! The one place where a file descriptor of the front-end becomes a handle.
//!
//! Only requests whose descriptors have a meaning in the appliance are here; `vvu_protocol::carriage` says what becomes of the
//! others.

use std::os::fd::OwnedFd;

use vvu_protocol::address::{FileOffset, WindowOffset};
use vvu_protocol::control::Handle;
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{FrontEndRequest, VringFile};

/// A memory table whose regions lie at `offsets` of the window.
pub(crate) fn memory_table(regions: &[MemoryRegion], offsets: &[WindowOffset]) -> FrontEndRequest<Handle> {
    let placed = regions.iter().zip(offsets).map(|(region, offset)| {
        let region = MemoryRegion { mmap_offset: FileOffset(offset.0), ..*region };
        (region, Handle::Window)
    });
    FrontEndRequest::SetMemTable(placed.collect())
}

/// The same eventfd message with a handle, if it has a descriptor.
pub(crate) fn vring_file(file: &VringFile<OwnedFd>, handle: Handle) -> VringFile<Handle> {
    VringFile { index: file.index, descriptor: file.descriptor.is_some().then_some(handle) }
}
