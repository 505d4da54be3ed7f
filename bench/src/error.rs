//! What can go wrong, and whose fault it is.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rustix::io::Errno;
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::volatile_memory;

/// See the module's text.
#[derive(Debug, Error)]
pub enum Error {
    /// Nobody listens there.
    #[error("cannot connect to {}: is a vhost-user back-end listening there?", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The back-end refused a message, or went away.
    #[error("the back-end did not accept {request}")]
    Message {
        /// Name of the message.
        request: &'static str,
        /// What the connection says.
        source: vhost::Error,
    },
    /// The back-end does not offer what a load cannot do without.
    #[error("the back-end does not offer {0}")]
    NotOffered(&'static str),
    /// The system refused something.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system says.
        source: Errno,
    },
    /// A file cannot be opened.
    #[error("cannot open {}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file became shorter.
    #[error("the file ended before a block")]
    Short,
    /// Driver memory cannot be had.
    #[error("cannot map {len} bytes of memory for driver and device")]
    Map {
        /// In bytes.
        len: usize,
        /// What the system says.
        source: MmapRegionError,
    },
    /// A place outside of driver memory: our own mistake.
    #[error("a place outside of the memory of driver and device")]
    Place(#[from] volatile_memory::Error),
    /// The disk has no room for the load.
    #[error("the disk has {capacity} bytes, but the load needs {needed}: serve a larger image")]
    TooSmall {
        /// Of the disk, in bytes.
        capacity: u64,
        /// In bytes.
        needed: u64,
    },
    /// A request failed (virtio 1.3, section 5.2.6: 1 is IOERR, 2 UNSUPP).
    #[error("the device ended a request with status {0}")]
    Status(u8),
    /// The device gave back what it did not have.
    #[error("the device gave back descriptor {0}, which it did not have")]
    NotUnderWay(u32),
    /// The device does not go on.
    #[error("the device ended no request for {0:?}")]
    Silent(Duration),
    /// A thread of the load panicked: our own mistake.
    #[error("a thread of the load panicked")]
    Panicked,
    /// Something that a person asked for makes no sense.
    #[error("{0}")]
    Usage(String),
}
