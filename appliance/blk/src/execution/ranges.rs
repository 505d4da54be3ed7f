//! DISCARD and WRITE_ZEROES: fallocate(2) range by range, and zeroes written where the storage cannot make them.

use std::io;

use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE};
use vvu_back_end::total_len;

use super::slot::Stage;
use super::{Executor, is_aligned};
use crate::driver_data::copy_from_driver;
use crate::engine::EngineError;
use crate::qcow2::disk::Operation;
use crate::request::{ByteRange, RequestKind, Status};
use crate::transfer::Direction;
use crate::write_gate::Passage;

impl Executor<'_> {
    pub(super) fn start_ranges(&mut self, head: u16) -> Result<(), EngineError> {
        let rules = self.rules;
        let formatted = self.jobs.is_some();
        let alignment = self.device.image.alignment().offset;
        let slot = self.slot(head)?;
        let (Some(memory), Some(kind)) = (&slot.memory, slot.kind()) else { return Err(EngineError::Busy { head }) };
        // Copied once; the plan has bounded the length.
        let mut payload = vec![0; usize::try_from(total_len(&slot.data)).unwrap_or(0)];
        if copy_from_driver(memory.as_ref(), &slot.data, 0, &mut payload).is_err() {
            return self.finish(head, Status::IoError);
        }
        if let Err(status) = rules.parse_ranges(kind, &payload, &mut slot.ranges) {
            return self.finish(head, status);
        }
        if formatted {
            let ranges = std::mem::take(&mut slot.ranges);
            let operation =
                if kind == RequestKind::Discard { Operation::Discard(ranges) } else { Operation::WriteZeroes(ranges) };
            return self.submit(head, operation);
        }
        let whole_blocks = kind == RequestKind::Discard || slot.ranges.iter().all(|range| is_aligned(range, alignment));
        slot.needs.buffer = !whole_blocks;
        slot.needs.passage = Some(if whole_blocks { Passage::Shared } else { Passage::Exclusive });
        self.enter_line(head)
    }

    /// Deallocates the whole blocks in the range; DISCARD promises nothing about the rest.
    pub(super) fn run_discard(&mut self, head: u16, range: &ByteRange) -> Result<(), EngineError> {
        let alignment = u64::from(self.device.image.alignment().offset);
        let start = range.offset.next_multiple_of(alignment);
        let end = range.offset + range.len;
        let end = end - end % alignment;
        if start >= end {
            return self.next_range(head);
        }
        self.run_fallocate(head, FALLOC_FL_PUNCH_HOLE, start, end - start)
    }

    pub(super) fn run_fallocate(&mut self, head: u16, mode: i32, offset: u64, len: u64) -> Result<(), EngineError> {
        self.slot(head)?.stage = Stage::Fallocate(mode);
        self.engine.fallocate(head, mode | FALLOC_FL_KEEP_SIZE, offset, len)
    }

    pub(super) fn run_write_zeroes(&mut self, head: u16, range: &ByteRange) -> Result<(), EngineError> {
        let done = self.slot(head)?.done;
        let len = self.engine.map_zeroes(head, range.len - done)?;
        self.slot(head)?.stage = Stage::WriteZeroes(len);
        self.engine.transfer(head, Direction::Write, range.offset + done)
    }

    pub(super) fn continue_write_zeroes(&mut self, head: u16, len: u64) -> Result<(), EngineError> {
        let slot = self.slot(head)?;
        slot.done += len;
        match slot.range() {
            Some(range) if slot.done < range.len => self.run_write_zeroes(head, &range),
            _ => self.next_range(head),
        }
    }

    /// The storage cannot do this to a range. A DISCARD stays undone; zeroes are made in another way.
    pub(super) fn replace_fallocate(&mut self, head: u16, mode: i32) -> Result<(), EngineError> {
        let slot = self.slot(head)?;
        match (slot.kind(), slot.range()) {
            (Some(RequestKind::WriteZeroes), Some(range)) if mode == FALLOC_FL_PUNCH_HOLE => {
                self.run_fallocate(head, FALLOC_FL_ZERO_RANGE, range.offset, range.len)
            }
            (Some(RequestKind::WriteZeroes), Some(range)) => self.run_write_zeroes(head, &range),
            _ => self.finish(head, Status::Unsupported),
        }
    }
}

/// The file system or disk does not know this kind of fallocate(2). EINVAL is what some block drivers say.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EINVAL))
}
