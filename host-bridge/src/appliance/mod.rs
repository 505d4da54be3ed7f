//! The device set, from the side of the bridge: three sockets to the appliance's VMM.
//!
//! Two of them speak vhost-user with the bridge as the back-end of QEMU's generic device ([`device`]): the control device
//! ([`control`]) and the window device ([`window`]). The third speaks ivshmem ([`doorbell`]). Each is one task that owns
//! its socket; a port is how the rest of the bridge talks to it.

pub mod control;
pub mod device;
pub mod doorbell;
mod memory;
mod queue;
pub mod window;

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::fstat;
use vvu_protocol::DecodeError;
use vvu_protocol::memory::MemoryError;
use vvu_protocol::window::FileId;
use vvu_socket::SocketError;
use vvu_socket::event::EventError;

/// What ends an appliance: its VMM broke the protocol, or went away.
#[derive(Debug, thiserror::Error)]
pub enum ApplianceError {
    /// The VMM closed a socket.
    #[error("the appliance's VMM closed the {device} device's socket")]
    Gone {
        /// Which device.
        device: &'static str,
    },
    /// A socket failed.
    #[error("{device} device of the appliance")]
    Socket {
        /// Which device.
        device: &'static str,
        /// What happened.
        source: SocketError,
    },
    /// A message of the VMM could not be decoded.
    #[error("{device} device of the appliance")]
    Decode {
        /// Which device.
        device: &'static str,
        /// What was wrong.
        source: DecodeError,
    },
    /// A request that the generic device does not send.
    #[error("{device} device of the appliance: request {request} is not expected here")]
    Request {
        /// Which device.
        device: &'static str,
        /// Its name.
        request: &'static str,
    },
    /// A request without which another makes no sense, or with a value out of range.
    #[error("{device} device of the appliance: vring {index}: {problem}")]
    Vring {
        /// Which device.
        device: &'static str,
        /// Index that came.
        index: u32,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A vring's descriptor is no eventfd.
    #[error("{device} device of the appliance")]
    Event {
        /// Which device.
        device: &'static str,
        /// What was wrong.
        source: EventError,
    },
    /// The appliance's memory table breaks a rule.
    #[error("memory of the appliance")]
    Memory(#[from] MemoryError),
    /// The appliance's memory could not be mapped.
    #[error("memory of the appliance: {problem}")]
    Map {
        /// What is wrong with it.
        problem: String,
    },
    /// The agent's queues are broken.
    #[error("control device's queue {queue}: {problem}")]
    Queue {
        /// Which queue.
        queue: u16,
        /// What is wrong with it.
        problem: String,
    },
    /// The VMM refused a mapping.
    #[error("the appliance's VMM refused {operation} of {len:#x} bytes at window offset {offset:#x} (answer {answer})")]
    Refused {
        /// SHMEM_MAP or SHMEM_UNMAP.
        operation: &'static str,
        /// Length in bytes.
        len: u64,
        /// Window offset.
        offset: u64,
        /// The VMM's answer.
        answer: u64,
    },
    /// The appliance was reset or its VMM stopped the device.
    #[error("the appliance was reset")]
    Reset,
    /// The appliance did not answer in time.
    #[error("the appliance did not answer {what} within {seconds} s")]
    Timeout {
        /// What was asked.
        what: &'static str,
        /// How long was waited.
        seconds: u64,
    },
    /// A system call failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What happened.
        source: io::Error,
    },
}

/// Identity of a memory file, and its length in bytes.
pub(crate) fn file_identity(file: &OwnedFd) -> Result<(FileId, u64), ApplianceError> {
    let what = "status of a memory file";
    let status = fstat(file).map_err(|errno| ApplianceError::Io { what, source: errno.into() })?;
    let id = FileId { device: status.st_dev, inode: status.st_ino };
    Ok((id, u64::try_from(status.st_size).unwrap_or(0)))
}
