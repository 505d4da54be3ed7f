//! A driver's ring in memory that the test maps itself.

use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vvu_protocol::address::{FileOffset as Offset, GuestAddress as Guest, UserAddress};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{VringAddresses, VringState};
pub(crate) use vvu_test_driver::event::wait_until;
pub(crate) use vvu_test_driver::front_end::USER_BASE;
use vvu_test_driver::front_end::{map_region, region_of};
use vvu_test_driver::ring::{Desc, Memory, NEXT, Ring, WRITE};

use crate::front_end::{Events, FrontEnd, NamedMemory, Request, wait_for};

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
    pub(crate) map: Memory,
}

impl DriverMemory {
    pub(crate) fn new() -> Self {
        let named = NamedMemory::new(MEMORY_LEN);
        let region = map_region(&named.file, &region_of(&named.file, 0, MEMORY_LEN, 0));
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

/// A ring of [`SIZE`] entries at a place of its own for each index, with its events.
pub(crate) struct Queue {
    pub(crate) index: u8,
    pub(crate) events: Events,
    ring: Ring,
}

impl Deref for Queue {
    type Target = Ring;

    fn deref(&self) -> &Ring {
        &self.ring
    }
}

impl DerefMut for Queue {
    fn deref_mut(&mut self) -> &mut Ring {
        &mut self.ring
    }
}

pub(crate) const SIZE: u16 = 16;

impl Queue {
    /// Each part is in a page of its own.
    pub(crate) fn new(index: u8) -> Self {
        let base = 0x1_0000 + u64::from(index) * 0x1_0000;
        Self { index, events: Events::new(), ring: Ring::new(SIZE, base, base + 0x3000, base + 0x6000) }
    }

    /// Addresses as the front-end names them.
    pub(crate) fn addresses(&self, log: Option<u64>) -> VringAddresses {
        VringAddresses {
            index: u32::from(self.index),
            flags: u32::from(log.is_some()),
            descriptors: USER_BASE + self.desc,
            used: USER_BASE + self.used,
            available: USER_BASE + self.avail,
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
        self.put_desc(&memory.map, head, Desc { address: from, len, flags: NEXT, next: head + 1 });
        self.put_desc(&memory.map, head + 1, Desc { address: to, len, flags: WRITE, next: 0 });
        self.ring.offer(&memory.map, head);
        self.publish(&memory.map);
    }

    pub(crate) fn kick(&self) {
        rustix::io::write(&self.events.kick, &1u64.to_ne_bytes()).unwrap();
    }

    pub(crate) fn used_index(&self, memory: &DriverMemory) -> u16 {
        self.ring.used_index(&memory.map)
    }

    /// Sets the indices of both rings, as after requests that are long done.
    pub(crate) fn set_indices(&mut self, memory: &DriverMemory, index: u16) {
        self.ring.set_indices(&memory.map, index);
    }

    /// The next used head; waits for it.
    pub(crate) fn wait_used(&mut self, memory: &DriverMemory) -> (u16, u32) {
        loop {
            if let Some(used) = self.take_used(&memory.map) {
                return used;
            }
            wait_for(&self.events.call, "call");
        }
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
