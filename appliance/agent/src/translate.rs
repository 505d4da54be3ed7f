//! The one place where a handle of the bridge becomes a file descriptor for the back-end.
//!
//! Only requests whose descriptors have a meaning here get through; all others are refused by name, and the bridge hears of
//! it. Some descriptors have another end, which stays here: [`OurEnd`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::pipe::{PipeFlags, pipe_with};
use vvu_protocol::address::{FileOffset, WindowOffset};
use vvu_protocol::carriage::{self, Carriage};
use vvu_protocol::control::Handle;
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{DeviceStateTransfer, FrontEndRequest, Inflight, LogArea, StateDirection, VringFile};
use vvu_protocol::window::{ALIGNMENT, INFLIGHT_LEN, INFLIGHT_OFFSET, LOG_LEN, LOG_OFFSET};

use crate::doorbell::{Doorbell, DoorbellError};
use crate::memory_map::Step;
use crate::regions::Extent;
use crate::window::{Backing, NotBacked, Window};

/// A file descriptor for the back-end. The same one may be sent several times.
pub type Descriptor = Arc<OwnedFd>;

/// Why handles cannot be turned into descriptors.
#[derive(Debug, thiserror::Error)]
pub enum TranslateError {
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
    /// A log or inflight buffer that cannot be mapped: outside its area, or not at the start of a unit.
    #[error(
        "{len:#x} bytes at window offset {start}, expected a multiple of 2 MiB in the {area:#x} bytes from {area_start}"
    )]
    Place {
        /// Where it starts.
        start: WindowOffset,
        /// Its length in bytes.
        len: u64,
        /// Where its area starts.
        area_start: WindowOffset,
        /// Length of its area in bytes.
        area: u64,
    },
    /// Nothing is there.
    #[error(transparent)]
    NotBacked(#[from] NotBacked),
    /// There is no eventfd for a handle.
    #[error(transparent)]
    Doorbell(#[from] DoorbellError),
    /// No pipe or socket could be made.
    #[error("pipe or socket for the back-end")]
    Io(#[from] io::Error),
}

/// The end of a descriptor for the back-end that stays here.
#[derive(Debug)]
pub enum OurEnd {
    /// Requests of the back-end come from it (SET_BACKEND_REQ_FD).
    BackChannel(UnixStream),
    /// The state of the device is read from it or written to it (SET_DEVICE_STATE_FD).
    State(StateDirection, OwnedFd),
}

/// A request for the back-end.
#[derive(Debug)]
pub struct Translation {
    /// The request.
    pub request: FrontEndRequest<Descriptor>,
    /// What stays here.
    pub ours: Option<OurEnd>,
}

/// The same request, for the back-end. Not for requests about memory: those are not carried as they are
/// ([`memory_request`]).
///
/// # Errors
/// [`TranslateError`].
pub fn translate(
    request: FrontEndRequest<Handle>,
    window: &impl Window,
    doorbell: &mut impl Doorbell,
) -> Result<Translation, TranslateError> {
    use FrontEndRequest as R;
    let request = match request {
        R::SetVringKick(file) => R::SetVringKick(vring_file(file, |handle| vector(handle, doorbell))?),
        R::SetVringCall(file) => R::SetVringCall(vring_file(file, |handle| peer(handle, doorbell))?),
        R::SetVringErr(file) => R::SetVringErr(vring_file(file, |handle| peer(handle, doorbell))?),
        R::SetLogBase(area, handle) => log(area, handle, window)?,
        R::SetLogFd(handle) => R::SetLogFd(peer(handle, doorbell)?),
        R::SetInflightFd(buffer, handle) => inflight(buffer, handle, window)?,
        R::SetBackendReqFd(handle) => return back_channel(handle),
        R::SetDeviceStateFd(transfer, handle) => return device_state(transfer, handle),
        other => match carriage::front_end(other.code()) {
            Carriage::Refused(reason) => return Err(TranslateError::NotCarried { reason }),
            Carriage::Answered => return Err(TranslateError::NotCarried { reason: "the bridge answers it" }),
            _ => other.without_descriptors().ok_or(TranslateError::NotCarried { reason: "it has descriptors" })?,
        },
    };
    Ok(Translation { request, ours: None })
}

/// The request that is a step of a change of memory.
///
/// # Errors
/// [`TranslateError::NotBacked`].
pub fn memory_request(step: &Step, window: &impl Window) -> Result<FrontEndRequest<Descriptor>, TranslateError> {
    let backed = |extent: &Extent| -> Result<(MemoryRegion, Descriptor), TranslateError> {
        let region = extent.region();
        let Backing { file, offset, len } = window.backing(WindowOffset(region.mmap_offset.0), region.size)?;
        Ok((MemoryRegion { size: len, mmap_offset: offset, ..region }, file))
    };
    Ok(match step {
        Step::Table(extents) => FrontEndRequest::SetMemTable(extents.iter().map(backed).collect::<Result<_, _>>()?),
        Step::Add(extent) => {
            let (region, file) = backed(extent)?;
            FrontEndRequest::AddMemReg(region, file)
        }
        Step::Remove(extent) => FrontEndRequest::RemMemReg(backed(extent)?.0),
    })
}

/// A region of the front-end, if it is in the window.
///
/// # Errors
/// [`TranslateError::Handle`].
pub fn memory_region((region, handle): (MemoryRegion, Handle)) -> Result<MemoryRegion, TranslateError> {
    match handle {
        Handle::Window => Ok(region),
        found => Err(TranslateError::Handle { expected: "window", found }),
    }
}

/// A descriptor for the state of the device that the back-end prefers to the one it was given. It is opened anew, so that
/// nobody else can change how it behaves.
///
/// # Errors
/// If it is no pipe.
pub fn pipe_of_back_end(theirs: &OwnedFd, direction: StateDirection) -> io::Result<OwnedFd> {
    if FileType::from_raw_mode(fstat(theirs)?.st_mode) != FileType::Fifo {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "expected a pipe"));
    }
    let mode = match direction {
        StateDirection::Save => OFlags::RDONLY,
        StateDirection::Load => OFlags::WRONLY,
    };
    let path = format!("/proc/self/fd/{}", theirs.as_fd().as_raw_fd());
    Ok(open(path, mode | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
}

/// A back-end maps the whole log, and some insist on the length they were told: so it is told whole units. The log gets longer
/// by bits that stand for no page of driver memory.
fn log(area: LogArea, handle: Handle, window: &impl Window) -> Result<FrontEndRequest<Descriptor>, TranslateError> {
    let (start, len) = units(area.mmap_offset, area.size, LOG_OFFSET, LOG_LEN)?;
    let Backing { file, offset, len } = in_window(handle, window)?.backing(start, len)?;
    Ok(FrontEndRequest::SetLogBase(LogArea { size: len, mmap_offset: offset }, file))
}

fn inflight(
    buffer: Inflight,
    handle: Handle,
    window: &impl Window,
) -> Result<FrontEndRequest<Descriptor>, TranslateError> {
    let (start, len) = units(buffer.mmap_offset, buffer.mmap_size, INFLIGHT_OFFSET, INFLIGHT_LEN)?;
    let Backing { file, offset, len } = in_window(handle, window)?.backing(start, len)?;
    Ok(FrontEndRequest::SetInflightFd(Inflight { mmap_size: len, mmap_offset: offset, ..buffer }, file))
}

/// Where in the window, and in whole units, lies what is to be in an area of it.
fn units(
    start: FileOffset,
    len: u64,
    area_start: WindowOffset,
    area: u64,
) -> Result<(WindowOffset, u64), TranslateError> {
    let start = WindowOffset(start.0);
    let error = TranslateError::Place { start, len, area_start, area };
    let rounded = len.checked_next_multiple_of(ALIGNMENT).filter(|len| *len > 0);
    let end = rounded.and_then(|len| start.checked_add(len));
    let inside = start >= area_start && end.is_some_and(|end| end.0 <= area_start.0.saturating_add(area));
    match rounded {
        Some(len) if inside && start.0.is_multiple_of(ALIGNMENT) => Ok((start, len)),
        _ => Err(error),
    }
}

fn back_channel(handle: Handle) -> Result<Translation, TranslateError> {
    if handle != Handle::BackChannel {
        return Err(TranslateError::Handle { expected: "back channel", found: handle });
    }
    let (ours, theirs) = UnixStream::pair()?;
    let request = FrontEndRequest::SetBackendReqFd(Arc::new(theirs.into()));
    Ok(Translation { request, ours: Some(OurEnd::BackChannel(ours)) })
}

fn device_state(transfer: DeviceStateTransfer, handle: Handle) -> Result<Translation, TranslateError> {
    if handle != Handle::Stream {
        return Err(TranslateError::Handle { expected: "stream", found: handle });
    }
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from)?;
    let (ours, theirs) = match transfer.direction {
        StateDirection::Save => (reader, writer),
        StateDirection::Load => (writer, reader),
    };
    let request = FrontEndRequest::SetDeviceStateFd(transfer, Arc::new(theirs));
    Ok(Translation { request, ours: Some(OurEnd::State(transfer.direction, ours)) })
}

fn in_window<W: Window>(handle: Handle, window: &W) -> Result<&W, TranslateError> {
    match handle {
        Handle::Window => Ok(window),
        found => Err(TranslateError::Handle { expected: "window", found }),
    }
}

fn vring_file(
    file: VringFile<Handle>,
    translate: impl FnOnce(Handle) -> Result<Descriptor, TranslateError>,
) -> Result<VringFile<Descriptor>, TranslateError> {
    Ok(VringFile { index: file.index, descriptor: file.descriptor.map(translate).transpose()? })
}

fn vector(handle: Handle, doorbell: &mut impl Doorbell) -> Result<Descriptor, TranslateError> {
    match handle {
        Handle::Vector(vector) => Ok(doorbell.vector(vector)?),
        found => Err(TranslateError::Handle { expected: "vector", found }),
    }
}

fn peer(handle: Handle, doorbell: &mut impl Doorbell) -> Result<Descriptor, TranslateError> {
    match handle {
        Handle::Peer(peer) => Ok(doorbell.peer(peer)?),
        found => Err(TranslateError::Handle { expected: "peer", found }),
    }
}
