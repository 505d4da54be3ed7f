//! Reads a virtio-blk request out of a chain and decides what it asks for (virtio 1.3, section 5.2.6). Pure.
//!
//! How a request is spread over descriptors is the driver's choice (section 2.7.4.1): the header is the first 16 readable
//! bytes and the status the last writable byte, wherever descriptors begin and end. Two kinds of wrong requests exist. A
//! chain in which header, status or data cannot be told apart breaks the device ([`RequestError`]); one that asks for what
//! the disk cannot do is answered with a [`Status`].

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Address, GuestAddress, GuestMemoryError};
use vvu_back_end::{Chain, Segment, total_len};

use crate::DriverMemory;
use crate::config_space::{
    MAX_DISCARD_SECTORS, MAX_RANGES, MAX_REQUEST_BYTES, MAX_WRITE_ZEROES_SECTORS, SECTOR_SIZE, feature,
};

/// Length of a request header in bytes.
const HEADER_LEN: usize = 16;

/// Length of one range of a DISCARD or WRITE_ZEROES request in bytes.
const RANGE_LEN: usize = 16;

/// `unmap` in the flags of a range.
const RANGE_FLAG_UNMAP: u32 = 1;

/// Why a chain is no request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("device-readable part has {len} bytes, a request header has 16")]
    HeaderTooShort { len: u64 },
    #[error("no device-writable byte for the status")]
    NoStatus,
    #[error("data buffers have the wrong direction for request type {kind}")]
    WrongDirection { kind: u32 },
    #[error("request cannot be read")]
    Unreadable { source: GuestMemoryError },
}

/// Status byte of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    /// The byte that the driver reads.
    pub(crate) fn byte(self) -> u8 {
        let value = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        value.to_le_bytes()[0]
    }
}

/// Request type, as far as this device knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestKind {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    Unknown(u32),
}

impl RequestKind {
    fn from_wire(kind: u32) -> Self {
        match kind {
            VIRTIO_BLK_T_IN => Self::Read,
            VIRTIO_BLK_T_OUT => Self::Write,
            VIRTIO_BLK_T_FLUSH => Self::Flush,
            VIRTIO_BLK_T_GET_ID => Self::GetId,
            VIRTIO_BLK_T_DISCARD => Self::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Self::WriteZeroes,
            unknown => Self::Unknown(unknown),
        }
    }
}

/// One request, its header copied out of driver memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) kind: RequestKind,
    /// First sector, in units of [`SECTOR_SIZE`].
    pub(crate) sector: u64,
    /// Where the status byte goes.
    pub(crate) status: GuestAddress,
    /// Number of device-writable bytes, the status among them, as the used ring reports it.
    pub(crate) writable_len: u32,
}

impl Request {
    /// Takes header and status off `chain`; what remains is the data, moved into `data`.
    ///
    /// # Errors
    /// [`RequestError`] if the chain holds no request.
    pub(crate) fn parse(
        memory: &DriverMemory,
        chain: &mut Chain,
        data: &mut Vec<Segment>,
    ) -> Result<Self, RequestError> {
        let writable_len = u32::try_from(total_len(&chain.writable)).unwrap_or(u32::MAX);
        let status = take_last_byte(&mut chain.writable).ok_or(RequestError::NoStatus)?;
        let header = take_header(memory, &mut chain.readable)?;
        // After the type, 4 bytes that the driver sets and the device ignores (the former priority).
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (u32::from_le_bytes([k0, k1, k2, k3]), u64::from_le_bytes(sector));

        let request = Self { kind: RequestKind::from_wire(kind), sector, status, writable_len };
        let (used, unused) = match request.kind {
            RequestKind::Read | RequestKind::GetId => (&mut chain.writable, &chain.readable),
            RequestKind::Write | RequestKind::Discard | RequestKind::WriteZeroes => {
                (&mut chain.readable, &chain.writable)
            }
            RequestKind::Flush | RequestKind::Unknown(_) => {
                data.clear();
                return Ok(request);
            }
        };
        if !unused.is_empty() {
            return Err(RequestError::WrongDirection { kind });
        }
        std::mem::swap(used, data);
        Ok(request)
    }
}

/// What the disk allows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DiskRules {
    /// Of the moment.
    pub(crate) capacity_sectors: u64,
    pub(crate) read_only: bool,
    /// Negotiated feature bits, latched when the ring starts.
    pub(crate) features: u64,
}

/// A range of the image in bytes, inside of its capacity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ByteRange {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// WRITE_ZEROES: the range may be deallocated.
    pub(crate) unmap: bool,
}

/// What is to be done for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Nothing but to report the status.
    Answer(Status),
    /// Read the data from the image.
    Read(ByteRange),
    /// Write the data to the image.
    Write(ByteRange),
    /// Make durable what was completed before.
    Sync,
    /// Hand out the serial number.
    Identify,
    /// Read the ranges out of the data ([`parse_ranges`]), then deallocate or zero them.
    Ranges,
}

impl DiskRules {
    /// Decides what a request with `data_len` bytes of data leads to.
    pub(crate) fn plan(&self, request: &Request, data_len: u64) -> Plan {
        match request.kind {
            RequestKind::Read => self.transfer(request.sector, data_len).map_or_else(Plan::Answer, Plan::Read),
            RequestKind::Write if self.read_only => Plan::Answer(Status::IoError),
            RequestKind::Write => self.transfer(request.sector, data_len).map_or_else(Plan::Answer, Plan::Write),
            RequestKind::Flush if self.negotiated(VIRTIO_BLK_F_FLUSH) => Plan::Sync,
            RequestKind::GetId => Plan::Identify,
            RequestKind::Discard | RequestKind::WriteZeroes if self.read_only => Plan::Answer(Status::IoError),
            RequestKind::Discard if self.negotiated(VIRTIO_BLK_F_DISCARD) => Self::ranges(data_len),
            RequestKind::WriteZeroes if self.negotiated(VIRTIO_BLK_F_WRITE_ZEROES) => Self::ranges(data_len),
            RequestKind::Flush | RequestKind::Discard | RequestKind::WriteZeroes | RequestKind::Unknown(_) => {
                Plan::Answer(Status::Unsupported)
            }
        }
    }

    fn negotiated(&self, bit: u32) -> bool {
        self.features & feature(bit) != 0
    }

    fn transfer(&self, sector: u64, len: u64) -> Result<ByteRange, Status> {
        if len > MAX_REQUEST_BYTES || !len.is_multiple_of(u64::from(SECTOR_SIZE)) {
            return Err(Status::IoError);
        }
        self.byte_range(sector, len / u64::from(SECTOR_SIZE))
    }

    fn byte_range(&self, sector: u64, sectors: u64) -> Result<ByteRange, Status> {
        let end = sector.checked_add(sectors).ok_or(Status::IoError)?;
        if end > self.capacity_sectors {
            return Err(Status::IoError);
        }
        // Inside of the capacity, which came from a byte count, so these products fit.
        let size = u64::from(SECTOR_SIZE);
        Ok(ByteRange { offset: sector.saturating_mul(size), len: sectors.saturating_mul(size), unmap: false })
    }

    fn ranges(data_len: u64) -> Plan {
        let max = u64::from(MAX_RANGES) * RANGE_LEN as u64;
        if data_len == 0 || data_len > max || !data_len.is_multiple_of(RANGE_LEN as u64) {
            return Plan::Answer(Status::IoError);
        }
        Plan::Ranges
    }

    /// Reads the ranges of a DISCARD or WRITE_ZEROES request into `ranges`. All or none of them are acted upon.
    ///
    /// # Errors
    /// [`Status`] to answer with.
    pub(crate) fn parse_ranges(
        &self,
        kind: RequestKind,
        payload: &[u8],
        ranges: &mut Vec<ByteRange>,
    ) -> Result<(), Status> {
        let (max_sectors, known_flags) = match kind {
            RequestKind::WriteZeroes => (MAX_WRITE_ZEROES_SECTORS, RANGE_FLAG_UNMAP),
            _ => (MAX_DISCARD_SECTORS, 0),
        };
        ranges.clear();
        for wire in payload.chunks_exact(RANGE_LEN) {
            let (sector, rest) = wire.split_at(8);
            let (sectors, flags) = rest.split_at(4);
            let (sectors, flags) = (le_u32(sectors), le_u32(flags));
            if flags & !known_flags != 0 {
                return Err(Status::Unsupported);
            }
            if sectors > max_sectors {
                return Err(Status::IoError);
            }
            let range = self.byte_range(le_u64(sector), u64::from(sectors))?;
            ranges.push(ByteRange { unmap: flags & RANGE_FLAG_UNMAP != 0, ..range });
        }
        Ok(())
    }
}

/// Takes the last byte off `segments`.
fn take_last_byte(segments: &mut Vec<Segment>) -> Option<GuestAddress> {
    let last = segments.last_mut()?;
    // No segment is empty, so neither subtraction nor address can go wrong.
    last.len = last.len.checked_sub(1)?;
    let address = last.address.checked_add(u64::from(last.len))?;
    if last.len == 0 {
        segments.pop();
    }
    Some(address)
}

/// Copies the first 16 bytes of `segments` and takes them off.
fn take_header(memory: &DriverMemory, segments: &mut Vec<Segment>) -> Result<[u8; HEADER_LEN], RequestError> {
    let mut header = [0; HEADER_LEN];
    let mut missing: &mut [u8] = &mut header;
    let mut emptied = 0;
    for segment in segments.iter_mut() {
        let take = missing.len().min(segment.len as usize);
        let (now, later) = missing.split_at_mut(take);
        memory.read_slice(now, segment.address).map_err(|source| RequestError::Unreadable { source })?;
        missing = later;
        segment.address = segment.address.unchecked_add(take as u64);
        segment.len = segment.len.saturating_sub(u32::try_from(take).unwrap_or(u32::MAX));
        emptied += usize::from(segment.len == 0);
        if missing.is_empty() {
            break;
        }
    }
    if !missing.is_empty() {
        return Err(RequestError::HeaderTooShort { len: (HEADER_LEN - missing.len()) as u64 });
    }
    segments.drain(..emptied);
    Ok(header)
}

/// Reads a little-endian number; bytes that are missing count as zero.
fn le_u64(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Reads a little-endian number; bytes that are missing count as zero.
fn le_u32(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}
