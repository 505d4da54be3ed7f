//! The device-DAX info block at the start of the window.
//!
//! Linux' nvdimm subsystem looks for a block with the signature `NVDIMM_DAX_INFO` 4 KiB into a pmem namespace. If it finds
//! one, it makes a device-DAX node (`/dev/dax0.0`) over the rest of the namespace: cacheable, mappable with huge pages,
//! and with struct pages, so that O_DIRECT reads and writes it without a copy. The bridge writes the block; no program in
//! the appliance has to create a namespace.
//!
//! Source: the on-media structure `nd_pfn_sb` of Linux (drivers/nvdimm/pfn.h), version 1.4; all fields little-endian. The
//! checksum is the Fletcher sum over 32-bit words that the subsystem uses for all its labels.

use crate::window::{ALIGNMENT, HEADER_LEN};

/// Where in the window the block stands, in bytes.
pub const INFO_BLOCK_OFFSET: u64 = 4096;

/// Length of the block in bytes.
pub const INFO_BLOCK_LEN: usize = 4096;

/// Offset of the window's first byte behind the header within the DAX node: none, the node starts there.
pub const NODE_OFFSET: u64 = HEADER_LEN;

const SIGNATURE: &[u8; 16] = b"NVDIMM_DAX_INFO\0";
const PAGE_SIZE: u64 = 4096;
/// `PFN_MODE_RAM`: struct pages come from the appliance's ordinary memory, not from the window.
const MODE_RAM: u32 = 1;
const STRUCT_PAGE_LEN: u16 = 64;
const CHECKSUM_OFFSET: usize = INFO_BLOCK_LEN - 8;

/// The block for a window of `window_len` bytes, with `uuid` as the node's identity.
#[must_use]
pub fn info_block(uuid: [u8; 16], window_len: u64) -> [u8; INFO_BLOCK_LEN] {
    let page_count = window_len.saturating_sub(HEADER_LEN) / PAGE_SIZE;
    let fields: [&[u8]; 14] = [
        SIGNATURE,
        &uuid,
        &[0; 16],                           // parent uuid: the namespace has no label
        &0_u32.to_le_bytes(),               // flags
        &1_u16.to_le_bytes(),               // version, major
        &4_u16.to_le_bytes(),               // version, minor
        &HEADER_LEN.to_le_bytes(),          // where the data starts
        &page_count.to_le_bytes(),          // pages of data
        &MODE_RAM.to_le_bytes(),            // where the struct pages are
        &[0; 8],                            // padding at the start and at the end
        &low_half(ALIGNMENT).to_le_bytes(), // alignment of mappings
        &low_half(PAGE_SIZE).to_le_bytes(), // page size
        &STRUCT_PAGE_LEN.to_le_bytes(),     // length of a struct page
        &[],
    ];
    let mut block = [0; INFO_BLOCK_LEN];
    let bytes = fields.iter().flat_map(|field| field.iter());
    block.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    let checksum = fletcher64(&block).to_le_bytes();
    block.iter_mut().skip(CHECKSUM_OFFSET).zip(checksum).for_each(|(to, from)| *to = from);
    block
}

fn low_half(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(0)
}

/// Two running sums over little-endian 32-bit words: the low half of the result sums the words, the high half the sums.
fn fletcher64(bytes: &[u8]) -> u64 {
    let (mut low, mut high) = (0_u32, 0_u32);
    let (words, _) = bytes.as_chunks::<4>();
    for word in words {
        low = low.wrapping_add(u32::from_le_bytes(*word));
        high = high.wrapping_add(low);
    }
    u64::from(high) << 32 | u64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let block = info_block([0xab; 16], 256 << 20);
        assert_eq!(&block[..16], SIGNATURE);
        assert_eq!(block[16..32], [0xab; 16]);
        assert_eq!(block[48..56], [0, 0, 0, 0, 1, 0, 4, 0]);
        assert_eq!(block[56..64], (2_u64 << 20).to_le_bytes());
        assert_eq!(block[64..72], (254_u64 << 8).to_le_bytes());
        assert_eq!(block[72..76], 1_u32.to_le_bytes());
        assert_eq!(block[84..88], (2_u32 << 20).to_le_bytes());
        assert_eq!(block[88..94], [0, 0x10, 0, 0, 64, 0]);
        assert!(block[94..CHECKSUM_OFFSET].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn checksum_of_known_words() {
        assert_eq!(fletcher64(&[1, 0, 0, 0, 2, 0, 0, 0]), 4 << 32 | 3);
        assert_eq!(fletcher64(&[0xff; 8]), 0xffff_fffd_ffff_fffe);
    }

    #[test]
    fn every_byte_of_the_window_size_and_uuid_counts() {
        let one = info_block([1; 16], 1 << 30);
        assert_ne!(one, info_block([2; 16], 1 << 30));
        assert_ne!(one, info_block([1; 16], 2 << 30));
    }
}
