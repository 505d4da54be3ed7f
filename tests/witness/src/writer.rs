//! One writer: one request in flight, in blocks that nobody else touches.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::atomic::Ordering;

use rustix::io::{Errno, preadv, pwritev, retry_on_intr};
use vvu_witness::block::{BLOCK_LEN, Block, Content};
use vvu_witness::dice::Dice;
use vvu_witness::ledger::{Control, Failure};

use crate::Clock;
use crate::mapping::Ledger;
use crate::share::Share;

/// Most blocks of one request.
const BLOCKS_PER_REQUEST: u64 = 8;

/// Blocks at the start of a share that get half of the requests.
const HOT_BLOCKS: u64 = 4;

/// What the disk did wrong.
#[derive(Debug)]
pub(crate) enum Fault {
    /// A request failed.
    Io { block: u64, request: &'static str, errno: Errno },
    /// A request was cut short, which a disk never does.
    Short { block: u64, request: &'static str, len: usize },
    /// A block is not what was last acknowledged.
    Content { block: u64, expected: u64, found: Content },
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io { block, request, errno } => {
                write!(f, "{request} of block {block} failed: {}", io::Error::from(*errno))
            }
            Self::Short { block, request, len } => write!(f, "{request} of block {block} moved only {len} bytes"),
            Self::Content { block, expected, found } => {
                write!(f, "block {block} must have generation {expected}, found {found:?}")
            }
        }
    }
}

impl Fault {
    /// Stores the fault in the ledger if it is the first one.
    pub(crate) fn report(&self, ledger: Ledger) {
        let (failure, block, expected, found) = match *self {
            Self::Io { block, errno, .. } => (Failure::Io, block, u64::from(errno.raw_os_error().unsigned_abs()), 0),
            Self::Short { block, .. } => (Failure::Io, block, 0, 0),
            Self::Content { block, expected, found: Content::Generation(found) | Content::Foreign(found) } => {
                (Failure::Content, block, expected, found)
            }
        };
        let word = ledger.control(Control::Failure);
        if word.compare_exchange(Failure::None as u64, failure as u64, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            ledger.store(Control::FailureBlock, block);
            ledger.store(Control::FailureExpected, expected);
            ledger.store(Control::FailureFound, found);
        }
    }
}

/// A writer and its share of the blocks.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    device: &'a File,
    clock: &'a Clock,
    ledger: Ledger,
    share: Share,
    seed: u64,
    flush_one_in: u64,
    /// How often the share was verified while the load runs.
    verified: u64,
    dice: Dice,
    buffers: Vec<Block>,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(device: &'a File, clock: &'a Clock, number: u64, blocks: Range<u64>) -> Self {
        let ledger = clock.ledger;
        let mut dice = Dice::new(ledger.load(Control::Order));
        for _ in 0..=number {
            dice = Dice::new(dice.roll());
        }
        Self {
            device,
            clock,
            ledger,
            share: Share::new(ledger, blocks),
            seed: ledger.load(Control::Seed),
            flush_one_in: ledger.load(Control::FlushOneIn),
            verified: 0,
            dice,
            buffers: vec![Block::default(); usize::try_from(BLOCKS_PER_REQUEST).unwrap_or(1)],
        }
    }

    /// Reads the whole share and compares it with what was acknowledged.
    pub(crate) fn verify(&mut self) -> Result<(), Fault> {
        let Range { start: mut first, end } = self.share.blocks();
        while first < end {
            let count = BLOCKS_PER_REQUEST.min(end - first);
            self.read(first, count)?;
            first += count;
        }
        Ok(())
    }

    /// Does one request of the load, or puts the ledger right and verifies the whole share if the host has asked for it.
    pub(crate) fn step(&mut self) -> Result<(), Fault> {
        let asked = self.ledger.load(Control::VerifyAsked);
        if self.verified < asked {
            self.share.restore();
            self.verify()?;
            self.verified = asked;
            self.ledger.control(Control::SharesVerified).fetch_add(1, Ordering::SeqCst);
            return Ok(());
        }
        if self.dice.below(self.flush_one_in) == 0 && self.flush_one_in > 0 {
            return self.flush();
        }
        let Range { start, end } = self.share.blocks();
        let reach = if self.dice.below(2) == 0 { HOT_BLOCKS.min(end - start) } else { end - start };
        let first = start + self.dice.below(reach);
        let count = 1 + self.dice.below(BLOCKS_PER_REQUEST.min(end - first));
        match self.dice.below(4) {
            0 => self.read(first, count),
            _ => self.write(first, count),
        }
    }

    fn write(&mut self, first: u64, count: u64) -> Result<(), Fault> {
        let blocks = first..first + count;
        for (block, buffer) in blocks.clone().zip(&mut self.buffers) {
            let generation = self.share.record(block).begun + 1;
            buffer.fill(self.seed, block, generation);
            self.share.note(block, |record| record.begun = generation);
        }
        let slices: Vec<IoSlice<'_>> = blocks.clone().zip(&self.buffers).map(|(_, b)| IoSlice::new(&b.0)).collect();
        let moved = retry_on_intr(|| pwritev(self.device, &slices, offset(first)));
        check("write", first, count, moved)?;
        for block in blocks {
            self.share.note(block, |record| record.acknowledged = record.begun);
        }
        self.clock.complete();
        Ok(())
    }

    fn read(&mut self, first: u64, count: u64) -> Result<(), Fault> {
        let blocks = first..first + count;
        let mut slices: Vec<IoSliceMut<'_>> =
            blocks.clone().zip(&mut self.buffers).map(|(_, buffer)| IoSliceMut::new(&mut buffer.0)).collect();
        let moved = retry_on_intr(|| preadv(self.device, &mut slices, offset(first)));
        check("read", first, count, moved)?;
        self.clock.complete();
        for (block, buffer) in blocks.zip(&self.buffers) {
            let expected = self.share.record(block).acknowledged;
            let found = buffer.content(self.seed, block);
            if found != Content::Generation(expected) {
                return Err(Fault::Content { block, expected, found });
            }
        }
        Ok(())
    }

    /// A FLUSH makes durable what was acknowledged before it began: of this share that is everything.
    fn flush(&mut self) -> Result<(), Fault> {
        let block = self.share.blocks().start;
        rustix::fs::fdatasync(self.device).map_err(|errno| Fault::Io { block, request: "flush", errno })?;
        for block in self.share.blocks() {
            self.share.note(block, |record| record.durable = record.acknowledged);
        }
        self.ledger.control(Control::Flushes).fetch_add(1, Ordering::SeqCst);
        self.clock.complete();
        Ok(())
    }
}

fn offset(block: u64) -> u64 {
    block * BLOCK_LEN as u64
}

fn check(request: &'static str, block: u64, count: u64, moved: Result<usize, Errno>) -> Result<(), Fault> {
    match moved {
        Ok(len) if len as u64 == count * BLOCK_LEN as u64 => Ok(()),
        Ok(len) => Err(Fault::Short { block, request, len }),
        Err(errno) => Err(Fault::Io { block, request, errno }),
    }
}
