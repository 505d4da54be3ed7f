//! Loads of virtio-blk (virtio 1.3, section 5.2): a number of requests that are always under way.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::connection::{Connection, EVENT_IDX, INDIRECT_DESC, Signals};
use crate::error::Error;
use crate::latency::Latencies;
use crate::memory::{Layout, Memory};
use crate::outcome::{Outcome, Whole};
use crate::processes;
use crate::ring::{Descriptor, NEXT, Place, WRITE};

mod queue;

use queue::Queue;
pub(crate) use queue::{Blocks, Measurement};

/// Device feature of virtio-blk: several queues.
const BLK_F_MQ: u64 = 1 << 12;

/// Request types.
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Length of a request's header, in bytes.
const HEADER_LEN: u32 = 16;

/// Descriptors of a request: header, data, status.
const DESCRIPTORS: u16 = 3;

/// Most requests under way in one queue. A ring of 1,024 entries, the most that back-ends have, holds three times as many.
pub const MAX_DEPTH: u16 = 256;

/// Least entries of a ring: what QEMU gives a disk.
const LEAST_RING: u16 = 256;

/// A device that ends nothing for so long is taken for dead.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Which blocks are read or written, in which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern {
    /// Written instead of read.
    pub writes: bool,
    /// In no order, instead of one after the other. Each queue has a part of the disk for itself.
    pub random: bool,
}

/// When a load ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// After so long.
    Time(Duration),
    /// After so many requests of all queues together.
    Count(u64),
}

/// A load.
#[derive(Debug, Clone)]
pub struct Load {
    /// Where the back-end listens.
    pub socket: PathBuf,
    /// Which blocks.
    pub pattern: Pattern,
    /// Bytes of a request, a multiple of 512.
    pub block: u32,
    /// Requests under way in each queue, 1 to [`MAX_DEPTH`].
    pub depth: u16,
    /// Queues, each with a thread of its own.
    pub queues: u16,
    /// Looks at the used ring all the time, instead of waiting for calls.
    pub polled: bool,
    /// Does not negotiate INDIRECT_DESC.
    pub direct: bool,
    /// When it ends; the warm-up comes before.
    pub limit: Limit,
    /// What is not measured at the beginning.
    pub warm_up: Duration,
    /// Processes whose switches and processor time are reported.
    pub watched: Vec<u32>,
}

/// What a queue's thread comes back with.
pub(crate) struct Share {
    requests: u64,
    seconds: f64,
    latencies: Latencies,
    whole: Whole,
}

/// Where one queue keeps what it shares with the device.
#[derive(Debug, Clone, Copy)]
struct QueuePlace {
    ring: Place,
    /// Start of the slots: one for each request.
    slots: usize,
    /// Start of the requests' data.
    data: usize,
}

/// Length of a slot, and where its parts are. The device writes to the second cache line, the driver to the first one.
const SLOT_LEN: usize = 128;
const SLOT_TABLE: usize = 0;
const SLOT_HEADER: usize = 48;
const SLOT_STATUS: usize = 64;

impl Load {
    /// Runs it.
    ///
    /// # Errors
    /// If the back-end refuses something, a request fails, or the load makes no sense.
    pub fn run(&self) -> Result<Outcome, Error> {
        self.check()?;
        let several = if self.queues > 1 { BLK_F_MQ } else { 0 };
        let indirect = if self.direct { 0 } else { INDIRECT_DESC };
        let mut connection = Connection::open(&self.socket, EVENT_IDX | indirect | several)?;
        if connection.features() & several != several {
            return Err(Error::NotOffered("several queues"));
        }
        let capacity = connection.first_config_field()?.saturating_mul(SECTOR);
        let blocks_each = capacity / u64::from(self.block) / u64::from(self.queues);
        if blocks_each == 0 {
            let needed = u64::from(self.block) * u64::from(self.queues);
            return Err(Error::TooSmall { capacity, needed });
        }

        let mut layout = Layout::default();
        let places: Vec<_> = (0..self.queues).map(|_| self.place(&mut layout)).collect();
        let memory = Memory::new(layout.len())?;
        connection.announce_memory(&memory)?;
        connection.share_inflight_buffer(self.queues, self.entries())?;
        let signals = places.iter().map(|_| Signals::new()).collect::<Result<Vec<_>, _>>()?;
        for (index, (place, signals)) in places.iter().zip(&signals).enumerate() {
            self.write_requests(&memory, place, connection.features() & INDIRECT_DESC != 0)?;
            connection.start_queue(index, place.ring, signals)?;
        }

        let before = processes::look_at(&self.watched);
        let begin = Instant::now();
        let shares = thread::scope(|scope| {
            let threads = places.iter().zip(&signals).zip(0..);
            let start = |((place, signals), index): ((&QueuePlace, _), u64)| {
                let queue = Queue::new(self, &memory, *place, signals, connection.features());
                let first = index * blocks_each;
                scope.spawn(move || queue?.run(first..first + blocks_each, begin))
            };
            let threads: Vec<_> = threads.map(start).collect();
            threads.into_iter().map(|thread| thread.join().map_err(|_| Error::Panicked)?).collect::<Result<Vec<_>, _>>()
        })?;
        let processes = processes::between(&before, processes::look_at(&self.watched));
        for index in 0..places.len() {
            connection.stop_queue(index)?;
        }
        let mut outcome = sum_up(self.block, &shares)?;
        outcome.whole.processes = processes;
        outcome.features = connection.features();
        Ok(outcome)
    }

    fn check(&self) -> Result<(), Error> {
        let usage = |text: String| Err(Error::Usage(text));
        if self.depth == 0 || self.depth > MAX_DEPTH {
            return usage(format!(
                "a depth of {} is not possible: 1 to {MAX_DEPTH} requests can be under way",
                self.depth
            ));
        }
        if self.block == 0 || !u64::from(self.block).is_multiple_of(SECTOR) {
            return usage(format!("blocks of {} bytes are not possible: give a multiple of {SECTOR}", self.block));
        }
        if self.queues == 0 {
            return usage("a load needs at least one queue".to_owned());
        }
        Ok(())
    }

    /// Entries of a ring that holds all requests.
    fn entries(&self) -> u16 {
        (DESCRIPTORS * self.depth).next_power_of_two().max(LEAST_RING)
    }

    fn place(&self, layout: &mut Layout) -> QueuePlace {
        QueuePlace {
            ring: Place::take(layout, self.entries()),
            slots: layout.take(SLOT_LEN * usize::from(self.depth), 4096),
            data: layout.take(self.block as usize * usize::from(self.depth), 4096),
        }
    }

    /// Writes all that is the same whenever a slot is used: its descriptors and the type of its request.
    fn write_requests(&self, memory: &Memory, place: &QueuePlace, indirect: bool) -> Result<(), Error> {
        let request = if self.pattern.writes { TYPE_OUT } else { TYPE_IN };
        for slot in 0..self.depth {
            let start = place.slot(slot);
            memory.at::<AtomicU32>(start + SLOT_HEADER)?.store(request, Ordering::Relaxed);
            let (table, first) = if indirect {
                let table = Descriptor { address: start + SLOT_TABLE, len: 48, flags: crate::ring::INDIRECT, next: 0 };
                table.write(memory, place.ring.descriptor(slot))?;
                (start + SLOT_TABLE, 0)
            } else {
                (place.ring.descriptor(slot * DESCRIPTORS), slot * DESCRIPTORS)
            };
            let data_flags = if self.pattern.writes { NEXT } else { NEXT | WRITE };
            let data = place.data + self.block as usize * usize::from(slot);
            let parts = [
                (start + SLOT_HEADER, HEADER_LEN, NEXT),
                (data, self.block, data_flags),
                (start + SLOT_STATUS, 1, WRITE),
            ];
            for ((address, len, flags), index) in parts.into_iter().zip(0u16..) {
                let descriptor = Descriptor { address, len, flags, next: first + index + 1 };
                descriptor.write(memory, table + crate::ring::DESCRIPTOR_LEN * usize::from(index))?;
            }
        }
        Ok(())
    }
}

/// What came of all threads together; `block` is the length of a request.
pub(crate) fn sum_up(block: u32, shares: &[Share]) -> Result<Outcome, Error> {
    let mut latencies = Latencies::new()?;
    let mut whole = Whole::default();
    for share in shares {
        latencies.add(&share.latencies)?;
        whole.add(&share.whole);
    }
    let iops = shares.iter().map(|share| share.requests as f64 / share.seconds).sum();
    Ok(Outcome {
        requests: shares.iter().map(|share| share.requests).sum(),
        seconds: shares.iter().map(|share| share.seconds).fold(0.0, f64::max),
        iops,
        mib_per_second: iops * f64::from(block) / f64::from(1 << 20),
        latency_us: latencies.summary(),
        whole,
        features: 0,
    })
}

impl QueuePlace {
    fn slot(&self, slot: u16) -> usize {
        self.slots + SLOT_LEN * usize::from(slot)
    }

    /// The field of a request's header that says where on the disk.
    fn sector<'m>(&self, memory: &'m Memory, slot: u16) -> Result<&'m AtomicU64, Error> {
        memory.at(self.slot(slot) + SLOT_HEADER + 8)
    }
}
