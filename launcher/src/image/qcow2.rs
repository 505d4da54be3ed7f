//! How long a qcow2 image can become (QEMU documentation, "qcow2: the QEMU Copy-On-Write image format, version 2 and 3").
//!
//! The appliance's disk is as long as the file is at its start, so a file that shall grow is made long before: what is not
//! written takes no space. Of the header only the numbers are read that tell the length; nothing in the image decides
//! what is opened.

use std::ops::RangeInclusive;

/// How an image begins.
pub(super) const MAGIC: &[u8] = b"QFI\xfb";

/// Bytes of the header that are read: that of version 3 without extensions.
pub(super) const HEADER_LEN: usize = 104;

/// Cluster sizes as powers of two: the format's least and QEMU's largest.
const CLUSTER_BITS: RangeInclusive<u32> = 9..=21;

/// Refcount width of version 2 as a power of two, in bits.
const REFCOUNT_ORDER_V2: u32 = 4;

/// Largest refcount width as a power of two, in bits.
const MAX_REFCOUNT_ORDER: u32 = 6;

/// Incompatible feature of version 3: entries of the second-level tables have 16 bytes.
const EXTENDED_L2: u64 = 1 << 4;

/// Clusters beside those that are counted: what is allocated before another is freed while a table moves.
const SPARE_CLUSTERS: u64 = 16;

/// Length in bytes of an image that begins with `header`, if all of its disk is written to and nothing is freed that
/// snapshots hold. None for what is no qcow2 image, or one of a size that no file has.
pub(super) fn full_length(header: &[u8]) -> Option<u64> {
    let version = be32(header, 4)?;
    if !header.starts_with(MAGIC) || !(2..=3).contains(&version) {
        return None;
    }
    let cluster_bits = Some(be32(header, 20)?).filter(|bits| CLUSTER_BITS.contains(bits))?;
    let size = be64(header, 24)?;
    let (features, refcount_order) =
        if version == 2 { (0, REFCOUNT_ORDER_V2) } else { (be64(header, 72)?, be32(header, 96)?) };
    let cluster = 1_u64 << cluster_bits;
    let l2_entry = if features & EXTENDED_L2 == 0 { 8 } else { 16 };
    let data = size.div_ceil(cluster);
    let l2 = data.checked_mul(l2_entry)?.div_ceil(cluster);
    let l1 = l2.checked_mul(8)?.div_ceil(cluster);
    let refcount_bits = 1_u64 << Some(refcount_order).filter(|order| *order <= MAX_REFCOUNT_ORDER)?;
    // Tables that grow are written anew before the old ones are freed, hence twice.
    let counted = data.checked_add(l2)?.checked_add(2 * l1)?.checked_add(SPARE_CLUSTERS)?;
    let per_block = cluster * 8 / refcount_bits;
    // Refcount blocks count themselves and their table: a second round covers what the first one added.
    let blocks = |clusters: u64| clusters.div_ceil(per_block);
    let table = |blocks: u64| (blocks * 8).div_ceil(cluster);
    let first = blocks(counted) + 2 * table(blocks(counted));
    let all = blocks(counted.checked_add(first)?) + 1;
    let clusters = counted.checked_add(all)?.checked_add(2 * table(all))?;
    clusters.checked_mul(cluster).filter(|length| i64::try_from(*length).is_ok())
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|chunk| u32::from_be_bytes(*chunk))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|chunk| u64::from_be_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of version 3.
    fn header(cluster_bits: u32, size: u64, features: u64, refcount_order: u32) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_LEN];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4..8].copy_from_slice(&3_u32.to_be_bytes());
        bytes[20..24].copy_from_slice(&cluster_bits.to_be_bytes());
        bytes[24..32].copy_from_slice(&size.to_be_bytes());
        bytes[72..80].copy_from_slice(&features.to_be_bytes());
        bytes[96..100].copy_from_slice(&refcount_order.to_be_bytes());
        bytes
    }

    /// The lengths are those that `qemu-img measure -O qcow2 -o OPTIONS --size SIZE` calls "fully allocated size".
    #[test]
    fn the_length_has_room_for_what_qemu_measures() {
        let gib = 1 << 30;
        for (header, measured) in [
            (header(16, gib, 0, 4), 1_074_135_040),
            (header(16, 1 << 40, 0, 4), 1_099_679_662_080),
            (header(9, gib, 0, 4), 1_095_127_040),
            (header(21, gib, 0, 4), 1_084_227_584),
            (header(16, gib, EXTENDED_L2, 4), 1_074_266_112),
        ] {
            let length = full_length(&header).unwrap();
            assert!(length >= measured, "{length} is too short for {measured}");
            assert!(length - measured <= measured / 50 + (32 << 21), "{length} is far more than {measured}");
        }
        let mut old = header(16, gib, u64::MAX, 99);
        old[4..8].copy_from_slice(&2_u32.to_be_bytes());
        assert_eq!(full_length(&old), full_length(&header(16, gib, 0, 4)), "version 2 ends before these fields");
    }

    #[test]
    fn nonsense_has_no_length() {
        let good = header(16, 1 << 30, 0, 4);
        for (at, value) in [(0, 0), (7, 4), (23, 8), (23, 22), (24, 0xff), (99, 7)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(full_length(&bad), None, "byte {at} is {value}");
        }
        assert_eq!(full_length(&good[..96]), None);
        assert_eq!(full_length(b""), None);
    }
}
