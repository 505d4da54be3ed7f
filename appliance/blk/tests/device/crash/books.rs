//! A driver that keeps books: what is under way, and what the disk must hold.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::driver::{DATA, FrontEnd, Queue, Req, SPECIAL_FEATURES, noise, wait_until};
use crate::process::Program;

/// Entries of each ring; a request takes three.
pub(super) const RING_SIZE: u16 = 64;

/// Requests of one queue at a time.
const SLOTS: u16 = RING_SIZE / 3;

const BLOCK: u64 = 4096;

/// Blocks of the image that are worked on. Few, so that a request that is carried out once too often, after a later one, is
/// found in its block.
const BLOCKS: u64 = 48;

/// Length of the image in bytes.
pub(super) const IMAGE_LEN: u64 = BLOCKS * BLOCK;

/// Random numbers that can be had again by their seed (xorshift64*).
pub(super) struct Random(u64);

impl Random {
    /// The seed is printed; `VVU_SEED` gives it.
    pub(super) fn seeded() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let seed = std::env::var("VVU_SEED").map_or(now.as_micros() as u64, |text| text.parse().unwrap());
        eprintln!("VVU_SEED={seed} repeats this run");
        Self(seed | 1)
    }

    /// A number less than `end`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % end
    }

    pub(super) fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pending {
    Write { block: u64, content: u64 },
    Read { block: u64 },
    Flush,
}

/// See the module's text. It looks at a used ring only when it is told to, as a driver does that works by interrupts.
pub(super) struct Driver {
    pub(super) front_end: FrontEnd,
    pub(super) queues: Vec<Queue>,
    pending: Vec<Vec<Option<Pending>>>,
    /// Seed of each block's content; 0 for zeroes.
    contents: Vec<u64>,
    busy: Vec<bool>,
    pub(super) completed: u64,
    pub(super) random: Random,
}

impl Driver {
    pub(super) fn new(program: &Program, queue_count: usize) -> Self {
        let front_end = FrontEnd::connect_for(
            &program.socket(),
            |offered| offered & !SPECIAL_FEATURES,
            VhostUserProtocolFeatures::INFLIGHT_SHMFD,
        );
        let queues = (0..queue_count).map(|index| front_end.idle_queue(index, RING_SIZE)).collect();
        Self {
            front_end,
            queues,
            pending: vec![vec![None; usize::from(SLOTS)]; queue_count],
            contents: vec![0; BLOCKS as usize],
            busy: vec![false; BLOCKS as usize],
            completed: 0,
            random: Random::seeded(),
        }
    }

    /// Offers new requests in some of the slots of each queue that are free.
    pub(super) fn offer_everywhere(&mut self) {
        for queue in 0..self.queues.len() {
            self.offer(queue);
        }
    }

    /// Some of the slots, so that what is offered, in flight and returned differs at each kill; and in any order, so that
    /// neither the ring's order is that of the heads nor the other way round.
    fn offer(&mut self, queue: usize) {
        let first = self.random.below(u64::from(SLOTS)) as u16;
        for slot in (first..SLOTS).chain(0..first) {
            if self.pending[queue][usize::from(slot)].is_none() && self.random.one_in(2) {
                self.offer_in(queue, slot);
            }
        }
        self.queues[queue].publish(&self.front_end.memory);
        self.queues[queue].kick();
    }

    fn offer_in(&mut self, queue: usize, slot: u16) {
        // Data is 8 KiB apart; a third of it is not aligned and goes by a bounce buffer.
        let start = DATA + (queue as u64 * u64::from(SLOTS) + u64::from(slot)) * 2 * BLOCK;
        let address = start + if self.random.one_in(3) { 2 } else { 0 };
        let block = self.random.below(BLOCKS);
        let (request, pending) = if self.busy[block as usize] {
            (Req::flush(), Pending::Flush)
        } else if self.random.one_in(4) {
            (Req::read(block * BLOCK / 512, address, BLOCK as u32), Pending::Read { block })
        } else {
            let content = self.random.below(u64::MAX) | 1;
            self.front_end.fill(address, &noise(BLOCK as usize, content));
            (Req::write(block * BLOCK / 512, address, BLOCK as u32), Pending::Write { block, content })
        };
        if pending != Pending::Flush {
            self.busy[block as usize] = true;
        }
        self.pending[queue][usize::from(slot)] = Some(pending);
        self.queues[queue].offer_request(&self.front_end.memory, slot * 3, &request);
    }

    /// Takes what is complete in queues that have been signalled, and checks it. True for each that was.
    fn take_signalled(&mut self, mut then: impl FnMut(&mut Self, usize)) {
        for queue in 0..self.queues.len() {
            if self.queues[queue].call.read().is_ok() {
                while let Some((head, _)) = self.queues[queue].take_used(&self.front_end.memory) {
                    self.close_account(queue, head);
                }
                then(self, queue);
            }
        }
    }

    fn close_account(&mut self, queue: usize, head: u16) {
        assert!(head.is_multiple_of(3) && head / 3 < SLOTS, "queue {queue} returned {head}, which is no head");
        let pending = self.pending[queue][usize::from(head / 3)].take();
        let pending = pending.unwrap_or_else(|| panic!("queue {queue} returned head {head} twice"));
        assert_eq!(self.queues[queue].status(&self.front_end.memory, head), 0, "{pending:?}");
        self.completed += 1;
        match pending {
            Pending::Flush => {}
            Pending::Write { block, content } => {
                self.contents[block as usize] = content;
                self.busy[block as usize] = false;
            }
            Pending::Read { block } => {
                let address = self.queues[queue].data_address(&self.front_end.memory, head);
                let expected = content_of(self.contents[block as usize]);
                let found = self.front_end.bytes(address, BLOCK as usize);
                assert!(found == expected, "block {block} has lost its last write");
                self.busy[block as usize] = false;
            }
        }
    }

    /// Requests that were offered and not seen to be returned.
    pub(super) fn outstanding(&self) -> usize {
        self.pending.iter().flatten().flatten().count()
    }

    /// Takes and offers for a while.
    pub(super) fn work(&mut self, limit: Duration) {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            self.take_signalled(Self::offer);
            std::thread::yield_now();
        }
    }

    /// Waits until nothing is outstanding.
    pub(super) fn drain(&mut self) {
        wait_until("the completion of every request", || {
            self.take_signalled(|_, _| {});
            self.outstanding() == 0
        });
    }

    /// Compares the whole disk with the books. Nothing may be outstanding.
    pub(super) fn check_disk(&self, image: &Path) {
        let image = File::open(image).unwrap();
        for (block, seed) in (0..).zip(&self.contents) {
            let mut bytes = vec![0; BLOCK as usize];
            image.read_exact_at(&mut bytes, block * BLOCK).unwrap();
            assert!(bytes == content_of(*seed), "block {block} does not hold its last write");
        }
    }
}

fn content_of(seed: u64) -> Vec<u8> {
    if seed == 0 { vec![0; BLOCK as usize] } else { noise(BLOCK as usize, seed) }
}
