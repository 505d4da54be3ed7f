//! Inflight tracking: a buffer that outlives the back-end and says which requests it had taken and not yet returned.
//!
//! # Theory of operation
//! The available ring does not tell which requests are in flight once they complete out of order: its entries are
//! overwritten. So the front-end keeps a buffer for the back-end, which notes there each request that it takes
//! ([`InflightQueue::start`]) and each that it returns. After a crash the next back-end maps the same buffer and learns which
//! requests it has to do again ([`InflightQueue::recover`]).
//!
//! A crash may come between any two stores. What makes that harmless is their order, which the specification prescribes:
//!
//! | step | stores, in this order |
//! | --- | --- |
//! | [`InflightQueue::start`] | `counter`, then `inflight = 1` |
//! | [`InflightQueue::begin_batch`], for each request | `next`, then `last_batch_head` |
//! | the caller | used elements, then `idx` of the used ring |
//! | [`InflightQueue::end_batch`] | `inflight = 0` for each request, then `used_idx` |
//!
//! If `used_idx` lags behind the used ring, the crash came after the ring's `idx` was stored: the requests of the last batch
//! are the driver's again, and the list from `last_batch_head` on names them. Every store here has release ordering, so the
//! program's order is the order in memory, the caller's store of `idx` included.
//!
//! The front-end can write the buffer at any time. Whatever it holds, recovery yields heads inside the ring, each at most
//! once; a front-end that lies harms its own driver only. One [`InflightQueue`] at a time may work on a queue's part.
//!
//! Source: vhost-user specification, "Inflight I/O tracking", split virtqueues. Packed ones have another format and are not
//! offered by our back-ends.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags};
use vvu_protocol::address::FileOffset;
use vvu_protocol::message::Inflight;

pub use crate::shared_mapping::MapError;
use crate::shared_mapping::SharedMapping;

#[cfg(test)]
mod tests;
mod tracker;

pub use tracker::Recovered;
use tracker::{QueueMemory, Tracker};

/// Most entries of a split ring (virtio 1.3, section 2.7).
const MAX_QUEUE_SIZE: u16 = 32768;

/// The start of the buffer in its file is a multiple of this, in bytes.
const PAGE_SIZE: u64 = 4096;

/// Each queue's part begins at a multiple of this, in bytes. The specification does not say so; libvhost-user and DPDK do
/// it, and a buffer may pass from one to the other.
const PART_ALIGNMENT: usize = 64;

/// `version` of the only format there is.
const VERSION: u16 = 1;

/// `struct QueueRegionSplit`: offsets of its fields and its length, in bytes.
mod region {
    pub(super) const FEATURES: usize = 0;
    pub(super) const VERSION: usize = 8;
    pub(super) const DESC_NUM: usize = 10;
    pub(super) const LAST_BATCH_HEAD: usize = 12;
    pub(super) const USED_IDX: usize = 14;
    pub(super) const LEN: usize = 16;
}

/// `struct DescStateSplit`: offsets of its fields and its length, in bytes.
mod entry {
    pub(super) const INFLIGHT: usize = 0;
    pub(super) const NEXT: usize = 6;
    pub(super) const COUNTER: usize = 8;
    pub(super) const LEN: usize = 16;
}

/// Why an inflight buffer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// The front-end describes a buffer for no queue.
    #[error("the inflight buffer is for no queue")]
    NoQueue,
    /// The queue size is none of a split ring.
    #[error("queue size {queue_size} of the inflight buffer is not in 1 to {MAX_QUEUE_SIZE}")]
    QueueSize {
        /// What came.
        queue_size: u16,
    },
    /// The buffer does not begin at a page.
    #[error("the inflight buffer begins at {offset:#x}, which is no multiple of {PAGE_SIZE}")]
    Alignment {
        /// What came.
        offset: u64,
    },
    /// The queues' parts do not fit.
    #[error("the inflight buffer has {mmap_size} bytes, but its queues take {needed}")]
    TooShort {
        /// What came.
        mmap_size: u64,
        /// What the number and size of the queues take.
        needed: u64,
    },
    /// The file cannot be mapped.
    #[error("inflight buffer")]
    Map(#[from] MapError),
    /// No memory for a new buffer.
    #[error("cannot create an inflight buffer")]
    Create(#[source] io::Error),
    /// A ring is started that the buffer has no part for.
    #[error("the inflight buffer is for {queue_count} queues, and has no part for queue {index}")]
    NoSuchQueue {
        /// The queue.
        index: u16,
        /// What the buffer has.
        queue_count: u16,
    },
    /// A ring is started that is larger than its part, or empty.
    #[error("the inflight buffer is for rings of 1 to {queue_size} entries, and the ring has {ring_size}")]
    RingSize {
        /// The ring's.
        ring_size: u16,
        /// What the buffer is for.
        queue_size: u16,
    },
    /// Another back-end has left the buffer in a format that is not known here.
    #[error("the inflight buffer has the unknown format: version {version}, features {features:#x}")]
    Format {
        /// 0 for a new buffer, 1 for the format of today.
        version: u16,
        /// No feature is defined.
        features: u64,
    },
}

/// The buffer of a device, with one part for each queue.
#[derive(Debug)]
pub struct InflightBuffer {
    mapping: SharedMapping,
    queue_count: u16,
    queue_size: u16,
}

impl InflightBuffer {
    /// Maps a buffer that the front-end sent (SET_INFLIGHT_FD). The file may be a device node, whose length is not known;
    /// the front-end answers for it then.
    ///
    /// # Errors
    /// [`InflightError`] if the description is wrong in itself or does not fit the file.
    pub fn map(file: &File, description: &Inflight) -> Result<Arc<Self>, InflightError> {
        let Inflight { mmap_size, mmap_offset, queue_count, queue_size } = *description;
        let needed = buffer_len(queue_count, queue_size)?;
        if mmap_size < needed {
            return Err(InflightError::TooShort { mmap_size, needed });
        }
        if !mmap_offset.0.is_multiple_of(PAGE_SIZE) {
            return Err(InflightError::Alignment { offset: mmap_offset.0 });
        }
        let mapping = SharedMapping::new(file, mmap_offset.0, mmap_size)?;
        Ok(Arc::new(Self { mapping, queue_count, queue_size }))
    }

    /// A new buffer with no request in flight, to be sent to the front-end (GET_INFLIGHT_FD): in memory that can be neither
    /// cut nor extended.
    ///
    /// # Errors
    /// [`InflightError`] if the sizes are none of a device, or the system has no memory or descriptor left.
    pub fn create(queue_count: u16, queue_size: u16) -> Result<(Arc<Self>, OwnedFd, Inflight), InflightError> {
        let mmap_size = buffer_len(queue_count, queue_size)?.next_multiple_of(PAGE_SIZE);
        let file = sealed_memory(mmap_size).map_err(InflightError::Create)?;
        let description = Inflight { mmap_size, mmap_offset: FileOffset(0), queue_count, queue_size };
        let buffer = Self::map(&file, &description)?;
        Ok((buffer, file.into(), description))
    }

    /// The part of queue `index`, whose ring has `ring_size` entries. [`InflightQueue::recover`] comes next.
    ///
    /// # Errors
    /// [`InflightError`] if there is no such part, it is too small, or in an unknown format.
    pub fn queue(self: &Arc<Self>, index: u16, ring_size: u16) -> Result<InflightQueue, InflightError> {
        let (queue_count, queue_size) = (self.queue_count, self.queue_size);
        if index >= queue_count {
            return Err(InflightError::NoSuchQueue { index, queue_count });
        }
        if ring_size == 0 || ring_size > queue_size {
            return Err(InflightError::RingSize { ring_size, queue_size });
        }
        let memory = Part { buffer: Arc::clone(self), start: usize::from(index) * part_len(queue_size) };
        let (features, version) = (memory.load_64(region::FEATURES), memory.load_16(region::VERSION));
        if features != 0 || version > VERSION {
            return Err(InflightError::Format { version, features });
        }
        Ok(InflightQueue { tracker: Tracker::new(memory, ring_size, queue_size) })
    }
}

/// Bytes of one queue's part.
fn part_len(queue_size: u16) -> usize {
    (region::LEN + usize::from(queue_size) * entry::LEN).next_multiple_of(PART_ALIGNMENT)
}

/// Bytes of all queues' parts; less than 2^35 whatever the numbers are.
fn buffer_len(queue_count: u16, queue_size: u16) -> Result<u64, InflightError> {
    if queue_count == 0 {
        return Err(InflightError::NoQueue);
    }
    if queue_size == 0 || queue_size > MAX_QUEUE_SIZE {
        return Err(InflightError::QueueSize { queue_size });
    }
    Ok(u64::from(queue_count) * part_len(queue_size) as u64)
}

fn sealed_memory(len: u64) -> io::Result<File> {
    let file = rustix::fs::memfd_create("inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, len)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

/// The tracking of one queue, for the one thread that works on its ring.
#[derive(Debug)]
pub struct InflightQueue {
    tracker: Tracker<Part>,
}

impl InflightQueue {
    /// Finds out what was in flight, before the ring is started. `used_idx` is the `idx` of the used ring, read now. To be
    /// called once, before all else; a new buffer becomes an initialised one by it.
    ///
    /// The requests that are returned stay in flight: they are submitted without another [`InflightQueue::start`].
    ///
    /// A caller that finds fewer requests outstanding in the rings (`idx` of the available ring less `used_idx`) than in
    /// flight here has a buffer of another ring: it calls [`InflightQueue::discard`].
    pub fn recover(&mut self, used_idx: u16) -> Recovered {
        self.tracker.recover(used_idx)
    }

    /// Nothing is in flight, whatever the buffer said: its content is of another ring.
    pub fn discard(&mut self) {
        self.tracker.discard();
    }

    /// Notes that `head` was taken from the available ring. Heads are to be noted in the order of that ring.
    pub fn start(&mut self, head: u16) {
        self.tracker.start(head);
    }

    /// Notes that `head` is about to be returned, before the used ring's `idx` is stored; once for each request of the batch.
    pub fn begin_batch(&mut self, head: u16) {
        self.tracker.begin_batch(head);
    }

    /// Notes that the batch has been returned, after the used ring's `idx` was stored as `used_idx`.
    pub fn end_batch(&mut self, used_idx: u16) {
        self.tracker.end_batch(used_idx);
    }
}

/// One queue's part of the mapping.
#[derive(Debug)]
struct Part {
    buffer: Arc<InflightBuffer>,
    /// A multiple of [`PART_ALIGNMENT`].
    start: usize,
}

// The part lies inside the mapping and every field is aligned, so no access fails: `map` has checked the sizes.
impl QueueMemory for Part {
    fn load_8(&self, offset: usize) -> u8 {
        self.buffer.mapping.byte(self.start + offset).map_or(0, |place| place.load(Ordering::Acquire))
    }

    fn load_16(&self, offset: usize) -> u16 {
        self.buffer.mapping.half_word(self.start + offset).map_or(0, |place| place.load(Ordering::Acquire))
    }

    fn load_64(&self, offset: usize) -> u64 {
        self.buffer.mapping.word(self.start + offset).map_or(0, |place| place.load(Ordering::Acquire))
    }

    fn store_8(&self, offset: usize, value: u8) {
        if let Some(place) = self.buffer.mapping.byte(self.start + offset) {
            place.store(value, Ordering::Release);
        }
    }

    fn store_16(&self, offset: usize, value: u16) {
        if let Some(place) = self.buffer.mapping.half_word(self.start + offset) {
            place.store(value, Ordering::Release);
        }
    }

    fn store_64(&self, offset: usize, value: u64) {
        if let Some(place) = self.buffer.mapping.word(self.start + offset) {
            place.store(value, Ordering::Release);
        }
    }
}
