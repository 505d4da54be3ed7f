//! The header of a qcow2 image, as far as it decides whether the image is served ("The QCOW2 image format", section
//! "Header"). Pure.
//!
//! It is looked at before the driver of the format sees the image, so that what cannot be served is refused with a remedy.

/// Bytes of the header that are looked at.
pub(crate) const HEADER_LEN: usize = 104;

const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");

/// Incompatible feature: reference counts may be wrong, for a program with lazy ones did not close the image.
const DIRTY: u64 = 1 << 0;
/// Incompatible feature: a program has found the image to be damaged.
const CORRUPT: u64 = 1 << 1;
/// Incompatible feature: the data is in another file.
const DATA_FILE: u64 = 1 << 2;

/// Longest table of reference counts in bytes, as QEMU has it.
const MAX_REFCOUNT_TABLE_LEN: u64 = 8 << 20;

/// Bits of an entry of that table that are not its block's offset, and have to be zero.
const RESERVED: u64 = 511;

/// Longest L1 table in bytes, as QEMU has it.
const MAX_L1_LEN: u64 = 32 << 20;

/// Bits of an L1 entry that are the offset of an L2 table.
const L2_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Length of an entry of either table in bytes.
const ENTRY_LEN: u64 = 8;

/// Largest virtual size in bytes; what can be addressed by sectors with a sign.
const MAX_SIZE: u64 = i64::MAX.cast_unsigned();

/// Why an image is not served. Each is one line, behind the name of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Something else, or damaged.
    #[error("is no qcow2 image; give the format that it has")]
    Magic,
    /// Neither version 2 nor 3.
    #[error("is a qcow2 image of version {0}, only 2 and 3 are known; convert it with qemu-img convert")]
    Version(u32),
    /// The data is encrypted.
    #[error("is encrypted, which is not supported; decrypt it with qemu-img convert")]
    Encrypted,
    /// The data is elsewhere.
    #[error("has its data in another file, which is not supported; put it into one with qemu-img convert")]
    DataFile,
    /// It was not closed, or is known to be damaged.
    #[error("is marked as damaged or as not closed in order; repair it with qemu-img check -r all")]
    NeedsRepair,
    /// Extended L2 entries, another compression, or something newer.
    #[error("has features that are not supported (bits {0:#x}); convert it with qemu-img convert")]
    Features(u64),
    /// A field has a value that it must not have, or the reference counts are none.
    #[error("is damaged ({0}); see what qemu-img check says")]
    Damaged(&'static str),
    /// The virtual size is beyond all reason.
    #[error("has a virtual size of {0} bytes; it is damaged")]
    Size(u64),
}

/// What is known of an image by its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// Length of the disk in bytes.
    pub(crate) virtual_size: u64,
    /// It names a backing file.
    pub(crate) has_backing: bool,
    /// Bytes of a cluster.
    pub(crate) cluster_len: u64,
    /// Offset of the L1 table in the file, in bytes: a multiple of `cluster_len`.
    pub(crate) l1_table: u64,
    /// Length of that table in bytes: at most 32 MiB.
    pub(crate) l1_len: u64,
    /// Offset of the table of reference counts in the file, in bytes: a multiple of `cluster_len`.
    pub(crate) refcount_table: u64,
    /// Length of that table in bytes: at least a cluster, at most 8 MiB.
    pub(crate) refcount_table_len: u64,
    /// Bits of one count.
    refcount_bits: u32,
}

impl Header {
    /// Reads the first bytes of an image.
    pub(crate) fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, HeaderError> {
        let mut fields = Fields { rest: bytes };
        if fields.u32() != MAGIC {
            return Err(HeaderError::Magic);
        }
        let version = fields.u32();
        let backing_file_offset = fields.u64();
        let _backing_file_len = fields.u32();
        let cluster_bits = fields.u32();
        let virtual_size = fields.u64();
        let encryption = fields.u32();
        let l1_len = u64::from(fields.u32()) * ENTRY_LEN;
        let l1_table = fields.u64();
        let refcount_table = fields.u64();
        let refcount_table_clusters = u64::from(fields.u32());
        // Snapshots.
        fields.skip(12);
        let (features, refcount_order) = match version {
            2 => (0, 4),
            3 => {
                let features = fields.u64();
                // Features that do not matter.
                fields.skip(16);
                (features, fields.u32())
            }
            _ => return Err(HeaderError::Version(version)),
        };
        match features {
            _ if encryption != 0 => Err(HeaderError::Encrypted),
            _ if features & DATA_FILE != 0 => Err(HeaderError::DataFile),
            _ if features & (DIRTY | CORRUPT) != 0 => Err(HeaderError::NeedsRepair),
            0 if virtual_size > MAX_SIZE => Err(HeaderError::Size(virtual_size)),
            0 if !(9..=21).contains(&cluster_bits) => Err(HeaderError::Damaged("cluster size")),
            0 if refcount_order > 6 => Err(HeaderError::Damaged("length of reference counts")),
            0 => {
                let cluster_len = 1 << cluster_bits;
                let refcount_table_len = refcount_table_clusters * cluster_len;
                let possible = (1..=MAX_REFCOUNT_TABLE_LEN).contains(&refcount_table_len);
                if !possible || !refcount_table.is_multiple_of(cluster_len) || refcount_table == 0 {
                    return Err(HeaderError::Damaged("table of reference counts"));
                }
                if l1_len > MAX_L1_LEN || !l1_table.is_multiple_of(cluster_len) {
                    return Err(HeaderError::Damaged("L1 table"));
                }
                Ok(Self {
                    virtual_size,
                    has_backing: backing_file_offset != 0,
                    cluster_len,
                    l1_table,
                    l1_len,
                    refcount_table,
                    refcount_table_len,
                    refcount_bits: 1 << refcount_order,
                })
            }
            _ => Err(HeaderError::Features(features)),
        }
    }

    /// Looks whether a table of reference counts, in a file of `file_len` bytes, can be one. Returns where its first block is.
    /// A format's driver that believes one which says that the header itself is free puts something else there.
    pub(crate) fn check_refcount_table(&self, table: &[u8], file_len: u64) -> Result<u64, HeaderError> {
        let in_file = |block: u64| block < file_len && block.is_multiple_of(self.cluster_len);
        let first = entries(table).next().unwrap_or(0);
        // A block that stands twice and is full would be searched again and again.
        let mut blocks: Vec<u64> = entries(table).filter(|entry| *entry != 0).collect();
        blocks.sort_unstable();
        let repeated = blocks.windows(2).any(|pair| pair.first() == pair.last());
        if first == 0 || repeated || blocks.iter().any(|block| block & RESERVED != 0 || !in_file(*block)) {
            return Err(HeaderError::Damaged("table of reference counts"));
        }
        Ok(first)
    }

    /// Looks whether the header has a reference, by the first bytes of the first block.
    pub(crate) fn check_first_refcounts(&self, block: &[u8]) -> Result<(), HeaderError> {
        let used = match self.refcount_bits {
            bits @ 0..8 => block.first().is_some_and(|byte| u32::from(*byte) & ((1 << bits) - 1) != 0),
            bits => block.iter().take(bits as usize / 8).any(|byte| *byte != 0),
        };
        if used { Ok(()) } else { Err(HeaderError::Damaged("reference counts")) }
    }
}

/// The count of references to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Count {
    /// Of its first byte in the file.
    pub(crate) offset: u64,
    /// Its bytes; big-endian.
    pub(crate) len: usize,
    /// Its bits in each of them.
    pub(crate) mask: u8,
}

impl Count {
    /// Makes the count 1 if it is 0, in the bytes at its offset. True if it was.
    pub(crate) fn restore(self, bytes: &mut [u8]) -> bool {
        let is_zero = bytes.iter().all(|byte| byte & self.mask == 0);
        if let Some(last) = bytes.last_mut().filter(|_| is_zero) {
            // The lowest of its bits.
            *last |= self.mask & self.mask.wrapping_neg();
        }
        is_zero
    }
}

impl Header {
    /// The counts of the L2 tables to which an L1 table refers, by their places in the file; `counts` is the table of reference
    /// counts. What the tables cannot mean is left to the format's driver.
    pub(crate) fn counts_of_l2_tables(&self, l1: &[u8], counts: &[u8]) -> Vec<Count> {
        let bits = u64::from(self.refcount_bits);
        let per_block = self.cluster_len * 8 / bits;
        let blocks: Vec<u64> = entries(counts).collect();
        let count_of = |l2_table: u64| {
            let cluster = l2_table / self.cluster_len;
            let block = *blocks.get(usize::try_from(cluster / per_block).ok()?)?;
            let bit = cluster % per_block * bits;
            let mask = if bits < 8 { ((1u16 << bits) - 1) << (bit % 8) } else { 0xff };
            let count = Count {
                offset: block.checked_add(bit / 8)?,
                len: usize::try_from(bits.div_ceil(8)).ok()?,
                mask: u8::try_from(mask).ok()?,
            };
            (block != 0).then_some(count)
        };
        let l2_tables = entries(l1).map(|entry| entry & L2_OFFSET);
        let l2_tables = l2_tables.filter(|offset| *offset != 0 && offset.is_multiple_of(self.cluster_len));
        let mut found: Vec<Count> = l2_tables.filter_map(count_of).collect();
        found.sort_unstable_by_key(|count| count.offset);
        found
    }
}

/// The entries of a table.
fn entries(table: &[u8]) -> impl Iterator<Item = u64> {
    table.chunks_exact(8).filter_map(|entry| entry.first_chunk()).map(|entry| u64::from_be_bytes(*entry))
}

/// Big-endian fields, one after the other. What lies beyond the bytes is zero.
struct Fields<'a> {
    rest: &'a [u8],
}

impl Fields<'_> {
    fn skip(&mut self, len: usize) {
        self.rest = self.rest.get(len..).unwrap_or_default();
    }

    fn u32(&mut self) -> u32 {
        let value = self.rest.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        self.skip(4);
        value
    }

    fn u64(&mut self) -> u64 {
        let value = self.rest.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        self.skip(8);
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(changes: &[(usize, &[u8])]) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let fields: [(usize, &[u8]); 9] = [
            (0, b"QFI\xfb"),
            (4, &3u32.to_be_bytes()),
            (20, &16u32.to_be_bytes()),
            (24, &(1u64 << 30).to_be_bytes()),
            (36, &2u32.to_be_bytes()),
            (40, &(3u64 << 16).to_be_bytes()),
            (48, &(1u64 << 16).to_be_bytes()),
            (56, &1u32.to_be_bytes()),
            (96, &4u32.to_be_bytes()),
        ];
        for (offset, field) in fields.iter().chain(changes) {
            bytes[*offset..offset + field.len()].copy_from_slice(field);
        }
        bytes
    }

    #[test]
    fn an_ordinary_image_is_taken() {
        let parsed = Header::parse(&header(&[])).unwrap();
        let expected = Header {
            virtual_size: 1 << 30,
            has_backing: false,
            cluster_len: 65536,
            l1_table: 3 << 16,
            l1_len: 16,
            refcount_table: 65536,
            refcount_table_len: 65536,
            refcount_bits: 16,
        };
        assert_eq!(parsed, expected);
        assert!(Header::parse(&header(&[(8, &512u64.to_be_bytes())])).unwrap().has_backing);
        // In version 2 there are no features: what stands there is something else.
        let old = header(&[(4, &2u32.to_be_bytes()), (72, &[0xff; 8])]);
        assert_eq!(Header::parse(&old).unwrap().virtual_size, 1 << 30);
    }

    #[test]
    fn what_cannot_be_served_is_refused_by_name() {
        let features = |bits: u64| bits.to_be_bytes();
        for (offset, field, expected) in [
            (0, &b"QED\0"[..], HeaderError::Magic),
            (4, &4u32.to_be_bytes(), HeaderError::Version(4)),
            (32, &2u32.to_be_bytes(), HeaderError::Encrypted),
            (72, &features(1), HeaderError::NeedsRepair),
            (72, &features(2), HeaderError::NeedsRepair),
            (72, &features(4), HeaderError::DataFile),
            (72, &features(8), HeaderError::Features(8)),
            (72, &features(16), HeaderError::Features(16)),
            (72, &features(1 << 63), HeaderError::Features(1 << 63)),
            (24, &(1u64 << 63).to_be_bytes(), HeaderError::Size(1 << 63)),
            (20, &8u32.to_be_bytes(), HeaderError::Damaged("cluster size")),
            (20, &22u32.to_be_bytes(), HeaderError::Damaged("cluster size")),
            (96, &7u32.to_be_bytes(), HeaderError::Damaged("length of reference counts")),
            (36, &(1u32 << 22 | 1).to_be_bytes(), HeaderError::Damaged("L1 table")),
            (40, &512u64.to_be_bytes(), HeaderError::Damaged("L1 table")),
            (48, &0u64.to_be_bytes(), HeaderError::Damaged("table of reference counts")),
            (48, &512u64.to_be_bytes(), HeaderError::Damaged("table of reference counts")),
            (56, &0u32.to_be_bytes(), HeaderError::Damaged("table of reference counts")),
            (56, &129u32.to_be_bytes(), HeaderError::Damaged("table of reference counts")),
            (56, &u32::MAX.to_be_bytes(), HeaderError::Damaged("table of reference counts")),
        ] {
            assert_eq!(Header::parse(&header(&[(offset, field)])), Err(expected));
        }
        assert_eq!(Header::parse(&[0; HEADER_LEN]), Err(HeaderError::Magic));
    }

    #[test]
    fn reference_counts_that_free_the_header_are_refused() {
        let parsed = Header::parse(&header(&[])).unwrap();
        let table = |entries: &[u64]| -> Vec<u8> { entries.iter().flat_map(|entry| entry.to_be_bytes()).collect() };
        let check = |entries: &[u64]| parsed.check_refcount_table(&table(entries), 1 << 20);
        assert_eq!(check(&[0x2_0000, 0, 0x3_0000]), Ok(0x2_0000));
        for wrong in [
            &[0, 0x2_0000][..],
            &[0x2_0000, 0x2_0001],
            &[0x2_0200],
            &[1 << 20],
            &[0x2_0000, u64::MAX],
            &[0x2_0000, 0x3_0000, 0x2_0000],
            &[],
        ] {
            check(wrong).unwrap_err();
        }
        parsed.check_first_refcounts(&[0, 1]).unwrap();
        parsed.check_first_refcounts(&[0, 0, 1]).unwrap_err();
        parsed.check_first_refcounts(&[]).unwrap_err();
        for (order, block, used) in
            [(0u32, [0xfe, 0xff], false), (0, [1, 0], true), (2, [0x10, 0], false), (3, [0, 1], false)]
        {
            let parsed = Header::parse(&header(&[(96, &order.to_be_bytes())])).unwrap();
            assert_eq!(parsed.check_first_refcounts(&block).is_ok(), used, "{order} {block:?}");
        }
    }

    #[test]
    fn the_count_of_an_l2_table_is_found_and_restored_whatever_its_length() {
        let bytes = |entries: &[u64]| -> Vec<u8> { entries.iter().flat_map(|entry| entry.to_be_bytes()).collect() };
        // A table that is used by this image alone, none, one that cannot be, and one whose count no block has.
        let l1 = bytes(&[5 << 16 | 1 << 63, 0, 0x200, 1 << 48]);
        for (order, offset, len, mask) in
            [(0u32, 0, 1, 0x20), (1, 1, 1, 0x0c), (2, 2, 1, 0xf0), (3, 5, 1, 0xff), (4, 10, 2, 0xff), (6, 40, 8, 0xff)]
        {
            let parsed = Header::parse(&header(&[(96, &order.to_be_bytes())])).unwrap();
            let counts = parsed.counts_of_l2_tables(&l1, &bytes(&[7 << 16, 0]));
            assert_eq!(counts, [Count { offset: (7 << 16) + offset, len, mask }], "{order}");
            let mut count = vec![!mask; len];
            assert!(counts[0].restore(&mut count) && !counts[0].restore(&mut count));
            count.iter_mut().for_each(|byte| *byte &= mask);
            let (last, others) = count.split_last().unwrap();
            assert!(others.iter().all(|byte| *byte == 0) && *last == 1 << mask.trailing_zeros(), "{order}: {count:?}");
            assert_eq!(parsed.counts_of_l2_tables(&l1, &bytes(&[0])), []);
        }
    }
}
