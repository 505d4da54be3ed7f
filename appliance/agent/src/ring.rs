//! The driver's side of a split virtqueue, as small as the control device allows: each descriptor has a buffer of one page
//! for good, and each buffer is one descriptor.
//!
//! The device is not trusted: an index that runs ahead, an id that is not in flight or a length that is beyond the buffer is
//! a [`RingError`], after which the queue is of no use any more.
//!
//! Source: virtio 1.3, section 2.7, "Split Virtqueues".

use std::sync::atomic::{Ordering, fence};

use vm_memory::volatile_memory::Error as VolatileError;
use vm_memory::{Bytes, VolatileSlice};

use crate::dma::{DmaError, PAGE_LEN, Page};

/// Number of descriptors, and so of buffers. A channel has one request under way at a time, so a few would do.
pub const QUEUE_SIZE: u16 = 16;

/// Length of each buffer in bytes.
pub const BUFFER_LEN: u32 = 4096;

const _: () = assert!(BUFFER_LEN as usize == PAGE_LEN);

// Places within the ring's page. Descriptor table: 16 bytes each. Available ring: flags, index, 2 bytes for each entry.
// Used ring: flags, index, 8 bytes for each entry.
const DESCRIPTORS: usize = 0;
const DESCRIPTOR_LEN: usize = 16;
const AVAILABLE: usize = 1024;
const USED: usize = 2048;
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ENTRIES: usize = 4;
const USED_ENTRY_LEN: usize = 8;

/// `VIRTQ_DESC_F_WRITE` (section 2.7.5): the device writes the buffer.
const DESCRIPTOR_DEVICE_WRITES: u16 = 2;

/// `VIRTQ_USED_F_NO_NOTIFY` (section 2.7.10): the device asks not to be notified.
const USED_NO_NOTIFY: u16 = 1;

/// What the device did wrong, or a failed access to the ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// More buffers used than were offered.
    #[error("device says that {found} buffers are used, {in_flight} are in flight")]
    UsedIndex {
        /// Number that the device's index stands for.
        found: u16,
        /// Number of buffers it has.
        in_flight: u16,
    },
    /// A buffer used that was not offered.
    #[error("device says that buffer {found} is used, which is not in flight")]
    UsedId {
        /// Id that the device wrote.
        found: u32,
    },
    /// More bytes written than the buffer has.
    #[error("device says that it wrote {found} bytes into a buffer of {BUFFER_LEN}")]
    UsedLength {
        /// Length that the device wrote.
        found: u32,
    },
    /// More bytes to send than a buffer has.
    #[error("{len} bytes do not fit a buffer of {BUFFER_LEN}")]
    TooLong {
        /// Bytes there are.
        len: usize,
    },
    /// The memory of the ring cannot be accessed.
    #[error("ring memory")]
    Memory(#[from] DmaError),
    /// An access beyond the ring's page.
    #[error("ring memory")]
    Bounds(#[from] VolatileError),
}

/// Who writes the buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The device writes them.
    FromDevice,
    /// The driver writes them.
    ToDevice,
}

/// Guest-physical addresses of a queue's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// A buffer that the device has given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsedBuffer {
    /// Index of the buffer.
    pub buffer: u16,
    /// Bytes that the device wrote, at most [`BUFFER_LEN`].
    pub len: u32,
}

#[derive(Debug)]
struct Buffer {
    page: Page,
    in_flight: bool,
}

/// One virtqueue.
#[derive(Debug)]
pub struct Queue {
    ring: Page,
    buffers: Vec<Buffer>,
    direction: Direction,
    /// Counts modulo 2^16, as the ring's own indices do.
    next_available: u16,
    next_used: u16,
}

impl Queue {
    /// A queue in `ring`, with the first [`QUEUE_SIZE`] of `buffers`. All pages are zero.
    ///
    /// # Errors
    /// [`RingError`] if the memory cannot be accessed.
    pub fn new(ring: Page, buffers: impl Iterator<Item = Page>, direction: Direction) -> Result<Self, RingError> {
        let buffers = buffers.take(usize::from(QUEUE_SIZE)).map(|page| Buffer { page, in_flight: false }).collect();
        let queue = Self { ring, buffers, direction, next_available: 0, next_used: 0 };
        let flags = if direction == Direction::FromDevice { DESCRIPTOR_DEVICE_WRITES } else { 0 };
        for (index, buffer) in queue.buffers.iter().enumerate() {
            let place = DESCRIPTORS + index * DESCRIPTOR_LEN;
            let bytes = queue.ring.bytes()?;
            bytes.write_obj(buffer.page.address().to_le(), place)?;
            bytes.write_obj(BUFFER_LEN.to_le(), place + 8)?;
            bytes.write_obj(flags.to_le(), place + 12)?;
        }
        Ok(queue)
    }

    /// Where the device finds the queue.
    #[must_use]
    pub const fn addresses(&self) -> RingAddresses {
        let start = self.ring.address();
        RingAddresses {
            descriptors: start + DESCRIPTORS as u64,
            available: start + AVAILABLE as u64,
            used: start + USED as u64,
        }
    }

    /// Who writes the buffers.
    #[must_use]
    pub const fn direction(&self) -> Direction {
        self.direction
    }

    /// A buffer that is not in flight, if there is one.
    #[must_use]
    pub fn free_buffer(&self) -> Option<u16> {
        self.buffers.iter().zip(0..).find(|(buffer, _)| !buffer.in_flight).map(|(_, index)| index)
    }

    /// Fills a buffer that is not in flight, and sets its descriptor to that length.
    ///
    /// # Errors
    /// [`RingError::TooLong`], or [`RingError::UsedId`] if there is no such buffer.
    pub fn fill(&mut self, buffer: u16, bytes: &[u8]) -> Result<(), RingError> {
        let len = u32::try_from(bytes.len()).ok().filter(|len| *len <= BUFFER_LEN);
        let len = len.ok_or(RingError::TooLong { len: bytes.len() })?;
        self.free(buffer)?.page.bytes()?.write_slice(bytes, 0)?;
        let place = DESCRIPTORS + usize::from(buffer) * DESCRIPTOR_LEN + 8;
        Ok(self.ring.bytes()?.write_obj(len.to_le(), place)?)
    }

    /// Hands a buffer to the device.
    ///
    /// # Errors
    /// [`RingError::UsedId`] if there is no such buffer, or it is in flight.
    pub fn offer(&mut self, buffer: u16) -> Result<(), RingError> {
        self.free(buffer)?.in_flight = true;
        let ring = self.ring.bytes()?;
        let slot = usize::from(self.next_available % QUEUE_SIZE);
        ring.write_obj(buffer.to_le(), AVAILABLE + ENTRIES + slot * 2)?;
        self.next_available = self.next_available.wrapping_add(1);
        // The entry has to be seen before the index (section 2.7.13.3.1).
        Ok(ring.store(self.next_available.to_le(), AVAILABLE + INDEX, Ordering::Release)?)
    }

    /// Whether the device wants to be told of what was offered.
    ///
    /// # Errors
    /// [`RingError`] if the memory cannot be accessed.
    pub fn wants_notification(&self) -> Result<bool, RingError> {
        // The index has to be seen before the flags are read (section 2.7.13.4.1).
        fence(Ordering::SeqCst);
        let flags: u16 = self.ring.bytes()?.load(USED + FLAGS, Ordering::Acquire)?;
        Ok(u16::from_le(flags) & USED_NO_NOTIFY == 0)
    }

    /// The next buffer that the device has given back, if there is one.
    ///
    /// # Errors
    /// [`RingError`] if the device breaks a rule.
    pub fn take_used(&mut self) -> Result<Option<UsedBuffer>, RingError> {
        let ring = self.ring.bytes()?;
        let index: u16 = ring.load(USED + INDEX, Ordering::Acquire)?;
        let found = u16::from_le(index).wrapping_sub(self.next_used);
        if found == 0 {
            return Ok(None);
        }
        let in_flight = self.next_available.wrapping_sub(self.next_used);
        if found > in_flight {
            return Err(RingError::UsedIndex { found, in_flight });
        }
        let (id, len) = read_used_entry(&ring, self.next_used % QUEUE_SIZE)?;
        let position = usize::try_from(id).unwrap_or(usize::MAX);
        let buffer = self.buffers.get_mut(position).filter(|buffer| buffer.in_flight);
        buffer.ok_or(RingError::UsedId { found: id })?.in_flight = false;
        let buffer = u16::try_from(id).map_err(|_| RingError::UsedId { found: id })?;
        if len > BUFFER_LEN {
            return Err(RingError::UsedLength { found: len });
        }
        self.next_used = self.next_used.wrapping_add(1);
        Ok(Some(UsedBuffer { buffer, len }))
    }

    /// A copy of what the device wrote into a buffer that it has given back.
    ///
    /// # Errors
    /// [`RingError::UsedId`] if there is no such buffer, or it is in flight.
    pub fn contents(&mut self, used: UsedBuffer) -> Result<Vec<u8>, RingError> {
        let mut bytes = vec![0; usize::try_from(used.len).unwrap_or(0).min(PAGE_LEN)];
        self.free(used.buffer)?.page.bytes()?.read_slice(&mut bytes, 0)?;
        Ok(bytes)
    }

    fn free(&mut self, buffer: u16) -> Result<&mut Buffer, RingError> {
        let found = self.buffers.get_mut(usize::from(buffer)).filter(|buffer| !buffer.in_flight);
        found.ok_or(RingError::UsedId { found: u32::from(buffer) })
    }
}

/// Id and length of an entry of the used ring, each read once.
fn read_used_entry<B: vm_memory::bitmap::BitmapSlice>(
    ring: &VolatileSlice<'_, B>,
    slot: u16,
) -> Result<(u32, u32), RingError> {
    let place = USED + ENTRIES + usize::from(slot) * USED_ENTRY_LEN;
    let id: u32 = ring.load(place, Ordering::Relaxed)?;
    let len: u32 = ring.load(place + 4, Ordering::Relaxed)?;
    Ok((u32::from_le(id), u32::from_le(len)))
}

#[cfg(test)]
mod tests;
