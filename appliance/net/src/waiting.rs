//! Where the thread of a queue waits: for the driver's kick, for the control thread, and for signals under way.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use vvu_back_end::wakeup::Wakeup;
use vvu_back_end::{Ring, Service};

use crate::bell::Bell;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Waiting {
    /// None after it has turned out to be no event.
    kick: Option<Arc<OwnedFd>>,
    wakeup: Arc<Wakeup>,
}

/// What has happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Events {
    /// The driver has kicked.
    pub(crate) kicked: bool,
    /// There is something to follow.
    pub(crate) woken: bool,
}

impl Waiting {
    pub(crate) fn new(service: &Service<'_>) -> Self {
        Self { kick: Some(Arc::clone(service.kick())), wakeup: Arc::clone(service.wakeup()) }
    }

    /// Takes over what the control thread has changed; a new kick is waited for from now on. True if the driver is to be signalled.
    pub(crate) fn follow(&mut self, service: &Service<'_>, ring: Option<&mut Ring>) -> bool {
        let changes = service.update(ring);
        if changes.kick.is_some() {
            self.kick = changes.kick;
        }
        changes.signal
    }

    /// Waits until something happens, or for as long as is said.
    pub(crate) fn wait(&mut self, bell: &mut Bell, limit: Option<Duration>) -> Events {
        let limit = limit.map(|limit| Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 }));
        // What there is not is replaced by the wakeup.
        let (wakeup, progress) = (self.wakeup.as_fd(), bell.progress());
        let kick = self.kick.as_ref().map_or(wakeup, |kick| kick.as_fd());
        let watched = [wakeup, kick, progress.unwrap_or(wakeup)];
        let mut polled = watched.map(|descriptor| PollFd::from_borrowed_fd(descriptor, PollFlags::IN));
        // An interruption is a look at what there is.
        let is_known = poll(&mut polled, limit.as_ref()).is_ok();
        let [woken, kicked, progressed] = polled.map(|polled| !is_known || !polled.revents().is_empty());
        if progressed {
            bell.proceed();
        }
        let woken = (woken || self.wakeup.has_fired()) && self.wakeup.consume();
        Events { kicked: kicked && self.take_kick(), woken }
    }

    /// Whether [`Waiting::wait`] would find something but a kick right now. Makes no system call.
    pub(crate) fn has_events(&self, bell: &mut Bell) -> bool {
        self.wakeup.has_fired() || bell.has_progress()
    }

    /// Takes the kick without waiting, whatever its flags are.
    fn take_kick(&mut self) -> bool {
        let Some(kick) = &self.kick else { return false };
        let mut count = [0; 8];
        // An offset of -1 stands for the file's own position, which an eventfd does not have.
        match preadv2(kick, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT) {
            Ok(_) => true,
            Err(Errno::AGAIN | Errno::INTR) => false,
            Err(error) => {
                tracing::warn!(%error, "kick cannot be read; the ring is not looked at until there is another");
                self.kick = None;
                false
            }
        }
    }
}
