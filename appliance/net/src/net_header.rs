//! The header before each packet in a ring (virtio 1.3, section 5.1.6, `struct virtio_net_hdr`): decoded once, checked
//! against the packet, and encoded anew for each receiver. Nothing of it passes unchecked from one driver to another.

use crate::layers::Layers;
use crate::offloads::Offloads;

/// Length of the header with `num_buffers`, in bytes.
pub(crate) const LEN: usize = 12;

/// Length for a legacy driver without MRG_RXBUF, in bytes (section 5.1.6.1).
pub(crate) const LEGACY_LEN: usize = 10;

const FLAG_NEEDS_CSUM: u8 = 1;
const FLAG_DATA_VALID: u8 = 2;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;

/// Most packets that one is cut into: 64 KiB in the smallest segments that TCP uses (48 bytes).
const MAX_SEGMENTS: usize = 1366;

/// What is known of a packet's checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Checksum {
    /// Nothing.
    Unknown,
    /// Somebody has found it right.
    Valid,
    /// It is to be completed: that of all bytes from `start` on, its place `offset` bytes behind it.
    Partial {
        /// Offset in the frame.
        start: u16,
        /// Offset from there.
        offset: u16,
    },
}

/// A packet that is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segmentation {
    pub(crate) layers: Layers,
    /// Bytes of payload of each segment; not 0.
    pub(crate) size: u16,
}

impl Segmentation {
    /// What a receiver must have to take the packet as it is.
    pub(crate) fn offload(&self) -> Offloads {
        Offloads::segmentation(self.layers.network, self.layers.transport)
    }
}

/// A header that fits its packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NetHeader {
    pub(crate) checksum: Checksum,
    pub(crate) segmentation: Option<Segmentation>,
}

/// Why a packet is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeaderError {
    #[error("the checksum at {start}+{offset} is outside of a frame of {frame_len} bytes")]
    ChecksumOutside { start: u16, offset: u16, frame_len: usize },
    #[error("an offload was not negotiated")]
    NotNegotiated,
    #[error("there is no segmentation of type {0:#x}")]
    Type(u8),
    #[error("segments of {size} bytes of a frame of {frame_len}")]
    SegmentSize { size: u16, frame_len: usize },
    #[error("segmentation without a checksum to be completed, or with one elsewhere")]
    SegmentChecksum,
    #[error("the frame is not of the protocol that is to be segmented")]
    Protocol,
}

impl NetHeader {
    /// Decodes and checks the header of a frame of `frame_len` bytes that somebody sends who was allowed `offloads`. Its
    /// `hdr_len` and `num_buffers` are only hints to the device, and are not looked at.
    pub(crate) fn decode(
        bytes: &[u8; LEGACY_LEN],
        frame_len: usize,
        layers: Option<Layers>,
        offloads: Offloads,
    ) -> Result<Self, HeaderError> {
        let [flags, gso_type, _, _, size0, size1, start0, start1, offset0, offset1] = *bytes;
        let checksum = if flags & FLAG_NEEDS_CSUM != 0 {
            let (start, offset) = (u16::from_le_bytes([start0, start1]), u16::from_le_bytes([offset0, offset1]));
            if !offloads.contains(Offloads::CHECKSUM) {
                return Err(HeaderError::NotNegotiated);
            }
            if usize::from(start) + usize::from(offset) + 2 > frame_len {
                return Err(HeaderError::ChecksumOutside { start, offset, frame_len });
            }
            Checksum::Partial { start, offset }
        } else if flags & FLAG_DATA_VALID != 0 {
            Checksum::Valid
        } else {
            Checksum::Unknown
        };
        let segmentation = match gso_type {
            GSO_NONE => None,
            _ => Some(Segmentation {
                layers: segmented_layers(gso_type, layers, checksum, offloads)?,
                size: u16::from_le_bytes([size0, size1]),
            }),
        };
        if let Some(Segmentation { layers, size }) = segmentation {
            let payload = frame_len.saturating_sub(layers.payload_start);
            if size == 0 || payload == 0 || payload.div_ceil(usize::from(size)) > MAX_SEGMENTS {
                return Err(HeaderError::SegmentSize { size, frame_len });
            }
        }
        Ok(Self { checksum, segmentation })
    }

    /// For a receiver that takes what [`NetHeader::needs`] says, with the packet in `buffers` buffers.
    pub(crate) fn encode(&self, valid_is_known: bool, buffers: u16) -> [u8; LEN] {
        let (mut flags, mut start, mut offset) = (0, 0, 0);
        match self.checksum {
            Checksum::Partial { start: place, offset: behind } => {
                (flags, start, offset) = (FLAG_NEEDS_CSUM, place, behind);
            }
            Checksum::Valid if valid_is_known => flags = FLAG_DATA_VALID,
            Checksum::Valid | Checksum::Unknown => {}
        }
        let (gso_type, size, header_len) = self.segmentation.map_or((GSO_NONE, 0, 0), |segmentation| {
            let Segmentation { layers, size } = segmentation;
            // Within the copied first bytes of a frame, which are few.
            (type_of(segmentation.offload()), size, u16::try_from(layers.payload_start).unwrap_or(0))
        });
        let ([h0, h1], [s0, s1]) = (header_len.to_le_bytes(), size.to_le_bytes());
        let ([c0, c1], [o0, o1], [b0, b1]) = (start.to_le_bytes(), offset.to_le_bytes(), buffers.to_le_bytes());
        [flags, gso_type, h0, h1, s0, s1, c0, c1, o0, o1, b0, b1]
    }

    /// What a receiver must have to take the packet as it is.
    pub(crate) fn needs(&self) -> Offloads {
        let checksum = match self.checksum {
            Checksum::Partial { .. } => Offloads::CHECKSUM,
            Checksum::Unknown | Checksum::Valid => Offloads::empty(),
        };
        checksum | self.segmentation.map_or(Offloads::empty(), |segmentation| segmentation.offload())
    }
}

/// The packet's headers, if they are those of the type, and its checksum is the one of its transport layer: section 5.1.6.2
/// wants NEEDS_CSUM with every segmentation.
fn segmented_layers(
    gso_type: u8,
    layers: Option<Layers>,
    checksum: Checksum,
    offloads: Offloads,
) -> Result<Layers, HeaderError> {
    let allowed = match gso_type {
        GSO_TCPV4 => Offloads::TCP4,
        GSO_TCPV6 => Offloads::TCP6,
        GSO_UDP_L4 => Offloads::UDP4 | Offloads::UDP6,
        // With the bit for ECN, too: it was not offered.
        other => return Err(HeaderError::Type(other)),
    };
    let layers = layers.ok_or(HeaderError::Protocol)?;
    let offload = Offloads::segmentation(layers.network, layers.transport);
    if !allowed.contains(offload) {
        return Err(HeaderError::Protocol);
    }
    if !offloads.contains(offload) {
        return Err(HeaderError::NotNegotiated);
    }
    match checksum {
        Checksum::Partial { start, offset }
            if usize::from(start) == layers.transport_start
                && usize::from(offset) == layers.transport.checksum_offset() =>
        {
            Ok(layers)
        }
        _ => Err(HeaderError::SegmentChecksum),
    }
}

fn type_of(offload: Offloads) -> u8 {
    if offload == Offloads::TCP4 {
        GSO_TCPV4
    } else if offload == Offloads::TCP6 {
        GSO_TCPV6
    } else {
        GSO_UDP_L4
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ethernet::Ethernet;
    use crate::sample;

    fn bytes(flags: u8, gso_type: u8, size: u16, start: u16, offset: u16) -> [u8; LEGACY_LEN] {
        let ([s0, s1], [c0, c1], [o0, o1]) = (size.to_le_bytes(), start.to_le_bytes(), offset.to_le_bytes());
        // A hint that is nonsense.
        [flags, gso_type, 0xff, 0xff, s0, s1, c0, c1, o0, o1]
    }

    fn decode(header: [u8; LEGACY_LEN], frame: &[u8], offloads: Offloads) -> Result<NetHeader, HeaderError> {
        let layers = Ethernet::parse(frame).and_then(|ethernet| Layers::parse(frame, &ethernet));
        NetHeader::decode(&header, frame.len(), layers, offloads)
    }

    #[test]
    fn hostile_headers_are_refused_by_name() {
        let (frame, all) = (sample::tcp4(&[1; 3000]), Offloads::all());
        let len = u16::try_from(frame.len()).unwrap();
        let outside = |start, offset| Err(HeaderError::ChecksumOutside { start, offset, frame_len: frame.len() });
        let size = |size| Err(HeaderError::SegmentSize { size, frame_len: frame.len() });
        for (what, header, offloads, expected) in [
            ("checksum behind the frame", bytes(1, 0, 0, len, 0), all, outside(len, 0)),
            ("checksum that ends behind it", bytes(1, 0, 0, len - 17, 16), all, outside(len - 17, 16)),
            ("sum of two large numbers", bytes(1, 0, 0, 0xffff, 0xffff), all, outside(0xffff, 0xffff)),
            ("checksum, not negotiated", bytes(1, 0, 0, 34, 16), Offloads::empty(), Err(HeaderError::NotNegotiated)),
            ("TSO, not negotiated", bytes(1, 1, 1000, 34, 16), all - Offloads::TCP4, Err(HeaderError::NotNegotiated)),
            ("size 0", bytes(1, 1, 0, 34, 16), all, size(0)),
            ("too many segments", bytes(1, 1, 2, 34, 16), all, size(2)),
            ("no checksum", bytes(0, 1, 1000, 34, 16), all, Err(HeaderError::SegmentChecksum)),
            ("checksum of another place", bytes(1, 1, 1000, 36, 16), all, Err(HeaderError::SegmentChecksum)),
            ("checksum of another protocol", bytes(1, 1, 1000, 34, 6), all, Err(HeaderError::SegmentChecksum)),
            ("another version", bytes(1, 4, 1000, 34, 16), all, Err(HeaderError::Protocol)),
            ("another protocol", bytes(1, 5, 1000, 34, 16), all, Err(HeaderError::Protocol)),
            ("UFO", bytes(1, 3, 1000, 34, 6), all, Err(HeaderError::Type(3))),
            ("ECN", bytes(1, 0x81, 1000, 34, 16), all, Err(HeaderError::Type(0x81))),
            ("unknown type", bytes(1, 0x7f, 1000, 34, 16), all, Err(HeaderError::Type(0x7f))),
        ] {
            assert_eq!(decode(header, &frame, offloads), expected, "{what}");
        }
        let empty = sample::tcp4(&[]);
        let expected = Err(HeaderError::SegmentSize { size: 1000, frame_len: empty.len() });
        assert_eq!(decode(bytes(1, 1, 1000, 34, 16), &empty, all), expected);
        assert_eq!(decode(bytes(1, 1, 1000, 34, 16), &[8; 60], all), Err(HeaderError::Protocol));
    }

    #[test]
    fn what_is_encoded_is_what_was_decoded_without_the_hint() {
        for (frame, gso_type, start, offset, needs) in [
            (sample::tcp4(&[1; 3000]), GSO_TCPV4, 34, 16, Offloads::TCP4),
            (sample::tcp6(&[1; 3000]), GSO_TCPV6, 54, 16, Offloads::TCP6),
            (sample::udp4(&[1; 3000]), GSO_UDP_L4, 34, 6, Offloads::UDP4),
            (sample::udp6(&[1; 3000]), GSO_UDP_L4, 54, 6, Offloads::UDP6),
        ] {
            let given = bytes(1, gso_type, 1000, start, offset);
            let header = decode(given, &frame, Offloads::all()).unwrap();
            assert_eq!(header.needs(), Offloads::CHECKSUM | needs);
            let taken = header.encode(true, 3);
            assert_eq!(taken[..2], given[..2]);
            let header_len = u16::from_le_bytes([taken[2], taken[3]]);
            assert_eq!(usize::from(header_len), frame.len() - 3000);
            assert_eq!((&taken[4..10], &taken[10..]), (&given[4..10], &[3, 0][..]));
        }
        let valid = decode(bytes(2, 0, 0, 9, 9), &[0; 60], Offloads::empty()).unwrap();
        assert_eq!(valid.encode(true, 1), [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(valid.encode(false, 1), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    }

    proptest! {
        #[test]
        fn what_passes_is_inside_of_the_frame(header in any::<[u8; LEGACY_LEN]>(), len in 0usize..3000, kind in 0usize..4) {
            let make = [sample::tcp4, sample::tcp6, sample::udp4, sample::udp6][kind];
            let mut frame = make(&[7; 3000]);
            frame.truncate(len);
            if let Ok(NetHeader { checksum: Checksum::Partial { start, offset }, .. }) = decode(header, &frame, Offloads::all()) {
                prop_assert!(usize::from(start) + usize::from(offset) + 2 <= len);
            }
        }
    }
}
