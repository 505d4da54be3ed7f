//! The memory of one operation, as the list of pieces that readv(2) takes, and how far the operation has come.
//!
//! It makes pointers and never follows one; only the kernel does, on behalf of the engine.

use std::sync::Arc;

use vm_memory::{GuestMemory, GuestMemoryError, Permissions, VolatileSlice};
use vvu_back_end::Segment;

use crate::DriverMemory;
use crate::aligned_buffer::AlignedBuffer;
use crate::image::Alignment;

/// Most pieces of memory in one transfer; readv(2) takes 1024. More than seg_max, because a segment that spans memory
/// regions has a piece in each.
const MAX_PIECES: usize = 256;

/// Why memory cannot be mapped for a transfer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MapError {
    #[error("driver memory is gone")]
    Memory(#[from] GuestMemoryError),
    #[error("request has more than {MAX_PIECES} pieces of memory")]
    TooManyPieces,
}

/// Direction as the image sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}

/// See the module's text. The fields that name memory are private: they change together or not at all.
#[derive(Debug, Default)]
pub(crate) struct Transfer {
    /// The kernel has the operation. Whoever sets it must not call anything that changes the pieces until it is reset.
    pub(crate) busy: bool,
    /// A thread of the kernel makes the copy.
    pub(crate) elsewhere: bool,
    /// The kernel has the pages of the memory at hand.
    pub(crate) registered: bool,
    /// None for an operation without data.
    pub(crate) direction: Option<Direction>,
    /// The file that is read, by its number among the disk's files; writes go to the first one.
    pub(crate) file: u32,
    /// Image offset of the first byte.
    pub(crate) offset: u64,
    transferred: u64,
    pieces: Vec<libc::iovec>,
    /// Pieces before this one are done.
    next: usize,
    /// Keeps the pieces' memory mapped.
    memory: Option<Arc<DriverMemory>>,
    /// Is the pieces' memory.
    buffer: Option<AlignedBuffer>,
}

impl Transfer {
    /// Lets go of all memory.
    pub(crate) fn reset(&mut self) {
        self.pieces.clear();
        self.next = 0;
        self.transferred = 0;
        self.direction = None;
        self.file = 0;
        self.memory = None;
        self.buffer = None;
    }

    /// Works on driver memory in place.
    pub(crate) fn map_segments(&mut self, memory: &Arc<DriverMemory>, segments: &[Segment]) -> Result<(), MapError> {
        self.reset();
        for segment in segments {
            if let Some(slice) = memory.slice(segment.address, segment.len as usize) {
                self.push(&slice)?;
                continue;
            }
            // One slice per memory region: a segment that spans two is no contiguous memory here.
            for slice in memory.get_slices(segment.address, segment.len as usize, Permissions::ReadWrite)? {
                self.push(&slice?)?;
            }
        }
        self.memory = Some(Arc::clone(memory));
        Ok(())
    }

    fn push(&mut self, slice: &VolatileSlice<'_>) -> Result<(), MapError> {
        if self.pieces.len() == MAX_PIECES {
            return Err(MapError::TooManyPieces);
        }
        self.pieces.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
        Ok(())
    }

    /// Works on the first `len` bytes of a buffer.
    pub(crate) fn map_buffer(&mut self, mut buffer: AlignedBuffer, len: usize) {
        self.reset();
        let bytes = buffer.bytes_mut();
        let iov_len = len.min(bytes.len());
        self.pieces.push(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len });
        self.buffer = Some(buffer);
    }

    /// Writes the bytes of `source` again and again, `len` in all or as many as fit; returns how many. `source` must
    /// outlive the operation.
    pub(crate) fn map_repeated(&mut self, source: &[u8], len: u64) -> u64 {
        self.reset();
        let mut left = len;
        while left > 0 && self.pieces.len() < MAX_PIECES {
            let iov_len = usize::try_from(left).map_or(source.len(), |left| left.min(source.len()));
            self.pieces.push(libc::iovec { iov_base: source.as_ptr().cast_mut().cast(), iov_len });
            left -= iov_len as u64;
        }
        len - left
    }

    /// Whether direct I/O can work on the pieces.
    pub(crate) fn is_aligned(&self, alignment: Alignment) -> bool {
        self.pieces.iter().all(|piece| {
            piece.iov_base.addr().is_multiple_of(alignment.memory as usize)
                && piece.iov_len.is_multiple_of(alignment.offset as usize)
        })
    }

    /// Gives the buffer of [`Transfer::map_buffer`] back.
    pub(crate) fn take_buffer(&mut self) -> Option<AlignedBuffer> {
        let buffer = self.buffer.take();
        if buffer.is_some() {
            self.reset();
        }
        buffer
    }

    /// The memory that the pieces are of, if it is the driver's.
    pub(crate) fn memory(&self) -> Option<&DriverMemory> {
        self.memory.as_deref()
    }

    /// The pieces that are left.
    pub(crate) fn pieces(&self) -> &[libc::iovec] {
        self.pieces.get(self.next..).unwrap_or_default()
    }

    /// Image offset of the first byte that is left.
    pub(crate) fn position(&self) -> u64 {
        self.offset.saturating_add(self.transferred)
    }

    /// Bytes that are done.
    pub(crate) fn transferred(&self) -> u64 {
        self.transferred
    }

    pub(crate) fn is_done(&self) -> bool {
        self.next >= self.pieces.len()
    }

    /// Moves the start of the pieces forward by `bytes`.
    pub(crate) fn advance(&mut self, mut bytes: usize) {
        self.transferred += bytes as u64;
        while let Some(piece) = self.pieces.get_mut(self.next) {
            if bytes < piece.iov_len {
                // Stays inside of the piece.
                piece.iov_base = piece.iov_base.wrapping_byte_add(bytes);
                piece.iov_len -= bytes;
                return;
            }
            bytes -= piece.iov_len;
            self.next += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    fn memory(regions: &[(u64, usize)]) -> Arc<DriverMemory> {
        let ranges: Vec<_> = regions.iter().map(|(start, len)| (GuestAddress(*start), *len)).collect();
        Arc::new(DriverMemory::from_ranges(&ranges).unwrap())
    }

    fn segment(address: u64, len: u32) -> Segment {
        Segment { address: GuestAddress(address), len }
    }

    #[test]
    fn a_segment_has_a_piece_in_each_region() {
        let memory = memory(&[(0, 0x3000), (0x3000, 0x1000), (0x4000, 0x1000)]);
        let mut transfer = Transfer::default();
        transfer.map_segments(&memory, &[segment(0x2800, 0x2000)]).unwrap();
        let lens: Vec<_> = transfer.pieces().iter().map(|piece| piece.iov_len).collect();
        assert_eq!(lens, [0x800, 0x1000, 0x800]);
        assert!(transfer.map_segments(&memory, &[segment(0x4800, 0x1000)]).is_err(), "a hole");
    }

    #[test]
    fn short_transfers_go_on_where_they_stopped() {
        let memory = memory(&[(0, 0x10000)]);
        let mut transfer = Transfer::default();
        transfer.map_segments(&memory, &[segment(0, 512), segment(0x1000, 1024), segment(0x4000, 512)]).unwrap();
        transfer.offset = 4096;
        let second = transfer.pieces()[1].iov_base.addr();
        transfer.advance(0);
        assert_eq!((transfer.pieces().len(), transfer.position()), (3, 4096));
        transfer.advance(512 + 100);
        assert_eq!((transfer.pieces().len(), transfer.position()), (2, 4096 + 612));
        assert_eq!(transfer.pieces()[0].iov_base.addr(), second + 100);
        assert_eq!(transfer.pieces()[0].iov_len, 924);
        transfer.advance(924 + 512);
        assert!(transfer.is_done());
        assert_eq!(transfer.transferred(), 2048);
    }

    #[test]
    fn pieces_are_bounded() {
        let memory = memory(&[(0, 0x1000)]);
        let many = vec![segment(0, 8); MAX_PIECES + 1];
        let mut transfer = Transfer::default();
        assert!(matches!(transfer.map_segments(&memory, &many), Err(MapError::TooManyPieces)));
        let source = [0; 16];
        assert_eq!(transfer.map_repeated(&source, u64::MAX), 16 * MAX_PIECES as u64);
        assert_eq!(transfer.map_repeated(&source, 40), 40);
        assert_eq!(transfer.pieces().last().unwrap().iov_len, 8);
    }
}
