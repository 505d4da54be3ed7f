//! IP, TCP and UDP headers of a frame: where they are, and that they are whole (RFC 791, RFC 8200, RFC 9293, RFC 768).
//!
//! Looked at is the copy of a frame's first bytes; a header that is not all in there is no header.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::ethernet::{Ethernet, word};

/// Most extension headers of IPv6 that are looked behind.
const MAX_EXTENSIONS: usize = 8;

const TYPE_IPV4: u16 = 0x0800;
const TYPE_IPV6: u16 = 0x86dd;

const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

/// Extension headers of IPv6: hop-by-hop options, routing, fragment, destination options (RFC 8200, section 4).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

/// Length of an IPv6 header without extensions in bytes.
pub(crate) const IPV6_LEN: usize = 40;

/// Length of a UDP header in bytes.
pub(crate) const UDP_LEN: usize = 8;

/// Version of the Internet protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Network {
    V4,
    V6,
}

/// Protocol of the transport layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    /// Where the checksum is in the header.
    pub(crate) fn checksum_offset(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }
}

/// An IP packet with a whole TCP or UDP header, in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layers {
    pub(crate) network: Network,
    /// Offset of the IP header in the frame.
    pub(crate) network_start: usize,
    pub(crate) transport: Transport,
    /// Offset of the TCP or UDP header in the frame.
    pub(crate) transport_start: usize,
    /// Offset of its payload.
    pub(crate) payload_start: usize,
}

impl Layers {
    /// Finds the headers. None for whatever is no whole TCP or UDP packet: other protocols, fragments, headers that are cut.
    pub(crate) fn parse(front: &[u8], ethernet: &Ethernet) -> Option<Self> {
        let network_start = ethernet.payload;
        let (network, protocol, transport_start) = match ethernet.ether_type {
            TYPE_IPV4 => (Network::V4, byte(front, network_start + 9)?, end_of_ipv4(front, network_start)?),
            TYPE_IPV6 => {
                let (protocol, end) = end_of_ipv6(front, network_start)?;
                (Network::V6, protocol, end)
            }
            _ => return None,
        };
        let (transport, len) = match protocol {
            PROTOCOL_TCP => (Transport::Tcp, usize::from(byte(front, transport_start + 12)? >> 4) * 4),
            PROTOCOL_UDP => (Transport::Udp, UDP_LEN),
            _ => return None,
        };
        let payload_start = transport_start + len;
        let is_whole = (transport == Transport::Udp || len >= 20) && payload_start <= front.len();
        is_whole.then_some(Self { network, network_start, transport, transport_start, payload_start })
    }

    /// The same number for all packets of a connection in one direction.
    pub(crate) fn flow_hash(&self, front: &[u8]) -> u64 {
        let addresses = match self.network {
            Network::V4 => self.network_start + 12..self.network_start + 20,
            Network::V6 => self.network_start + 8..self.network_start + 40,
        };
        let mut hasher = DefaultHasher::new();
        front.get(addresses).hash(&mut hasher);
        front.get(self.transport_start..self.transport_start + 4).hash(&mut hasher);
        hasher.finish()
    }
}

/// Where the header ends; None for a fragment.
fn end_of_ipv4(front: &[u8], start: usize) -> Option<usize> {
    let first = byte(front, start)?;
    let len = usize::from(first & 0xf) * 4;
    // More fragments, or an offset that is not 0.
    let is_fragment = word(front, start + 6)? & 0x3fff != 0;
    (first >> 4 == 4 && len >= 20 && !is_fragment).then_some(start + len)
}

/// What is behind the header and its extensions, and where; None for a fragment.
fn end_of_ipv6(front: &[u8], start: usize) -> Option<(u8, usize)> {
    if byte(front, start)? >> 4 != 6 {
        return None;
    }
    let mut next = byte(front, start + 6)?;
    let mut end = start + IPV6_LEN;
    for _ in 0..=MAX_EXTENSIONS {
        match next {
            HOP_BY_HOP | ROUTING | DESTINATION => {
                next = byte(front, end)?;
                end += (usize::from(byte(front, end + 1)?) + 1) * 8;
            }
            FRAGMENT => return None,
            _ => return Some((next, end)),
        }
    }
    None
}

fn byte(bytes: &[u8], offset: usize) -> Option<u8> {
    bytes.get(offset).copied()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sample;

    fn parse(frame: &[u8]) -> Option<Layers> {
        Layers::parse(frame, &Ethernet::parse(frame)?)
    }

    #[test]
    fn headers_are_found_and_need_every_byte() {
        for (frame, network, transport, starts) in [
            (sample::tcp4(&[]), Network::V4, Transport::Tcp, (14, 34, 54)),
            (sample::tcp6(&[]), Network::V6, Transport::Tcp, (14, 54, 74)),
            (sample::udp4(&[]), Network::V4, Transport::Udp, (14, 34, 42)),
            (sample::udp6(&[]), Network::V6, Transport::Udp, (14, 54, 62)),
            (sample::tagged(5, &sample::tcp4(&[])), Network::V4, Transport::Tcp, (18, 38, 58)),
        ] {
            let layers = parse(&frame).unwrap();
            assert_eq!((layers.network, layers.transport), (network, transport));
            assert_eq!((layers.network_start, layers.transport_start, layers.payload_start), starts);
            for len in 0..frame.len() {
                assert_eq!(parse(&frame[..len]), None, "{len}");
            }
        }
    }

    #[test]
    fn what_is_no_whole_packet_has_no_layers() {
        let changed = |frame: Vec<u8>, offset: usize, value: u8| {
            let mut frame = frame;
            frame[offset] = value;
            frame
        };
        for (what, frame) in [
            ("another version", changed(sample::tcp4(&[]), 14, 0x55)),
            ("a short header", changed(sample::tcp4(&[]), 14, 0x44)),
            ("more fragments", changed(sample::tcp4(&[]), 20, 0x20)),
            ("a later fragment", changed(sample::tcp4(&[]), 21, 1)),
            ("another protocol", changed(sample::tcp4(&[]), 23, 1)),
            ("a short TCP header", changed(sample::tcp4(&[]), 46, 0x40)),
            ("a TCP header that is cut", changed(sample::tcp4(&[]), 46, 0xf0)),
            ("version 4 as version 6", changed(sample::tcp6(&[]), 14, 0x40)),
            ("a fragment of version 6", changed(sample::tcp6(&[]), 20, 44)),
            ("an extension that is cut", changed(sample::tcp6(&[]), 20, 60)),
        ] {
            assert_eq!(parse(&frame), None, "{what}");
        }
    }

    #[test]
    fn extensions_of_ipv6_are_looked_behind() {
        let with_extensions = |count: usize| {
            let mut frame = sample::tcp6(&[]);
            let tail = frame.split_off(54);
            frame[20] = if count > 0 { 60 } else { 6 };
            for left in (0..count).rev() {
                frame.extend([if left > 0 { 60 } else { 6 }, 0, 0, 0, 0, 0, 0, 0]);
            }
            [frame, tail].concat()
        };
        assert_eq!(parse(&with_extensions(8)).unwrap().transport_start, 54 + 64);
        assert_eq!(parse(&with_extensions(9)), None);
    }

    #[test]
    fn a_flow_has_one_hash() {
        let hash = |frame: &[u8]| parse(frame).unwrap().flow_hash(frame);
        assert_eq!(hash(&sample::tcp4(b"x")), hash(&sample::tcp4(b"yz")));
        let mut other = sample::tcp4(&[]);
        other[35] ^= 1;
        assert_ne!(hash(&other), hash(&sample::tcp4(&[])));
    }

    proptest! {
        #[test]
        fn no_bytes_can_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0usize..3) {
            let mut frame = bytes;
            if let Some(place) = frame.get_mut(12..14) {
                place.copy_from_slice(&[[8, 0], [0x86, 0xdd], [0x81, 0]][kind]);
            }
            if let Some(layers) = parse(&frame) {
                prop_assert!(layers.payload_start <= frame.len());
                layers.flow_hash(&frame);
            }
        }
    }
}
