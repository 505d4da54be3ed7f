//! The algorithm, over memory of any kind, so that a test can look at it after every single store.

use super::{VERSION, entry, region};

/// One queue's part of the buffer, by offsets in bytes. Stores become visible in the order in which they are made, and
/// after all that the thread has stored before.
pub(super) trait QueueMemory {
    fn load_8(&self, offset: usize) -> u8;
    fn load_16(&self, offset: usize) -> u16;
    fn load_64(&self, offset: usize) -> u64;
    fn store_8(&self, offset: usize, value: u8);
    fn store_16(&self, offset: usize, value: u16);
    fn store_64(&self, offset: usize, value: u64);
}

/// What a back-end that takes over has to go on with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// Heads of the requests in flight, in the order in which they were taken; each is less than the ring's size and
    /// comes once.
    pub heads: Vec<u16>,
    /// Position in the available ring after the last one that was taken: all that was returned plus all in flight. The
    /// index that the front-end remembers, or that of the ring, would lose the requests between.
    pub next_avail: u16,
}

/// See `InflightQueue`.
#[derive(Debug)]
pub(super) struct Tracker<M> {
    memory: M,
    ring_size: u16,
    /// Entries of the part; the ring may have fewer.
    queue_size: u16,
    /// The specification's "global counter".
    counter: u64,
    /// Heads between `begin_batch` and `end_batch`.
    batch: Vec<u16>,
}

impl<M: QueueMemory> Tracker<M> {
    pub(super) fn new(memory: M, ring_size: u16, queue_size: u16) -> Self {
        Self { memory, ring_size, queue_size, counter: 0, batch: Vec::new() }
    }

    pub(super) fn recover(&mut self, used_idx: u16) -> Recovered {
        self.batch.clear();
        if self.memory.load_16(region::VERSION) == VERSION {
            for head in self.unfinished_batch(used_idx) {
                self.clear(head);
            }
            self.memory.store_16(region::USED_IDX, used_idx);
        } else {
            self.initialise(used_idx);
        }
        let mut in_flight: Vec<(u64, u16)> = (0..self.ring_size)
            .filter(|head| self.is_in_flight(*head))
            .map(|head| (self.counter_of(head), head))
            .collect();
        in_flight.sort_unstable();
        self.counter = in_flight.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let heads: Vec<u16> = in_flight.into_iter().map(|(_, head)| head).collect();
        // As many as the ring has entries at most, so no bit is lost.
        let count = u16::try_from(heads.len()).unwrap_or(self.ring_size);
        Recovered { heads, next_avail: used_idx.wrapping_add(count) }
    }

    pub(super) fn discard(&mut self) {
        self.clear_all();
        self.counter = 0;
    }

    pub(super) fn start(&mut self, head: u16) {
        let Some(place) = self.place(head) else { return };
        self.memory.store_64(place + entry::COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.memory.store_8(place + entry::INFLIGHT, 1);
    }

    pub(super) fn begin_batch(&mut self, head: u16) {
        let Some(place) = self.place(head) else { return };
        let last = self.memory.load_16(region::LAST_BATCH_HEAD);
        self.memory.store_16(place + entry::NEXT, last);
        self.memory.store_16(region::LAST_BATCH_HEAD, head);
        self.batch.push(head);
    }

    pub(super) fn end_batch(&mut self, used_idx: u16) {
        for head in &self.batch {
            self.clear(*head);
        }
        self.batch.clear();
        self.memory.store_16(region::USED_IDX, used_idx);
    }

    /// The heads that were returned by the last batch and may still be marked: as many as the used ring is ahead.
    ///
    /// A batch consists of distinct heads of the ring. A list that does not is none of a batch, and then nothing may be
    /// taken from it: `last_batch_head` is 0 in a buffer whose first batch never came, and request 0 may be in flight.
    fn unfinished_batch(&self, used_idx: u16) -> Vec<u16> {
        let count = used_idx.wrapping_sub(self.memory.load_16(region::USED_IDX));
        if count == 0 || count > self.ring_size {
            return Vec::new();
        }
        let mut seen = vec![false; usize::from(self.ring_size)];
        let mut heads = Vec::with_capacity(usize::from(count));
        let mut head = self.memory.load_16(region::LAST_BATCH_HEAD);
        for _ in 0..count {
            match (seen.get_mut(usize::from(head)), self.place(head)) {
                (Some(seen), Some(place)) if !*seen => {
                    *seen = true;
                    heads.push(head);
                    head = self.memory.load_16(place + entry::NEXT);
                }
                _ => return Vec::new(),
            }
        }
        heads
    }

    /// A buffer of zeroes becomes one in which nothing is in flight. The version is last: before it, nothing counts.
    fn initialise(&mut self, used_idx: u16) {
        self.clear_all();
        self.memory.store_16(region::DESC_NUM, self.queue_size);
        self.memory.store_16(region::USED_IDX, used_idx);
        self.memory.store_16(region::VERSION, VERSION);
    }

    fn clear_all(&mut self) {
        self.batch.clear();
        for head in 0..self.queue_size {
            self.clear(head);
        }
    }

    /// `head` is an entry of the part.
    fn clear(&self, head: u16) {
        self.memory.store_8(region::LEN + usize::from(head) * entry::LEN + entry::INFLIGHT, 0);
    }

    fn is_in_flight(&self, head: u16) -> bool {
        self.place(head).is_some_and(|place| self.memory.load_8(place + entry::INFLIGHT) == 1)
    }

    fn counter_of(&self, head: u16) -> u64 {
        self.place(head).map_or(0, |place| self.memory.load_64(place + entry::COUNTER))
    }

    /// Where the entry of `head` is, if the ring has it.
    fn place(&self, head: u16) -> Option<usize> {
        (head < self.ring_size).then(|| region::LEN + usize::from(head) * entry::LEN)
    }
}
