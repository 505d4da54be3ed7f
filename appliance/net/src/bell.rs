//! Signals drivers, without ever waiting for one of them.
//!
//! Their eventfds belong to front-ends, who may make any write to them block. So they are written through an io_uring, one
//! write at a time for each ring: what blocks there blocks nothing else, and takes one place.
//!
//! # Safety
//! The kernel reads the eight bytes of a write until its completion has come: they are a constant. It looks a descriptor up by
//! its number when the write is submitted, which may be later than it was queued: the file stays open in `pending` until the
//! completion.

#![expect(
    unsafe_code,
    reason = "operations are handed to the kernel by address; the module's text says why that is sound"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};

/// Writes that can be under way; a driver whose front-end lets its writes block occupies one of them.
const ENTRIES: u32 = 256;

/// How long the last signals may take when a thread ends.
const LAST_SIGNAL_LIMIT: Timespec = Timespec::new().sec(1);

/// What is added to the count of an eventfd.
static ONE: u64 = 1;

/// Which ring is signalled. The thread that has the bell gives the numbers.
pub(crate) type Target = u32;

/// A write that has not been completed.
struct Pending {
    target: Target,
    _file: Arc<OwnedFd>,
    /// To be written next: the pending write may have taken effect before there was a reason for this one.
    again: Option<Arc<OwnedFd>>,
}

/// See the module's text.
pub(crate) struct Bell {
    ring: IoUring,
    /// Few: a write that does not block is completed when it is submitted.
    pending: Vec<Pending>,
}

impl Bell {
    /// For one thread.
    ///
    /// # Errors
    /// If there is no io_uring to be had.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { ring: IoUring::builder().dontfork().build(ENTRIES)?, pending: Vec::new() })
    }

    /// Signals the driver of a ring.
    pub(crate) fn signal(&mut self, target: Target, event: Arc<OwnedFd>) {
        self.proceed();
        match self.pending.iter_mut().find(|pending| pending.target == target) {
            Some(pending) => pending.again = Some(event),
            None => self.write(target, event),
        }
    }

    /// Readable when [`Bell::proceed`] has something to do; None if nothing is under way.
    pub(crate) fn progress(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the ring's descriptor is open as long as the ring, and so is the borrow of it.
        (!self.pending.is_empty()).then(|| unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) })
    }

    /// Whether [`Bell::proceed`] has something to do at this moment.
    pub(crate) fn has_progress(&mut self) -> bool {
        !self.pending.is_empty() && !self.ring.completion().is_empty()
    }

    /// Takes note of what was written.
    pub(crate) fn proceed(&mut self) {
        while let Some(completion) = self.next_completion() {
            let target = Target::try_from(completion.user_data()).unwrap_or(Target::MAX);
            if completion.result() < 0 {
                let error = io::Error::from_raw_os_error(-completion.result());
                tracing::debug!(%error, "driver cannot be signalled");
            }
            let place = self.pending.iter().position(|pending| pending.target == target);
            if let Some(again) = place.and_then(|place| self.pending.swap_remove(place).again) {
                self.write(target, again);
            }
        }
    }

    fn next_completion(&mut self) -> Option<cqueue::Entry> {
        self.ring.completion().next()
    }

    fn write(&mut self, target: Target, event: Arc<OwnedFd>) {
        let descriptor = Fd(event.as_fd().as_raw_fd());
        let write = opcode::Write::new(descriptor, (&raw const ONE).cast(), 8).build().user_data(target.into());
        // SAFETY: the module's text says why the bytes and the descriptor outlive the operation.
        if unsafe { self.ring.submission().push(&write) }.is_err() {
            tracing::error!("no room to signal a driver");
            return;
        }
        self.pending.push(Pending { target, _file: event, again: None });
        // What is not submitted now is submitted with the next one.
        if let Err(error) = self.ring.submit() {
            tracing::debug!(%error, "io_uring refuses to work for now");
        }
    }

    /// Waits until the last signals have reached their eventfds, but not for long.
    pub(crate) fn finish(&mut self) {
        self.proceed();
        while !self.pending.is_empty() {
            let limit = SubmitArgs::new().timespec(&LAST_SIGNAL_LIMIT);
            if self.ring.submitter().submit_with_args(1, &limit).is_err() {
                return;
            }
            self.proceed();
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

    use super::*;

    fn count(event: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        rustix::io::read(event, &mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn a_driver_that_cannot_be_signalled_delays_no_other() {
        let blocking = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        rustix::io::write(&blocking, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let other = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
        let mut bell = Bell::new().unwrap();
        for _ in 0..1000 {
            bell.signal(0, Arc::clone(&blocking));
            bell.signal(1, Arc::clone(&other));
        }
        assert_eq!(count(&other), 1000);
        // When there is room again, it learns of the rest by two writes at the most.
        assert_eq!(count(&blocking), u64::MAX - 1);
        while let Some(progress) = bell.progress() {
            poll(&mut [PollFd::new(&progress, PollFlags::IN)], None).unwrap();
            bell.proceed();
        }
        assert_eq!(count(&blocking), 2);
    }

    #[test]
    fn the_last_signals_arrive_before_the_end() {
        let blocking = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let mut bell = Bell::new().unwrap();
        bell.signal(0, Arc::clone(&blocking));
        bell.finish();
        assert_eq!(count(&blocking), 1);
    }
}
