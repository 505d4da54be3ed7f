//! The one place where a file descriptor of the front-end becomes a handle.
//!
//! Only requests whose descriptors have a meaning in the appliance are here; `vvu_protocol::carriage` says what becomes of the
//! others.

use vvu_protocol::address::{FileOffset, WindowOffset};
use vvu_protocol::control::Handle;
use vvu_protocol::doorbell::PeerId;
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{DeviceStateTransfer, FrontEndRequest, Inflight, LogArea, VringFile};

/// A memory table whose regions lie at `offsets` of the window.
pub(crate) fn memory_table(regions: &[MemoryRegion], offsets: &[WindowOffset]) -> FrontEndRequest<Handle> {
    let placed = regions.iter().zip(offsets).map(|(region, offset)| (placed(region, *offset), Handle::Window));
    FrontEndRequest::SetMemTable(placed.collect())
}

/// One more region, at `offset` of the window.
pub(crate) fn added_region(region: &MemoryRegion, offset: WindowOffset) -> FrontEndRequest<Handle> {
    FrontEndRequest::AddMemReg(placed(region, offset), Handle::Window)
}

/// A region that goes, from `offset` of the window.
pub(crate) fn removed_region(region: &MemoryRegion, offset: WindowOffset) -> FrontEndRequest<Handle> {
    FrontEndRequest::RemMemReg(placed(region, offset))
}

fn placed(region: &MemoryRegion, offset: WindowOffset) -> MemoryRegion {
    MemoryRegion { mmap_offset: FileOffset(offset.0), ..*region }
}

/// A dirty log that starts at `offset` of the window.
pub(crate) fn log(area: &LogArea, offset: WindowOffset) -> FrontEndRequest<Handle> {
    FrontEndRequest::SetLogBase(LogArea { mmap_offset: FileOffset(offset.0), ..*area }, Handle::Window)
}

/// The eventfd for log updates.
pub(crate) fn log_signal(peer: PeerId) -> FrontEndRequest<Handle> {
    FrontEndRequest::SetLogFd(Handle::Peer(peer))
}

/// An inflight buffer that starts at `offset` of the window.
pub(crate) fn inflight(inflight: &Inflight, offset: WindowOffset) -> FrontEndRequest<Handle> {
    FrontEndRequest::SetInflightFd(Inflight { mmap_offset: FileOffset(offset.0), ..*inflight }, Handle::Window)
}

/// The connection for requests of the back-end.
pub(crate) fn back_channel() -> FrontEndRequest<Handle> {
    FrontEndRequest::SetBackendReqFd(Handle::BackChannel)
}

/// The stream for the state of the device.
pub(crate) fn state_stream(transfer: DeviceStateTransfer) -> FrontEndRequest<Handle> {
    FrontEndRequest::SetDeviceStateFd(transfer, Handle::Stream)
}

/// The same eventfd message with a handle, if it has a descriptor.
pub(crate) fn vring_file<F>(file: &VringFile<F>, handle: Handle) -> VringFile<Handle> {
    VringFile { index: file.index, descriptor: file.descriptor.is_some().then_some(handle) }
}
