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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_WRITE};
    use vm_memory::GuestMemoryMmap;

    use super::*;
    use crate::request::Request;

    const TABLE: u64 = 0x1000;
    const QUEUE_SIZE: u16 = 16;

    /// Two adjoining regions, a hole, and one more.
    fn memory() -> GuestMemoryMmap<()> {
        let ranges = [(0, 0x4000), (0x4000, 0x4000), (0x10000, 0x1000)];
        GuestMemoryMmap::from_ranges(&ranges.map(|(start, len)| (GuestAddress(start), len))).unwrap()
    }

    fn ring() -> DescriptorTable {
        DescriptorTable { address: GuestAddress(TABLE), queue_size: QUEUE_SIZE, indirect: true }
    }

    /// Descriptors that are right more often than chance would make them: else nearly all fail at the first.
    fn descriptor() -> impl Strategy<Value = Descriptor> {
        let address = prop_oneof![4 => 0u64..0x8000, 1 => 0xf000u64..0x12000, 1 => any::<u64>()];
        let len = prop_oneof![4 => 1u32..64, 2 => (1u32..20).prop_map(|count| count * 16), 1 => any::<u32>()];
        let flag = |flag: u32| prop_oneof![Just(0), Just(u16::try_from(flag).unwrap())];
        let next = prop_oneof![8 => 0u16..QUEUE_SIZE, 1 => any::<u16>()];
        let rare = prop_oneof![6 => Just(0), 1 => Just(u16::try_from(VRING_DESC_F_INDIRECT).unwrap())];
        (address, len, flag(VRING_DESC_F_NEXT), flag(VRING_DESC_F_WRITE), rare, next).prop_map(
            |(address, len, more, write, indirect, next)| Descriptor::new(address, len, more | write | indirect, next),
        )
    }

    fn in_memory(memory: &GuestMemoryMmap<()>, segment: &Segment) -> bool {
        segment.len > 0 && memory.check_range(segment.address, segment.len as usize, Permissions::Read)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn whatever_the_driver_writes_the_walk_ends_in_checked_segments(
            // The whole of low memory, tables and buffers alike, is made of descriptors.
            descriptors in prop::collection::vec(descriptor(), 64..256),
            head in prop_oneof![8 => 0..QUEUE_SIZE, 1 => any::<u16>()],
        ) {
            let memory = memory();
            for (index, descriptor) in (0u64..).zip(&descriptors) {
                memory.write_obj(*descriptor, GuestAddress(TABLE + 16 * index)).unwrap();
            }
            let mut chain = Chain::default();
            let mut data = Vec::new();
            if chain.walk(&memory, &ring(), head).is_ok() {
                let (readable, writable) = (total_len(&chain.readable), total_len(&chain.writable));
                let count = chain.readable.len() + chain.writable.len();
                prop_assert!(count > 0 && count <= usize::from(QUEUE_SIZE + MAX_INDIRECT_CHAIN));
                prop_assert!(chain.readable.iter().chain(&chain.writable).all(|segment| in_memory(&memory, segment)));
                if let Ok(request) = Request::parse(&memory, &mut chain, &mut data) {
                    prop_assert!(readable >= 16 && writable >= 1);
                    prop_assert!(memory.check_range(request.status, 1, Permissions::Write));
                    prop_assert_eq!(u64::from(request.writable_len), writable);
                    prop_assert!(data.iter().all(|segment| in_memory(&memory, segment)));
                    prop_assert!(total_len(&data) <= readable.max(writable));
                }
            }
        }
    }

    #[test]
    fn direct_descriptors_may_precede_an_indirect_table() {
        let memory = memory();
        let next = u16::try_from(VRING_DESC_F_NEXT).unwrap();
        let write = u16::try_from(VRING_DESC_F_WRITE).unwrap();
        // The device must ignore WRITE on the descriptor that refers to the table (virtio 1.3, section 2.7.5.3.2).
        let indirect = u16::try_from(VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE).unwrap();
        memory.write_obj(Descriptor::new(0x100, 16, next, 1), GuestAddress(TABLE)).unwrap();
        memory.write_obj(Descriptor::new(0x2000, 32, indirect, 0), GuestAddress(TABLE + 16)).unwrap();
        memory.write_obj(Descriptor::new(0x200, 32, next, 1), GuestAddress(0x2000)).unwrap();
        memory.write_obj(Descriptor::new(0x300, 1, write, 0), GuestAddress(0x2010)).unwrap();
        let mut chain = Chain::default();
        chain.walk(&memory, &ring(), 0).unwrap();
        let segment = |address, len| Segment { address: GuestAddress(address), len };
        assert_eq!(chain.readable, [segment(0x100, 16), segment(0x200, 32)]);
        assert_eq!(chain.writable, [segment(0x300, 1)]);
    }
}
