//! Cuts a large packet of TCP or UDP into packets of the network's size, for a receiver that does not do it itself.
//!
//! Each piece gets the headers of the whole, changed as the protocols want it (RFC 791, RFC 8200, RFC 9293, RFC 3168), and
//! checksums that are complete.

use crate::checksum;
use crate::layers::{IPV6_LEN, Layers, Network, Transport};
use crate::net_header::Segmentation;

/// Flags of TCP: the last segment only has FIN and PSH, the first only has CWR.
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// The pieces of one packet.
#[derive(Debug)]
pub(crate) struct Pieces<'a> {
    headers: &'a [u8],
    payload: &'a [u8],
    layers: Layers,
    size: usize,
    /// Bytes of the payload that are in former pieces.
    position: usize,
    index: u16,
}

impl<'a> Pieces<'a> {
    /// `segmentation` is of this very frame, as [`crate::net_header::NetHeader::decode`] has checked it.
    pub(crate) fn new(frame: &'a [u8], segmentation: &Segmentation) -> Self {
        let Segmentation { layers, size } = *segmentation;
        let (headers, payload) = frame.split_at_checked(layers.payload_start).unwrap_or((frame, &[]));
        Self { headers, payload, layers, size: usize::from(size).max(1), position: 0, index: 0 }
    }

    /// Replaces the content of `piece` by the next one. False if there is none, or if the frame is not what was checked.
    #[must_use]
    pub(crate) fn next(&mut self, piece: &mut Vec<u8>) -> bool {
        let Some(rest) = self.payload.get(self.position..).filter(|rest| !rest.is_empty()) else { return false };
        let payload = rest.get(..self.size).unwrap_or(rest);
        piece.clear();
        piece.extend_from_slice(self.headers);
        piece.extend_from_slice(payload);
        let place = Place { is_last: payload.len() == rest.len(), position: self.position, index: self.index };
        self.position += payload.len();
        self.index = self.index.wrapping_add(1);
        rewrite(piece, &self.layers, place).is_some()
    }
}

/// Where a piece stands in the whole.
#[derive(Debug, Clone, Copy)]
struct Place {
    is_last: bool,
    position: usize,
    index: u16,
}

/// Makes headers of the whole those of a piece.
fn rewrite(piece: &mut [u8], layers: &Layers, place: Place) -> Option<()> {
    let (_, packet) = piece.split_at_mut_checked(layers.network_start)?;
    let packet_len = packet.len();
    let (network, transport) =
        packet.split_at_mut_checked(layers.transport_start.checked_sub(layers.network_start)?)?;
    match layers.network {
        Network::V4 => {
            put(network, 2, u16::try_from(packet_len).ok()?)?;
            let identification = take(network, 4)?;
            put(network, 4, identification.wrapping_add(place.index))?;
            put(network, 10, 0)?;
            put(network, 10, checksum::finish(checksum::sum(network, 0)))?;
        }
        Network::V6 => put(network, 4, u16::try_from(packet_len - IPV6_LEN).ok()?)?,
    }
    let transport_len = transport.len();
    match layers.transport {
        Transport::Tcp => {
            let sequence = transport.get_mut(4..)?.first_chunk_mut::<4>()?;
            // Sequence numbers go round.
            let position = u32::try_from(place.position).ok()?;
            *sequence = u32::from_be_bytes(*sequence).wrapping_add(position).to_be_bytes();
            let flags = transport.get_mut(13)?;
            if !place.is_last {
                *flags &= !(FIN | PSH);
            }
            if place.position > 0 {
                *flags &= !CWR;
            }
        }
        Transport::Udp => put(transport, 4, u16::try_from(transport_len).ok()?)?,
    }
    // The sum over the pseudo header anew, as the length in it is another.
    let sum = pseudo_header(network, layers, transport_len)?;
    let offset = layers.transport.checksum_offset();
    put(transport, offset, !checksum::finish(sum))?;
    checksum::complete(transport, 0, offset).then_some(())
}

/// RFC 9293, section 3.1, and RFC 8200, section 8.1. A routing header would have the last destination elsewhere; the sum then
/// is that of the next hop, as with the segmentation of network cards.
fn pseudo_header(network: &[u8], layers: &Layers, transport_len: usize) -> Option<u64> {
    let addresses = match layers.network {
        Network::V4 => network.get(12..20)?,
        Network::V6 => network.get(8..40)?,
    };
    let protocol = match layers.transport {
        Transport::Tcp => 6,
        Transport::Udp => 17,
    };
    Some(checksum::sum(addresses, 0) + u64::try_from(transport_len).ok()? + protocol)
}

fn take(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes.get(offset..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

fn put(bytes: &mut [u8], offset: usize, value: u16) -> Option<()> {
    *bytes.get_mut(offset..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ethernet::Ethernet;
    use crate::sample;

    fn pieces(frame: &[u8], size: u16) -> Vec<Vec<u8>> {
        let layers = Layers::parse(frame, &Ethernet::parse(frame).unwrap()).unwrap();
        let mut pieces = Pieces::new(frame, &Segmentation { layers, size });
        let (mut all, mut piece) = (Vec::new(), Vec::new());
        while pieces.next(&mut piece) {
            all.push(piece.clone());
        }
        all
    }

    /// What the whole packet's sender would have sent if it had cut it itself.
    fn expected(make: fn(&[u8]) -> Vec<u8>, payload: &[u8], size: usize) -> Vec<Vec<u8>> {
        let chunks = payload.chunks(size);
        let last = chunks.len() - 1;
        chunks
            .enumerate()
            .map(|(index, chunk)| {
                let mut frame = make(chunk);
                if frame[12] == 8 {
                    // Identification, and the header's checksum in the plainest way.
                    let number = 0x1234 + u16::try_from(index).unwrap();
                    frame[18..20].copy_from_slice(&number.to_be_bytes());
                    frame[24..26].copy_from_slice(&[0, 0]);
                    let mut sum = frame[14..34].chunks(2).map(|p| u32::from(p[0]) << 8 | u32::from(p[1])).sum::<u32>();
                    while sum > 0xffff {
                        sum = (sum & 0xffff) + (sum >> 16);
                    }
                    frame[24..26].copy_from_slice(&(!u16::try_from(sum).unwrap()).to_be_bytes());
                }
                let (start, offset) = sample::transport(&frame);
                if offset == 16 {
                    let sequence = 0xffff_fff0u32.wrapping_add(u32::try_from(index * size).unwrap());
                    frame[start + 4..start + 8].copy_from_slice(&sequence.to_be_bytes());
                    // ACK; FIN and PSH at the end; CWR at the beginning.
                    let ends = if index == last { 0x09 } else { 0 } | if index == 0 { 0x80 } else { 0 };
                    frame[start + 13] = 0x10 | ends;
                }
                frame[start + offset..][..2].copy_from_slice(&[0, 0]);
                let sum = sample::plain_checksum(&frame);
                let sum = if sum == 0 { 0xffff } else { sum };
                frame[start + offset..][..2].copy_from_slice(&sum.to_be_bytes());
                frame
            })
            .collect()
    }

    #[test]
    fn the_pieces_of_a_small_packet_by_hand() {
        let whole = sample::tcp4(b"abcde");
        let pieces = pieces(&whole, 3);
        assert_eq!(pieces.len(), 2);
        // Total length 43 and 42, identification 0x1234 and 0x1235.
        assert_eq!((&pieces[0][16..20], &pieces[1][16..20]), (&[0, 43, 0x12, 0x34][..], &[0, 42, 0x12, 0x35][..]));
        // Sequence numbers three apart, FIN and PSH with the second, CWR with the first.
        assert_eq!((&pieces[0][38..42], pieces[0][47]), (&[0xff, 0xff, 0xff, 0xf0][..], 0x90));
        assert_eq!((&pieces[1][38..42], pieces[1][47]), (&[0xff, 0xff, 0xff, 0xf3][..], 0x19));
        assert_eq!((&pieces[0][54..], &pieces[1][54..]), (&b"abc"[..], &b"de"[..]));
    }

    #[test]
    fn tags_stay_before_each_piece() {
        let whole = sample::tagged(7, &sample::udp6(&[3; 50]));
        for piece in pieces(&whole, 20) {
            assert_eq!(piece[..18], whole[..18]);
            let untagged = [&piece[..12], &piece[16..]].concat();
            assert_eq!(sample::plain_checksum(&untagged), 0);
        }
    }

    proptest! {
        #[test]
        fn the_pieces_are_what_the_sender_would_have_sent(
            payload in prop::collection::vec(any::<u8>(), 1..5000),
            size in 1u16..3000,
            kind in 0usize..4,
        ) {
            let make = [sample::tcp4, sample::tcp6, sample::udp4, sample::udp6][kind];
            let cut = pieces(&sample::partial(make(&payload)), size);
            prop_assert_eq!(cut, expected(make, &payload, usize::from(size)));
        }
    }
}
