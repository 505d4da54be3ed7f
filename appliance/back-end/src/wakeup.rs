//! An event by which one thread wakes the wait of another.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::EventfdFlags;

/// A non-blocking eventfd that no other process knows, so nobody can make a write to it block.
#[derive(Debug)]
pub struct Wakeup {
    eventfd: OwnedFd,
    /// For those who look rather than wait.
    fired: AtomicBool,
}

impl Wakeup {
    /// A new event that has not fired.
    ///
    /// # Errors
    /// If the process or the system has too many open files.
    pub fn new() -> rustix::io::Result<Self> {
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { eventfd, fired: AtomicBool::new(false) })
    }

    /// Wakes the waiting thread, or its next wait.
    pub fn wake(&self) {
        self.fired.store(true, Ordering::Release);
        // The one possible failure is a full counter, and then the event is pending already.
        let _full = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
    }

    /// Whether it has fired and was not taken back by [`Wakeup::consume`]; costs no system call. May be true after the event
    /// was taken back, if it fired just then.
    #[must_use]
    pub fn has_fired(&self) -> bool {
        self.fired.load(Ordering::Acquire)
    }

    /// Takes the event back; false if there is none.
    pub fn consume(&self) -> bool {
        // First: who wakes in between leaves the mark, and one look too many.
        self.fired.store(false, Ordering::Release);
        rustix::io::read(&self.eventfd, &mut [0; 8]).is_ok()
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}
