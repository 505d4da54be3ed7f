//! One queue under load: the loop that must not be what is measured.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use super::{DESCRIPTORS, Limit, Load, PATIENCE, QueuePlace, SECTOR, SLOT_STATUS, Share};
use crate::connection::{EVENT_IDX, INDIRECT_DESC, Signals};
use crate::error::Error;
use crate::latency::Latencies;
use crate::memory::Memory;
use crate::outcome::Whole;
use crate::processes;
use crate::ring::Ring;

/// What a status is before the device writes it.
const NO_STATUS: u8 = 0xff;

/// Looks at an empty ring between two looks at the clock.
const LOOKS: u32 = 4096;

/// See the module's text.
pub(super) struct Queue<'l> {
    load: &'l Load,
    memory: &'l Memory,
    place: QueuePlace,
    ring: Ring<'l>,
    signals: &'l Signals,
    /// Head of a slot's chain divided by the slot's number.
    stride: u16,
    /// For each slot, when its request was offered, if it is under way.
    offered: Vec<Option<Instant>>,
    under_way: u16,
    latencies: Latencies,
    whole: Whole,
}

/// Where the next request goes.
pub(crate) struct Blocks {
    all: Range<u64>,
    next: u64,
    chance: Option<fastrand::Rng>,
    sectors: u64,
}

/// What is measured: everything that ends within a span of time, but at least one request; or the first so many requests after
/// the warm-up.
pub(crate) struct Measurement {
    start: Instant,
    end: Option<Instant>,
    left: u64,
    requests: u64,
    last: Instant,
}

impl<'l> Queue<'l> {
    pub(super) fn new(
        load: &'l Load,
        memory: &'l Memory,
        place: QueuePlace,
        signals: &'l Signals,
        features: u64,
    ) -> Result<Self, Error> {
        Ok(Self {
            load,
            memory,
            place,
            ring: Ring::new(memory, place.ring, features & EVENT_IDX != 0),
            signals,
            stride: if features & INDIRECT_DESC != 0 { 1 } else { DESCRIPTORS },
            offered: vec![None; usize::from(load.depth)],
            under_way: 0,
            latencies: Latencies::new()?,
            whole: Whole::default(),
        })
    }

    /// Runs the load on a range of blocks, from `begin` on.
    pub(super) fn run(mut self, blocks: Range<u64>, begin: Instant) -> Result<Share, Error> {
        let mut blocks = Blocks::new(self.load.pattern.random, self.load.block, blocks);
        let mut measurement = Measurement::new(self.load.warm_up, self.load.limit, u64::from(self.load.queues), begin);
        self.ring.ask_for_calls(false)?;
        let now = Instant::now();
        for slot in 0..self.load.depth {
            self.offer(slot, &mut blocks, now)?;
        }
        while self.under_way > 0 {
            if self.ring.publish()? {
                self.whole.kicks += 1;
                self.signals.kick();
            }
            self.await_used()?;
            // One look at the clock for all that has come by now.
            let now = Instant::now();
            while let Some((head, _)) = self.ring.take()? {
                let slot = self.end(head, now, &mut measurement)?;
                if !measurement.is_over(now) {
                    self.offer(slot, &mut blocks, now)?;
                }
            }
        }
        self.whole.calls = self.signals.calls();
        // The thread was made for this.
        self.whole.load = processes::own_thread();
        Ok(measurement.share(self.latencies, self.whole))
    }

    fn offer(&mut self, slot: u16, blocks: &mut Blocks, now: Instant) -> Result<(), Error> {
        self.place.sector(self.memory, slot)?.store(blocks.next_sector(), Ordering::Relaxed);
        self.status(slot)?.store(NO_STATUS, Ordering::Relaxed);
        if let Some(offered) = self.offered.get_mut(usize::from(slot)) {
            *offered = Some(now);
        }
        self.under_way += 1;
        self.ring.offer(slot * self.stride)
    }

    /// Takes note of the end of a request; its slot.
    fn end(&mut self, head: u16, now: Instant, measurement: &mut Measurement) -> Result<u16, Error> {
        let slot = head / self.stride;
        let known = if head.is_multiple_of(self.stride) { self.offered.get_mut(usize::from(slot)) } else { None };
        let offered = known.and_then(Option::take).ok_or(Error::NotUnderWay(u32::from(head)))?;
        let status = self.status(slot)?.load(Ordering::Relaxed);
        if status != 0 {
            return Err(Error::Status(status));
        }
        self.under_way -= 1;
        self.whole.requests += 1;
        if measurement.counts(now) {
            self.latencies.record(now.duration_since(offered));
        }
        Ok(slot)
    }

    fn status(&self, slot: u16) -> Result<&'l AtomicU8, Error> {
        self.memory.at(self.place.slot(slot) + SLOT_STATUS)
    }

    /// Waits until the device is done with something.
    fn await_used(&mut self) -> Result<(), Error> {
        if self.load.polled { self.poll() } else { self.await_call() }
    }

    fn poll(&self) -> Result<(), Error> {
        let mut since = None;
        loop {
            for _ in 0..LOOKS {
                if self.ring.has_used()? {
                    // Once in 65,536 chains the wish would come round.
                    return self.ring.ask_for_calls(false);
                }
                std::hint::spin_loop();
            }
            if since.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
                return Err(Error::Silent(PATIENCE));
            }
        }
    }

    fn await_call(&mut self) -> Result<(), Error> {
        loop {
            if self.ring.has_used()? {
                return Ok(());
            }
            self.ring.ask_for_calls(true)?;
            if self.ring.has_used()? {
                return Ok(());
            }
            self.whole.waits += 1;
            if !self.signals.wait(PATIENCE)? {
                return Err(Error::Silent(PATIENCE));
            }
        }
    }
}

impl Blocks {
    /// Of `block` bytes each.
    pub(crate) fn new(random: bool, block: u32, all: Range<u64>) -> Self {
        // The same requests in each run.
        let chance = random.then(|| fastrand::Rng::with_seed(all.start));
        Self { next: all.start, all, chance, sectors: u64::from(block) / SECTOR }
    }

    pub(crate) fn next_sector(&mut self) -> u64 {
        if let Some(chance) = &mut self.chance {
            return chance.u64(self.all.clone()) * self.sectors;
        }
        let block = self.next;
        self.next = if block + 1 == self.all.end { self.all.start } else { block + 1 };
        block * self.sectors
    }
}

impl Measurement {
    /// Of one of several equal threads.
    pub(crate) fn new(warm_up: Duration, limit: Limit, threads: u64, begin: Instant) -> Self {
        let start = begin + warm_up;
        let (end, left) = match limit {
            Limit::Time(time) => (Some(start + time), u64::MAX),
            Limit::Count(count) => (None, count.div_ceil(threads)),
        };
        Self { start, end, left, requests: 0, last: start + Duration::from_nanos(1) }
    }

    /// Whether a request that ends now is measured; notes it.
    pub(crate) fn counts(&mut self, now: Instant) -> bool {
        if now < self.start || self.is_over(now) {
            return false;
        }
        self.left -= 1;
        self.requests += 1;
        self.last = now;
        true
    }

    pub(crate) fn is_over(&self, now: Instant) -> bool {
        self.left == 0 || (self.requests > 0 && self.end.is_some_and(|end| now >= end))
    }

    /// What the thread comes back with.
    pub(crate) fn share(&self, latencies: Latencies, whole: Whole) -> Share {
        let seconds = self.last.duration_since(self.start).as_secs_f64();
        Share { requests: self.requests, seconds, latencies, whole }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of two threads.
    fn of_two(limit: Limit, begin: Instant) -> Measurement {
        Measurement::new(Duration::from_secs(1), limit, 2, begin)
    }

    #[test]
    fn blocks_come_round_and_random_ones_stay_in_their_part() {
        let mut blocks = Blocks::new(false, 4096, 3..5);
        let sectors: Vec<_> = (0..3).map(|_| blocks.next_sector()).collect();
        assert_eq!(sectors, [24, 32, 24]);
        let mut blocks = Blocks::new(true, 4096, 3..5);
        let sectors: Vec<_> = (0..64).map(|_| blocks.next_sector()).collect();
        assert!(sectors.contains(&24) && sectors.contains(&32) && sectors.iter().all(|s| [24, 32].contains(s)));
    }

    #[test]
    fn what_ends_in_the_warm_up_or_too_late_does_not_count() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let mut measurement = of_two(Limit::Time(Duration::from_secs(1)), begin);
        assert!(!measurement.counts(at(999)) && measurement.counts(at(1000)) && measurement.counts(at(1999)));
        assert!(!measurement.counts(at(2000)) && measurement.is_over(at(2000)));
        assert_eq!((measurement.requests, measurement.last), (2, at(1999)));
        let mut slow = of_two(Limit::Time(Duration::from_secs(1)), begin);
        assert!(!slow.is_over(at(3000)) && slow.counts(at(3000)) && slow.is_over(at(3000)));
    }

    #[test]
    fn a_count_is_shared_by_the_queues() {
        let begin = Instant::now();
        let later = begin + Duration::from_secs(9);
        let mut measurement = of_two(Limit::Count(3), begin);
        assert!(measurement.counts(later) && measurement.counts(later) && measurement.is_over(later));
    }
}
