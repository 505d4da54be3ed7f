//! Walks one descriptor chain of a split ring into lists of checked segments (virtio 1.3, section 2.7).
//!
//! The driver owns the descriptor table and may change it at any moment. Each descriptor is therefore copied once, and
//! only the copy is checked and used. Whatever the table holds, the walk ends after a bounded number of steps.

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{GuestMemoryError, Permissions};

use crate::place::Place;
use crate::view::{AccessError, Segment, View};

/// Length of one descriptor in bytes (virtio 1.3, section 2.7.5).
pub(crate) const DESCRIPTOR_LEN: u32 = 16;

/// Most segments of one chain. Only an IOMMU that scatters each page, 16 MiB of them in one request, comes near it.
const MAX_SEGMENTS: usize = 4096;

/// Why a chain breaks the device.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// `next` or the head is beyond the table.
    #[error("descriptor {index} is outside of a table of {table_len}")]
    IndexOutOfRange {
        /// Index that came.
        index: u16,
        /// Entries of the table.
        table_len: u16,
    },
    /// More descriptors than there may be.
    #[error("chain has more than {limit} descriptors: it is circular or too long")]
    TooLong {
        /// How many there may be.
        limit: u16,
    },
    /// More pieces of memory than are kept.
    #[error("chain has more than {MAX_SEGMENTS} pieces of memory")]
    TooManySegments,
    /// The table lies in memory that cannot be read.
    #[error("descriptor {index} cannot be read")]
    Descriptor {
        /// Its index.
        index: u16,
        /// Cause.
        source: GuestMemoryError,
    },
    /// An indirect table without INDIRECT_DESC.
    #[error("indirect descriptor, but the feature was not negotiated")]
    IndirectNotNegotiated,
    /// An indirect table in an indirect table.
    #[error("indirect descriptor inside an indirect table")]
    NestedIndirect,
    /// NEXT and INDIRECT in one descriptor.
    #[error("indirect descriptor with a successor")]
    IndirectWithNext,
    /// The indirect table has no or half descriptors.
    #[error("indirect table of {len} bytes")]
    IndirectLength {
        /// What came.
        len: u32,
    },
    /// A descriptor of no bytes.
    #[error("descriptor of zero bytes")]
    ZeroLength,
    /// A buffer or an indirect table cannot be reached.
    #[error("buffer")]
    Access(#[from] AccessError),
    /// The order of virtio 1.3, section 2.7.4.2 is not kept.
    #[error("device-readable descriptor after a device-writable one")]
    ReadableAfterWritable,
}

/// One descriptor, copied out of driver memory.
#[derive(Debug, Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn from_pair([address, rest]: [u64; 2]) -> Self {
        let [l0, l1, l2, l3, f0, f1, n0, n1] = rest.to_ne_bytes();
        Self {
            address: u64::from_le(address),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    fn has(&self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }
}

/// Buffers of one chain. Reused from one chain to the next, so that a walk allocates nothing in the long run.
#[derive(Debug, Default)]
pub struct Chain {
    /// What the device may read, in the order of the chain.
    pub readable: Vec<Segment>,
    /// What the device may write.
    pub writable: Vec<Segment>,
    /// Where the indirect table is.
    table: Place,
    /// See [`Chain::new`].
    max_indirect: u16,
}

/// Where a walk reads descriptors: the ring's own table or an indirect one.
#[derive(Debug, Clone, Copy)]
struct Table {
    len: u16,
    /// Most descriptors that are taken from it.
    limit: u16,
    indirect: bool,
}

impl Chain {
    /// An empty chain. Drivers size an indirect table by what the device takes, not by the queue: `max_indirect` is the
    /// longest indirect chain that is followed when the queue itself is smaller.
    #[must_use]
    pub fn new(max_indirect: u16) -> Self {
        Self { max_indirect, ..Self::default() }
    }

    /// Replaces the contents by the chain that starts at `head` of `ring`, a table of `queue_size` descriptors.
    pub(crate) fn walk(
        &mut self,
        view: &View,
        ring: &Place,
        queue_size: u16,
        indirect: bool,
        head: u16,
    ) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        let mut table = Table { len: queue_size, limit: queue_size, indirect: false };
        let mut index = head;
        let mut left = table.limit;
        loop {
            let Some(others) = left.checked_sub(1) else { return Err(ChainError::TooLong { limit: table.limit }) };
            left = others;
            let place = if table.indirect { &self.table } else { ring };
            let descriptor = read(place, view, table, index)?;
            if descriptor.has(VRING_DESC_F_INDIRECT) {
                if !indirect {
                    return Err(ChainError::IndirectNotNegotiated);
                }
                table = self.enter_indirect(view, table, queue_size, descriptor)?;
                index = 0;
                left = table.limit;
                continue;
            }
            self.push(view, descriptor)?;
            if !descriptor.has(VRING_DESC_F_NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    fn push(&mut self, view: &View, descriptor: Descriptor) -> Result<(), ChainError> {
        if descriptor.len == 0 {
            return Err(ChainError::ZeroLength);
        }
        let (list, access) = if descriptor.has(VRING_DESC_F_WRITE) {
            (&mut self.writable, Permissions::Write)
        } else if self.writable.is_empty() {
            (&mut self.readable, Permissions::Read)
        } else {
            return Err(ChainError::ReadableAfterWritable);
        };
        view.resolve(descriptor.address, descriptor.len, access, list)?;
        if self.readable.len() + self.writable.len() > MAX_SEGMENTS {
            return Err(ChainError::TooManySegments);
        }
        Ok(())
    }

    fn enter_indirect(
        &mut self,
        view: &View,
        from: Table,
        queue_size: u16,
        descriptor: Descriptor,
    ) -> Result<Table, ChainError> {
        if from.indirect {
            return Err(ChainError::NestedIndirect);
        }
        if descriptor.has(VRING_DESC_F_NEXT) {
            return Err(ChainError::IndirectWithNext);
        }
        let len = descriptor.len;
        let entries = u16::try_from(len / DESCRIPTOR_LEN).map_err(|_| ChainError::IndirectLength { len })?;
        if entries == 0 || !len.is_multiple_of(DESCRIPTOR_LEN) {
            return Err(ChainError::IndirectLength { len });
        }
        self.table.refill(|pieces| view.resolve(descriptor.address, len, Permissions::Read, pieces))?;
        let limit = queue_size.max(self.max_indirect).min(entries);
        Ok(Table { len: entries, limit, indirect: true })
    }
}

fn read(place: &Place, view: &View, table: Table, index: u16) -> Result<Descriptor, ChainError> {
    if index >= table.len {
        return Err(ChainError::IndexOutOfRange { index, table_len: table.len });
    }
    let pair = place.read_pair(view.memory(), u32::from(index) * DESCRIPTOR_LEN);
    pair.map(Descriptor::from_pair).map_err(|source| ChainError::Descriptor { index, source })
}

/// Number of bytes in a list of segments. Cannot overflow: less than 2^16 segments of less than 2^32 bytes.
#[must_use]
pub fn total_len(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::Memory;

    const TABLE: u64 = 0x1000;
    const QUEUE_SIZE: u16 = 16;
    const MAX_INDIRECT: u16 = 128;

    /// Two adjoining regions, a hole, and one more.
    fn view() -> View {
        let ranges = [(0, 0x4000), (0x4000, 0x4000), (0x10000, 0x1000)];
        let memory = Memory::from_ranges(&ranges.map(|(start, len)| (GuestAddress(start), len))).unwrap();
        View { memory: Arc::new(memory), iommu: None, log: None, used_ring_log: None }
    }

    fn table() -> Place {
        Place::new(vec![Segment { address: GuestAddress(TABLE), len: u32::from(QUEUE_SIZE) * DESCRIPTOR_LEN }])
    }

    fn put(view: &View, address: u64, descriptor: &Descriptor) {
        let Descriptor { address: buffer, len, flags, next } = *descriptor;
        view.memory.write_obj(buffer.to_le(), GuestAddress(address)).unwrap();
        view.memory.write_obj(len.to_le(), GuestAddress(address + 8)).unwrap();
        view.memory.write_obj(flags.to_le(), GuestAddress(address + 12)).unwrap();
        view.memory.write_obj(next.to_le(), GuestAddress(address + 14)).unwrap();
    }

    fn flags(flags: u32) -> u16 {
        u16::try_from(flags).unwrap()
    }

    /// Descriptors that are right more often than chance would make them: else nearly all fail at the first.
    fn descriptor() -> impl Strategy<Value = Descriptor> {
        let address = prop_oneof![4 => 0u64..0x8000, 1 => 0xf000u64..0x12000, 1 => any::<u64>()];
        let len = prop_oneof![4 => 1u32..64, 2 => (1u32..20).prop_map(|count| count * 16), 1 => any::<u32>()];
        let flag = |flag: u32| prop_oneof![Just(0), Just(flags(flag))];
        let next = prop_oneof![8 => 0u16..QUEUE_SIZE, 1 => any::<u16>()];
        let rare = prop_oneof![6 => Just(0), 1 => Just(flags(VRING_DESC_F_INDIRECT))];
        (address, len, flag(VRING_DESC_F_NEXT), flag(VRING_DESC_F_WRITE), rare, next).prop_map(
            |(address, len, more, write, indirect, next)| Descriptor {
                address,
                len,
                flags: more | write | indirect,
                next,
            },
        )
    }

    fn in_memory(view: &View, segment: &Segment) -> bool {
        segment.len > 0 && view.memory.check_range(segment.address, segment.len as usize)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn whatever_the_driver_writes_the_walk_ends_in_checked_segments(
            // The whole of low memory, tables and buffers alike, is made of descriptors.
            descriptors in prop::collection::vec(descriptor(), 64..256),
            head in prop_oneof![8 => 0..QUEUE_SIZE, 1 => any::<u16>()],
        ) {
            let view = view();
            for (index, descriptor) in (0u64..).zip(&descriptors) {
                put(&view, TABLE + 16 * index, descriptor);
            }
            let mut chain = Chain::new(MAX_INDIRECT);
            if chain.walk(&view, &table(), QUEUE_SIZE, true, head).is_ok() {
                let count = chain.readable.len() + chain.writable.len();
                prop_assert!(count > 0 && count <= usize::from(QUEUE_SIZE + MAX_INDIRECT));
                prop_assert!(chain.readable.iter().chain(&chain.writable).all(|segment| in_memory(&view, segment)));
            }
        }
    }

    #[test]
    fn direct_descriptors_may_precede_an_indirect_table() {
        let view = view();
        let descriptor = |address, len, flags, next| Descriptor { address, len, flags, next };
        // The device must ignore WRITE on the descriptor that refers to the table (virtio 1.3, section 2.7.5.3.2).
        let indirect = flags(VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE);
        put(&view, TABLE, &descriptor(0x100, 16, flags(VRING_DESC_F_NEXT), 1));
        put(&view, TABLE + 16, &descriptor(0x2000, 32, indirect, 0));
        put(&view, 0x2000, &descriptor(0x200, 32, flags(VRING_DESC_F_NEXT), 1));
        put(&view, 0x2010, &descriptor(0x300, 1, flags(VRING_DESC_F_WRITE), 0));
        let mut chain = Chain::new(MAX_INDIRECT);
        chain.walk(&view, &table(), QUEUE_SIZE, true, 0).unwrap();
        let segment = |address, len| Segment { address: GuestAddress(address), len };
        assert_eq!(chain.readable, [segment(0x100, 16), segment(0x200, 32)]);
        assert_eq!(chain.writable, [segment(0x300, 1)]);
        let error = chain.walk(&view, &table(), QUEUE_SIZE, false, 0).unwrap_err();
        assert!(matches!(error, ChainError::IndirectNotNegotiated));
    }
}
