//! Copies between a request's segments of driver memory and a buffer. Pure.

use vm_memory::{Address, Bytes, GuestMemory, GuestMemoryError};

use vvu_back_end::Segment;

/// Copies the bytes that begin `position` bytes into the segments to `buffer`. What lies beyond the segments is left.
pub(crate) fn copy_from_driver<M: GuestMemory>(
    memory: &M,
    segments: &[Segment],
    position: u64,
    buffer: &mut [u8],
) -> Result<(), GuestMemoryError> {
    let mut rest = buffer;
    for segment in parts(segments, position, rest.len()) {
        let (now, later) = rest.split_at_mut(rest.len().min(segment.len as usize));
        memory.read_slice(now, segment.address)?;
        rest = later;
    }
    Ok(())
}

/// Copies `bytes` to the place that begins `position` bytes into the segments. What lies beyond the segments is dropped.
pub(crate) fn copy_to_driver<M: GuestMemory>(
    memory: &M,
    segments: &[Segment],
    position: u64,
    bytes: &[u8],
) -> Result<(), GuestMemoryError> {
    let mut rest = bytes;
    for segment in parts(segments, position, rest.len()) {
        let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
        memory.write_slice(now, segment.address)?;
        rest = later;
    }
    Ok(())
}

/// The segments' part that begins at `position` and has `len` bytes, or less at their end.
fn parts(segments: &[Segment], position: u64, len: usize) -> impl Iterator<Item = Segment> {
    let mut skip = position;
    let mut left = len as u64;
    segments.iter().filter_map(move |segment| {
        let skipped = skip.min(u64::from(segment.len));
        skip -= skipped;
        let take = left.min(u64::from(segment.len) - skipped);
        left -= take;
        // At most the segment's own length.
        let len = u32::try_from(take).unwrap_or(segment.len);
        (take > 0).then(|| Segment { address: segment.address.unchecked_add(skipped), len })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    proptest! {
        #[test]
        fn what_is_copied_in_parts_is_what_was_copied(
            lens in prop::collection::vec(1u32..700, 1..6),
            step in 1usize..900,
        ) {
            let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x1000), 0x3000)]).unwrap();
            let mut address = 0x1003;
            let mut segments = Vec::new();
            for len in lens {
                segments.push(Segment { address: GuestAddress(address), len });
                address += u64::from(len) + 5;
            }
            let total: usize = vvu_back_end::total_len(&segments) .try_into().unwrap();
            let data: Vec<u8> = (0..total).map(|index| u8::try_from(index * 7 % 251).unwrap()).collect();
            for (index, part) in data.chunks(step).enumerate() {
                copy_to_driver(&memory, &segments, (index * step) as u64, part).unwrap();
            }
            let mut whole = vec![0; total];
            copy_from_driver(&memory, &segments, 0, &mut whole).unwrap();
            prop_assert_eq!(&whole, &data);
            let mut tail = vec![0; total / 2];
            copy_from_driver(&memory, &segments, (total - total / 2) as u64, &mut tail).unwrap();
            prop_assert_eq!(&tail[..], &data[total - total / 2..]);
        }
    }
}
