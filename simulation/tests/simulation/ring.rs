//! The driver's side of the control device's virtqueues (virtio 1.3, section 2.7), in the appliance's memory.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use vvu_socket::event::{self, Event};

use super::file::MappedFile;

/// Entries of the ring: the `vq_size` of the control device.
pub(crate) const SIZE: u16 = 64;

/// Buffers of one page.
pub(crate) const BUFFERS: u16 = 16;

const BUFFER_LEN: u32 = 4096;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const FIRST_BUFFER: u64 = 0x3000;

/// Bytes that a ring with its buffers takes.
pub(crate) const LEN: u64 = FIRST_BUFFER + BUFFERS as u64 * BUFFER_LEN as u64;

/// `VIRTQ_DESC_F_WRITE`.
const WRITE: u16 = 2;

/// One queue and its two events.
#[derive(Debug)]
pub(crate) struct DriverRing {
    memory: Rc<MappedFile>,
    /// Where it lies in the file, and how far the guest-physical address is from that.
    base: u64,
    distance: u64,
    available: u16,
    used: u16,
    free: Vec<u16>,
    pub(crate) kick: OwnedFd,
    pub(crate) call: Event,
}

impl DriverRing {
    pub(crate) fn new(memory: &Rc<MappedFile>, base: u64, guest_address: u64) -> Self {
        memory.write(base, &vec![0; usize::try_from(FIRST_BUFFER).unwrap()]);
        Self {
            memory: Rc::clone(memory),
            base,
            distance: guest_address - base,
            available: 0,
            used: 0,
            free: (0..BUFFERS).collect(),
            kick: event::create().unwrap(),
            call: Event::new(event::create().unwrap()).unwrap(),
        }
    }

    /// Guest-physical addresses of descriptor table, available ring and used ring.
    pub(crate) fn addresses(&self) -> [u64; 3] {
        [0, AVAILABLE, USED].map(|offset| self.base + self.distance + offset)
    }

    fn buffer(&self, index: u16) -> u64 {
        self.base + FIRST_BUFFER + u64::from(index) * u64::from(BUFFER_LEN)
    }

    fn offer(&mut self, index: u16, len: u32, flags: u16) {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&(self.buffer(index) + self.distance).to_le_bytes());
        descriptor[8..12].copy_from_slice(&len.to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        self.memory.write(self.base + u64::from(index) * 16, &descriptor);
        let slot = AVAILABLE + 4 + u64::from(self.available % SIZE) * 2;
        self.memory.store(self.base + slot, index.to_le());
        self.available = self.available.wrapping_add(1);
        self.memory.store(self.base + AVAILABLE + 2, self.available.to_le());
        event::signal(&self.kick).unwrap();
    }

    /// Offers all free buffers for the device to write.
    pub(crate) fn offer_buffers(&mut self) {
        while let Some(index) = self.free.pop() {
            self.offer(index, BUFFER_LEN, WRITE);
        }
    }

    /// Offers bytes for the device to read. There is always room: the device takes what it is given.
    pub(crate) fn offer_bytes(&mut self, bytes: &[u8]) {
        while self.take_used().is_some() {}
        let index = self.free.pop().expect("a free buffer for a frame to the bridge");
        self.memory.write(self.buffer(index), bytes);
        self.offer(index, u32::try_from(bytes.len()).unwrap(), 0);
    }

    pub(crate) fn has_used(&self) -> bool {
        u16::from_le(self.memory.load(self.base + USED + 2)) != self.used
    }

    /// The next buffer that the device gives back: what it has written. The buffer is free then.
    pub(crate) fn take_used(&mut self) -> Option<Vec<u8>> {
        if !self.has_used() {
            return None;
        }
        let element = self.base + USED + 4 + u64::from(self.used % SIZE) * 8;
        let index = u16::try_from(u32::from_le(self.memory.load(element))).unwrap();
        let mut bytes = vec![0; usize::try_from(u32::from_le(self.memory.load(element + 4))).unwrap()];
        self.used = self.used.wrapping_add(1);
        assert!(
            index < BUFFERS && !self.free.contains(&index),
            "the bridge gives buffer {index} back, which it does not have"
        );
        self.memory.read(self.buffer(index), &mut bytes);
        self.free.push(index);
        Some(bytes)
    }
}
