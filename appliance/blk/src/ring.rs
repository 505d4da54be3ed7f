//! The split ring as the queue's thread works on it (virtio 1.3, section 2.7): takes heads, returns used ones.
//!
//! Addresses, size and features are those of the start. The driver's indices are read once per look and are checked
//! before anything is taken.

use std::num::Wrapping;
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT,
};
use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};

use crate::DriverMemory;
use crate::chain::DescriptorTable;
use crate::config_space::feature;
use crate::vring::RingParameters;

/// Largest ring that is served; as large as the largest of the VMMs.
pub(crate) const MAX_QUEUE_SIZE: u16 = 1024;

/// Offset of the first entry of the available ring: flags and index come before.
const AVAIL_ENTRIES: u64 = 4;

/// Why a ring breaks.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RingError {
    #[error("ring has {size} entries, expected a power of two up to {MAX_QUEUE_SIZE}")]
    Size { size: u16 },
    #[error("ring does not lie in driver memory")]
    Place,
    #[error("avail index is {avail}, more than {size} beyond {next}")]
    AvailIndex { avail: u16, next: u16, size: u16 },
    #[error("head {head} is outside of a ring of {size} entries")]
    Head { head: u16, size: u16 },
    #[error("head {head} is made available again while in flight")]
    DuplicateHead { head: u16 },
    #[error("chain of head {head}")]
    Chain { head: u16, source: crate::chain::ChainError },
    #[error("driver memory was taken away under the device")]
    MemoryLost,
    #[error("ring cannot be accessed")]
    Queue(#[from] QueueError),
    #[error("ring cannot be read")]
    Memory(#[from] GuestMemoryError),
}

/// A ring in service.
pub(crate) struct Ring {
    queue: Queue,
    event_idx: bool,
    table: DescriptorTable,
}

impl Ring {
    /// Builds the ring from what was latched.
    pub(crate) fn new(parameters: &RingParameters, features: u64, memory: &DriverMemory) -> Result<Self, RingError> {
        let size = parameters.size;
        let mut queue = Queue::new(MAX_QUEUE_SIZE)?;
        queue.try_set_size(size).map_err(|_invalid| RingError::Size { size })?;
        queue.try_set_desc_table_address(parameters.descriptor_table)?;
        queue.try_set_avail_ring_address(parameters.avail_ring)?;
        queue.try_set_used_ring_address(parameters.used_ring)?;
        queue.set_next_avail(parameters.next_avail);
        queue.set_next_used(parameters.next_used);
        let event_idx = features & feature(VIRTIO_RING_F_EVENT_IDX) != 0;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            return Err(RingError::Place);
        }
        let table = DescriptorTable {
            address: parameters.descriptor_table,
            queue_size: size,
            indirect: features & feature(VIRTIO_RING_F_INDIRECT_DESC) != 0,
        };
        Ok(Self { queue, event_idx, table })
    }

    pub(crate) fn table(&self) -> &DescriptorTable {
        &self.table
    }

    /// Position up to which heads were taken.
    pub(crate) fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Position up to which heads were returned.
    pub(crate) fn next_used(&self) -> u16 {
        self.queue.next_used()
    }

    /// How many heads can be taken. Asks the driver not to notify until [`Ring::listen`].
    pub(crate) fn available(&mut self, memory: &DriverMemory) -> Result<u16, RingError> {
        self.queue.disable_notification(memory)?;
        let avail = self.queue.avail_idx(memory, Ordering::Acquire)?;
        let (next, size) = (self.queue.next_avail(), self.table.queue_size);
        let count = (avail - Wrapping(next)).0;
        if count > size {
            return Err(RingError::AvailIndex { avail: avail.0, next, size });
        }
        Ok(count)
    }

    /// Takes the next head; [`Ring::available`] says how many there are.
    pub(crate) fn take(&mut self, memory: &DriverMemory) -> Result<u16, RingError> {
        let (next, size) = (self.queue.next_avail(), self.table.queue_size);
        let entry = AVAIL_ENTRIES + 2 * u64::from(next % size);
        let address = GuestAddress(self.queue.avail_ring()).checked_add(entry).ok_or(RingError::Place)?;
        let head = u16::from_le(memory.load(address, Ordering::Relaxed)?);
        if head >= size {
            return Err(RingError::Head { head, size });
        }
        self.queue.set_next_avail(next.wrapping_add(1));
        Ok(head)
    }

    /// Asks the driver to notify from now on. True if there are heads to take that it will not notify about.
    pub(crate) fn listen(&mut self, memory: &DriverMemory) -> Result<bool, RingError> {
        Ok(self.queue.enable_notification(memory)?)
    }

    /// Returns a head with the number of bytes that were written for it.
    pub(crate) fn put_used(&mut self, memory: &DriverMemory, head: u16, len: u32) -> Result<(), RingError> {
        Ok(self.queue.add_used(memory, head, len)?)
    }

    /// Whether the driver wants to be notified of the heads returned since the last call.
    pub(crate) fn wants_signal(&mut self, memory: &DriverMemory) -> Result<bool, RingError> {
        let wanted = self.queue.needs_notification(memory)?;
        if self.event_idx {
            return Ok(wanted);
        }
        let flags = u16::from_le(memory.load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)?);
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}
