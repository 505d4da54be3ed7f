//! The Internet checksum (RFC 1071).

/// A sum in ones' complement that has not been folded, continued over `bytes`. Except for the last, the parts that are added
/// one after the other have an even length.
///
/// The sum does not depend on how wide the words are that are added, nor on the order of the bytes in them, as long as it is
/// put right in the end (RFC 1071, section 2): so these are as wide as the machine's, in its own order.
pub(crate) fn sum(bytes: &[u8], start: u64) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    let add = |sum: u64, word: &[u8; 8]| {
        let (sum, carry) = sum.overflowing_add(u64::from_ne_bytes(*word));
        // With a carry the sum is less than its largest value.
        sum.wrapping_add(u64::from(carry))
    };
    let sum = words.iter().chain([&last]).fold(0, add);
    // 16 bits are added to the start, which no number of parts of one frame lets overflow.
    start + u64::from(u16::from_be_bytes(fold((sum >> 32) + (sum & 0xffff_ffff)).to_ne_bytes()))
}

/// A sum of so many bits as 16.
fn fold(sum: u64) -> u16 {
    let mut folded = sum;
    while folded > 0xffff {
        folded = (folded & 0xffff) + (folded >> 16);
    }
    // At most 16 bits are left.
    u16::try_from(folded).unwrap_or(0)
}

/// The checksum of a sum.
pub(crate) fn finish(sum: u64) -> u16 {
    !fold(sum)
}

/// Completes a checksum that was left to the device (virtio 1.3, section 5.1.6.2): that of all bytes from `start` on, its
/// place `offset` bytes behind it, where the sum over the pseudo header stands. False, and nothing is done, if the place is
/// outside of the frame.
#[must_use]
pub(crate) fn complete(frame: &mut [u8], start: usize, offset: usize) -> bool {
    let Some(covered) = frame.get_mut(start..) else { return false };
    let checksum = match finish(sum(covered, 0)) {
        // Means "no checksum" to UDP, and the two zeroes of ones' complement are equal to all others.
        0 => 0xffff,
        checksum => checksum,
    };
    let Some(place) = covered.get_mut(offset..).and_then(|rest| rest.first_chunk_mut()) else { return false };
    *place = checksum.to_be_bytes();
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sample;

    #[test]
    fn the_example_of_rfc_1071_comes_out() {
        assert_eq!(finish(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7], 0)), !0xddf2);
    }

    #[test]
    fn places_outside_of_the_frame_are_refused() {
        let mut frame = [7; 20];
        assert!(!complete(&mut frame, 21, 0) && !complete(&mut frame, 10, 9) && !complete(&mut frame, 20, 0));
        assert!(!complete(&mut frame, 10, usize::from(u16::MAX)));
        assert_eq!(frame, [7; 20]);
        assert!(complete(&mut frame, 10, 8));
    }

    proptest! {
        #[test]
        fn a_sum_is_that_of_words_of_16_bits(bytes in prop::collection::vec(any::<u8>(), 0..70), cut in 0usize..35) {
            let (first, second) = bytes.split_at(bytes.len().min(2 * cut));
            let word = |pair: &[u8]| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u64::from(*low));
            let plain = bytes.chunks(2).map(word).sum();
            prop_assert_eq!(finish(sum(second, sum(first, 0))), finish(plain));
        }

        #[test]
        fn a_completed_checksum_is_the_plain_one(payload in prop::collection::vec(any::<u8>(), 0..100), kind in 0usize..4) {
            let make = [sample::tcp4, sample::tcp6, sample::udp4, sample::udp6][kind];
            let whole = make(&payload);
            let mut frame = sample::partial(whole.clone());
            let (start, offset) = sample::transport(&frame);
            prop_assert!(complete(&mut frame, start, offset));
            prop_assert_eq!(sample::plain_checksum(&frame), 0);
            if whole[start + offset..][..2] != [0, 0] {
                prop_assert_eq!(frame, whole);
            }
        }
    }
}
