//! Carries out the requests of one queue on the engine.
//!
//! # Theory of operation
//! Each head has a [`Slot`]. [`Executor::start`] plans the request and starts its first operation; each completion leads
//! to the next one ([`Stage`]) or finishes the request: its status byte is written and its head appears among
//! [`Executor::take_finished`].
//!
//! Data moves in place wherever alignment permits. Otherwise it takes the way over a bounce buffer, window by window, and
//! a write that covers a block only partly reads the block first. For that a request may need a buffer and a passage
//! through the [`WriteGate`](crate::write_gate::WriteGate). If it cannot have both at once it takes neither and waits in
//! line, so none waits for another that waits.

mod bouncing;
mod formatted;
mod ranges;
mod slot;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use libc::{FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE};
use vm_memory::GuestAddress;
use vvu_back_end::wakeup::Wakeup;
use vvu_back_end::{Segment, total_len};

use self::ranges::is_unsupported;
use self::slot::{Needs, Slot, Stage};
use crate::DriverMemory;
use crate::bounce::BufferPool;
use crate::counters::QueueCounters;
use crate::device::Device;
use crate::driver_data::copy_to_driver;
use crate::engine::{Engine, EngineError};
use crate::qcow2::pool::RingJobs;
use crate::request::{ByteRange, DiskRules, Plan, Request, RequestKind, Status};
use crate::transfer::{Direction, MapError};
use crate::write_gate::Passage;

/// A request that is done, for the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Finished {
    pub(crate) head: u16,
    pub(crate) written_len: u32,
    /// Where the status was written.
    pub(crate) status: Segment,
    /// The data was written, too ([`Executor::data`]), wholly or in part.
    pub(crate) writes_data: bool,
}

/// See the module's text.
pub(crate) struct Executor<'a> {
    pub(crate) engine: Engine,
    device: &'a Device,
    counters: &'a QueueCounters,
    rules: DiskRules,
    wakeup: Arc<Wakeup>,
    slots: Vec<Slot<'a>>,
    line: VecDeque<u16>,
    buffers: BufferPool,
    finished: Vec<Finished>,
    in_flight: usize,
    /// For a disk in a format: its requests are carried out there, but for reads of what is known to lie in one piece.
    jobs: Option<RingJobs<'a>>,
}

impl<'a> Executor<'a> {
    /// For the heads of a ring of `queue_size` entries. `wakeup` fires when the gate opens.
    pub(crate) fn new(
        device: &'a Device,
        counters: &'a QueueCounters,
        queue_size: u16,
        features: u64,
        wakeup: &Arc<Wakeup>,
    ) -> Result<Self, EngineError> {
        let mut slots = Vec::new();
        slots.resize_with(usize::from(queue_size), Slot::default);
        let image = || vec![Arc::clone(&device.image)];
        let images = device.formatted.as_ref().map_or_else(image, |pool| pool.disk().images());
        Ok(Self {
            engine: Engine::new(images, queue_size, device.ring_setup)?,
            device,
            counters,
            rules: device.rules(features),
            wakeup: Arc::clone(wakeup),
            slots,
            line: VecDeque::new(),
            buffers: BufferPool::new(device.image.alignment()),
            finished: Vec::with_capacity(usize::from(queue_size)),
            in_flight: 0,
            jobs: device.formatted.as_ref().map(|pool| pool.connect(wakeup)),
        })
    }

    /// Requests that were started and are not in the used ring.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// There are requests that are done and were not taken.
    pub(crate) fn has_finished(&self) -> bool {
        !self.finished.is_empty()
    }

    /// Takes one request that is done. Its head may be used again.
    pub(crate) fn take_finished(&mut self) -> Option<Finished> {
        let finished = self.finished.pop()?;
        self.in_flight = self.in_flight.saturating_sub(1);
        Some(finished)
    }

    /// Data of the request of this head that was taken last.
    pub(crate) fn data(&self, head: u16) -> &[Segment] {
        self.slots.get(usize::from(head)).map_or(&[], |slot| &slot.data)
    }

    /// Starts a request. `data` is exchanged for an empty vector. The head must not be in flight.
    pub(crate) fn start(
        &mut self,
        head: u16,
        request: Request,
        memory: &Arc<DriverMemory>,
        data: &mut Vec<Segment>,
    ) -> Result<(), EngineError> {
        let Some(slot) = self.slots.get_mut(usize::from(head)) else { return Err(EngineError::Busy { head }) };
        slot.request = Some(request);
        slot.memory = Some(Arc::clone(memory));
        std::mem::swap(&mut slot.data, data);
        data.clear();
        slot.stage = Stage::Idle;
        slot.ranges.clear();
        slot.range = 0;
        slot.done = 0;
        // The image may have grown or shrunk since the last request.
        self.rules.capacity_sectors = self.device.shape().capacity_sectors;
        let plan = self.rules.plan(&request, total_len(&slot.data));
        self.in_flight += 1;
        if let (Some(_), Some(operation)) = (&self.jobs, Self::operation(plan)) {
            return self.start_formatted(head, operation);
        }
        match plan {
            Plan::Read(_) | Plan::Write(_) | Plan::Sync | Plan::Ranges if self.device.image.is_null() => {
                self.finish(head, Status::Ok)
            }
            Plan::Answer(status) => self.finish(head, status),
            Plan::Identify => self.identify(head),
            Plan::Sync => self.start_sync(head),
            Plan::Ranges => self.start_ranges(head),
            Plan::Read(range) => self.start_transfer(head, Direction::Read, range),
            Plan::Write(range) => self.start_transfer(head, Direction::Write, range),
        }
    }

    fn slot(&mut self, head: u16) -> Result<&mut Slot<'a>, EngineError> {
        match self.slots.get_mut(usize::from(head)) {
            Some(slot) => Ok(slot),
            None => Err(EngineError::Busy { head }),
        }
    }

    fn identify(&mut self, head: u16) -> Result<(), EngineError> {
        let serial = self.device.serial;
        let slot = self.slot(head)?;
        let Some(memory) = &slot.memory else { return self.finish(head, Status::IoError) };
        let status = copy_to_driver(memory.as_ref(), &slot.data, 0, &serial).map_or(Status::IoError, |()| Status::Ok);
        self.finish(head, status)
    }

    fn start_transfer(&mut self, head: u16, direction: Direction, range: ByteRange) -> Result<(), EngineError> {
        if range.len == 0 {
            return self.finish(head, Status::Ok);
        }
        let Some(slot) = self.slots.get_mut(usize::from(head)) else { return Err(EngineError::Busy { head }) };
        slot.ranges.push(range);
        let Some(memory) = &slot.memory else { return Err(EngineError::Busy { head }) };
        let transfer = self.engine.idle_transfer(head)?;
        let alignment = self.device.image.alignment();
        let aligned = is_aligned(&range, alignment.offset);
        let in_place = match transfer.map_segments(memory, &slot.data) {
            Ok(()) => !self.device.image.direct() || (aligned && transfer.is_aligned(alignment)),
            Err(MapError::TooManyPieces) => false,
            Err(error @ MapError::Memory(_)) => return self.fail(head, &io::Error::other(error)),
        };
        let slot = self.slot(head)?;
        slot.needs.buffer = !in_place;
        slot.needs.passage = match direction {
            Direction::Read => None,
            Direction::Write if aligned => Some(Passage::Shared),
            Direction::Write => Some(Passage::Exclusive),
        };
        self.enter_line(head)
    }

    fn enter_line(&mut self, head: u16) -> Result<(), EngineError> {
        self.line.push_back(head);
        if self.line.len() == 1 { self.advance_line() } else { self.overtake(head) }
    }

    /// Lets a request that needs nothing pass those that wait.
    fn overtake(&mut self, head: u16) -> Result<(), EngineError> {
        let free = self.device.image.gate().is_none();
        let slot = self.slot(head)?;
        if !slot.needs.buffer && (slot.needs.passage.is_none() || free) {
            self.line.pop_back();
            return self.run(head);
        }
        Ok(())
    }

    /// Starts the requests in line whose needs can be met.
    pub(crate) fn advance_line(&mut self) -> Result<(), EngineError> {
        while let Some(&head) = self.line.front() {
            if !self.meet_needs(head)? {
                return Ok(());
            }
            self.line.pop_front();
            self.run(head)?;
        }
        Ok(())
    }

    fn meet_needs(&mut self, head: u16) -> Result<bool, EngineError> {
        let Some(slot) = self.slots.get_mut(usize::from(head)) else { return Err(EngineError::Busy { head }) };
        let took_buffer = slot.needs.buffer && slot.buffer.is_none();
        if took_buffer {
            slot.buffer = self.buffers.take();
            if slot.buffer.is_none() {
                return Ok(false);
            }
        }
        let (Some(gate), Some(passage), None) = (self.device.image.gate(), slot.needs.passage, slot.passage) else {
            return Ok(true);
        };
        if gate.try_enter(passage, &self.wakeup) {
            slot.passage = Some(passage);
            return Ok(true);
        }
        if let Some(buffer) = slot.buffer.take_if(|_| took_buffer) {
            self.buffers.give_back(buffer);
        }
        Ok(false)
    }

    /// Starts the next operation on the current range.
    fn run(&mut self, head: u16) -> Result<(), EngineError> {
        let slot = self.slot(head)?;
        let (Some(kind), Some(range)) = (slot.kind(), slot.range()) else { return self.finish_data(head) };
        match kind {
            RequestKind::Discard => self.run_discard(head, &range),
            RequestKind::WriteZeroes if slot.needs.buffer => self.run_bounce(head, Direction::Write, &range),
            RequestKind::WriteZeroes if range.len == 0 => self.next_range(head),
            RequestKind::WriteZeroes => {
                let mode = if range.unmap { FALLOC_FL_PUNCH_HOLE } else { FALLOC_FL_ZERO_RANGE };
                self.run_fallocate(head, mode, range.offset, range.len)
            }
            _ => {
                let direction = if kind == RequestKind::Read { Direction::Read } else { Direction::Write };
                if slot.needs.buffer {
                    return self.run_bounce(head, direction, &range);
                }
                slot.stage = Stage::InPlace(direction);
                self.engine.transfer(head, direction, range.offset)
            }
        }
    }

    /// Takes the outcome of a request's operation and starts what follows.
    pub(crate) fn complete(
        &mut self,
        head: u16,
        transferred: u64,
        result: Result<(), io::Error>,
    ) -> Result<(), EngineError> {
        let stage = std::mem::take(&mut self.slot(head)?.stage);
        match (stage, result) {
            (Stage::Idle, _) => Ok(()),
            (Stage::Placed(range), result) => self.complete_placed(head, range, result),
            (Stage::InPlace(_), Err(error)) if self.should_bounce(&error) => self.bounce_instead(head, &error),
            (Stage::Fallocate(mode), Err(error)) if is_unsupported(&error) => self.replace_fallocate(head, mode),
            (Stage::BounceRead(window), result) => self.complete_read_window(head, window, transferred, result),
            (Stage::BounceFill(window), result) => self.complete_fill(head, window, transferred, result),
            (Stage::Sync, Err(error)) if error.kind() == io::ErrorKind::Interrupted => self.start_sync(head),
            (Stage::Fallocate(_), Err(error)) if error.kind() == io::ErrorKind::Interrupted => self.run(head),
            (Stage::Sync, Err(error)) => {
                self.device.image.note_failed_flush();
                self.fail(head, &error)
            }
            (_, Err(error)) => self.fail(head, &error),
            (Stage::InPlace(direction), Ok(())) => {
                self.count_in_place(head, direction, transferred)?;
                self.finish_data(head)
            }
            (Stage::BounceWrite(window), Ok(())) => {
                self.take_back_buffer(head)?;
                self.count_data(Direction::Write, window.data_len as u64, true);
                self.advance_range(head, window.data_len as u64)
            }
            (Stage::WriteZeroes(len), Ok(())) => self.continue_write_zeroes(head, len),
            (Stage::Fallocate(_), Ok(())) => self.next_range(head),
            (Stage::Sync, Ok(())) => self.finish(head, Status::Ok),
        }
    }

    /// Goes on after `len` bytes of the current range went through the bounce buffer.
    fn advance_range(&mut self, head: u16, len: u64) -> Result<(), EngineError> {
        let slot = self.slot(head)?;
        slot.done += len;
        self.run(head)
    }

    fn next_range(&mut self, head: u16) -> Result<(), EngineError> {
        let slot = self.slot(head)?;
        slot.range += 1;
        slot.done = 0;
        self.run(head)
    }

    fn leave_gate(&mut self, head: u16) -> Result<(), EngineError> {
        let passage = self.slot(head)?.passage.take();
        if let (Some(gate), Some(passage)) = (self.device.image.gate(), passage) {
            gate.leave(passage);
        }
        Ok(())
    }

    /// All data is where it belongs; what changes the image may still have to become durable.
    fn finish_data(&mut self, head: u16) -> Result<(), EngineError> {
        let reads = self.slot(head)?.kind() == Some(RequestKind::Read);
        if !reads && self.device.writes_through(self.rules.features) {
            return self.start_sync(head);
        }
        self.finish(head, Status::Ok)
    }

    fn start_sync(&mut self, head: u16) -> Result<(), EngineError> {
        self.release(head)?;
        if !self.device.image.can_flush() {
            return self.fail(head, &io::Error::other("an earlier flush failed and data was lost"));
        }
        self.slot(head)?.stage = Stage::Sync;
        self.engine.sync(head)
    }

    fn fail(&mut self, head: u16, error: &io::Error) -> Result<(), EngineError> {
        if let Some(suppressed) = self.device.storage_log.admit(Instant::now()) {
            let slot = self.slot(head)?;
            let (kind, range) = (slot.kind(), slot.range());
            tracing::warn!(%error, ?kind, ?range, suppressed, "request failed");
        }
        self.finish(head, Status::IoError)
    }

    /// Gives back what the request was granted.
    fn release(&mut self, head: u16) -> Result<(), EngineError> {
        let transfer = self.engine.idle_transfer(head)?;
        let buffer = transfer.take_buffer();
        transfer.reset();
        self.leave_gate(head)?;
        let slot = self.slot(head)?;
        slot.needs = Needs::default();
        slot.shared = None;
        if let Some(buffer) = slot.buffer.take().or(buffer) {
            self.buffers.give_back(buffer);
        }
        Ok(())
    }

    fn finish(&mut self, head: u16, status: Status) -> Result<(), EngineError> {
        self.release(head)?;
        let slot = self.slot(head)?;
        slot.stage = Stage::Idle;
        let (Some(request), Some(memory)) = (slot.request.take(), slot.memory.take()) else { return Ok(()) };
        write_status(&memory, request.status, status);
        self.count_request(request.kind, status);
        self.finished.push(Finished {
            head,
            written_len: request.writable_len,
            status: Segment { address: request.status, len: 1 },
            writes_data: matches!(request.kind, RequestKind::Read | RequestKind::GetId),
        });
        Ok(())
    }

    fn count_in_place(&mut self, head: u16, direction: Direction, bytes: u64) -> Result<(), EngineError> {
        self.count_data(direction, bytes, false);
        if self.engine.idle_transfer(head)?.registered {
            self.counters.registered_bytes.add(bytes);
        }
        Ok(())
    }

    fn count_data(&self, direction: Direction, bytes: u64, bounced: bool) {
        let kind = match direction {
            Direction::Read => &self.counters.bytes_read,
            Direction::Write => &self.counters.bytes_written,
        };
        kind.add(bytes);
        let way = match (bounced, self.device.image.direct()) {
            (true, _) => &self.counters.bounced_bytes,
            (false, true) => &self.counters.zero_copy_bytes,
            (false, false) => &self.counters.page_cache_bytes,
        };
        way.add(bytes);
    }

    fn count_request(&self, kind: RequestKind, status: Status) {
        let counter = match kind {
            RequestKind::Read => &self.counters.reads,
            RequestKind::Write => &self.counters.writes,
            RequestKind::Flush => &self.counters.flushes,
            RequestKind::GetId => &self.counters.get_ids,
            RequestKind::Discard => &self.counters.discards,
            RequestKind::WriteZeroes => &self.counters.write_zeroes,
            RequestKind::Unknown(_) => &self.counters.unknown,
        };
        counter.add(1);
        match status {
            Status::Ok => {}
            Status::IoError => self.counters.io_errors.add(1),
            Status::Unsupported => self.counters.unsupported.add(1),
        }
    }
}

impl Drop for Executor<'_> {
    fn drop(&mut self) {
        if let Some(gate) = self.device.image.gate() {
            for slot in &mut self.slots {
                if let Some(passage) = slot.passage.take() {
                    gate.leave(passage);
                }
            }
            gate.forget(&self.wakeup);
        }
    }
}

fn write_status(memory: &DriverMemory, address: GuestAddress, status: Status) {
    // The place was checked in this very snapshot of the memory.
    if let Err(error) = memory.write_slice(&[status.byte()], address) {
        tracing::error!(%error, "status cannot be written");
    }
}

fn is_aligned(range: &ByteRange, alignment: u32) -> bool {
    let alignment = u64::from(alignment);
    range.offset.is_multiple_of(alignment) && range.len.is_multiple_of(alignment)
}
