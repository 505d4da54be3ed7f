//! Frames that tests send, and checks of those that arrive.

use vvu_station::packet::{self, Header, NEEDS_CSUM, Station, checksum};

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
    packet::unfinished_tcp(station(from, 2, 12345), station(to, 1, 80), payload)
}

/// A datagram of UDP over IPv4, the same way.
pub(crate) fn udp(to: [u8; 6], from: [u8; 6], port: u16, payload: &[u8]) -> Vec<u8> {
    packet::unfinished_udp(station(from, 2, 12345), station(to, 1, port), payload)
}

fn station(mac: [u8; 6], last: u8, port: u16) -> Station {
    Station { mac, address: [10, 0, 0, last].into(), port }
}

/// Whether the checksums of a frame of IPv4 are right and complete.
pub(crate) fn is_right(frame: &[u8]) -> bool {
    let len = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    let transport_len = ((frame.len() - 34) as u16).to_be_bytes();
    let pseudo_header = [&frame[26..34], &[0, frame[23]], &transport_len].concat();
    let right = checksum(&frame[14..34]) == 0 && checksum(&[&pseudo_header, &frame[34..]].concat()) == 0;
    right && len == frame.len() - 14
}

/// The header before a packet that nobody has to do anything for.
pub(crate) const NO_OFFLOAD: [u8; 12] = [0; 12];

/// A header with NEEDS_CSUM and a segmentation: type, size, and where the checksum is.
pub(crate) fn header(gso_type: u8, gso_size: u16, csum_start: u16, csum_offset: u16) -> [u8; 12] {
    Header { flags: NEEDS_CSUM, gso_type, hdr_len: 0, gso_size, csum_start, csum_offset }.bytes()
}
