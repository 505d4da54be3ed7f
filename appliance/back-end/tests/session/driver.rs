//! A driver's ring in memory that the test maps itself.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vvu_protocol::address::{FileOffset as Offset, GuestAddress as Guest, UserAddress};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{VringAddresses, VringState};

use crate::front_end::{Events, FrontEnd, NamedMemory, Request, wait_for};

/// Difference of the front-end's addresses to guest-physical ones: far, so that a missed translation fails.
pub(crate) const USER_BASE: u64 = 0x7a00_0000_0000;

pub(crate) const PAGE: u64 = 4096;

/// Guest-physical memory of the test, which begins at 0.
pub(crate) const MEMORY_LEN: u64 = 4 << 20;

/// Where requests have their data; the rings are before it.
pub(crate) const DATA: u64 = 1 << 20;

pub(crate) fn region(start: u64, len: u64, offset: u64) -> MemoryRegion {
    MemoryRegion {
        guest_address: Guest(start),
        size: len,
        user_address: UserAddress(USER_BASE + start),
        mmap_offset: Offset(offset),
    }
}

/// Memory of the driver VM.
pub(crate) struct DriverMemory {
    pub(crate) named: NamedMemory,
    pub(crate) map: GuestMemoryMmap<()>,
}

impl DriverMemory {
    pub(crate) fn new() -> Self {
        let named = NamedMemory::new(MEMORY_LEN);
        let file = FileOffset::new(named.file.try_clone().unwrap(), 0);
        let mapping = MmapRegion::from_file(file, usize::try_from(MEMORY_LEN).unwrap()).unwrap();
        let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
        Self { named, map: GuestMemoryMmap::from_regions(vec![region]).unwrap() }
    }

    /// The whole, as a region.
    pub(crate) fn region(&self) -> (MemoryRegion, OwnedFd) {
        (region(0, MEMORY_LEN, 0), self.named.fd())
    }

    pub(crate) fn announce(&self, front_end: &mut FrontEnd) {
        front_end.done(Request::SetMemTable(vec![self.region()]));
    }

    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.map.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// A ring of [`SIZE`] entries at a place of its own for each index.
pub(crate) struct Queue {
    pub(crate) index: u8,
    pub(crate) events: Events,
    /// Guest-physical.
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    avail_index: u16,
    used_seen: u16,
}

pub(crate) const SIZE: u16 = 16;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

impl Queue {
    /// Each part is in a page of its own.
    pub(crate) fn new(index: u8) -> Self {
        let base = 0x1_0000 + u64::from(index) * 0x1_0000;
        Self {
            index,
            events: Events::new(),
            descriptors: base,
            available: base + 0x3000,
            used: base + 0x6000,
            avail_index: 0,
            used_seen: 0,
        }
    }

    /// Addresses as the front-end names them.
    pub(crate) fn addresses(&self, log: Option<u64>) -> VringAddresses {
        VringAddresses {
            index: u32::from(self.index),
            flags: u32::from(log.is_some()),
            descriptors: USER_BASE + self.descriptors,
            used: USER_BASE + self.used,
            available: USER_BASE + self.available,
            log: log.unwrap_or(0),
        }
    }

    pub(crate) fn set_up(&self, front_end: &mut FrontEnd, base: u16, addresses: VringAddresses) {
        let index = u32::from(self.index);
        front_end.done(Request::SetVringNum(VringState { index, num: u32::from(SIZE) }));
        front_end.done(Request::SetVringBase(VringState { index, num: u32::from(base) }));
        front_end.done(Request::SetVringAddr(addresses));
    }

    pub(crate) fn start(&self, front_end: &mut FrontEnd, base: u16) {
        self.set_up(front_end, base, self.addresses(None));
        front_end.start(self.index, &self.events);
    }

    /// Offers a request at `head` and `head + 1`: `len` bytes at `from` are to be copied to `to`.
    pub(crate) fn offer(&mut self, memory: &DriverMemory, head: u16, from: u64, to: u64, len: u32) {
        let descriptor = |index: u16, address: u64, flags: u16, next: u16| {
            let place = GuestAddress(self.descriptors + 16 * u64::from(index));
            memory.map.write_obj(address, place).unwrap();
            memory.map.write_obj(len, GuestAddress(place.0 + 8)).unwrap();
            memory.map.write_obj(flags, GuestAddress(place.0 + 12)).unwrap();
            memory.map.write_obj(next, GuestAddress(place.0 + 14)).unwrap();
        };
        descriptor(head, from, NEXT, head + 1);
        descriptor(head + 1, to, WRITE, 0);
        let entry = self.available + 4 + 2 * u64::from(self.avail_index % SIZE);
        memory.map.write_obj(head, GuestAddress(entry)).unwrap();
        self.avail_index = self.avail_index.wrapping_add(1);
        memory.map.store(self.avail_index, GuestAddress(self.available + 2), Ordering::Release).unwrap();
    }

    pub(crate) fn kick(&self) {
        rustix::io::write(&self.events.kick, &1u64.to_ne_bytes()).unwrap();
    }

    pub(crate) fn used_index(&self, memory: &DriverMemory) -> u16 {
        memory.map.load(GuestAddress(self.used + 2), Ordering::Acquire).unwrap()
    }

    /// Sets the indices of both rings, as after requests that are long done.
    pub(crate) fn set_indices(&mut self, memory: &DriverMemory, index: u16) {
        (self.avail_index, self.used_seen) = (index, index);
        memory.map.write_obj(index, GuestAddress(self.available + 2)).unwrap();
        memory.map.write_obj(index, GuestAddress(self.used + 2)).unwrap();
    }

    /// The next used head; waits for it.
    pub(crate) fn wait_used(&mut self, memory: &DriverMemory) -> (u16, u32) {
        while self.used_index(memory) == self.used_seen {
            wait_for(&self.events.call, "call");
        }
        let entry = self.used + 4 + 8 * u64::from(self.used_seen % SIZE);
        self.used_seen = self.used_seen.wrapping_add(1);
        let head: u32 = memory.map.read_obj(GuestAddress(entry)).unwrap();
        (u16::try_from(head).unwrap(), memory.map.read_obj(GuestAddress(entry + 4)).unwrap())
    }

    /// Has `text` copied from one page to another one and looks whether it was.
    pub(crate) fn echo(&mut self, memory: &DriverMemory, text: &str) {
        let (from, to) = (DATA + PAGE, DATA + 2 * PAGE);
        memory.map.write_slice(text.as_bytes(), GuestAddress(from)).unwrap();
        let len = u32::try_from(text.len()).unwrap();
        self.offer(memory, 0, from, to, len);
        self.kick();
        assert_eq!(self.wait_used(memory), (0, len));
        assert_eq!(memory.bytes(to, text.len()), text.as_bytes());
    }
}

/// A front-end with memory and one running ring.
pub(crate) fn running() -> (FrontEnd, DriverMemory, Queue) {
    let mut front_end = FrontEnd::negotiated();
    let memory = DriverMemory::new();
    memory.announce(&mut front_end);
    let queue = Queue::new(0);
    queue.start(&mut front_end, 0);
    (front_end, memory, queue)
}

/// Waits for what no event tells of.
pub(crate) fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + crate::front_end::LIMIT;
    while !happened() {
        assert!(std::time::Instant::now() < deadline, "{what} did not happen");
        std::thread::yield_now();
    }
}
