//! The engine's events: those that it watches, and the peer's that it signals.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use io_uring::opcode;
use io_uring::types::{CancelBuilder, Fd};

use super::{Completion, Engine, EngineError, ONE, TAG_CALL, TAG_ERROR, TAG_KICK, TAG_UNTRACKED, TAG_WAKEUP};

/// An event that the engine watches: a poll of its eventfd is always pending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watch {
    /// The driver's notification.
    Kick,
    /// Our own, from other threads.
    Wakeup,
}

/// A peer's eventfd that the engine writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// Used buffers.
    Call,
    /// The ring is broken.
    Error,
}

/// A watched event.
#[derive(Default)]
pub(super) struct Watched {
    pub(super) file: Option<Arc<dyn AsFd + Send + Sync>>,
    /// File to watch instead, once the pending read has been cancelled.
    replacement: Option<Arc<dyn AsFd + Send + Sync>>,
    pub(super) pending: bool,
}

/// A signalled event.
#[derive(Default)]
pub(super) struct Signalled {
    /// File of the write that is pending.
    pub(super) pending: Option<Arc<OwnedFd>>,
    /// Signal once more when it is written: it may have been read before the reason for the new signal existed.
    pub(super) again: Option<Arc<OwnedFd>>,
}

impl Engine {
    /// Watches an event; one that is watched already is replaced.
    pub(crate) fn watch(&mut self, watch: Watch, file: Arc<dyn AsFd + Send + Sync>) -> Result<(), EngineError> {
        let watched = self.watched(watch);
        if watched.pending {
            watched.replacement = Some(file);
            let cancel = opcode::AsyncCancel2::new(CancelBuilder::user_data(tag_of(watch))).build();
            return self.push_untracked(cancel.user_data(TAG_UNTRACKED));
        }
        watched.file = Some(file);
        self.start_watch(watch)
    }

    fn watched(&mut self, watch: Watch) -> &mut Watched {
        match watch {
            Watch::Kick => &mut self.kick,
            Watch::Wakeup => &mut self.wakeup,
        }
    }

    /// Polls the eventfd until it is cancelled. Each write to it wakes the poll, however much it has counted; several writes
    /// may be told of as one event.
    fn start_watch(&mut self, watch: Watch) -> Result<(), EngineError> {
        let watched = self.watched(watch);
        let Some(file) = &watched.file else { return Ok(()) };
        let fd = Fd(raw_fd(file.as_ref()));
        watched.pending = true;
        let readable = u32::from(libc::POLLIN.cast_unsigned());
        self.push(opcode::PollAdd::new(fd, readable).multi(true).build().user_data(tag_of(watch)))
    }

    /// An event has fired and is watched further.
    pub(super) fn note_event(&self, tag: u64) -> Option<Completion> {
        let watch = [Watch::Kick, Watch::Wakeup].into_iter().find(|watch| tag_of(*watch) == tag)?;
        (!self.closing).then_some(Completion::Event(watch))
    }

    /// Adds one to a peer's eventfd.
    pub(crate) fn signal(&mut self, signal: Signal, file: Arc<OwnedFd>) -> Result<(), EngineError> {
        let (signalled, tag) = match signal {
            Signal::Call => (&mut self.call, TAG_CALL),
            Signal::Error => (&mut self.error, TAG_ERROR),
        };
        if signalled.pending.is_some() {
            signalled.again = Some(file);
            return Ok(());
        }
        let write = opcode::Write::new(Fd(file.as_raw_fd()), (&raw const ONE).cast(), 8).build();
        signalled.pending = Some(file);
        self.push(write.user_data(tag))
    }

    pub(super) fn finish_watch(&mut self, watch: Watch, result: i32) -> Result<Option<Completion>, EngineError> {
        let closing = self.closing;
        let watched = self.watched(watch);
        watched.pending = false;
        if closing {
            watched.file = None;
            return Ok(None);
        }
        let replaced = watched.replacement.take();
        // What ends without an error has told of an event, and had no room to tell that it goes on.
        if replaced.is_none() && result < 0 && result != -libc::EINTR {
            watched.file = None;
            return Ok(Some(Completion::WatchFailed(watch, io::Error::from_raw_os_error(-result))));
        }
        if replaced.is_some() {
            watched.file = replaced;
        }
        self.start_watch(watch)?;
        Ok(Some(Completion::Event(watch)))
    }

    pub(super) fn finish_signal(&mut self, signal: Signal) -> Result<Option<Completion>, EngineError> {
        let signalled = match signal {
            Signal::Call => &mut self.call,
            Signal::Error => &mut self.error,
        };
        // A full counter (EAGAIN) is a signal that is pending anyway; any other failure is the peer's own loss.
        signalled.pending = None;
        if let Some(file) = signalled.again.take() {
            self.signal(signal, file)?;
        }
        Ok(None)
    }
}

fn raw_fd(file: &(dyn AsFd + Send + Sync)) -> RawFd {
    file.as_fd().as_raw_fd()
}

fn tag_of(watch: Watch) -> u64 {
    match watch {
        Watch::Kick => TAG_KICK,
        Watch::Wakeup => TAG_WAKEUP,
    }
}
