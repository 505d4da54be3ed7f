//! A packet on its way through the switch: headers that were copied and checked once, and where the rest of it lies.

use vm_memory::GuestMemoryError;
use vvu_back_end::{Segment, total_len};

use crate::DriverMemory;
use crate::driver_data::Cursor;
use crate::ethernet::{self, Ethernet};
use crate::layers::Layers;
use crate::net_header::{Checksum, HeaderError, LEGACY_LEN, NetHeader};
use crate::offloads::Offloads;

/// Bytes of a frame that are copied before they are looked at: all headers that are understood lie in there.
pub(crate) const FRONT_LEN: usize = 256;

/// Longest frame in bytes: two tags, and the longest IP packet.
pub(crate) const MAX_FRAME_LEN: usize = ethernet::HEADER_LEN + ethernet::MAX_TAGS * ethernet::TAG_LEN + 65535;

/// Shortest frame that goes to drivers and the uplink, in bytes; it is what a network without padding carries at the least.
const MIN_FRAME_LEN: usize = ethernet::HEADER_LEN;

/// Why a packet is dropped where it comes from.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PacketError {
    #[error("frame of {len} bytes")]
    Length { len: u64 },
    #[error("header")]
    Header(#[from] HeaderError),
    #[error("driver memory")]
    Memory(#[from] GuestMemoryError),
}

/// Bytes of a frame: the first ones, and the others.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Content<'a> {
    front: &'a [u8],
    /// Behind the front, in the memory of the driver that sends it, who may change it at any moment: it is only copied.
    rest: Option<Cursor<'a>>,
    rest_len: usize,
}

impl<'a> Content<'a> {
    /// A frame of our own.
    pub(crate) fn of(frame: &'a [u8]) -> Self {
        Self { front: frame, rest: None, rest_len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.front.len() + self.rest_len
    }

    /// The first bytes.
    pub(crate) fn front(&self) -> &'a [u8] {
        self.front
    }

    /// Copies the frame to driver memory. The number of bytes is less where the memory ends.
    pub(crate) fn copy_to_driver(&self, to: &mut Cursor<'_>) -> Result<usize, GuestMemoryError> {
        let done = to.write(self.front)?;
        match self.rest {
            Some(rest) => Ok(done + to.write_from(rest, self.rest_len)?),
            None => Ok(done),
        }
    }

    /// Replaces what is in `buffer` by the frame.
    pub(crate) fn copy_to(&self, buffer: &mut Vec<u8>) -> Result<(), GuestMemoryError> {
        // What is in there from before need not be cleared: all of it is written to.
        buffer.resize(self.len(), 0);
        let (front, behind) = buffer.split_at_mut(self.front.len());
        front.copy_from_slice(self.front);
        if let Some(mut rest) = self.rest {
            let read = rest.read(behind)?;
            behind.get_mut(read..).unwrap_or_default().fill(0);
        }
        Ok(())
    }
}

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packet<'a> {
    pub(crate) header: NetHeader,
    pub(crate) ethernet: Ethernet,
    pub(crate) layers: Option<Layers>,
    pub(crate) content: Content<'a>,
}

impl<'a> Packet<'a> {
    /// A packet that lies in the chain of a driver, behind a header of `header_len` bytes. `front` takes a copy of its first
    /// bytes. `offloads` are what the driver may leave to the device.
    pub(crate) fn from_driver(
        memory: &'a DriverMemory,
        segments: &'a [Segment],
        header_len: usize,
        offloads: Offloads,
        front: &'a mut [u8; FRONT_LEN],
    ) -> Result<Self, PacketError> {
        let mut cursor = Cursor::new(memory, segments);
        let mut header = [0; crate::net_header::LEN];
        // All of it is there: `header_len` is one of two lengths, and the chain was measured.
        cursor.read(header.get_mut(..header_len).unwrap_or_default())?;
        let len = total_len(segments).saturating_sub(header_len as u64);
        let frame_len = usize::try_from(len).ok().filter(|len| (MIN_FRAME_LEN..=MAX_FRAME_LEN).contains(len));
        let frame_len = frame_len.ok_or(PacketError::Length { len })?;
        let front = front.get_mut(..frame_len.min(FRONT_LEN)).unwrap_or_default();
        cursor.read(front)?;
        let content = Content { front, rest: Some(cursor), rest_len: frame_len.saturating_sub(FRONT_LEN) };
        let [header @ .., _, _] = header;
        let mut packet = Self::parse(&header, content, offloads)?;
        // Section 5.1.6.2.1: a driver does not say so, and nobody would have to believe it.
        if packet.header.checksum == Checksum::Valid {
            packet.header.checksum = Checksum::Unknown;
        }
        Ok(packet)
    }

    /// A packet that was read into a buffer, behind its header.
    pub(crate) fn from_buffer(header: &[u8; LEGACY_LEN], frame: &'a [u8]) -> Result<Self, PacketError> {
        if !(MIN_FRAME_LEN..=MAX_FRAME_LEN).contains(&frame.len()) {
            return Err(PacketError::Length { len: frame.len() as u64 });
        }
        Self::parse(header, Content::of(frame), Offloads::all())
    }

    fn parse(header: &[u8; LEGACY_LEN], content: Content<'a>, offloads: Offloads) -> Result<Self, PacketError> {
        let len = content.len();
        let front = content.front().get(..content.front().len().min(FRONT_LEN)).unwrap_or_default();
        let ethernet = Ethernet::parse(front).ok_or(PacketError::Length { len: len as u64 })?;
        let layers = Layers::parse(front, &ethernet);
        let header = NetHeader::decode(header, len, layers, offloads)?;
        Ok(Self { header, ethernet, layers, content })
    }

    /// Bytes behind the Ethernet header of the largest frame that the network has to carry for it: its MTU is to be at least
    /// that.
    pub(crate) fn network_len(&self) -> usize {
        let (start, end) = (self.ethernet.payload, self.content.len());
        let carried = match self.header.segmentation {
            Some(segmentation) => (segmentation.layers.payload_start + usize::from(segmentation.size)).min(end),
            None => end,
        };
        carried.saturating_sub(start)
    }

    /// The same number for all packets of a connection in one direction.
    pub(crate) fn flow_hash(&self) -> u64 {
        match self.layers {
            Some(layers) => layers.flow_hash(self.content.front()),
            None => self.ethernet.source.bits() ^ self.ethernet.destination.bits(),
        }
    }
}
