//! Payload structures, each with its section in the vhost-user specification.

use crate::DecodeError;
use crate::address::FileOffset;
use crate::payload::{Reader, Writer};

/// "A vring state description": an index and a number, whose meaning is the message's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringState {
    /// Index of the vring. All 32 bits count; it is not cut before it is checked.
    pub index: u32,
    /// Size, base, enable flag or endianness.
    pub num: u32,
}

impl VringState {
    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { index: reader.u32()?, num: reader.u32()? })
    }

    pub(crate) fn write(self, writer: Writer) -> Writer {
        writer.u32(self.index).u32(self.num)
    }
}

/// "A vring address description".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringAddresses {
    /// Index of the vring.
    pub index: u32,
    /// Bit 0 (`VHOST_VRING_F_LOG`): writes to the used ring are logged at `log`.
    pub flags: u32,
    /// Descriptor table, a user address of the front-end (with an IOMMU, an I/O address).
    pub descriptors: u64,
    /// Used ring, likewise.
    pub used: u64,
    /// Available ring, likewise.
    pub available: u64,
    /// Guest-physical address of the used ring for the dirty log.
    pub log: u64,
}

impl VringAddresses {
    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            index: reader.u32()?,
            flags: reader.u32()?,
            descriptors: reader.u64()?,
            used: reader.u64()?,
            available: reader.u64()?,
            log: reader.u64()?,
        })
    }

    pub(crate) fn write(self, writer: Writer) -> Writer {
        writer.u32(self.index).u32(self.flags).u64(self.descriptors).u64(self.used).u64(self.available).u64(self.log)
    }
}

/// Payload of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR: bits 0–7 are the index, bit 8 says that no descriptor
/// came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VringFile<F> {
    /// Index of the vring.
    pub index: u8,
    /// The eventfd, or `None` if the vring is to be polled.
    pub descriptor: Option<F>,
}

const VRING_INDEX_MASK: u64 = 0xff;
const VRING_NO_DESCRIPTOR: u64 = 1 << 8;

/// Bit 8 and the descriptor have to agree, and no other bit than that and the index may be set.
fn check_vring_value(what: &'static str, value: u64, has_descriptor: bool) -> Result<(), DecodeError> {
    if value & !(VRING_INDEX_MASK | VRING_NO_DESCRIPTOR) != 0 {
        return Err(DecodeError::Value { what, field: "vring", value });
    }
    let (expected, found) = (usize::from(value & VRING_NO_DESCRIPTOR == 0), usize::from(has_descriptor));
    if found == expected {
        return Ok(());
    }
    Err(DecodeError::Descriptors { what, expected: expected..=expected, found })
}

impl<F> VringFile<F> {
    pub(crate) fn read(
        what: &'static str,
        reader: &mut Reader<'_>,
        descriptor: Option<F>,
    ) -> Result<Self, DecodeError> {
        let value = reader.u64()?;
        check_vring_value(what, value, descriptor.is_some())?;
        let [index, ..] = value.to_le_bytes();
        Ok(Self { index, descriptor })
    }

    pub(crate) fn try_map<G, E>(self, change: impl FnMut(F) -> Result<G, E>) -> Result<VringFile<G>, E> {
        Ok(VringFile { index: self.index, descriptor: self.descriptor.map(change).transpose()? })
    }

    pub(crate) fn value(&self) -> u64 {
        u64::from(self.index) | if self.descriptor.is_some() { 0 } else { VRING_NO_DESCRIPTOR }
    }
}

/// "Log description": where the dirty log lies in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogArea {
    /// Length in bytes; one bit stands for one page of 4 KiB.
    pub size: u64,
    /// Start in the file.
    pub mmap_offset: FileOffset,
}

impl LogArea {
    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { size: reader.u64()?, mmap_offset: FileOffset(reader.u64()?) })
    }

    pub(crate) fn write(self, writer: Writer) -> Writer {
        writer.u64(self.size).u64(self.mmap_offset.0)
    }
}

/// "An IOTLB message": the kernel's `struct vhost_iotlb_msg`, 32 bytes with its padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Iotlb {
    /// I/O address.
    pub iova: u64,
    /// Length in bytes.
    pub size: u64,
    /// User address that it maps to.
    pub user_address: u64,
    /// 1 read, 2 write, 3 both.
    pub permission: u8,
    /// 1 miss, 2 update, 3 invalidate, 4 access failed, 5 batch begin, 6 batch end.
    pub kind: u8,
}

impl Iotlb {
    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let message = Self {
            iova: reader.u64()?,
            size: reader.u64()?,
            user_address: reader.u64()?,
            permission: reader.u8()?,
            kind: reader.u8()?,
        };
        reader.skip(6)?;
        Ok(message)
    }

    pub(crate) fn write(self, writer: Writer) -> Writer {
        writer.u64(self.iova).u64(self.size).u64(self.user_address).u8(self.permission).u8(self.kind).zeros(6)
    }
}

/// "Virtio device config space".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigSpace {
    /// First byte of the device's configuration space that is meant.
    pub offset: u32,
    /// 0, or 1 for a write by migration.
    pub flags: u32,
    /// The bytes, at most [`MAX_CONFIG_LEN`]; in a GET_CONFIG request their number is what counts.
    pub bytes: Vec<u8>,
}

/// Largest configuration space in bytes (`VHOST_USER_MAX_CONFIG_SIZE`).
pub const MAX_CONFIG_LEN: usize = 256;

impl ConfigSpace {
    pub(crate) fn read(what: &'static str, reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (offset, size, flags) = (reader.u32()?, reader.u32()?, reader.u32()?);
        let len = usize::try_from(size).unwrap_or(usize::MAX);
        if len > MAX_CONFIG_LEN {
            return Err(DecodeError::Value { what, field: "size", value: u64::from(size) });
        }
        let end = usize::try_from(offset).ok().and_then(|start| start.checked_add(len));
        if end.is_none_or(|end| end > MAX_CONFIG_LEN) {
            return Err(DecodeError::Value { what, field: "offset", value: u64::from(offset) });
        }
        Ok(Self { offset, flags, bytes: reader.bytes(len)?.to_vec() })
    }

    pub(crate) fn write(&self, writer: Writer) -> Writer {
        let len = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        writer.u32(self.offset).u32(len).u32(self.flags).bytes(&self.bytes)
    }
}

/// "Inflight description".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inflight {
    /// Length of the buffer in bytes.
    pub mmap_size: u64,
    /// Start in its file.
    pub mmap_offset: FileOffset,
    /// Number of queues that it covers.
    pub queue_count: u16,
    /// Entries of each queue.
    pub queue_size: u16,
}

impl Inflight {
    /// The specification's fields take 20 bytes; front-ends that send the C structure add its padding, 24 in all. Both are
    /// read, and the longer one is written, as QEMU and the vhost crate do.
    pub(crate) fn read(bytes: &[u8], what: &'static str) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(what, bytes);
        let description = Self {
            mmap_size: reader.u64()?,
            mmap_offset: FileOffset(reader.u64()?),
            queue_count: reader.u16()?,
            queue_size: reader.u16()?,
        };
        if bytes.len() == 24 {
            reader.skip(4)?;
        }
        reader.finish()?;
        Ok(description)
    }

    pub(crate) fn write(self, writer: Writer) -> Writer {
        writer.u64(self.mmap_size).u64(self.mmap_offset.0).u16(self.queue_count).u16(self.queue_size).zeros(4)
    }
}

/// Direction of SET_DEVICE_STATE_FD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateDirection {
    /// The back-end writes its state.
    Save,
    /// The back-end reads its state.
    Load,
}

/// Phase of SET_DEVICE_STATE_FD; the specification knows one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceStatePhase {
    /// All vrings are stopped.
    Stopped,
}

/// "Device state transfer parameters".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceStateTransfer {
    /// Save or load.
    pub direction: StateDirection,
    /// When.
    pub phase: DeviceStatePhase,
}

impl DeviceStateTransfer {
    pub(crate) fn read(what: &'static str, reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let direction = match reader.u32()? {
            0 => StateDirection::Save,
            1 => StateDirection::Load,
            other => return Err(DecodeError::Value { what, field: "direction", value: u64::from(other) }),
        };
        match reader.u32()? {
            0 => Ok(Self { direction, phase: DeviceStatePhase::Stopped }),
            other => Err(DecodeError::Value { what, field: "phase", value: u64::from(other) }),
        }
    }

    pub(crate) fn write(self, writer: Writer) -> Writer {
        let direction = match self.direction {
            StateDirection::Save => 0,
            StateDirection::Load => 1,
        };
        let DeviceStatePhase::Stopped = self.phase;
        writer.u32(direction).u32(0)
    }
}

/// "Vring area description", payload of VRING_HOST_NOTIFIER_MSG.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringArea {
    /// Bits 0–7 vring index, bit 8 no descriptor.
    pub vring: u64,
    /// Length in bytes.
    pub size: u64,
    /// Start in the file.
    pub offset: FileOffset,
}

impl VringArea {
    pub(crate) fn read(what: &'static str, reader: &mut Reader<'_>, has_descriptor: bool) -> Result<Self, DecodeError> {
        let area = Self { vring: reader.u64()?, size: reader.u64()?, offset: FileOffset(reader.u64()?) };
        check_vring_value(what, area.vring, has_descriptor)?;
        Ok(area)
    }

    pub(crate) fn write(self, writer: Writer) -> Writer {
        writer.u64(self.vring).u64(self.size).u64(self.offset.0)
    }
}

/// Number of shared memory regions that a [`ShmemConfig`] has room for.
pub const SHMEM_MAX_REGIONS: usize = 256;

/// Reply to GET_SHMEM_CONFIG: the sizes of a device's shared memory regions, 2,056 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShmemConfig {
    /// Region id and length in bytes, for each region that exists; ids ascend.
    pub regions: Vec<(u8, u64)>,
}

impl ShmemConfig {
    pub(crate) fn read(what: &'static str, reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let count = reader.u32()?;
        reader.skip(4)?;
        let mut regions = Vec::new();
        for id in 0..=u8::MAX {
            let size = reader.u64()?;
            if size != 0 {
                regions.push((id, size));
            }
        }
        if usize::try_from(count).ok() != Some(regions.len()) {
            return Err(DecodeError::Value { what, field: "region count", value: u64::from(count) });
        }
        Ok(Self { regions })
    }

    pub(crate) fn write(&self, writer: Writer) -> Writer {
        let count = u32::try_from(self.regions.len()).unwrap_or(u32::MAX);
        let mut sizes = [0_u64; SHMEM_MAX_REGIONS];
        for (id, size) in &self.regions {
            if let Some(slot) = sizes.get_mut(usize::from(*id)) {
                *slot = *size;
            }
        }
        sizes.iter().fold(writer.u32(count).u32(0), |writer, size| writer.u64(*size))
    }
}

/// Payload of SHMEM_MAP and SHMEM_UNMAP, 40 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShmemMap {
    /// Shared memory region.
    pub region: u8,
    /// Start in the file that comes with SHMEM_MAP.
    pub file_offset: FileOffset,
    /// Start in the shared memory region, in bytes.
    pub region_offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Bit 0 of the flags.
    pub writable: bool,
}

impl ShmemMap {
    pub(crate) fn read(what: &'static str, reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let region = reader.u8()?;
        reader.skip(7)?;
        let file_offset = FileOffset(reader.u64()?);
        let (region_offset, len, flags) = (reader.u64()?, reader.u64()?, reader.u64()?);
        if flags > 1 {
            return Err(DecodeError::Value { what, field: "flags", value: flags });
        }
        Ok(Self { region, file_offset, region_offset, len, writable: flags == 1 })
    }

    pub(crate) fn write(self, writer: Writer) -> Writer {
        writer
            .u8(self.region)
            .zeros(7)
            .u64(self.file_offset.0)
            .u64(self.region_offset)
            .u64(self.len)
            .u64(u64::from(self.writable))
    }
}
