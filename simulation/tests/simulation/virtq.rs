//! A split virtqueue in driver memory (virtio 1.3, section 2.7): where its parts lie, and the driver's side of it. Each
//! request is two descriptors, one to read and one to write, and has a number that no other one has.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::file::MappedFile;

/// All rings lie before this offset of the driver VM's first file.
pub(crate) const RINGS_END: u64 = 0x4_0000;

/// Distance of one queue's ring from the next.
const RING_LEN: u64 = 0x1_0000;

pub(crate) const AVAILABLE: u64 = 0x1000;
pub(crate) const USED: u64 = 0x2000;

/// Requests of a queue lie in a file from here on.
const REQUESTS: u64 = 0x10_0000;
const REQUESTS_OF_QUEUE: u64 = 0x1000;
pub(crate) const READ_LEN: u32 = 16;
pub(crate) const WRITE_LEN: u32 = 16;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// What the back-end writes for request `id`.
pub(crate) const fn response(id: u64) -> u64 {
    id.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Offset of a queue's ring in the driver VM's first file.
pub(crate) const fn ring_offset(queue: u16) -> u64 {
    RING_LEN * (queue as u64 + 1)
}

/// A request that the driver waits for.
#[derive(Debug)]
struct Outstanding {
    id: u64,
    file: Rc<MappedFile>,
}

/// The driver's side.
#[derive(Debug)]
pub(crate) struct DriverQueue {
    index: u16,
    pub(crate) size: u16,
    memory: Rc<MappedFile>,
    pub(crate) available: u16,
    used: u16,
    outstanding: BTreeMap<u16, Outstanding>,
    next_slot: u16,
}

impl DriverQueue {
    /// An empty ring.
    pub(crate) fn new(index: u16, size: u16, memory: &Rc<MappedFile>) -> Self {
        memory.write(ring_offset(index), &vec![0; usize::try_from(RING_LEN).unwrap()]);
        let (memory, outstanding) = (Rc::clone(memory), BTreeMap::new());
        Self { index, size, memory, available: 0, used: 0, outstanding, next_slot: 0 }
    }

    fn base(&self) -> u64 {
        ring_offset(self.index)
    }

    pub(crate) fn used_index(&self) -> u16 {
        u16::from_le(self.memory.load(self.base() + USED + 2))
    }

    /// Requests that were not completed.
    pub(crate) fn outstanding(&self) -> impl Iterator<Item = u64> {
        self.outstanding.values().map(|request| request.id)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.outstanding.is_empty()
    }

    /// Whether a request lies in this file.
    pub(crate) fn uses(&self, file: &Rc<MappedFile>) -> bool {
        self.outstanding.values().any(|request| Rc::ptr_eq(&request.file, file))
    }

    /// Submits request `id`, whose buffers are in `file`, which is at `guest_address`. Fails if the ring is full.
    pub(crate) fn submit(&mut self, id: u64, file: &Rc<MappedFile>, guest_address: u64) -> bool {
        let slots = self.size / 2;
        let free = (0..slots)
            .map(|step| (self.next_slot + step) % slots)
            .find(|slot| !self.outstanding.contains_key(&(slot * 2)));
        let Some(slot) = free else { return false };
        // Not always the next one, so that heads come in any order.
        self.next_slot = (slot + 1 + u16::try_from(id % 3).unwrap()) % slots;
        let head = slot * 2;
        let place = REQUESTS + u64::from(self.index) * REQUESTS_OF_QUEUE + u64::from(slot) * 64;
        file.store(place, id.to_le());
        file.store(place + 8, (!id).to_le());
        file.store(place + 16, 0_u64);
        self.describe(head, guest_address + place, READ_LEN, NEXT, head + 1);
        self.describe(head + 1, guest_address + place + 16, WRITE_LEN, WRITE, 0);
        let entry = self.base() + AVAILABLE + 4 + u64::from(self.available % self.size) * 2;
        self.memory.store(entry, head.to_le());
        self.available = self.available.wrapping_add(1);
        self.memory.store(self.base() + AVAILABLE + 2, self.available.to_le());
        self.outstanding.insert(head, Outstanding { id, file: Rc::clone(file) });
        true
    }

    fn describe(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let place = self.base() + u64::from(index) * 16;
        self.memory.store(place, address.to_le());
        self.memory.store(place + 8, len.to_le());
        self.memory.store(place + 12, flags.to_le());
        self.memory.store(place + 14, next.to_le());
    }

    /// Takes what the back-end has completed: each request once, and with its own answer.
    pub(crate) fn harvest(&mut self) -> Vec<u64> {
        let mut completed = Vec::new();
        while self.used != self.used_index() {
            let element = self.base() + USED + 4 + u64::from(self.used % self.size) * 8;
            let head = u16::try_from(u32::from_le(self.memory.load(element))).unwrap();
            self.used = self.used.wrapping_add(1);
            let request = self.outstanding.remove(&head);
            let Outstanding { id, file } = request.unwrap_or_else(|| {
                panic!("queue {}: head {head} is completed at {}, and is not outstanding", self.index, self.used)
            });
            let place = REQUESTS + u64::from(self.index) * REQUESTS_OF_QUEUE + u64::from(head / 2) * 64;
            assert_eq!(u64::from_le(file.load(place + 16)), response(id), "request {id}: answer in driver memory");
            completed.push(id);
        }
        completed
    }
}
