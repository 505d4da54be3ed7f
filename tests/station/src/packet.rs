//! Packets of IPv4 as bytes of frames, and the device's header before them.

use std::net::Ipv4Addr;

/// Before each packet (virtio 1.3, section 5.1.6). The fields are those of the specification.
#[derive(Debug, Clone, Copy, Default)]
#[expect(missing_docs, reason = "the specification has it")]
pub struct Header {
    pub flags: u8,
    pub gso_type: u8,
    pub hdr_len: u16,
    pub gso_size: u16,
    pub csum_start: u16,
    pub csum_offset: u16,
}

/// The checksum is to be completed.
pub const NEEDS_CSUM: u8 = 1;

/// The packet is to be cut into segments of TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;

impl Header {
    /// Its bytes, in a driver that has negotiated VIRTIO_F_VERSION_1.
    #[must_use]
    pub fn bytes(self) -> [u8; 12] {
        let ([h0, h1], [s0, s1]) = (self.hdr_len.to_le_bytes(), self.gso_size.to_le_bytes());
        let ([c0, c1], [o0, o1]) = (self.csum_start.to_le_bytes(), self.csum_offset.to_le_bytes());
        [self.flags, self.gso_type, h0, h1, s0, s1, c0, c1, o0, o1, 0, 0]
    }
}

/// A station of an Ethernet.
#[derive(Debug, Clone, Copy)]
pub struct Station {
    /// Its address on the Ethernet.
    pub mac: [u8; 6],
    /// Its address of IPv4.
    pub address: Ipv4Addr,
    /// Its port of TCP or UDP.
    pub port: u16,
}

/// Protocols of IPv4.
pub const TCP: u8 = 6;
/// See [`TCP`].
pub const UDP: u8 = 17;

/// Where the packet of IPv4 begins in a frame, and where its payload does.
pub const IPV4_START: u16 = 14;
/// See [`IPV4_START`].
pub const TRANSPORT_START: u16 = IPV4_START + 20;

/// Where the checksum is in the headers of TCP and UDP.
pub const TCP_CHECKSUM: u16 = 16;
/// See [`TCP_CHECKSUM`].
pub const UDP_CHECKSUM: u16 = 6;

/// A frame with an IPv4 packet of any protocol, whose own header is the caller's.
#[must_use]
pub fn ipv4(from: Station, to: Station, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let total = u16::try_from(20 + payload.len()).unwrap_or(u16::MAX);
    let mut header = [&[0x45, 0][..], &total.to_be_bytes(), &[0, 0, 0x40, 0, 64, protocol, 0, 0]].concat();
    header.extend(from.address.octets());
    header.extend(to.address.octets());
    let sum = checksum(&header).to_be_bytes();
    header.splice(10..12, sum);
    [&to.mac[..], &from.mac, &[8, 0], &header, payload].concat()
}

/// A frame with a segment of TCP whose checksum is left to the device.
#[must_use]
pub fn unfinished_tcp(from: Station, to: Station, content: &[u8]) -> Vec<u8> {
    let sum = pseudo_header_sum(from, to, TCP, 20 + content.len()).to_be_bytes();
    let ports = [from.port.to_be_bytes(), to.port.to_be_bytes()].concat();
    // Numbers of first bytes, length, PSH and ACK, window, checksum, urgent pointer (RFC 9293, section 3.1).
    let fields = [&[0, 0, 0x10, 0, 0, 0, 0, 9, 0x50, 0x18, 4, 0][..], &sum, &[0, 0]].concat();
    ipv4(from, to, TCP, &[&ports, &fields, content].concat())
}

/// A frame with a datagram whose checksum is left to the device.
#[must_use]
pub fn unfinished_udp(from: Station, to: Station, content: &[u8]) -> Vec<u8> {
    datagram(from, to, content, pseudo_header_sum(from, to, UDP, 8 + content.len()))
}

/// A frame with a datagram, which says that its checksum is not used.
#[must_use]
pub fn udp(from: Station, to: Station, content: &[u8]) -> Vec<u8> {
    datagram(from, to, content, 0)
}

fn datagram(from: Station, to: Station, content: &[u8], checksum: u16) -> Vec<u8> {
    let len = u16::try_from(8 + content.len()).unwrap_or(u16::MAX);
    let fields = [from.port, to.port, len, checksum].map(u16::to_be_bytes).concat();
    ipv4(from, to, UDP, &[&fields, content].concat())
}

/// The sum over the pseudo header, which stands in the place of a checksum that is left to the device (virtio 1.3, section
/// 5.1.6.2), of so many bytes with the protocol's header.
fn pseudo_header_sum(from: Station, to: Station, protocol: u8, len: usize) -> u16 {
    let len = u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes();
    !checksum(&[&from.address.octets()[..], &to.address.octets(), &[0, protocol], &len].concat())
}

/// The Internet checksum (RFC 1071), computed in the plainest way: 0 for bytes that have theirs among them.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u16 {
    let (words, rest) = bytes.as_chunks();
    let last = rest.first().map_or(0, |high| u32::from(*high) << 8);
    let mut sum = words.iter().fold(last, |sum, word| sum + u32::from(u16::from_be_bytes(*word)));
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn station(last: u8) -> Station {
        Station { mac: [2, 0, 0, 0, 0, last], address: Ipv4Addr::new(10, 7, 0, last), port: 7 }
    }

    #[test]
    fn a_header_sums_up_to_nothing() {
        let frame = udp(station(1), station(2), b"mark 1");
        assert_eq!(checksum(&frame[14..34]), 0);
        assert_eq!(frame.len(), 14 + 20 + 8 + 6);
        assert_eq!((&frame[16..18], &frame[38..40]), (&[0, 34][..], &[0, 14][..]));
        assert_eq!(frame[40..42], [0, 0]);
    }

    #[test]
    fn the_device_completes_a_checksum_over_what_stands_there() {
        let (tcp, udp) =
            (unfinished_tcp(station(1), station(2), b"odd"), unfinished_udp(station(1), station(2), b"odd"));
        for (mut frame, place) in [(tcp, TCP_CHECKSUM), (udp, UDP_CHECKSUM)] {
            let place = usize::from(TRANSPORT_START + place);
            let sum = checksum(&frame[usize::from(TRANSPORT_START)..]);
            frame[place..place + 2].copy_from_slice(&sum.to_be_bytes());
            let len = u16::try_from(frame.len() - 34).unwrap().to_be_bytes();
            let pseudo = [&frame[26..34], &[0, frame[23]], &len].concat();
            assert_eq!(checksum(&[&pseudo, &frame[34..]].concat()), 0);
        }
    }
}
