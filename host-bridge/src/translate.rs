//! The one place where a file descriptor of the front-end becomes a handle.
//!
//! Only requests whose descriptors have a meaning in the appliance get through; all others are refused by name.

use std::os::fd::OwnedFd;

use vvu_protocol::address::{FileOffset, WindowOffset};
use vvu_protocol::control::Handle;
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{FrontEndRequest, VringFile};

/// A request that carries no descriptor, as it is. `None` if this bridge does not carry it.
pub(crate) fn without_descriptors(request: FrontEndRequest<OwnedFd>) -> Option<FrontEndRequest<Handle>> {
    use FrontEndRequest as R;
    Some(match request {
        R::GetFeatures => R::GetFeatures,
        R::SetFeatures(features) => R::SetFeatures(features),
        R::SetOwner => R::SetOwner,
        R::ResetOwner => R::ResetOwner,
        R::SetVringNum(state) => R::SetVringNum(state),
        R::SetVringAddr(addresses) => R::SetVringAddr(addresses),
        R::SetVringBase(state) => R::SetVringBase(state),
        R::GetVringBase(state) => R::GetVringBase(state),
        R::GetProtocolFeatures => R::GetProtocolFeatures,
        R::SetProtocolFeatures(features) => R::SetProtocolFeatures(features),
        R::GetQueueNum => R::GetQueueNum,
        R::SetVringEnable(state) => R::SetVringEnable(state),
        R::SendRarp(mac) => R::SendRarp(mac),
        R::NetSetMtu(mtu) => R::NetSetMtu(mtu),
        R::GetConfig(config) => R::GetConfig(config),
        R::SetConfig(config) => R::SetConfig(config),
        R::ResetDevice => R::ResetDevice,
        R::SetStatus(status) => R::SetStatus(status),
        R::GetStatus => R::GetStatus,
        _ => return None,
    })
}

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
