//! Walks one descriptor chain of a split ring into lists of checked segments (virtio 1.3, section 2.7). Pure.
//!
//! The driver owns the descriptor table and may change it at any moment. Each descriptor is therefore copied once, and
//! only the copy is checked and used. Whatever the table holds, the walk ends after a bounded number of steps.

use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_NEXT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use crate::config_space::SEG_MAX;

/// Length of one descriptor in bytes (virtio 1.3, section 2.7.5).
const DESCRIPTOR_LEN: u32 = 16;

/// Longest indirect chain that is followed when the queue itself is smaller. Drivers size an indirect table by seg_max,
/// not by the queue: header, segments and status.
const MAX_INDIRECT_CHAIN: u16 = SEG_MAX + 2;

/// Why a chain breaks the device.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChainError {
    #[error("descriptor {index} is outside of a table of {table_len}")]
    IndexOutOfRange { index: u16, table_len: u16 },
    #[error("chain has more than {limit} descriptors: it is circular or too long")]
    TooLong { limit: u16 },
    #[error("descriptor at {address:#x} cannot be read")]
    Descriptor { address: u64, source: GuestMemoryError },
    #[error("indirect descriptor, but the feature was not negotiated")]
    IndirectNotNegotiated,
    #[error("indirect descriptor inside an indirect table")]
    NestedIndirect,
    #[error("indirect descriptor with a successor")]
    IndirectWithNext,
    #[error("indirect table of {len} bytes")]
    IndirectLength { len: u32 },
    #[error("descriptor of zero bytes")]
    ZeroLength,
    #[error("buffer {address:#x}+{len:#x} is not driver memory")]
    OutsideMemory { address: u64, len: u32 },
    #[error("device-readable descriptor after a device-writable one")]
    ReadableAfterWritable,
    #[error("device-readable part has {len} bytes, a request header has 16")]
    HeaderTooShort { len: u64 },
    #[error("no device-writable byte for the status")]
    NoStatus,
    #[error("data buffers have the wrong direction for request type {kind}")]
    WrongDirection { kind: u32 },
    #[error("request cannot be read")]
    Unreadable { source: GuestMemoryError },
}

/// A contiguous range of driver-physical addresses, checked to be driver memory when the chain was walked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) address: GuestAddress,
    pub(crate) len: u32,
}

/// Where the chains of one ring stand. Latched when the ring starts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DescriptorTable {
    pub(crate) address: GuestAddress,
    pub(crate) queue_size: u16,
    /// VIRTIO_RING_F_INDIRECT_DESC was negotiated.
    pub(crate) indirect: bool,
}

/// Buffers of one chain. Reused from one chain to the next, so that a walk allocates nothing in the long run.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    pub(crate) readable: Vec<Segment>,
    pub(crate) writable: Vec<Segment>,
}

impl Chain {
    /// Replaces the contents by the chain that starts at `head`.
    pub(crate) fn walk<M: GuestMemory>(
        &mut self,
        memory: &M,
        ring: &DescriptorTable,
        head: u16,
    ) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        let mut table = Table { address: ring.address, len: ring.queue_size, limit: ring.queue_size, indirect: false };
        let mut index = head;
        let mut left = table.limit;
        loop {
            left = left.checked_sub(1).ok_or(ChainError::TooLong { limit: table.limit })?;
            let descriptor = table.read(memory, index)?;
            if descriptor.refers_to_indirect_table() {
                table = table.enter_indirect(memory, ring, &descriptor)?;
                index = 0;
                left = table.limit;
                continue;
            }
            self.push(memory, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    fn push<M: GuestMemory>(&mut self, memory: &M, descriptor: &Descriptor) -> Result<(), ChainError> {
        let segment = Segment { address: descriptor.addr(), len: descriptor.len() };
        if segment.len == 0 {
            return Err(ChainError::ZeroLength);
        }
        let access = if descriptor.is_write_only() { Permissions::Write } else { Permissions::Read };
        check_range(memory, segment, access)?;
        if descriptor.is_write_only() {
            self.writable.push(segment);
        } else if self.writable.is_empty() {
            self.readable.push(segment);
        } else {
            return Err(ChainError::ReadableAfterWritable);
        }
        Ok(())
    }
}

fn check_range<M: GuestMemory>(memory: &M, segment: Segment, access: Permissions) -> Result<(), ChainError> {
    let Segment { address, len } = segment;
    let fits = address.checked_add(u64::from(len)).is_some();
    if fits && memory.check_range(address, len as usize, access) {
        Ok(())
    } else {
        Err(ChainError::OutsideMemory { address: address.raw_value(), len })
    }
}

/// The table that the walk is in: the ring's own or an indirect one.
struct Table {
    address: GuestAddress,
    len: u16,
    /// Most descriptors that are taken from it.
    limit: u16,
    indirect: bool,
}

impl Table {
    fn read<M: GuestMemory>(&self, memory: &M, index: u16) -> Result<Descriptor, ChainError> {
        if index >= self.len {
            return Err(ChainError::IndexOutOfRange { index, table_len: self.len });
        }
        let address = self.address.unchecked_add(u64::from(index) * u64::from(DESCRIPTOR_LEN));
        memory.read_obj(address).map_err(|source| ChainError::Descriptor { address: address.raw_value(), source })
    }

    fn enter_indirect<M: GuestMemory>(
        &self,
        memory: &M,
        ring: &DescriptorTable,
        descriptor: &Descriptor,
    ) -> Result<Self, ChainError> {
        if !ring.indirect {
            return Err(ChainError::IndirectNotNegotiated);
        }
        if self.indirect {
            return Err(ChainError::NestedIndirect);
        }
        if u32::from(descriptor.flags()) & VRING_DESC_F_NEXT != 0 {
            return Err(ChainError::IndirectWithNext);
        }
        let len = descriptor.len();
        let entries = u16::try_from(len / DESCRIPTOR_LEN).map_err(|_| ChainError::IndirectLength { len })?;
        if entries == 0 || !len.is_multiple_of(DESCRIPTOR_LEN) {
            return Err(ChainError::IndirectLength { len });
        }
        check_range(memory, Segment { address: descriptor.addr(), len }, Permissions::Read)?;
        let limit = ring.queue_size.max(MAX_INDIRECT_CHAIN).min(entries);
        Ok(Self { address: descriptor.addr(), len: entries, limit, indirect: true })
    }
}

/// Number of bytes in a list of segments. Cannot overflow: at most 2^16 segments of less than 2^32 bytes.
pub(crate) fn total_len(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}
