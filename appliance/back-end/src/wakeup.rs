//! An event by which one thread wakes the wait of another.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::EventfdFlags;

/// A non-blocking eventfd that no other process knows, so nobody can make a write to it block.
#[derive(Debug)]
pub struct Wakeup {
    eventfd: OwnedFd,
}

impl Wakeup {
    /// A new event that has not fired.
    ///
    /// # Errors
    /// If the process or the system has too many open files.
    pub fn new() -> rustix::io::Result<Self> {
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { eventfd })
    }

    /// Wakes the waiting thread, or its next wait.
    pub fn wake(&self) {
        // The one possible failure is a full counter, and then the event is pending already.
        let _full = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
    }

    /// Takes the event back; false if there is none.
    pub fn consume(&self) -> bool {
        rustix::io::read(&self.eventfd, &mut [0; 8]).is_ok()
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}
