//! Descriptors to pass, and what they refer to.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vvu_protocol::message::RawMessage;

/// What a descriptor refers to. Equal for a descriptor and its copy that came over a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Identity {
    /// An eventfd, by the kernel's number for it.
    Event(String),
    /// Anything else, by device and inode.
    File(u64, u64),
}

/// What `descriptor` refers to.
pub(crate) fn identity(descriptor: RawFd) -> Identity {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")).unwrap();
    if let Some(id) = info.lines().find_map(|line| line.strip_prefix("eventfd-id:")) {
        return Identity::Event(id.trim().to_owned());
    }
    let metadata = fs::metadata(format!("/proc/self/fd/{descriptor}")).unwrap();
    Identity::File(metadata.dev(), metadata.ino())
}

/// The message with what its descriptors refer to in their place.
pub(crate) fn identified<F: AsRawFd>(message: &RawMessage<F>) -> RawMessage<Identity> {
    let descriptors = message.descriptors.iter().map(|descriptor| identity(descriptor.as_raw_fd())).collect();
    RawMessage { header: message.header, payload: message.payload.clone(), descriptors }
}

/// A new file in memory.
pub(crate) fn memfd() -> Arc<OwnedFd> {
    Arc::new(rustix::fs::memfd_create("pair", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
}

/// A new eventfd.
pub(crate) fn eventfd() -> Arc<OwnedFd> {
    Arc::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap())
}

#[test]
fn copies_are_the_same_and_others_are_not() {
    for new in [memfd as fn() -> Arc<OwnedFd>, eventfd] {
        let (one, other) = (new(), new());
        let copy = one.try_clone().unwrap();
        assert_eq!(identity(one.as_raw_fd()), identity(copy.as_raw_fd()));
        assert_ne!(identity(one.as_raw_fd()), identity(other.as_raw_fd()));
    }
}
