//! What the driver is told: feature bits and the configuration space (virtio 1.3, section 5.2). Pure.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Unit of every sector number in the protocol, in bytes, whatever the block size is (virtio 1.3, section 5.2.4).
pub(crate) const SECTOR_SIZE: u32 = 512;

/// Most data segments of one request: with header and status, a chain then fits a queue of 128 entries.
pub(crate) const SEG_MAX: u16 = 126;

/// Longest data segment in bytes.
pub(crate) const SIZE_MAX: u32 = 1 << 20;

/// Most data bytes of one request: what [`SEG_MAX`] segments of [`SIZE_MAX`] hold.
pub(crate) const MAX_REQUEST_BYTES: u64 = SEG_MAX as u64 * SIZE_MAX as u64;

/// Most ranges of one DISCARD or WRITE_ZEROES request.
pub(crate) const MAX_RANGES: u32 = 16;

/// Longest range of a DISCARD request in sectors (1 GiB).
pub(crate) const MAX_DISCARD_SECTORS: u32 = 1 << 21;

/// Longest range of a WRITE_ZEROES request in sectors (256 MiB): storage that cannot zero a range by itself gets all of
/// these bytes written to it, while the driver waits.
pub(crate) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 19;

/// Length of the configuration space in bytes, up to the end of the write-zeroes fields.
pub(crate) const CONFIG_LEN: usize = 60;

/// Offset of `writeback`, the one byte that a driver may write (virtio 1.3, section 5.2.4).
pub(crate) const WRITEBACK_OFFSET: u32 = 32;

/// The disk's measures, as the configuration space needs them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DiskShape {
    /// Capacity in units of [`SECTOR_SIZE`].
    pub(crate) capacity_sectors: u64,
    /// Logical block size in bytes: a power of two, at least [`SECTOR_SIZE`].
    pub(crate) block_size: u32,
    /// Physical block size in bytes: a power of two, at least `block_size`.
    pub(crate) physical_block_size: u32,
    /// The disk refuses every change.
    pub(crate) read_only: bool,
}

/// Feature bits that the device offers for a disk, the transport's ring features among them.
pub(crate) fn offered_features(read_only: bool) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_GEOMETRY,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_BLK_F_MQ,
    ];
    if read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    bits.into_iter().map(feature).fold(0, |all, bit| all | bit)
}

/// The mask of a feature bit.
pub(crate) const fn feature(bit: u32) -> u64 {
    1 << bit
}

/// The configuration space, little-endian (virtio 1.3, section 5.2.4, `struct virtio_blk_config`).
pub(crate) fn encode(shape: DiskShape, queues: u16, writeback: bool) -> [u8; CONFIG_LEN] {
    let mut config = [0; CONFIG_LEN];
    let mut writer = FieldWriter { rest: &mut config };
    writer.put(&shape.capacity_sectors.to_le_bytes());
    writer.put(&SIZE_MAX.to_le_bytes());
    writer.put(&u32::from(SEG_MAX).to_le_bytes());
    let geometry = Geometry::of(shape.capacity_sectors);
    writer.put(&geometry.cylinders.to_le_bytes());
    writer.put(&[geometry.heads, geometry.sectors]);
    writer.put(&shape.block_size.to_le_bytes());

    // topology: log2 of logical blocks per physical block, offset of the first aligned block, and the smallest and the
    // best length of a request in logical blocks (0: no statement).
    let blocks_per_physical = (shape.physical_block_size / shape.block_size.max(1)).max(1);
    let exponent = u8::try_from(blocks_per_physical.ilog2()).unwrap_or(0);
    writer.put(&[exponent, 0]);
    writer.put(&u16::try_from(blocks_per_physical).unwrap_or(1).to_le_bytes());
    writer.put(&0u32.to_le_bytes());

    writer.put(&[u8::from(writeback), 0]);
    writer.put(&queues.to_le_bytes());

    let (max_sectors, ranges) = if shape.read_only { (0, 0) } else { (MAX_DISCARD_SECTORS, MAX_RANGES) };
    writer.put(&max_sectors.to_le_bytes());
    writer.put(&ranges.to_le_bytes());
    writer.put(&(shape.physical_block_size / SECTOR_SIZE).to_le_bytes());
    let (max_sectors, ranges) = if shape.read_only { (0, 0) } else { (MAX_WRITE_ZEROES_SECTORS, MAX_RANGES) };
    writer.put(&max_sectors.to_le_bytes());
    writer.put(&ranges.to_le_bytes());
    writer.put(&[u8::from(!shape.read_only), 0, 0, 0]);
    config
}

/// Fills an array from its front; what does not fit is cut, which the test of the layout would show.
struct FieldWriter<'a> {
    rest: &'a mut [u8],
}

impl FieldWriter<'_> {
    fn put(&mut self, field: &[u8]) {
        let rest = std::mem::take(&mut self.rest);
        let (now, later) = rest.split_at_mut(field.len().min(rest.len()));
        for (to, from) in now.iter_mut().zip(field) {
            *to = *from;
        }
        self.rest = later;
    }
}

/// Cylinders, heads and sectors, for drivers old enough to ask: the translation that PC firmware uses for large disks.
struct Geometry {
    cylinders: u16,
    heads: u8,
    sectors: u8,
}

impl Geometry {
    fn of(capacity_sectors: u64) -> Self {
        const HEADS: u8 = 16;
        const SECTORS: u8 = 63;
        let cylinders = capacity_sectors / (u64::from(HEADS) * u64::from(SECTORS));
        Self { cylinders: u16::try_from(cylinders).unwrap_or(u16::MAX), heads: HEADS, sectors: SECTORS }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> DiskShape {
        DiskShape { capacity_sectors: 0x0102_0304_0506, block_size: 512, physical_block_size: 4096, read_only: false }
    }

    #[test]
    fn the_layout_is_that_of_the_specification() {
        let config = encode(shape(), 7, true);
        let at = |offset: usize, len: usize| config[offset..offset + len].to_vec();
        assert_eq!(at(0, 8), [6, 5, 4, 3, 2, 1, 0, 0], "capacity");
        assert_eq!(at(8, 4), SIZE_MAX.to_le_bytes(), "size_max");
        assert_eq!(at(12, 4), u32::from(SEG_MAX).to_le_bytes(), "seg_max");
        assert_eq!(at(16, 4), [0xff, 0xff, 16, 63], "geometry");
        assert_eq!(at(20, 4), 512u32.to_le_bytes(), "blk_size");
        assert_eq!(at(24, 8), [3, 0, 8, 0, 0, 0, 0, 0], "topology");
        assert_eq!(at(WRITEBACK_OFFSET as usize, 1), [1], "writeback");
        assert_eq!(at(34, 2), [7, 0], "num_queues");
        assert_eq!(at(36, 4), MAX_DISCARD_SECTORS.to_le_bytes(), "max_discard_sectors");
        assert_eq!(at(40, 4), MAX_RANGES.to_le_bytes(), "max_discard_seg");
        assert_eq!(at(44, 4), 8u32.to_le_bytes(), "discard_sector_alignment");
        assert_eq!(at(48, 4), MAX_WRITE_ZEROES_SECTORS.to_le_bytes(), "max_write_zeroes_sectors");
        assert_eq!(at(52, 4), MAX_RANGES.to_le_bytes(), "max_write_zeroes_seg");
        assert_eq!(at(56, 4), [1, 0, 0, 0], "write_zeroes_may_unmap");
    }

    #[test]
    fn a_read_only_disk_offers_no_change() {
        assert_eq!(offered_features(true) & feature(VIRTIO_BLK_F_DISCARD), 0);
        assert_eq!(offered_features(true) & feature(VIRTIO_BLK_F_WRITE_ZEROES), 0);
        assert_ne!(offered_features(true) & feature(VIRTIO_BLK_F_RO), 0);
        assert_eq!(offered_features(false) & feature(VIRTIO_BLK_F_RO), 0);
        let config = encode(DiskShape { read_only: true, ..shape() }, 1, true);
        assert_eq!(config[36..44], [0; 8]);
        assert_eq!(config[48..57], [0; 9]);
    }
}
