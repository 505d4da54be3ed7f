//! A structure of the driver's, contiguous in the driver's addresses and in pieces in guest-physical ones.
//!
//! Without an IOMMU there is one piece, or two where memory regions adjoin.

use vm_memory::{Address, GuestAddress, GuestMemoryError, VolatileMemory};

use crate::memory::Memory;
use crate::view::Segment;

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Place {
    pieces: Vec<Segment>,
}

impl Place {
    pub(crate) fn new(pieces: Vec<Segment>) -> Self {
        Self { pieces }
    }

    /// Exchanges the pieces for those that `fill` appends. The vector keeps its memory.
    pub(crate) fn refill<E>(&mut self, fill: impl FnOnce(&mut Vec<Segment>) -> Result<(), E>) -> Result<(), E> {
        self.pieces.clear();
        fill(&mut self.pieces)
    }

    /// The address of the `len` bytes at `offset`, which do not cross from one page to the next.
    pub(crate) fn address(&self, offset: u32, len: u32) -> Result<GuestAddress, GuestMemoryError> {
        match self.part(offset).filter(|part| part.len >= len) {
            Some(part) => Ok(part.address),
            None => Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(u64::from(offset)))),
        }
    }

    /// Copies two numbers at `offset`, as they are in memory.
    pub(crate) fn read_pair(&self, memory: &Memory, offset: u32) -> Result<[u64; 2], GuestMemoryError> {
        const LEN: usize = size_of::<[u64; 2]>();
        let whole = self.part(offset).filter(|part| part.len as usize >= LEN);
        if let Some(slice) = whole.and_then(|part| memory.slice(part.address, LEN)) {
            return Ok(slice.get_ref(0)?.load());
        }
        let mut bytes = [0; LEN];
        self.read(memory, offset, &mut bytes)?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, rest @ ..] = bytes;
        Ok([u64::from_ne_bytes([a0, a1, a2, a3, a4, a5, a6, a7]), u64::from_ne_bytes(rest)])
    }

    /// Copies the bytes at `offset`.
    fn read(&self, memory: &Memory, offset: u32, bytes: &mut [u8]) -> Result<(), GuestMemoryError> {
        let (mut rest, mut offset) = (bytes, offset);
        while !rest.is_empty() {
            let outside = GuestMemoryError::InvalidGuestAddress(GuestAddress(u64::from(offset)));
            let part = self.part(offset).ok_or(outside)?;
            let (now, later) = rest.split_at_mut(rest.len().min(part.len as usize));
            memory.read_slice(now, part.address)?;
            // Not more than the part's own length.
            offset += u32::try_from(now.len()).unwrap_or(part.len);
            rest = later;
        }
        Ok(())
    }

    /// What of the piece at `offset` lies behind it.
    fn part(&self, offset: u32) -> Option<Segment> {
        let mut skip = offset;
        for piece in &self.pieces {
            if skip < piece.len {
                return Some(Segment { address: piece.address.unchecked_add(u64::from(skip)), len: piece.len - skip });
            }
            skip -= piece.len;
        }
        None
    }

    pub(crate) fn pieces(&self) -> &[Segment] {
        &self.pieces
    }
}
