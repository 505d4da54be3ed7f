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
        // The one possible failure is a full counter, and then the event is pending already.
        let _full = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
        // Last: who sees the mark and takes it away finds the event.
        self.fired.store(true, Ordering::SeqCst);
    }

    /// Whether it has fired and was not taken back by [`Wakeup::consume`]; costs no system call. Who sees that is to
    /// call [`Wakeup::consume`], which may find the event gone: somebody who waits has been faster.
    #[must_use]
    pub fn has_fired(&self) -> bool {
        self.fired.load(Ordering::Acquire)
    }

    /// Takes the event back; false if there is none.
    pub fn consume(&self) -> bool {
        // First: who wakes in between leaves the mark, and one look too many.
        self.fired.store(false, Ordering::SeqCst);
        rustix::io::read(&self.eventfd, &mut [0; 8]).is_ok()
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}
