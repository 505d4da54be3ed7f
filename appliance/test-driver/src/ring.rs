//! A split ring, driver's side (virtio 1.3, section 2.7).

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Memory of the driver VM, as the test maps it.
pub type Memory = GuestMemoryMmap<()>;

/// Flag of a descriptor: another one follows.
pub const NEXT: u16 = 1;

/// Flag of a descriptor: the device writes.
pub const WRITE: u16 = 2;

/// Flag of a descriptor: it is a table of descriptors.
pub const INDIRECT_FLAG: u16 = 4;

/// One descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Desc {
    /// Guest-physical, or an I/O address.
    pub address: u64,
    /// In bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT_FLAG`].
    pub flags: u16,
    /// The descriptor that follows.
    pub next: u16,
}

impl Desc {
    /// As the device reads it.
    #[must_use]
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// See the module's text. All addresses are guest-physical.
#[derive(Debug, Clone, Copy)]
pub struct Ring {
    /// Entries.
    pub size: u16,
    /// Address of the descriptor table.
    pub desc: u64,
    /// Address of the available ring.
    pub avail: u64,
    /// Address of the used ring.
    pub used: u64,
    /// Position up to which heads were offered.
    pub avail_index: u16,
    /// Position up to which used heads were taken.
    pub used_seen: u16,
    /// What the driver adds to the addresses in descriptors: 0, or the start of its I/O addresses.
    pub io_base: u64,
}

impl Ring {
    /// A ring whose parts are at these addresses, which the memory has to be cleared for.
    #[must_use]
    pub fn new(size: u16, desc: u64, avail: u64, used: u64) -> Self {
        Self { size, desc, avail, used, avail_index: 0, used_seen: 0, io_base: 0 }
    }

    /// Writes a descriptor.
    pub fn put_desc(&self, memory: &Memory, index: u16, desc: Desc) {
        let desc = Desc { address: desc.address + self.io_base, ..desc };
        memory.write_slice(&desc.bytes(), GuestAddress(self.desc + 16 * u64::from(index))).unwrap();
    }

    /// Puts `head` into the available ring without telling the device.
    pub fn offer(&mut self, memory: &Memory, head: u16) {
        let entry = self.avail + 4 + 2 * u64::from(self.avail_index % self.size);
        memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.avail_index = self.avail_index.wrapping_add(1);
    }

    /// Makes visible what was offered.
    pub fn publish(&self, memory: &Memory) {
        memory.store(self.avail_index, GuestAddress(self.avail + 2), Ordering::Release).unwrap();
    }

    /// Makes visible what was offered after position `former`, and moves that; whether the device wants to be told (virtio 1.3,
    /// section 2.7.10).
    pub fn publish_and_look(&self, memory: &Memory, event_idx: bool, former: &mut u16) -> bool {
        self.publish(memory);
        fence(Ordering::SeqCst);
        let former = std::mem::replace(former, self.avail_index);
        if event_idx {
            let event = GuestAddress(self.used + 4 + 8 * u64::from(self.size));
            let event: u16 = memory.load(event, Ordering::Relaxed).unwrap();
            return self.avail_index.wrapping_sub(event).wrapping_sub(1) < self.avail_index.wrapping_sub(former);
        }
        memory.load::<u16>(GuestAddress(self.used), Ordering::Relaxed).unwrap() & 1 == 0
    }

    /// Sets the indices of both rings, as after requests that are long done.
    pub fn set_indices(&mut self, memory: &Memory, index: u16) {
        (self.avail_index, self.used_seen) = (index, index);
        memory.write_obj(index, GuestAddress(self.avail + 2)).unwrap();
        memory.write_obj(index, GuestAddress(self.used + 2)).unwrap();
    }

    /// How far the device has come.
    #[must_use]
    pub fn used_index(&self, memory: &Memory) -> u16 {
        memory.load(GuestAddress(self.used + 2), Ordering::Acquire).unwrap()
    }

    /// Takes one entry of the used ring, if there is one: the head, and how much was written.
    pub fn take_used(&mut self, memory: &Memory) -> Option<(u16, u32)> {
        if self.used_index(memory) == self.used_seen {
            return None;
        }
        let entry = self.used + 4 + 8 * u64::from(self.used_seen % self.size);
        let head: u32 = memory.read_obj(GuestAddress(entry)).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(entry + 4)).unwrap();
        self.used_seen = self.used_seen.wrapping_add(1);
        Some((u16::try_from(head).unwrap(), len))
    }

    /// Asks for an interrupt for the next entry of the used ring, should EVENT_IDX be in force.
    pub fn ask_for_call(&self, memory: &Memory) {
        let event = GuestAddress(self.avail + 4 + 2 * u64::from(self.size));
        memory.store(self.used_seen, event, Ordering::SeqCst).unwrap();
    }
}
