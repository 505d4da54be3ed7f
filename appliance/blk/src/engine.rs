//! One io_uring for one ring: the requests' I/O, the kick and the call go through it, so its thread waits in one place.
//!
//! # Theory of operation
//! A request is known by the head of its chain, and has at most one operation at the kernel. [`Engine::idle_transfer`] lets
//! the caller say which memory the operation of a head works on; [`Engine::transfer`] starts it; [`Engine::wait`] and
//! [`Engine::next_completion`] tell the outcome. A transfer that comes back short is continued here, so a completion is
//! all or an error.
//!
//! Kick and call eventfds belong to the peer, who may make any read or write of them block. Therefore calls are written
//! through the ring, one operation each, and kicks are not read at all: a poll that stays in force tells of each of them, and
//! what they have counted up to is nobody's concern.
//!
//! Operations are collected and go to the kernel together, in [`Engine::wait`] or [`Engine::submit`]. What has been
//! completed is found without a system call ([`Engine::has_events`]), so a thread can look at the driver's ring and at this one
//! in turn.
//!
//! What is read from an image in memory, or written to it, is copied while it is submitted. So not too much of it is submitted at
//! a time ([`Engine::has_enough`]): the driver is to go on with the first requests while the next ones are copied. And where
//! several long ones are to be copied, threads of the kernel take their part, as many as there are other CPUs.
//!
//! # Safety
//! The kernel reads and writes the memory of an operation until its completion has been taken from the ring. The engine
//! owns all of it (mapped driver memory by reference count, buffers by value, the list of pieces) in one [`Transfer`] per
//! head, and `busy` there is true from the submission to the completion: nothing changes or frees a busy transfer. An
//! engine that is dropped waits for its operations; one that cannot, leaks their memory.

#![expect(
    unsafe_code,
    reason = "operations are handed to the kernel by address; the module's text says who keeps them"
)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{CancelBuilder, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{Builder, IoUring, cqueue, opcode, squeue};

use self::copies::Copies;
pub(crate) use self::events::{Signal, Watch};
use self::events::{Signalled, Watched};
use self::registered::Registered;
use crate::aligned_buffer::AlignedBuffer;
use crate::image::Image;
use crate::transfer::{Direction, Transfer};

mod copies;
mod events;
mod registered;
#[cfg(test)]
mod tests;

/// Operations beside those of requests, with reserve: for each watched event one and a cancellation, two signals, and a last
/// cancellation.
const EXTRA_OPERATIONS: u32 = 16;

/// How long the last interrupts of a ring may take to be delivered when it stops.
const LAST_SIGNAL_LIMIT: Timespec = Timespec::new().sec(1);

/// Bytes of zeroes that are kept for writing; a longer write repeats them.
const ZEROES_LEN: usize = 64 * 1024;

/// The image's index among the ring's registered files. Those that it builds on follow.
const IMAGE: Fixed = Fixed(0);

/// Why the engine stopped working.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EngineError {
    #[error("io_uring cannot be set up; it needs Linux 5.19 with kernel.io_uring_disabled=0")]
    Setup(#[source] io::Error),
    #[error("io_uring refuses to work")]
    Enter(#[source] io::Error),
    #[error("io_uring has no room for an operation")]
    Full,
    #[error("head {head} has no idle transfer")]
    Busy { head: u16 },
}

/// What the kernel has finished.
#[derive(Debug)]
pub(crate) enum Completion {
    /// The operation of a request. `transferred` bytes were moved, all of them if there is no error.
    Request { head: u16, transferred: u64, result: Result<(), io::Error> },
    /// An event fired; it is watched further.
    Event(Watch),
    /// An event cannot be watched any more.
    WatchFailed(Watch, io::Error),
}

/// What is added to the count of an eventfd.
static ONE: u64 = 1;

/// How the kernel is asked for a ring.
pub(crate) type Setup = fn(&mut Builder);

/// The best one first. Completions are made in the system calls of the ring's thread and nowhere else if the kernel can do that
/// (Linux 6.1), else in any system call of it (5.19); in both cases a flag tells that there are some.
pub(crate) const SETUPS: [Setup; 2] = [
    |ring| {
        ring.setup_single_issuer().setup_defer_taskrun();
    },
    |ring| {
        ring.setup_coop_taskrun();
    },
];

/// See the module's text.
pub(crate) struct Engine {
    ring: IoUring,
    transfers: Vec<Transfer>,
    kick: Watched,
    wakeup: Watched,
    call: Signalled,
    error: Signalled,
    zeroes: AlignedBuffer,
    /// Operations whose completion has not been taken.
    pending: usize,
    /// No event is watched again.
    closing: bool,
    copies: Copies,
    registered: Registered,
    _images: Vec<Arc<Image>>,
}

impl Engine {
    /// Sets up an io_uring for the I/O of `queue_size` heads on the first of `images`; the others can only be read
    /// ([`Transfer::file`]). All further calls must come from this thread.
    pub(crate) fn new(images: Vec<Arc<Image>>, queue_size: u16, setup: Setup) -> Result<Self, EngineError> {
        let entries = (u32::from(queue_size) + EXTRA_OPERATIONS).next_power_of_two();
        let mut builder = IoUring::builder();
        setup(builder.dontfork().setup_taskrun_flag());
        let ring = builder.build(entries).map_err(EngineError::Setup)?;
        let files: Vec<_> = images.iter().map(|image| image.file().as_raw_fd()).collect();
        ring.submitter().register_files(&files).map_err(EngineError::Setup)?;
        let mut transfers = Vec::new();
        transfers.resize_with(usize::from(queue_size), Transfer::default);
        Ok(Self {
            ring,
            transfers,
            kick: Watched::default(),
            wakeup: Watched::default(),
            call: Signalled::default(),
            error: Signalled::default(),
            zeroes: AlignedBuffer::new(ZEROES_LEN, 4096),
            pending: 0,
            closing: false,
            copies: Copies::new(images.iter().any(|image| image.in_memory())),
            registered: Registered::default(),
            _images: images,
        })
    }

    /// The first of `setups` with which an engine for `image` can be set up: a kernel refuses flags that it does not know.
    pub(crate) fn find_setup(image: &Arc<Image>, setups: &[Setup]) -> Result<Setup, EngineError> {
        let mut refusal = EngineError::Setup(io::ErrorKind::InvalidInput.into());
        for setup in setups {
            match Self::new(vec![Arc::clone(image)], 1, *setup) {
                Ok(_) => return Ok(*setup),
                Err(error) => refusal = error,
            }
        }
        Err(refusal)
    }

    /// The transfer of `head`, to say which memory the next operation works on; only while the kernel has none.
    pub(crate) fn idle_transfer(&mut self, head: u16) -> Result<&mut Transfer, EngineError> {
        match self.transfers.get_mut(usize::from(head)) {
            Some(transfer) if !transfer.busy => Ok(transfer),
            _ => Err(EngineError::Busy { head }),
        }
    }

    /// The transfer of `head` is to write zeroes. Returns how many bytes, at most `len`.
    pub(crate) fn map_zeroes(&mut self, head: u16, len: u64) -> Result<u64, EngineError> {
        match self.transfers.get_mut(usize::from(head)) {
            Some(transfer) if !transfer.busy => Ok(transfer.map_repeated(self.zeroes.bytes(), len)),
            _ => Err(EngineError::Busy { head }),
        }
    }

    /// Starts to move all that was mapped for `head` from or to `offset` of the image.
    pub(crate) fn transfer(&mut self, head: u16, direction: Direction, offset: u64) -> Result<(), EngineError> {
        let transfer = self.idle_transfer(head)?;
        transfer.direction = Some(direction);
        transfer.offset = offset;
        self.start_transfer(head)
    }

    /// So many requests are about to be started.
    pub(crate) fn expect(&mut self, requests: u16) {
        self.copies.expect(requests);
    }

    /// What is started further on should be submitted later.
    pub(crate) fn has_enough(&self) -> bool {
        self.copies.are_enough()
    }

    fn start_transfer(&mut self, head: u16) -> Result<(), EngineError> {
        let Some(transfer) = self.transfers.get(usize::from(head)) else { return Err(EngineError::Busy { head }) };
        let slot = match (transfer.pieces(), transfer.memory()) {
            ([piece], Some(memory)) => self.registered.slot_of(&self.ring, memory, piece),
            _ => None,
        };
        self.start_with(head, slot)
    }

    /// Starts to move what is left, whose memory is in a slot or in none.
    fn start_with(&mut self, head: u16, slot: Option<u16>) -> Result<(), EngineError> {
        let transfer = match self.transfers.get_mut(usize::from(head)) {
            Some(transfer) if !transfer.busy => transfer,
            _ => return Err(EngineError::Busy { head }),
        };
        transfer.elsewhere = self.copies.place(transfer.pieces());
        transfer.registered = slot.is_some();
        let flags = if transfer.elsewhere { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        let entry = match slot {
            Some(slot) => registered_operation(transfer, slot),
            None => operation(transfer),
        };
        self.start(head, entry.flags(flags))
    }

    /// Starts to make durable what was written before (fdatasync).
    pub(crate) fn sync(&mut self, head: u16) -> Result<(), EngineError> {
        self.idle_transfer(head)?.reset();
        self.start(head, opcode::Fsync::new(IMAGE).flags(FsyncFlags::DATASYNC).build())
    }

    /// Starts fallocate(2) with `mode` on a range of the image.
    pub(crate) fn fallocate(&mut self, head: u16, mode: i32, offset: u64, len: u64) -> Result<(), EngineError> {
        self.idle_transfer(head)?.reset();
        self.start(head, opcode::Fallocate::new(IMAGE, len).offset(offset).mode(mode).build())
    }

    fn start(&mut self, head: u16, entry: squeue::Entry) -> Result<(), EngineError> {
        // Before the push: from now on nothing touches what the entry points at.
        self.idle_transfer(head)?.busy = true;
        self.push(entry.user_data(u64::from(head)))
    }

    fn push(&mut self, entry: squeue::Entry) -> Result<(), EngineError> {
        self.push_untracked(entry)?;
        self.pending += 1;
        Ok(())
    }

    /// For operations that use no memory and whose completion nobody waits for.
    fn push_untracked(&mut self, entry: squeue::Entry) -> Result<(), EngineError> {
        // SAFETY: what the entry points at is a busy transfer, `ONE` or `zeroes`; the module's text says why all of it
        // stays until the completion. Descriptors are kept in `file` or `pending` until then.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_full| EngineError::Full)
    }

    /// Hands the started operations to the kernel and waits until something is complete, or for `limit`.
    pub(crate) fn wait(&mut self, limit: Option<Duration>) -> Result<(), EngineError> {
        let limit = limit.map(Timespec::from);
        self.copies.submit();
        loop {
            let waited = match &limit {
                Some(limit) => self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(limit)),
                None => self.ring.submit_and_wait(1),
            };
            match waited {
                Ok(_) => return Ok(()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::ETIME) => return Ok(()),
                    Some(libc::EINTR) => {}
                    // Short of memory or of room for completions: take some, then try again.
                    Some(libc::EAGAIN | libc::EBUSY) if !self.ring.completion().is_empty() => return Ok(()),
                    Some(libc::EAGAIN | libc::EBUSY) => std::thread::yield_now(),
                    _ => return Err(EngineError::Enter(error)),
                },
            }
        }
    }

    /// Hands the started operations to the kernel, without waiting for any; makes no system call if there is nothing to do.
    pub(crate) fn submit(&mut self) -> Result<(), EngineError> {
        let queue = self.ring.submission();
        if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
            return Ok(());
        }
        drop(queue);
        self.copies.submit();
        loop {
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY) if !self.ring.completion().is_empty() => return Ok(()),
                    Some(libc::EAGAIN | libc::EBUSY) => std::thread::yield_now(),
                    _ => return Err(EngineError::Enter(error)),
                },
            }
        }
    }

    /// Whether [`Engine::submit`] and [`Engine::next_completion`] would find something that is complete. Makes no system call.
    pub(crate) fn has_events(&mut self) -> bool {
        let queue = self.ring.submission();
        let calls = queue.taskrun() || queue.cq_overflow();
        drop(queue);
        calls || !self.ring.completion().is_empty()
    }

    /// Takes one completion. Events are watched again, short transfers continued and unfinished signals repeated.
    pub(crate) fn next_completion(&mut self) -> Result<Option<Completion>, EngineError> {
        loop {
            let Some(entry) = self.ring.completion().next() else { return Ok(None) };
            let completion = self.dispatch(&entry)?;
            if completion.is_some() {
                return Ok(completion);
            }
        }
    }

    fn dispatch(&mut self, entry: &cqueue::Entry) -> Result<Option<Completion>, EngineError> {
        let tag = entry.user_data();
        if tag == TAG_UNTRACKED {
            return Ok(None);
        }
        if cqueue::more(entry.flags()) {
            return Ok(self.note_event(tag));
        }
        self.pending = self.pending.saturating_sub(1);
        match tag {
            TAG_KICK => self.finish_watch(Watch::Kick, entry.result()),
            TAG_WAKEUP => self.finish_watch(Watch::Wakeup, entry.result()),
            TAG_CALL => self.finish_signal(Signal::Call),
            TAG_ERROR => self.finish_signal(Signal::Error),
            head => self.finish_request(u16::try_from(head).unwrap_or(u16::MAX), entry.result()),
        }
    }

    fn finish_request(&mut self, head: u16, result: i32) -> Result<Option<Completion>, EngineError> {
        let Some(transfer) = self.transfers.get_mut(usize::from(head)) else { return Ok(None) };
        transfer.busy = false;
        if std::mem::take(&mut transfer.elsewhere) {
            self.copies.finish_elsewhere();
        }
        let moved = transfer.direction.is_some();
        let result = match usize::try_from(result) {
            Err(_negative) if result == -libc::EINTR || result == -libc::EAGAIN => {
                // Only reads and writes are repeated here; the rest is for the caller to judge.
                if moved {
                    self.start_transfer(head)?;
                    return Ok(None);
                }
                Err(io::Error::from_raw_os_error(-result))
            }
            // Other memory has got its slot before the kernel looked at the operation.
            Err(_negative) if result == -libc::EFAULT && transfer.registered => {
                self.start_with(head, None)?;
                return Ok(None);
            }
            Err(_negative) => Err(io::Error::from_raw_os_error(-result)),
            Ok(_) if !moved => Ok(()),
            Ok(bytes) => {
                transfer.advance(bytes);
                if transfer.is_done() {
                    Ok(())
                } else if bytes == 0 {
                    Err(io::ErrorKind::UnexpectedEof.into())
                } else {
                    self.start_transfer(head)?;
                    return Ok(None);
                }
            }
        };
        let transferred = self.transfers.get(usize::from(head)).map_or(0, Transfer::transferred);
        Ok(Some(Completion::Request { head, transferred, result }))
    }

    /// Ends all that is pending. Requests must have completed before; signals get [`LAST_SIGNAL_LIMIT`] to be delivered.
    pub(crate) fn close(&mut self) -> Result<(), EngineError> {
        self.closing = true;
        while self.call.pending.is_some() || self.error.pending.is_some() {
            let limit = SubmitArgs::new().timespec(&LAST_SIGNAL_LIMIT);
            let waited = self.ring.submitter().submit_with_args(1, &limit);
            self.take_completions()?;
            if waited.is_err_and(|error| error.raw_os_error() == Some(libc::ETIME)) {
                break;
            }
        }
        self.call.again = None;
        self.error.again = None;
        if self.pending > 0 {
            self.push_untracked(opcode::AsyncCancel2::new(CancelBuilder::any()).build().user_data(TAG_UNTRACKED))?;
        }
        while self.pending > 0 {
            self.wait(None)?;
            self.take_completions()?;
        }
        Ok(())
    }

    fn take_completions(&mut self) -> Result<(), EngineError> {
        while self.next_completion()?.is_some() {}
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!(%error, pending = self.pending, "io_uring cannot be ended; its memory is leaked");
            // The kernel may still use the memory of every pending operation.
            std::mem::forget(std::mem::take(&mut self.transfers));
            std::mem::forget(std::mem::replace(&mut self.zeroes, AlignedBuffer::new(0, 1)));
        }
    }
}

/// What is left of a transfer.
fn operation(transfer: &Transfer) -> squeue::Entry {
    let (pieces, offset, file) = (transfer.pieces(), transfer.position(), Fixed(transfer.file));
    let count = u32::try_from(pieces.len()).unwrap_or(0);
    let writes = transfer.direction == Some(Direction::Write);
    match pieces {
        // The kernel need not copy a list of one.
        [piece] => {
            let (start, len) = start_and_len(piece);
            if writes {
                opcode::Write::new(IMAGE, start, len).offset(offset).build()
            } else {
                opcode::Read::new(file, start, len).offset(offset).build()
            }
        }
        _ if writes => opcode::Writev::new(IMAGE, pieces.as_ptr(), count).offset(offset).build(),
        _ => opcode::Readv::new(file, pieces.as_ptr(), count).offset(offset).build(),
    }
}

/// What is left of a transfer of one piece, whose memory is in a slot.
fn registered_operation(transfer: &Transfer, slot: u16) -> squeue::Entry {
    let (offset, file) = (transfer.position(), Fixed(transfer.file));
    let (start, len) = transfer.pieces().first().map_or((std::ptr::null_mut(), 0), start_and_len);
    if transfer.direction == Some(Direction::Write) {
        opcode::WriteFixed::new(IMAGE, start, len, slot).offset(offset).build()
    } else {
        opcode::ReadFixed::new(file, start, len, slot).offset(offset).build()
    }
}

/// What is longer than that is a short transfer, which is continued.
fn start_and_len(piece: &libc::iovec) -> (*mut u8, u32) {
    (piece.iov_base.cast(), u32::try_from(piece.iov_len).unwrap_or(u32::MAX))
}

// Values of user_data above those of heads.
const TAG_KICK: u64 = 1 << 32;
const TAG_WAKEUP: u64 = 2 << 32;
const TAG_CALL: u64 = 3 << 32;
const TAG_ERROR: u64 = 4 << 32;
const TAG_UNTRACKED: u64 = 5 << 32;
