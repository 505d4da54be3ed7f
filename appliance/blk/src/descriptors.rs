//! File descriptors that are known by number only.

#![expect(unsafe_code, reason = "a number becomes an owned descriptor; each block says why it is ours")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use rustix::event::EventfdFlags;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

/// Takes over a descriptor that the parent process left open for us (`--fd`). To be called once, before anything else
/// opens descriptors.
///
/// # Errors
/// The number is no open descriptor, or one of the standard streams.
pub(crate) fn inherit(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "descriptors 0 to 2 are the standard streams"));
    }
    // SAFETY: only looked at; fcntl refuses a number that is not open.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, the parent passed it for this purpose, and nothing in this process uses it yet.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// The event that ends one thread of `vhost-user-backend`.
#[derive(Debug)]
pub(crate) struct ExitEvent {
    eventfd: OwnedFd,
}

impl ExitEvent {
    pub(crate) fn new() -> io::Result<Self> {
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { eventfd })
    }

    /// Both ends for the crate. It takes the number out of the consumer and never closes it; were it given a descriptor
    /// of its own, each connection would leak one. So it gets ours, which must outlive the daemon.
    pub(crate) fn lend(&self) -> io::Result<(EventConsumer, EventNotifier)> {
        let notifier = self.eventfd.try_clone()?;
        // SAFETY: the consumer does not own the descriptor: `VringEpollHandler::new` turns it back into the bare number
        // before anything else, and `self` closes it.
        let consumer = unsafe { EventConsumer::from_raw_fd(self.eventfd.as_raw_fd()) };
        // SAFETY: the duplicate is owned by nobody else.
        let notifier = unsafe { EventNotifier::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(notifier)) };
        Ok((consumer, notifier))
    }
}
