//! Requests to a disk in a format: they are carried out by its threads, and only begun and finished here; but what is known to lie
//! in one piece is read at once, as from an image without a format.

use std::io;
use std::sync::Arc;

use super::slot::Stage;
use super::{Executor, Status};
use crate::engine::EngineError;
use crate::qcow2::disk::{Job, Operation};
use crate::qcow2::transfer::Moved;
use crate::request::{ByteRange, Plan, RequestKind};
use crate::transfer::Direction;

impl Executor<'_> {
    pub(super) fn start_formatted(&mut self, head: u16, operation: Operation) -> Result<(), EngineError> {
        match operation {
            Operation::Read(range) if self.read_in_place(head, range)? => Ok(()),
            operation => self.submit(head, operation),
        }
    }

    /// Starts to read from where the range lies, if that is known and the memory fits; else returns false.
    fn read_in_place(&mut self, head: u16, range: ByteRange) -> Result<bool, EngineError> {
        let device = self.device;
        let Some(found) = device.formatted.as_ref().and_then(|pool| pool.disk().find(range)) else { return Ok(false) };
        let Some(slot) = self.slots.get_mut(usize::from(head)) else { return Err(EngineError::Busy { head }) };
        let Some(memory) = &slot.memory else { return Err(EngineError::Busy { head }) };
        let transfer = self.engine.idle_transfer(head)?;
        let fits = found.place.offset.is_multiple_of(u64::from(found.alignment.offset))
            && transfer.map_segments(memory, &slot.data).is_ok()
            && transfer.is_aligned(found.alignment)
            && !transfer.is_done();
        if !fits {
            transfer.reset();
            return Ok(false);
        }
        transfer.file = found.place.layer;
        slot.stage = Stage::Placed(range);
        slot.shared = Some(found.shared);
        self.engine.transfer(head, Direction::Read, found.place.offset)?;
        Ok(true)
    }

    pub(super) fn complete_placed(
        &mut self,
        head: u16,
        range: ByteRange,
        result: io::Result<()>,
    ) -> Result<(), EngineError> {
        if result.is_err() {
            // The end of the file, or memory that it is not read to directly: the format's driver knows what to do.
            self.release(head)?;
            return self.submit(head, Operation::Read(range));
        }
        self.count_in_place(head, Direction::Read, range.len)?;
        self.finish(head, Status::Ok)
    }

    /// Hands a request over.
    pub(super) fn submit(&mut self, head: u16, operation: Operation) -> Result<(), EngineError> {
        let durable = !matches!(operation, Operation::Read(_)) && self.device.writes_through(self.rules.features);
        let former_losses = self.device.former_losses();
        let slot = self.slot(head)?;
        let Some(memory) = &slot.memory else { return Err(EngineError::Busy { head }) };
        let job = Job { operation, memory: Arc::clone(memory), data: slot.data.clone(), durable, former_losses };
        match &self.jobs {
            Some(jobs) => jobs.submit(head, job),
            None => return Err(EngineError::Busy { head }),
        }
        Ok(())
    }

    /// What a plan means for a disk in a format. None if it needs no storage, or a look at the data first.
    pub(super) fn operation(plan: Plan) -> Option<Operation> {
        match plan {
            Plan::Read(range) => Some(Operation::Read(range)),
            Plan::Write(range) => Some(Operation::Write(range)),
            Plan::Sync => Some(Operation::Flush),
            Plan::Answer(_) | Plan::Identify | Plan::Ranges => None,
        }
    }

    /// Finishes the requests that have come back.
    pub(crate) fn complete_jobs(&mut self) -> Result<(), EngineError> {
        let Some(jobs) = &self.jobs else { return Ok(()) };
        for done in jobs.take_done() {
            self.complete_job(done.head, done.result)?;
        }
        Ok(())
    }

    fn complete_job(&mut self, head: u16, result: io::Result<Moved>) -> Result<(), EngineError> {
        let kind = self.slot(head)?.kind();
        let direction = if kind == Some(RequestKind::Write) { Direction::Write } else { Direction::Read };
        match result {
            Ok(moved) => {
                match moved {
                    Moved::InPlace(bytes) => self.count_data(direction, bytes, false),
                    Moved::Bounced(bytes) => self.count_data(direction, bytes, true),
                    Moved::Nothing => {}
                }
                self.finish(head, Status::Ok)
            }
            Err(error) if kind == Some(RequestKind::Discard) && error.kind() == io::ErrorKind::Unsupported => {
                self.finish(head, Status::Unsupported)
            }
            Err(error) => self.fail(head, &error),
        }
    }
}
