//! Driver memory whose pages the kernel keeps at hand for one io_uring (registered buffers, io_uring_register(2)), so that it
//! need not find and hold them anew for each operation.
//!
//! Only memory that says so of itself is registered ([`DriverMemory::lasting`]); an appliance's window does. It is registered
//! in chunks, each when an operation first works on it: a ring that starts, or whose driver VM gets other memory, does not
//! wait for all of it.
//!
//! # Safety
//! The kernel holds the pages of a chunk by itself, so they stay pages whatever becomes of the mapping. What they are pages of
//! is the question: a slot is named for a piece of memory only between the registration of the chunk, made while that
//! piece was mapped, and the next change of memory, which has all chunks registered anew. The kernel may look at an operation later
//! than that. It finds the addresses of the piece in its slot then, which nothing else can have while the piece is mapped, or it
//! refuses the operation, which is started again without a slot.

#![expect(unsafe_code, reason = "memory is registered by address; the module's text says why it is what it was")]

use std::io;

use io_uring::{IoUring, Submitter};

use crate::DriverMemory;

/// Most chunks; io_uring takes four times as many.
const MOST_CHUNKS: usize = 4096;

/// Length of a chunk in bytes, as a power of two: to register it takes less than a millisecond, and five under an emulator.
const LEAST_SHIFT: u32 = 24;

/// Of chunks of larger memory: io_uring takes no longer ones.
const MOST_SHIFT: u32 = 30;

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Registered {
    /// Whose memory it is; at first nobody's.
    memory: u64,
    chunks: Chunks,
    /// Whether the chunk of a slot is there.
    filled: Vec<bool>,
    /// The ring has a table of slots.
    has_table: bool,
}

impl Registered {
    /// The slot that has all of `piece`, which is a part of `memory` and mapped. None if the operation has to go without.
    #[inline]
    pub(super) fn slot_of(&mut self, ring: &IoUring, memory: &DriverMemory, piece: &libc::iovec) -> Option<u16> {
        if self.memory == memory.id() && self.filled.is_empty() {
            return None;
        }
        self.find(ring, memory, piece)
    }

    fn find(&mut self, ring: &IoUring, memory: &DriverMemory, piece: &libc::iovec) -> Option<u16> {
        let ring = ring.submitter();
        if self.memory != memory.id() {
            self.follow(&ring, memory);
        }
        let chunk = self.chunks.find(piece.iov_base.addr(), piece.iov_len)?;
        let filled = *self.filled.get(usize::from(chunk.slot))?;
        (filled || self.register(&ring, chunk)).then_some(chunk.slot)
    }

    /// Forgets all chunks and takes those of another table of memory.
    #[cold]
    fn follow(&mut self, ring: &Submitter<'_>, memory: &DriverMemory) {
        self.forget(ring);
        self.memory = memory.id();
        let regions = memory.lasting().map(|slice| (slice.ptr_guard().as_ptr().addr(), slice.len()));
        self.chunks = Chunks::of(regions.collect());
        self.filled.resize(self.chunks.count(), false);
        if !self.filled.is_empty() && !self.has_table {
            match ring.register_buffers_sparse(u32::try_from(MOST_CHUNKS).unwrap_or(0)) {
                Ok(()) => self.has_table = true,
                Err(error) => self.give_up(ring, &error),
            }
        }
    }

    fn register(&mut self, ring: &Submitter<'_>, chunk: Chunk) -> bool {
        let memory = libc::iovec { iov_base: std::ptr::without_provenance_mut(chunk.start), iov_len: chunk.len };
        // SAFETY: the chunk is a part of a region that is mapped now, for a piece of it is; the module's text says why it may be
        // unmapped later.
        if let Err(error) = unsafe { ring.register_buffers_update(u32::from(chunk.slot), &[memory], None) } {
            self.give_up(ring, &error);
            return false;
        }
        if let Some(filled) = self.filled.get_mut(usize::from(chunk.slot)) {
            *filled = true;
        }
        true
    }

    /// What the kernel has refused it refuses again: operations go without until the memory changes.
    fn give_up(&mut self, ring: &Submitter<'_>, error: &io::Error) {
        tracing::debug!(%error, "driver memory is not registered");
        self.forget(ring);
    }

    /// Empties all slots. Operations that are under way keep what they have.
    fn forget(&mut self, ring: &Submitter<'_>) {
        self.chunks = Chunks::default();
        if self.filled.contains(&true) {
            let empty = vec![libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; self.filled.len()];
            // SAFETY: there is no memory in it. If the kernel refuses, it keeps pages that no operation names.
            if let Err(error) = unsafe { ring.register_buffers_update(0, &empty, None) } {
                tracing::debug!(%error, "registered memory cannot be let go");
            }
        }
        self.filled.clear();
    }
}

/// Regions of memory in chunks of one length, each with a slot. Pure.
#[derive(Debug, Default)]
struct Chunks {
    /// In ascending order.
    spans: Vec<Span>,
    shift: u32,
}

/// One region.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: usize,
    len: usize,
    /// Slot of its first chunk.
    first: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Chunk {
    slot: u16,
    start: usize,
    len: usize,
}

impl Chunks {
    /// Of regions that are given by address and length, and do not overlap.
    fn of(mut regions: Vec<(usize, usize)>) -> Self {
        regions.sort_unstable();
        let count = |shift: u32| regions.iter().map(|(_, len)| len.div_ceil(1 << shift)).sum::<usize>();
        let shift = (LEAST_SHIFT..MOST_SHIFT).find(|shift| count(*shift) <= MOST_CHUNKS).unwrap_or(MOST_SHIFT);
        let mut next = 0;
        let place = |(start, len): (usize, usize)| {
            let first = next;
            next += len.div_ceil(1 << shift);
            Span { start, len, first }
        };
        Self { spans: regions.into_iter().map(place).collect(), shift }
    }

    /// What lies behind the last slot has no chunk.
    fn count(&self) -> usize {
        let end = |span: &Span| span.first + span.len.div_ceil(1 << self.shift);
        self.spans.last().map_or(0, end).min(MOST_CHUNKS)
    }

    /// The chunk that has all of a piece of memory.
    fn find(&self, start: usize, len: usize) -> Option<Chunk> {
        let not_before = self.spans.partition_point(|span| span.start <= start);
        let span = self.spans.get(not_before.checked_sub(1)?)?;
        let offset = start - span.start;
        let last = offset.checked_add(len.checked_sub(1)?)?;
        let index = offset >> self.shift;
        if last >= span.len || last >> self.shift != index || span.first + index >= MOST_CHUNKS {
            return None;
        }
        let chunk = index << self.shift;
        Some(Chunk {
            slot: u16::try_from(span.first + index).ok()?,
            start: span.start + chunk,
            len: (span.len - chunk).min(1 << self.shift),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use io_uring::{opcode, types};
    use vm_memory::GuestAddress;

    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn a_piece_has_the_chunk_that_it_lies_in() {
        let chunks = Chunks::of(vec![(100 * MIB, 40 * MIB), (16 * MIB, 4096)]);
        assert_eq!(chunks.count(), 4);
        let slot = |start, len| chunks.find(start, len).map(|chunk| (chunk.slot, chunk.start / MIB, chunk.len));
        assert_eq!(slot(16 * MIB, 4096), Some((0, 16, 4096)));
        assert_eq!(slot(100 * MIB, 1), Some((1, 100, 16 * MIB)));
        assert_eq!(slot(116 * MIB - 512, 512), Some((1, 100, 16 * MIB)));
        assert_eq!(slot(116 * MIB, 512), Some((2, 116, 16 * MIB)));
        assert_eq!(slot(140 * MIB - 512, 512), Some((3, 132, 8 * MIB)));
        for (start, len) in [
            (116 * MIB - 512, 513),
            (140 * MIB - 512, 513),
            (16 * MIB - 1, 1),
            (16 * MIB + 4096, 1),
            (140 * MIB, 1),
            (100 * MIB, 0),
            (100 * MIB, usize::MAX),
        ] {
            assert_eq!(slot(start, len), None, "{start:#x}+{len:#x}");
        }
        assert_eq!(Chunks::of(Vec::new()).count(), 0);
    }

    #[test]
    fn much_memory_has_long_chunks_and_too_much_has_none_at_its_end() {
        for (gib, shift, count) in [(64, 24, 4096), (65, 25, 2080), (4096, 30, 4096), (5000, 30, 4096)] {
            let chunks = Chunks::of(vec![(1 << 40, gib << 30)]);
            assert_eq!((chunks.shift, chunks.count()), (shift, count), "{gib} GiB");
            let last = chunks.find((1 << 40) + (gib << 30) - 512, 512);
            assert_eq!(last.is_some(), gib <= 4096);
        }
    }

    fn read(ring: &mut IoUring, slot: u16, piece: &libc::iovec) {
        let len = u32::try_from(piece.iov_len).unwrap();
        let entry = opcode::ReadFixed::new(types::Fixed(0), piece.iov_base.cast(), len, slot).build();
        // SAFETY: the piece is memory of the caller, which waits for the end.
        unsafe { ring.submission().push(&entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        assert_eq!(ring.completion().next().unwrap().result(), i32::try_from(len).unwrap());
    }

    /// The second memory takes the place of the first one, at the same addresses if the system likes.
    #[test]
    fn what_is_read_is_where_the_memory_is_now() {
        let source = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(source.path(), [7; 4096]).unwrap();
        let file = File::open(source.path()).unwrap();
        let mut ring = IoUring::new(4).unwrap();
        ring.submitter().register_files(&[file.as_raw_fd()]).unwrap();
        let mut registered = Registered::default();
        let mut addresses = Vec::new();
        for _ in 0..4 {
            let memory = DriverMemory::from_ranges(&[(GuestAddress(0), MIB), (GuestAddress(1 << 32), MIB)]).unwrap();
            for start in [0x2000, (1 << 32) + 0x3000, 0x2000] {
                let start = GuestAddress(start);
                memory.write_slice(&[0; 4096], start).unwrap();
                let slice = memory.slice(start, 4096).unwrap();
                let piece = libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: 4096 };
                addresses.push(piece.iov_base);
                let slot = registered.slot_of(&ring, &memory, &piece).expect("registered");
                read(&mut ring, slot, &piece);
                let mut found = [0; 4096];
                memory.read_slice(&mut found, start).unwrap();
                assert_eq!(found, [7; 4096]);
            }
            assert_eq!(registered.filled, [true, true]);
        }
        assert!(addresses.iter().any(|address| addresses.iter().filter(|other| *other == address).count() > 2));
    }

    #[test]
    fn without_a_table_nothing_is_registered_until_the_memory_changes() {
        let ring = IoUring::new(4).unwrap();
        let mut registered = Registered::default();
        let memory = || DriverMemory::from_ranges(&[(GuestAddress(0), MIB)]).unwrap();
        let first = memory();
        let piece_of = |memory: &DriverMemory| {
            let slice = memory.slice(GuestAddress(0), 512).unwrap();
            libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: 512 }
        };
        // There is a table already.
        ring.submitter().register_buffers_sparse(1).unwrap();
        assert_eq!(registered.slot_of(&ring, &first, &piece_of(&first)), None);
        ring.submitter().unregister_buffers().unwrap();
        assert_eq!(registered.slot_of(&ring, &first, &piece_of(&first)), None);
        let second = memory();
        assert_eq!(registered.slot_of(&ring, &second, &piece_of(&second)), Some(0));
    }
}
