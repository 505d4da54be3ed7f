//! Copies out of and into driver memory, by the segments of chains; and what is done where that memory disappears.

use std::os::unix::fs::MetadataExt;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, VolatileSlice};
use vvu_back_end::{Segment, lost_memory};

use crate::DriverMemory;
use crate::fault::Fault;

/// A place in a list of segments that moves forward.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cursor<'a> {
    memory: &'a DriverMemory,
    segments: &'a [Segment],
    /// Bytes of the first segment that lie behind.
    offset: u32,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(memory: &'a DriverMemory, segments: &'a [Segment]) -> Self {
        Self { memory, segments, offset: 0 }
    }

    /// The next piece that is contiguous here, of `limit` bytes at the most. None at the end.
    fn next(&mut self, limit: usize) -> Result<Option<VolatileSlice<'a>>, GuestMemoryError> {
        let Some((first, later)) = self.segments.split_first() else { return Ok(None) };
        let left = first.len.saturating_sub(self.offset);
        let wanted = limit.min(left as usize);
        let start = first.address.unchecked_add(u64::from(self.offset));
        let piece = match self.memory.slice(start, wanted) {
            Some(whole) => whole,
            None => match self.memory.get_slices(start, wanted).next() {
                Some(piece) => piece?,
                None => return Ok(None),
            },
        };
        // Not more than `left`.
        let taken = u32::try_from(piece.len()).unwrap_or(left);
        if taken >= left {
            (self.segments, self.offset) = (later, 0);
        } else {
            self.offset += taken;
        }
        Ok(Some(piece))
    }

    /// Copies to `bytes` what comes next; the number of bytes is less than wanted at the end of the segments.
    pub(crate) fn read(&mut self, bytes: &mut [u8]) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let Some(piece) = self.next(rest.len())? else { break };
            piece.copy_to(rest);
            done += piece.len();
        }
        Ok(done)
    }

    /// Copies `bytes` to what comes next; the number of bytes is less at the end of the segments.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            let Some(piece) = self.next(rest.len())? else { break };
            piece.copy_from(rest);
            done += piece.len();
        }
        Ok(done)
    }

    /// Copies `len` bytes from `source` to what comes next, once; the number of bytes is less where one of the two ends.
    pub(crate) fn write_from(&mut self, mut source: Cursor<'_>, len: usize) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        while done < len {
            let Some(from) = source.next(len - done)? else { break };
            let mut copied = 0;
            while copied < from.len() {
                let Some(to) = self.next(from.len() - copied)? else { return Ok(done) };
                let part = from.subslice(copied, to.len()).map_err(GuestMemoryError::from)?;
                part.copy_to_volatile_slice(to);
                copied += to.len();
                done += to.len();
            }
        }
        Ok(done)
    }
}

/// Notices that driver memory has disappeared under a ring: its file was cut. What was read since is zeroes.
///
/// Losses are counted for the whole process, and most of them are others'.
#[derive(Debug)]
pub(crate) struct MemoryWatch {
    /// Losses that are known not to be of this memory.
    losses: u64,
}

impl MemoryWatch {
    pub(crate) fn new() -> Self {
        Self { losses: lost_memory::losses() }
    }

    /// To be called after driver memory was read or written, and before anything is believed.
    ///
    /// # Errors
    /// [`Fault::MemoryLost`].
    pub(crate) fn check(&mut self, memory: &DriverMemory) -> Result<(), Fault> {
        let losses = lost_memory::losses();
        if losses == self.losses {
            return Ok(());
        }
        if !is_whole(memory) {
            return Err(Fault::MemoryLost);
        }
        self.losses = losses;
        Ok(())
    }
}

/// Whether the files behind the memory still are as long as they were.
fn is_whole(memory: &DriverMemory) -> bool {
    GuestMemoryBackend::iter(memory).all(|region| {
        let Some(place) = region.file_offset() else { return true };
        place.file().metadata().is_ok_and(|file| file.size() >= place.start().saturating_add(region.len()))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    /// Two adjoining regions.
    fn memory() -> DriverMemory {
        DriverMemory::from_ranges(&[(GuestAddress(0), 0x3000), (GuestAddress(0x3000), 0x5000)]).unwrap()
    }

    fn segments(start: u64, lens: &[u32]) -> Vec<Segment> {
        let mut address = start;
        let place = |len: &u32| {
            let segment = Segment { address: GuestAddress(address), len: *len };
            address += u64::from(*len) + 3;
            segment
        };
        lens.iter().map(place).collect()
    }

    proptest! {
        #[test]
        fn what_is_copied_in_any_pieces_is_what_was_there(
            from in prop::collection::vec(1u32..1500, 1..5),
            to in prop::collection::vec(1u32..1500, 1..5),
            front in 0usize..300,
        ) {
            let (sender, receiver) = (memory(), memory());
            let (source, target) = (segments(0x2ff0 - 700, &from), segments(0x2ff0 - 300, &to));
            let data: Vec<u8> = (0..from.iter().sum::<u32>()).map(|index| (index % 251) as u8).collect();
            let mut writer = Cursor::new(&sender, &source);
            prop_assert_eq!(writer.write(&data).unwrap(), data.len());
            prop_assert_eq!(writer.write(&[1]).unwrap(), 0);

            let mut reader = Cursor::new(&sender, &source);
            let mut copied = vec![0; front.min(data.len())];
            prop_assert_eq!(reader.read(&mut copied).unwrap(), copied.len());
            prop_assert_eq!(&copied[..], &data[..copied.len()]);

            let room = to.iter().sum::<u32>() as usize;
            let mut cursor = Cursor::new(&receiver, &target);
            let head = cursor.write(&copied).unwrap();
            let tail = cursor.write_from(reader, data.len() - copied.len()).unwrap();
            let len = room.min(data.len());
            prop_assert_eq!(head + tail, len);
            let mut received = vec![0; len];
            prop_assert_eq!(Cursor::new(&receiver, &target).read(&mut received).unwrap(), len);
            prop_assert_eq!(&received[..], &data[..len]);
        }
    }

    #[test]
    fn nothing_is_written_beside_the_segments() {
        let memory = memory();
        let segments = segments(0x1000, &[4, 4]);
        assert_eq!(Cursor::new(&memory, &segments).write(&[9; 100]).unwrap(), 8);
        let bytes: [u8; 16] = memory.read_obj(GuestAddress(0x1000)).unwrap();
        assert_eq!(bytes, [9, 9, 9, 9, 0, 0, 0, 9, 9, 9, 9, 0, 0, 0, 0, 0]);
    }
}
