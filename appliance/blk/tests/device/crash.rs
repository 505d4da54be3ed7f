//! The program is killed under load, again and again, and each time another one takes over with the same memory and the same
//! inflight buffer, as behind a bridge or a front-end that reconnects. The driver notices nothing: every request is completed
//! once, and the disk holds what the driver wrote last.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};

use crate::driver::{DATA, FrontEnd, Queue, Req, SPECIAL_FEATURES, noise, wait_until};
use crate::process::{ImageFile, Program};

/// Programs that are killed in one run.
const KILLS: u32 = 200;

/// Queues, each with its own thread in the program.
const QUEUES: usize = 2;

/// Entries of each ring; a request takes three.
const RING_SIZE: u16 = 64;

/// Requests of one queue at a time.
const SLOTS: u16 = RING_SIZE / 3;

const BLOCK: u64 = 4096;

/// Blocks of the image that are worked on. Few, so that a request that is carried out once too often, after a later one, is
/// found in its block.
const BLOCKS: u64 = 48;

/// Random numbers that can be had again by their seed (xorshift64*).
pub(crate) struct Random(u64);

impl Random {
    /// The seed is printed; `VVU_SEED` gives it.
    pub(crate) fn seeded() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let seed = std::env::var("VVU_SEED").map_or(now.as_micros() as u64, |text| text.parse().unwrap());
        eprintln!("VVU_SEED={seed} repeats this run");
        Self(seed | 1)
    }

    /// A number less than `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % end
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pending {
    Write { block: u64, content: u64 },
    Read { block: u64 },
    Flush,
}

/// The driver's books: what is under way, and what the disk must hold.
struct Driver {
    front_end: FrontEnd,
    queues: Vec<Queue>,
    pending: Vec<Vec<Option<Pending>>>,
    /// Seed of each block's content; 0 for zeroes.
    contents: Vec<u64>,
    busy: Vec<bool>,
    completed: u64,
    random: Random,
}

impl Driver {
    fn new(program: &Program, random: Random) -> Self {
        let front_end = FrontEnd::connect_for(
            &program.socket(),
            |offered| offered & !SPECIAL_FEATURES,
            VhostUserProtocolFeatures::INFLIGHT_SHMFD,
        );
        let queues = (0..QUEUES).map(|index| front_end.idle_queue(index, RING_SIZE)).collect();
        Self {
            front_end,
            queues,
            pending: vec![vec![None; usize::from(SLOTS)]; QUEUES],
            contents: vec![0; BLOCKS as usize],
            busy: vec![false; BLOCKS as usize],
            completed: 0,
            random,
        }
    }

    /// Data of one slot: 4 KiB apart, and a little more, for those that are not aligned.
    fn data(queue: usize, slot: u16) -> u64 {
        DATA + (queue as u64 * u64::from(SLOTS) + u64::from(slot)) * 2 * BLOCK
    }

    /// Fills all slots of a queue with new requests.
    fn offer(&mut self, queue: usize) {
        for slot in 0..SLOTS {
            if self.pending[queue][usize::from(slot)].is_some() {
                continue;
            }
            // A third of them by a bounce buffer.
            let address = Self::data(queue, slot) + if self.random.below(3) == 0 { 2 } else { 0 };
            let block = self.random.below(BLOCKS);
            let (request, pending) = if self.busy[block as usize] {
                (Req::flush(), Pending::Flush)
            } else if self.random.below(4) == 0 {
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
        self.queues[queue].publish(&self.front_end.memory);
        self.queues[queue].kick();
    }

    /// Takes what is complete, and checks it. True if there was something.
    fn take(&mut self, queue: usize) -> bool {
        let mut any = false;
        while let Some((head, _)) = self.queues[queue].take_used(&self.front_end.memory) {
            any = true;
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
                    self.check_read(queue, head / 3, block);
                    self.busy[block as usize] = false;
                }
            }
        }
        any
    }

    fn check_read(&self, queue: usize, slot: u16, block: u64) {
        let address = self.queues[queue].data_address(&self.front_end.memory, slot * 3);
        let expected = content_of(self.contents[block as usize]);
        assert!(self.front_end.bytes(address, BLOCK as usize) == expected, "block {block} has lost its last write");
    }

    /// Requests that are offered and not returned.
    fn outstanding(&self) -> usize {
        self.pending.iter().flatten().flatten().count()
    }

    fn work(&mut self, limit: Duration) {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            for queue in 0..QUEUES {
                if self.take(queue) {
                    self.offer(queue);
                }
            }
            std::thread::yield_now();
        }
    }

    fn drain(&mut self) {
        wait_until("the completion of every request", || {
            for queue in 0..QUEUES {
                self.take(queue);
            }
            self.outstanding() == 0
        });
    }
}

fn content_of(seed: u64) -> Vec<u8> {
    if seed == 0 { vec![0; BLOCK as usize] } else { noise(BLOCK as usize, seed) }
}

/// An inflight buffer in the front-end's hands.
struct Buffer {
    description: VhostUserInflight,
    file: File,
}

impl Buffer {
    fn ask_for(front_end: &mut FrontEnd) -> Self {
        let wanted = VhostUserInflight { num_queues: QUEUES as u16, queue_size: RING_SIZE, ..Default::default() };
        let (description, file) = front_end.frontend.get_inflight_fd(&wanted).unwrap();
        Self { description, file }
    }
}

/// Sets the device up as a front-end does after it has lost the back-end. Stops half-way before the step with the number
/// `give_up`; false then.
fn set_up(driver: &mut Driver, buffer: &Buffer, give_up: u64) -> bool {
    let front_end = &mut driver.front_end;
    if give_up == 0 {
        return false;
    }
    front_end.repeat_mem_table();
    if give_up == 1 {
        return false;
    }
    front_end.frontend.set_inflight_fd(&buffer.description, buffer.file.as_raw_fd()).unwrap();
    for (step, queue) in (2..).zip(&mut driver.queues) {
        if give_up == step {
            return false;
        }
        // The used ring is all that a front-end knows of a back-end that is gone.
        let base = queue.used_index(&front_end.memory);
        queue.start(front_end, base);
        queue.kick();
    }
    true
}

fn start(image: &Path) -> Program {
    Program::start(image, &["--queues", "2"])
}

#[test]
fn kills_lose_and_repeat_nothing() {
    let begin = Instant::now();
    let image = ImageFile::new(BLOCKS * BLOCK);
    let mut program = start(&image.path());
    let mut driver = Driver::new(&program, Random::seeded());
    let buffer = Buffer::ask_for(&mut driver.front_end);
    for queue in 0..QUEUES {
        driver.offer(queue);
    }
    let mut killed_with_requests = 0;
    for _ in 0..KILLS {
        // One in eight dies while it is set up.
        let give_up = driver.random.below(8 * 4);
        if set_up(&mut driver, &buffer, give_up) {
            // Half of them die while they take over, the others at work.
            let limit_us = if driver.random.below(2) == 0 { 500 } else { 20_000 };
            let limit = Duration::from_micros(driver.random.below(limit_us));
            driver.work(limit);
        }
        program.signal(Signal::KILL);
        program.wait();
        for queue in 0..QUEUES {
            driver.take(queue);
        }
        killed_with_requests += u32::from(driver.outstanding() > 0);
        for queue in 0..QUEUES {
            driver.offer(queue);
        }
        program = start(&image.path());
        driver.front_end.reconnect(&program.socket());
    }
    assert!(set_up(&mut driver, &buffer, u64::MAX));
    driver.drain();
    let content = File::open(image.path()).unwrap();
    for (block, seed) in (0..).zip(&driver.contents) {
        let mut bytes = vec![0; BLOCK as usize];
        content.read_exact_at(&mut bytes, block * BLOCK).unwrap();
        assert!(bytes == content_of(*seed), "block {block} does not hold its last write");
    }
    eprintln!(
        "{KILLS} kills, {killed_with_requests} of them with requests in flight, {} requests, {:?}",
        driver.completed,
        begin.elapsed()
    );
    assert!(killed_with_requests > KILLS / 2, "only {killed_with_requests} kills met requests");
    assert!(driver.completed > u64::from(KILLS) * 10, "only {} requests", driver.completed);
}
