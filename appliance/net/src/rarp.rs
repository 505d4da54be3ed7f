//! The frame by which a network learns where a station is now (RFC 903).

use crate::ethernet::MacAddress;

/// Length of a frame that every network carries, without its checksum, in bytes.
const LEN: usize = 60;

/// A request of the station for its own protocol address, which nobody will answer: what counts is its source.
pub(crate) fn announcement(mac: MacAddress) -> [u8; LEN] {
    let mut frame = [0; LEN];
    // Ethernet and IPv4, lengths of their addresses, "request reverse".
    let fields: [&[u8]; 7] =
        [&MacAddress::BROADCAST.0, &mac.0, &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3], &mac.0, &[0; 4], &mac.0, &[0; 4]];
    for (to, from) in frame.iter_mut().zip(fields.concat()) {
        *to = from;
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_is_a_reverse_request() {
        let mac = MacAddress([2, 0, 0, 0, 0, 9]);
        let frame = announcement(mac);
        assert_eq!((&frame[..6], &frame[6..12]), (&[0xff; 6][..], &mac.0[..]));
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&mac.0[..], &mac.0[..]));
        assert_eq!(frame[38..], [0; 22]);
    }
}
