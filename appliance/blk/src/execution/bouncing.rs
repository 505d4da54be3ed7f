//! Data by way of a bounce buffer, window by window.

use std::io;
use std::time::Instant;

use super::Executor;
use super::slot::{Needs, Stage};
use crate::aligned_buffer::AlignedBuffer;
use crate::bounce::Window;
use crate::driver_data::{copy_from_driver, copy_to_driver};
use crate::engine::EngineError;
use crate::request::{ByteRange, RequestKind};
use crate::transfer::Direction;
use crate::write_gate::Passage;

impl Executor<'_> {
    pub(super) fn run_bounce(&mut self, head: u16, direction: Direction, range: &ByteRange) -> Result<(), EngineError> {
        let alignment = self.device.image.alignment().offset;
        let slot = self.slot(head)?;
        if slot.done == range.len {
            return self.next_range(head);
        }
        let window = Window::first_of(range.offset + slot.done, range.len - slot.done, alignment);
        let Some(buffer) = slot.buffer.take() else { return Err(EngineError::Busy { head }) };
        match direction {
            Direction::Read => self.bounce(head, buffer, Stage::BounceRead(window)),
            Direction::Write if window.is_whole() => self.write_window(head, buffer, window),
            Direction::Write => self.bounce(head, buffer, Stage::BounceFill(window)),
        }
    }

    /// Puts the data of the window into the buffer and writes it.
    pub(super) fn write_window(
        &mut self,
        head: u16,
        mut buffer: AlignedBuffer,
        window: Window,
    ) -> Result<(), EngineError> {
        let slot = self.slot(head)?;
        let target = buffer.bytes_mut().get_mut(window.data()).unwrap_or_default();
        let copied = match &slot.memory {
            Some(memory) if slot.kind() == Some(RequestKind::Write) => {
                copy_from_driver(memory.as_ref(), &slot.data, slot.done, target)
            }
            _ => {
                target.fill(0);
                Ok(())
            }
        };
        let copied = match copied {
            // Zeroes in place of what was lost must not reach the image.
            Ok(()) if self.device.lost_memory() => Err(io::Error::other("driver memory was taken away")),
            copied => copied.map_err(io::Error::other),
        };
        if let Err(error) = copied {
            self.buffers.give_back(buffer);
            return self.fail(head, &error);
        }
        self.bounce(head, buffer, Stage::BounceWrite(window))
    }

    pub(super) fn bounce(&mut self, head: u16, buffer: AlignedBuffer, stage: Stage) -> Result<(), EngineError> {
        let (direction, window) = match stage {
            Stage::BounceWrite(window) => (Direction::Write, window),
            Stage::BounceRead(window) | Stage::BounceFill(window) => (Direction::Read, window),
            _ => return Err(EngineError::Busy { head }),
        };
        self.slot(head)?.stage = stage;
        self.engine.idle_transfer(head)?.map_buffer(buffer, window.len);
        self.engine.transfer(head, direction, window.offset)
    }

    pub(super) fn complete_read_window(
        &mut self,
        head: u16,
        window: Window,
        transferred: u64,
        result: Result<(), io::Error>,
    ) -> Result<(), EngineError> {
        self.take_back_buffer(head)?;
        let slot = self.slot(head)?;
        // The image may end behind the data and before the end of its block.
        let copied = match (result, &slot.memory, &slot.buffer) {
            (Err(error), _, _) if transferred < window.data().end as u64 => Err(error),
            (_, Some(memory), Some(buffer)) => {
                let data = buffer.bytes().get(window.data()).unwrap_or_default();
                copy_to_driver(memory.as_ref(), &slot.data, slot.done, data).map_err(io::Error::other)
            }
            _ => return Err(EngineError::Busy { head }),
        };
        if let Err(error) = copied {
            return self.fail(head, &error);
        }
        self.count_data(Direction::Read, window.data_len as u64, true);
        self.advance_range(head, window.data_len as u64)
    }

    pub(super) fn complete_fill(
        &mut self,
        head: u16,
        window: Window,
        transferred: u64,
        result: Result<(), io::Error>,
    ) -> Result<(), EngineError> {
        self.take_back_buffer(head)?;
        if let Err(error) = result
            && transferred < window.data().end as u64
        {
            return self.fail(head, &error);
        }
        let Some(mut buffer) = self.slot(head)?.buffer.take() else { return Err(EngineError::Busy { head }) };
        // Beyond the end of the image there is nothing; not what the buffer held before.
        let end = usize::try_from(transferred).unwrap_or(usize::MAX);
        buffer.bytes_mut().get_mut(end..).unwrap_or_default().fill(0);
        self.write_window(head, buffer, window)
    }

    pub(super) fn take_back_buffer(&mut self, head: u16) -> Result<(), EngineError> {
        let buffer = self.engine.idle_transfer(head)?.take_buffer();
        self.slot(head)?.buffer = buffer;
        Ok(())
    }

    /// Direct I/O refuses this memory although it looked fit: no struct pages behind it, or storage that says too little
    /// about its needs.
    pub(super) fn should_bounce(&self, error: &io::Error) -> bool {
        self.device.image.direct() && matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EINVAL))
    }

    pub(super) fn bounce_instead(&mut self, head: u16, error: &io::Error) -> Result<(), EngineError> {
        if let Some(suppressed) = self.device.storage_log.admit(Instant::now()) {
            tracing::warn!(%error, suppressed, "direct I/O refuses driver memory; bouncing");
        }
        // A passage is given back before waiting: the request in front may wait for it.
        self.leave_gate(head)?;
        let write = self.slot(head)?.kind() == Some(RequestKind::Write);
        self.slot(head)?.needs = Needs { buffer: true, passage: write.then_some(Passage::Shared) };
        self.enter_line(head)
    }
}
