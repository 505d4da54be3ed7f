//! The Internet checksum (RFC 1071).

/// A sum in ones' complement that has not been folded, continued over `bytes`. Except for the last, the parts that are added
/// one after the other have an even length.
pub(crate) fn sum(bytes: &[u8], start: u64) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    // Less than 2^32 words of 32 bits cannot overflow.
    let sum = words.iter().fold(start, |sum, word| sum + u64::from(u32::from_be_bytes(*word)));
    let mut last = [0; 4];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    sum + u64::from(u32::from_be_bytes(last))
}

/// The checksum of a sum.
pub(crate) fn finish(sum: u64) -> u16 {
    let mut folded = sum;
    while folded > 0xffff {
        folded = (folded & 0xffff) + (folded >> 16);
    }
    // At most 16 bits are left.
    !u16::try_from(folded).unwrap_or(0)
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
