//! The driver's side of a split virtqueue (virtio 1.3, section 2.7), in memory that the bridge maps too.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vvu_socket::event::{self, Event};

use super::within;

/// Entries of the ring: the `vq_size` of the control device.
pub(crate) const SIZE: u16 = 64;

/// Length of each buffer in bytes.
pub(crate) const BUFFER_LEN: u32 = 4096;

const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x1_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// One queue, its buffers, and its two events.
#[derive(Debug)]
pub(crate) struct DriverRing {
    memory: GuestMemoryMmap,
    base: GuestAddress,
    available: u16,
    used: u16,
    /// Signals the device.
    pub(crate) kick: OwnedFd,
    call: Event,
}

/// One entry of the descriptor table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
    pub(crate) next: Option<u16>,
}

impl DriverRing {
    /// An empty queue at `base` of the appliance's memory.
    pub(crate) fn new(memory: &GuestMemoryMmap, base: GuestAddress) -> Self {
        memory.write_slice(&vec![0; usize::try_from(BUFFERS).unwrap()], base).unwrap();
        let call = Event::new(event::create().unwrap()).unwrap();
        Self { memory: memory.clone(), base, available: 0, used: 0, kick: event::create().unwrap(), call }
    }

    /// Guest-physical addresses of descriptor table, available ring and used ring.
    pub(crate) fn addresses(&self) -> (u64, u64, u64) {
        (self.base.0, self.base.0 + AVAILABLE, self.base.0 + USED)
    }

    const fn at(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.base.0 + offset)
    }

    /// The event that the device signals, for the VMM to hand out.
    pub(crate) fn call(&self) -> OwnedFd {
        use std::os::fd::AsFd;
        self.call.as_fd().try_clone_to_owned().unwrap()
    }

    /// Guest-physical address of buffer `index`.
    pub(crate) fn buffer(&self, index: u16) -> u64 {
        self.base.0 + BUFFERS + u64::from(index) * u64::from(BUFFER_LEN)
    }

    /// Writes a descriptor, whatever is in it.
    pub(crate) fn describe(&self, index: u16, descriptor: Descriptor) {
        let Descriptor { address, len, writable, next } = descriptor;
        let flags = if writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.unwrap_or(0).to_le_bytes());
        self.memory.write_slice(&bytes, self.at(u64::from(index) * 16)).unwrap();
    }

    /// Puts a chain into the available ring and tells the device.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + u64::from(self.available % SIZE) * 2;
        self.memory.write_slice(&head.to_le_bytes(), self.at(slot)).unwrap();
        self.set_available_index(self.available.wrapping_add(1));
    }

    /// Sets the available index, and tells the device.
    pub(crate) fn set_available_index(&mut self, index: u16) {
        self.available = index;
        let place = self.at(AVAILABLE + 2);
        self.memory.store(index.to_le(), place, Ordering::Release).unwrap();
        event::signal(&self.kick).unwrap();
    }

    pub(crate) fn available_index(&self) -> u16 {
        self.available
    }

    /// Offers buffer `index` for the device to write.
    pub(crate) fn offer_buffer(&mut self, index: u16) {
        let address = self.buffer(index);
        self.describe(index, Descriptor { address, len: BUFFER_LEN, writable: true, next: None });
        self.offer(index);
    }

    /// Offers `bytes` for the device to read, in buffer `index`.
    pub(crate) fn offer_bytes(&mut self, index: u16, bytes: &[u8]) {
        let address = self.buffer(index);
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.describe(index, Descriptor { address, len, writable: false, next: None });
        self.offer(index);
    }

    /// Whether the device has given a buffer back that was not looked at yet.
    pub(crate) fn has_used(&self) -> bool {
        let place = self.at(USED + 2);
        let index: u16 = self.memory.load(place, Ordering::Acquire).unwrap();
        u16::from_le(index) != self.used
    }

    /// Waits for the next buffer that the device gives back: its index, and the bytes that were written into it.
    pub(crate) async fn next_used(&mut self, what: &str) -> (u16, Vec<u8>) {
        while !self.has_used() {
            within(what, self.call.signalled()).await.unwrap();
        }
        let place = USED + 4 + u64::from(self.used % SIZE) * 8;
        let mut element = [0; 8];
        self.memory.read_slice(&mut element, self.at(place)).unwrap();
        self.used = self.used.wrapping_add(1);
        let (head, len) = element.split_at(4);
        let head = u16::try_from(u32::from_le_bytes(head.try_into().unwrap())).unwrap();
        let mut bytes = vec![0; usize::try_from(u32::from_le_bytes(len.try_into().unwrap())).unwrap()];
        self.memory.read_slice(&mut bytes, GuestAddress(self.buffer(head))).unwrap();
        (head, bytes)
    }
}
