//! Datagrams as bytes of frames, and the device's header before them.

use std::net::Ipv4Addr;

/// Before each packet (virtio 1.3, section 5.1.6).
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Header {
    pub(crate) flags: u8,
    pub(crate) gso_type: u8,
    pub(crate) hdr_len: u16,
    pub(crate) gso_size: u16,
    pub(crate) csum_start: u16,
    pub(crate) csum_offset: u16,
}

/// The checksum is to be completed.
pub(crate) const NEEDS_CSUM: u8 = 1;

impl Header {
    pub(crate) fn bytes(self) -> [u8; 12] {
        let ([h0, h1], [s0, s1]) = (self.hdr_len.to_le_bytes(), self.gso_size.to_le_bytes());
        let ([c0, c1], [o0, o1]) = (self.csum_start.to_le_bytes(), self.csum_offset.to_le_bytes());
        [self.flags, self.gso_type, h0, h1, s0, s1, c0, c1, o0, o1, 0, 0]
    }
}

/// A station of an Ethernet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Station {
    pub(crate) mac: [u8; 6],
    pub(crate) address: Ipv4Addr,
    pub(crate) port: u16,
}

/// Protocols of IPv4.
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

/// A frame with an IPv4 packet of any protocol, whose own header is the caller's.
pub(crate) fn ipv4(from: Station, to: Station, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let total = u16::try_from(20 + payload.len()).unwrap_or(u16::MAX);
    let mut header = [&[0x45, 0][..], &total.to_be_bytes(), &[0, 0, 0x40, 0, 64, protocol, 0, 0]].concat();
    header.extend(from.address.octets());
    header.extend(to.address.octets());
    let sum = checksum(&header).to_be_bytes();
    header.splice(10..12, sum);
    [&to.mac[..], &from.mac, &[8, 0], &header, payload].concat()
}

/// A frame with a datagram, which says that its checksum is not used.
pub(crate) fn udp(from: Station, to: Station, content: &[u8]) -> Vec<u8> {
    let len = u16::try_from(8 + content.len()).unwrap_or(u16::MAX);
    let fields = [from.port.to_be_bytes(), to.port.to_be_bytes(), len.to_be_bytes(), [0, 0]].concat();
    ipv4(from, to, UDP, &[&fields, content].concat())
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair.iter().fold(0, |word: u16, byte| word << 8 | u16::from(*byte))))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_sums_up_to_nothing() {
        let station = |last| Station { mac: [2, 0, 0, 0, 0, last], address: Ipv4Addr::new(10, 7, 0, last), port: 7 };
        let frame = udp(station(1), station(2), b"mark 1");
        assert_eq!(checksum(&frame[14..34]), 0);
        assert_eq!(frame.len(), 14 + 20 + 8 + 6);
        assert_eq!((&frame[16..18], &frame[38..40]), (&[0, 34][..], &[0, 14][..]));
    }
}
