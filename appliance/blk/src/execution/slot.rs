//! What is known of one request while it is carried out.

use std::sync::Arc;

use vvu_back_end::Segment;

use crate::DriverMemory;
use crate::aligned_buffer::AlignedBuffer;
use crate::bounce::Window;
use crate::qcow2::disk::Shared;
use crate::request::{ByteRange, Request, RequestKind};
use crate::transfer::Direction;
use crate::write_gate::Passage;

/// The operation that a request waits for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// None: the slot is free, or its request is in line.
    #[default]
    Idle,
    /// Data straight between image and driver memory.
    InPlace(Direction),
    /// Data of a disk in a format, straight from where it lies.
    Placed(ByteRange),
    /// The window is read for the driver.
    BounceRead(Window),
    /// The window's blocks are read, to be overlaid.
    BounceFill(Window),
    /// The window is written.
    BounceWrite(Window),
    /// fallocate(2) with this mode on the current range.
    Fallocate(i32),
    /// This many zeroes are written.
    WriteZeroes(u64),
    /// The last step of a flush, and of a write that must be durable.
    Sync,
}

/// What a request must have before its data can move.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Needs {
    pub(super) buffer: bool,
    pub(super) passage: Option<Passage>,
}

/// One request. The vectors keep their memory from one request to the next.
#[derive(Default)]
pub(super) struct Slot<'a> {
    pub(super) request: Option<Request>,
    pub(super) memory: Option<Arc<DriverMemory>>,
    pub(super) data: Vec<Segment>,
    pub(super) stage: Stage,
    pub(super) needs: Needs,
    pub(super) passage: Option<Passage>,
    pub(super) buffer: Option<AlignedBuffer>,
    /// Keeps the place of the data what it is.
    pub(super) shared: Option<Shared<'a>>,
    /// What is to be done: one range for a transfer, several for DISCARD and WRITE_ZEROES.
    pub(super) ranges: Vec<ByteRange>,
    /// The current range.
    pub(super) range: usize,
    /// Bytes of the current range that are done.
    pub(super) done: u64,
}

impl Slot<'_> {
    pub(super) fn range(&self) -> Option<ByteRange> {
        self.ranges.get(self.range).copied()
    }

    pub(super) fn kind(&self) -> Option<RequestKind> {
        self.request.map(|request| request.kind)
    }
}
