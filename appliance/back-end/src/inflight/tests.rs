use std::cell::RefCell;
use std::rc::Rc;

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

/// What happens in the world, in order; a crash may come after any of these.
#[derive(Debug, Clone)]
enum Step {
    /// The tracker stores the lowest bytes of a number at an offset.
    Store(usize, [u8; 8], usize),
    /// The driver makes a head available.
    Offer(u16),
    /// The back-end stores the `idx` of the used ring, and with this one store returns the whole batch.
    Return(Vec<u16>),
}

/// Memory that remembers each store; the world's other steps stand in the same list.
#[derive(Debug, Clone)]
struct Recorder {
    bytes: Rc<RefCell<Vec<u8>>>,
    steps: Rc<RefCell<Vec<Step>>>,
}

impl Recorder {
    fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Rc::new(RefCell::new(bytes)), steps: Rc::default() }
    }

    fn load<const N: usize>(&self, offset: usize) -> [u8; N] {
        self.bytes.borrow()[offset..offset + N].try_into().unwrap()
    }

    fn store(&self, offset: usize, bytes: &[u8]) {
        let mut padded = [0; 8];
        padded[..bytes.len()].copy_from_slice(bytes);
        self.steps.borrow_mut().push(Step::Store(offset, padded, bytes.len()));
        self.bytes.borrow_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

impl QueueMemory for Recorder {
    fn load_8(&self, offset: usize) -> u8 {
        u8::from_le_bytes(self.load(offset))
    }
    fn load_16(&self, offset: usize) -> u16 {
        assert!(offset.is_multiple_of(2));
        u16::from_le_bytes(self.load(offset))
    }
    fn load_64(&self, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(8));
        u64::from_le_bytes(self.load(offset))
    }
    fn store_8(&self, offset: usize, value: u8) {
        self.store(offset, &value.to_le_bytes());
    }
    fn store_16(&self, offset: usize, value: u16) {
        self.store(offset, &value.to_le_bytes());
    }
    fn store_64(&self, offset: usize, value: u64) {
        self.store(offset, &value.to_le_bytes());
    }
}

const RING_SIZE: u16 = 6;

/// What survives a crash: the buffer, the rings, and what the driver knows.
#[derive(Debug, Clone)]
struct World {
    buffer: Vec<u8>,
    /// Every head that was ever made available.
    offered: Vec<u16>,
    /// Every head that was ever returned.
    returned: Vec<u16>,
    /// The rings' indices at the beginning.
    first_idx: u16,
}

impl World {
    fn used_idx(&self) -> u16 {
        self.first_idx.wrapping_add(u16::try_from(self.returned.len()).unwrap())
    }

    /// Heads that the driver waits for, in the order in which it made them available.
    fn outstanding(&self) -> Vec<u16> {
        let mut outstanding = Vec::new();
        let mut returned = self.returned.clone();
        // Each return of a head ends the oldest of its offers.
        for head in &self.offered {
            match returned.iter().position(|returned| returned == head) {
                Some(position) => drop(returned.remove(position)),
                None => outstanding.push(*head),
            }
        }
        outstanding
    }

    fn apply(&mut self, step: &Step) {
        match step {
            Step::Store(offset, bytes, len) => self.buffer[*offset..][..*len].copy_from_slice(&bytes[..*len]),
            Step::Offer(head) => self.offered.push(*head),
            Step::Return(heads) => self.returned.extend(heads),
        }
    }

    /// A back-end starts now: it has to find exactly what is outstanding, in flight or still to be taken.
    fn check_recovery(&self) {
        let mut tracker = Tracker::new(Recorder::new(self.buffer.clone()), RING_SIZE, RING_SIZE);
        let recovered = tracker.recover(self.used_idx());
        let taken = usize::from(recovered.next_avail.wrapping_sub(self.first_idx));
        assert!(taken <= self.offered.len(), "taken what was never offered: {recovered:?} {self:?}");
        let found: Vec<u16> = recovered.heads.iter().chain(&self.offered[taken..]).copied().collect();
        assert_eq!(found, self.outstanding(), "{recovered:?} {self:?}");
    }
}

/// What the driver and the back-end do next.
#[derive(Debug, Clone)]
enum Act {
    Offer(Index),
    Take(usize),
    /// Returns a batch; which ones is said by the indices.
    Return(Vec<Index>),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        any::<Index>().prop_map(Act::Offer),
        (1_usize..4).prop_map(Act::Take),
        prop::collection::vec(any::<Index>(), 1..4).prop_map(Act::Return),
    ]
}

/// One life of a back-end, from its recovery to its crash, which comes after any step that `crash` names. Every moment at
/// which it might have crashed instead is checked too.
fn live(world: &mut World, acts: &[Act], crash: Index) {
    let recorder = Recorder::new(world.buffer.clone());
    let mut tracker = Tracker::new(recorder.clone(), RING_SIZE, RING_SIZE);
    let recovered = tracker.recover(world.used_idx());
    let mut in_flight = recovered.heads;
    let mut next = usize::from(recovered.next_avail.wrapping_sub(world.first_idx));
    let mut now = world.clone();
    let world_step = |now: &mut World, step: Step| {
        now.apply(&step);
        recorder.steps.borrow_mut().push(step);
    };
    for act in acts {
        match act {
            Act::Offer(which) => {
                let outstanding = now.outstanding();
                let free: Vec<u16> = (0..RING_SIZE).filter(|head| !outstanding.contains(head)).collect();
                if !free.is_empty() {
                    world_step(&mut now, Step::Offer(free[which.index(free.len())]));
                }
            }
            Act::Take(count) => {
                for head in now.offered[next..].iter().take(*count) {
                    tracker.start(*head);
                    in_flight.push(*head);
                    next += 1;
                }
            }
            Act::Return(which) => {
                let mut batch = Vec::new();
                for index in which {
                    if !in_flight.is_empty() {
                        batch.push(in_flight.remove(index.index(in_flight.len())));
                    }
                }
                for head in &batch {
                    tracker.begin_batch(*head);
                }
                world_step(&mut now, Step::Return(batch));
                tracker.end_batch(now.used_idx());
            }
        }
    }
    let steps = recorder.steps.borrow().clone();
    let mut moment = world.clone();
    let crash = crash.index(steps.len() + 1);
    for (index, step) in steps.iter().enumerate() {
        if index == crash {
            *world = moment.clone();
        }
        moment.apply(step);
        moment.check_recovery();
    }
    if crash == steps.len() {
        *world = moment;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever driver and back-end do, and whenever the back-end crashes, even while it recovers: what was not returned is
    /// found, once and in order; what was returned is not.
    #[test]
    fn a_crash_after_any_store_loses_and_repeats_nothing(
        first_idx in prop_oneof![Just(0), Just(u16::MAX - 2), any::<u16>()],
        mut buffer in prop::collection::vec(0..=1_u8, part_len(RING_SIZE)),
        lives in prop::collection::vec((prop::collection::vec(act(), 0..25), any::<Index>()), 1..6),
    ) {
        // Not initialised: the rest means nothing.
        buffer[region::VERSION..][..2].fill(0);
        let mut world = World { buffer, offered: Vec::new(), returned: Vec::new(), first_idx };
        for (acts, crash) in lives {
            live(&mut world, &acts, crash);
        }
    }

    /// Whatever the front-end writes into the buffer: heads of the ring, each once, and work goes on.
    #[test]
    fn garbage_is_bounded(
        mut bytes in prop::collection::vec(prop_oneof![Just(0_u8), Just(1), any::<u8>()], part_len(RING_SIZE)),
        initialised: bool,
        used_idx: u16,
    ) {
        if initialised {
            bytes[region::VERSION..][..2].copy_from_slice(&1_u16.to_le_bytes());
        }
        let mut tracker = Tracker::new(Recorder::new(bytes), RING_SIZE - 1, RING_SIZE);
        let recovered = tracker.recover(used_idx);
        let mut sorted = recovered.heads.clone();
        sorted.sort_unstable();
        sorted.dedup();
        prop_assert_eq!(sorted.len(), recovered.heads.len());
        prop_assert!(recovered.heads.iter().all(|head| *head < RING_SIZE - 1));
        prop_assert_eq!(recovered.next_avail, used_idx.wrapping_add(u16::try_from(recovered.heads.len()).unwrap()));
        tracker.discard();
        prop_assert!(tracker.recover(used_idx).heads.is_empty());
        tracker.start(3);
        tracker.start(u16::MAX);
        tracker.begin_batch(u16::MAX);
        prop_assert_eq!(tracker.recover(used_idx).heads, [3]);
    }
}

fn described(file_len: u64) -> (File, Inflight) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(file_len).unwrap();
    (file, Inflight { mmap_size: file_len, mmap_offset: FileOffset(0), queue_count: 2, queue_size: 64 })
}

/// SPDK #3766: requests were taken, none was returned yet, and the ring's index is not 0, as after a migration. Recovery
/// took `last_batch_head`, which is 0 then, for a batch, and request 0 was lost.
#[test]
fn spdk_3766_no_batch_yet_clears_nothing() {
    let (buffer, _file, _description) = InflightBuffer::create(1, 64).unwrap();
    let mut queue = buffer.queue(0, 64).unwrap();
    assert_eq!(queue.recover(500), Recovered { heads: vec![], next_avail: 500 });
    queue.start(0);
    queue.start(7);
    let mut next = buffer.queue(0, 64).unwrap();
    assert_eq!(next.recover(500), Recovered { heads: vec![0, 7], next_avail: 502 });

    // The same left by a back-end that has never noted the ring's index.
    for ring_idx in [2, 63, 64, 500] {
        buffer.mapping.half_word(region::USED_IDX).unwrap().store(0, Ordering::Relaxed);
        let recovered = buffer.queue(0, 64).unwrap().recover(ring_idx);
        assert_eq!(recovered, Recovered { heads: vec![0, 7], next_avail: ring_idx + 2 });
    }
}

/// Cloud Hypervisor #8592: a back-end that starts at the available ring's index loses the requests in flight.
#[test]
fn cloud_hypervisor_8592_the_position_is_behind_what_was_taken() {
    let (buffer, _file, _description) = InflightBuffer::create(1, 64).unwrap();
    let mut queue = buffer.queue(0, 64).unwrap();
    queue.recover(0);
    for head in [5, 6, 7, 8] {
        queue.start(head);
    }
    // The second and the fourth are returned out of order; the driver offers them again, they are not taken.
    for (used_idx, head) in [(1, 6), (2, 8)] {
        queue.begin_batch(head);
        queue.end_batch(used_idx);
    }
    let recovered = buffer.queue(0, 64).unwrap().recover(2);
    assert_eq!(recovered, Recovered { heads: vec![5, 7], next_avail: 4 });
}

#[test]
fn queues_do_not_share_their_parts() {
    let (buffer, file, description) = InflightBuffer::create(3, 100).unwrap();
    for index in 0..3 {
        let mut queue = buffer.queue(index, 100).unwrap();
        queue.recover(0);
        for head in 0..=index {
            queue.start(99 - head);
        }
    }
    // Another process has the same memory.
    let again = InflightBuffer::map(&file.into(), &description).unwrap();
    drop(buffer);
    for index in 0..3 {
        let heads = again.queue(index, 100).unwrap().recover(0).heads;
        assert_eq!(heads, (0..=index).map(|head| 99 - head).collect::<Vec<_>>());
    }
}

/// CVE-2021-3839 (DPDK) and its kin: what the description says is checked before anything is done with it.
#[test]
fn cve_2021_3839_wrong_descriptions_are_refused() {
    let (file, good) = described(1 << 20);
    InflightBuffer::map(&file, &good).unwrap();
    let refused = |description: Inflight| InflightBuffer::map(&file, &description).unwrap_err();
    assert!(matches!(refused(Inflight { queue_count: 0, ..good }), InflightError::NoQueue));
    for queue_size in [0, 32769, u16::MAX] {
        assert!(matches!(refused(Inflight { queue_size, ..good }), InflightError::QueueSize { .. }));
    }
    for (queue_count, queue_size) in [(u16::MAX, 64), (u16::MAX, 32768), (2, 32768), (1000, 65)] {
        let error = refused(Inflight { queue_count, queue_size, ..good });
        assert!(matches!(error, InflightError::TooShort { mmap_size: 0x10_0000, .. }), "{error}");
    }
    for mmap_size in [0, 1, 2 * 1088 - 1] {
        assert!(matches!(refused(Inflight { mmap_size, ..good }), InflightError::TooShort { .. }));
    }
    InflightBuffer::map(&file, &Inflight { mmap_size: 2 * 1088, ..good }).unwrap();
    for offset in [1, 64, 4095] {
        let error = refused(Inflight { mmap_offset: FileOffset(offset), ..good });
        assert!(matches!(error, InflightError::Alignment { .. }), "{error}");
    }
    for (mmap_offset, mmap_size) in
        [(4096, 1 << 20), (1 << 20, 2176), (0, 1 << 40), (0, u64::MAX), (u64::MAX - 4095, 2176), (1 << 63, 2176)]
    {
        let error = refused(Inflight { mmap_offset: FileOffset(mmap_offset), mmap_size, ..good });
        assert!(matches!(error, InflightError::Map(_)), "{error}");
    }
    InflightBuffer::map(&file, &Inflight { mmap_offset: FileOffset(4096), mmap_size: 8192, ..good }).unwrap();
}

#[test]
fn a_ring_that_the_buffer_is_not_for_is_refused() {
    let (file, description) = described(1 << 20);
    let buffer = InflightBuffer::map(&file, &description).unwrap();
    assert!(matches!(buffer.queue(2, 64), Err(InflightError::NoSuchQueue { index: 2, queue_count: 2 })));
    for ring_size in [0, 65, 32768] {
        assert!(matches!(buffer.queue(1, ring_size), Err(InflightError::RingSize { .. })));
    }
    buffer.queue(1, 1).unwrap();
    buffer.mapping.half_word(region::VERSION).unwrap().store(2, Ordering::Relaxed);
    assert!(matches!(buffer.queue(0, 64), Err(InflightError::Format { version: 2, features: 0 })));
    buffer.mapping.half_word(region::VERSION).unwrap().store(1, Ordering::Relaxed);
    buffer.mapping.word(region::FEATURES).unwrap().store(1, Ordering::Relaxed);
    assert!(matches!(buffer.queue(0, 64), Err(InflightError::Format { version: 1, features: 1 })));
}

/// CVE-2020-10726 (DPDK): each repeated message left a mapping behind.
#[test]
fn cve_2020_10726_a_replaced_buffer_leaves_nothing() {
    let mapped = |inode: u64| {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.split_whitespace().nth(4) == Some(&inode.to_string())).count()
    };
    let (buffer, file, description) = InflightBuffer::create(1, 64).unwrap();
    let inode = rustix::fs::fstat(&file).unwrap().st_ino;
    let file = File::from(file);
    let mut current = buffer;
    for _ in 0..100 {
        current = InflightBuffer::map(&file, &description).unwrap();
        assert_eq!(mapped(inode), 1);
    }
    let queue = current.queue(0, 64).unwrap();
    drop(current);
    assert_eq!(mapped(inode), 1, "a queue keeps the buffer");
    drop(queue);
    assert_eq!(mapped(inode), 0);
}

#[test]
fn a_created_buffer_can_be_neither_cut_nor_extended() {
    let (_buffer, file, description) = InflightBuffer::create(4, 1024).unwrap();
    assert_eq!(description.mmap_size, 69632, "4 parts of 16,448 bytes, in whole pages");
    for len in [0, description.mmap_size - 4096, description.mmap_size + 4096] {
        assert_eq!(rustix::fs::ftruncate(&file, len).unwrap_err(), rustix::io::Errno::PERM);
    }
    assert!(matches!(InflightBuffer::create(0, 1), Err(InflightError::NoQueue)));
    assert!(matches!(InflightBuffer::create(1, 0), Err(InflightError::QueueSize { .. })));
}
