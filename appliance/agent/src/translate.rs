//! The one place where a handle of the bridge becomes a file descriptor for the back-end.
//!
//! Only requests whose descriptors have a meaning here get through; all others are refused by name, and the bridge hears of
//! it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vvu_protocol::carriage::{self, Carriage};
use vvu_protocol::control::Handle;
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{FrontEndRequest, VringFile};

use crate::doorbell::{Doorbell, DoorbellError};
use crate::regions::{RegionError, mappable_regions};
use crate::window::Window;

/// A file descriptor for the back-end. The same one may be sent several times.
pub type Descriptor = Arc<OwnedFd>;

/// Why a request does not reach the back-end.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The agent does not carry this request.
    #[error("request is not carried into the appliance: {reason}")]
    NotCarried {
        /// Why not.
        reason: &'static str,
    },
    /// A handle of another kind belongs to this request.
    #[error("request came with the handle {found:?}, expected {expected}")]
    Handle {
        /// Kind that belongs to it.
        expected: &'static str,
        /// Handle that came.
        found: Handle,
    },
    /// The memory table cannot be mapped.
    #[error(transparent)]
    Regions(#[from] RegionError),
    /// There is no eventfd for a handle.
    #[error(transparent)]
    Doorbell(#[from] DoorbellError),
}

/// The same request, for the back-end.
///
/// # Errors
/// [`Refusal`].
pub fn translate(
    request: FrontEndRequest<Handle>,
    window: &Window,
    doorbell: &mut impl Doorbell,
) -> Result<FrontEndRequest<Descriptor>, Refusal> {
    use FrontEndRequest as R;
    Ok(match request {
        R::SetMemTable(table) => R::SetMemTable(memory_table(table, window)?),
        R::SetVringKick(file) => R::SetVringKick(vring_file(file, |handle| vector(handle, doorbell))?),
        R::SetVringCall(file) => R::SetVringCall(vring_file(file, |handle| peer(handle, doorbell))?),
        R::SetVringErr(file) => R::SetVringErr(vring_file(file, |handle| peer(handle, doorbell))?),
        other => match carriage::front_end(other.code()) {
            Carriage::Refused(reason) => return Err(Refusal::NotCarried { reason }),
            _ => other.without_descriptors().ok_or(Refusal::NotCarried { reason: "it has descriptors" })?,
        },
    })
}

/// Regions that the back-end can map, each with the window's node.
fn memory_table(
    table: Vec<(MemoryRegion, Handle)>,
    window: &Window,
) -> Result<Vec<(MemoryRegion, Descriptor)>, Refusal> {
    let other = table.iter().map(|(_, handle)| *handle).find(|handle| *handle != Handle::Window);
    if let Some(found) = other {
        return Err(Refusal::Handle { expected: "window", found });
    }
    let regions = table.into_iter().map(|(region, _)| region).collect::<Vec<_>>();
    let regions = mappable_regions(&regions, window.len)?;
    Ok(regions.into_iter().map(|region| (region, Arc::clone(&window.file))).collect())
}

fn vring_file(
    file: VringFile<Handle>,
    translate: impl FnOnce(Handle) -> Result<Descriptor, Refusal>,
) -> Result<VringFile<Descriptor>, Refusal> {
    Ok(VringFile { index: file.index, descriptor: file.descriptor.map(translate).transpose()? })
}

fn vector(handle: Handle, doorbell: &impl Doorbell) -> Result<Descriptor, Refusal> {
    match handle {
        Handle::Vector(vector) => Ok(doorbell.vector(vector)?),
        found => Err(Refusal::Handle { expected: "vector", found }),
    }
}

fn peer(handle: Handle, doorbell: &mut impl Doorbell) -> Result<Descriptor, Refusal> {
    match handle {
        Handle::Peer(peer) => Ok(doorbell.peer(peer)?),
        found => Err(Refusal::Handle { expected: "peer", found }),
    }
}
