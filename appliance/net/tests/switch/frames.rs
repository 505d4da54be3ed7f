//! Frames that tests send, and checks of those that arrive.

use crate::program::mac;

pub(crate) const BROADCAST: [u8; 6] = [0xff; 6];

/// A frame that no protocol knows, with a pattern for its content.
pub(crate) fn plain(to: [u8; 6], from: [u8; 6], len: usize) -> Vec<u8> {
    let content = (14..len).map(|index| (index * 7 % 251) as u8);
    [&to[..], &from, &[0x88, 0xb5]].concat().into_iter().chain(content).collect()
}

/// From the device of one port to that of another.
pub(crate) fn between(from: usize, to: usize, len: usize) -> Vec<u8> {
    plain(mac(to), mac(from), len)
}

/// With a VLAN tag.
pub(crate) fn tagged(vlan: u16, frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &[0x81, 0], &vlan.to_be_bytes(), &frame[12..]].concat()
}

/// A segment of TCP over IPv4 whose checksum is the sum over the pseudo header.
pub(crate) fn tcp(to: [u8; 6], from: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let header = [0x30, 0x39, 0, 80, 0, 0, 0x10, 0, 0, 0, 0, 9, 0x50, 0x18, 4, 0, 0, 0, 0, 0];
    ipv4(to, from, 6, &[&header, payload].concat(), 16)
}

/// A datagram of UDP over IPv4, the same way.
pub(crate) fn udp(to: [u8; 6], from: [u8; 6], port: u16, payload: &[u8]) -> Vec<u8> {
    let len = ((8 + payload.len()) as u16).to_be_bytes();
    let port = port.to_be_bytes();
    ipv4(to, from, 17, &[&[0x30, 0x39, port[0], port[1], len[0], len[1], 0, 0], payload].concat(), 6)
}

fn ipv4(to: [u8; 6], from: [u8; 6], protocol: u8, payload: &[u8], checksum: usize) -> Vec<u8> {
    let total = ((20 + payload.len()) as u16).to_be_bytes();
    let mut header = vec![0x45, 0, total[0], total[1], 0, 1, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1];
    let sum = !fold(words(&header));
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = [&to[..], &from, &[8, 0], &header, payload].concat();
    let pseudo = fold(words(&frame[26..34]) + u64::from(protocol) + payload.len() as u64);
    frame[34 + checksum..][..2].copy_from_slice(&pseudo.to_be_bytes());
    frame
}

/// Whether the checksums of a frame of IPv4 are right and complete.
pub(crate) fn is_right(frame: &[u8]) -> bool {
    let len = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    let pseudo = words(&frame[26..34]) + u64::from(frame[23]) + (frame.len() - 34) as u64;
    len == frame.len() - 14 && fold(words(&frame[14..34])) == 0xffff && fold(pseudo + words(&frame[34..])) == 0xffff
}

fn words(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0))).sum()
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The header before a packet that nobody has to do anything for.
pub(crate) const NO_OFFLOAD: [u8; 12] = [0; 12];

/// A header with NEEDS_CSUM and a segmentation: type, size, and where the checksum is.
pub(crate) fn header(gso_type: u8, size: u16, start: u16, offset: u16) -> [u8; 12] {
    let ([s0, s1], [c0, c1], [o0, o1]) = (size.to_le_bytes(), start.to_le_bytes(), offset.to_le_bytes());
    [1, gso_type, 0, 0, s0, s1, c0, c1, o0, o1, 0, 0]
}
