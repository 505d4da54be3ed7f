//! Frames for tests, with checksums that are right.

use crate::checksum;

pub(crate) const DESTINATION: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
pub(crate) const SOURCE: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];

fn ethernet(ether_type: u16) -> Vec<u8> {
    [&DESTINATION[..], &SOURCE, &ether_type.to_be_bytes()].concat()
}

fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let total = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut header =
        vec![0x45, 0, total[0], total[1], 0x12, 0x34, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1];
    let sum = checksum::finish(checksum::sum(&header, 0));
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [ethernet(0x0800), header, payload.to_vec()].concat()
}

fn ipv6(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(payload.len()).unwrap().to_be_bytes();
    let mut header = vec![0x60, 0, 0, 0, len[0], len[1], protocol, 64];
    header.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    header.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    [ethernet(0x86dd), header, payload.to_vec()].concat()
}

/// Flags ACK, PSH, FIN and CWR.
fn tcp(payload: &[u8]) -> Vec<u8> {
    let header = [0x30, 0x39, 0, 80, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 9, 0x50, 0x99, 4, 0, 0, 0, 0, 0];
    [&header, payload].concat()
}

fn udp(payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(8 + payload.len()).unwrap().to_be_bytes();
    [&[0x30, 0x39, 0, 53, len[0], len[1], 0, 0], payload].concat()
}

pub(crate) fn tcp4(payload: &[u8]) -> Vec<u8> {
    with_checksum(ipv4(6, &tcp(payload)))
}

pub(crate) fn tcp6(payload: &[u8]) -> Vec<u8> {
    with_checksum(ipv6(6, &tcp(payload)))
}

pub(crate) fn udp4(payload: &[u8]) -> Vec<u8> {
    with_checksum(ipv4(17, &udp(payload)))
}

pub(crate) fn udp6(payload: &[u8]) -> Vec<u8> {
    with_checksum(ipv6(17, &udp(payload)))
}

/// The frame with a VLAN tag.
pub(crate) fn tagged(vlan: u16, frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &[0x81, 0], &vlan.to_be_bytes(), &frame[12..]].concat()
}

/// Where TCP or UDP begins, and where its checksum is there.
pub(crate) fn transport(frame: &[u8]) -> (usize, usize) {
    let (start, protocol) = if frame[12] == 8 { (34, frame[23]) } else { (54, frame[20]) };
    (start, if protocol == 6 { 16 } else { 6 })
}

/// Sum over the addresses, the length and the protocol (RFC 9293, section 3.1), computed in the plainest way.
fn pseudo_header(frame: &[u8]) -> u64 {
    let (start, _) = transport(frame);
    let (addresses, protocol) = if frame[12] == 8 { (&frame[26..34], frame[23]) } else { (&frame[22..54], frame[20]) };
    let words = addresses.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(pair[1])).sum::<u64>();
    words + u64::from(protocol) + (frame.len() - start) as u64
}

/// The checksum of TCP or UDP, computed in the plainest way: 0 if the one in the frame is right.
pub(crate) fn plain_checksum(frame: &[u8]) -> u16 {
    let (start, _) = transport(frame);
    let mut sum = pseudo_header(frame);
    for pair in frame[start..].chunks(2) {
        sum += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

fn with_checksum(mut frame: Vec<u8>) -> Vec<u8> {
    let (start, offset) = transport(&frame);
    let sum = plain_checksum(&frame);
    frame[start + offset..][..2].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// The frame as a driver gives it that leaves the checksum to the device: the sum over the pseudo header stands there.
pub(crate) fn partial(mut frame: Vec<u8>) -> Vec<u8> {
    let (start, offset) = transport(&frame);
    let mut sum = pseudo_header(&frame);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    frame[start + offset..][..2].copy_from_slice(&u16::try_from(sum).unwrap().to_be_bytes());
    frame
}
