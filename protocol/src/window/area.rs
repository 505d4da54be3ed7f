//! Areas of the window for one buffer of the front-end each: the dirty log and the inflight buffer.

use super::{ALIGNMENT, FileId, INFLIGHT_LEN, INFLIGHT_OFFSET, LOG_LEN, LOG_OFFSET, Span};
use crate::address::{FileOffset, WindowOffset};
use crate::memory::PAGE_SIZE;

/// A part of the window that holds one buffer, and for a moment two: the next one is mapped before the one before is unmapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    start: u64,
    len: u64,
}

/// Where a buffer goes in its area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// The whole pages of its file, or `None` if it does not fill one.
    pub span: Option<Span>,
    /// Its end, if its file ends within a page.
    pub tail: Option<Tail>,
    /// Where the buffer itself starts.
    pub offset: WindowOffset,
}

/// The end of a buffer that shares its last page with the end of its file. A VMM maps whole pages only, so another file has
/// to stand in the window for this page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tail {
    /// Where the page starts in the buffer's file.
    pub file_offset: FileOffset,
    /// Bytes of the page before the buffer; not 0 only if the buffer is shorter than a page.
    pub before: u64,
    /// Bytes of the page up to the end of the buffer.
    pub len: u64,
    /// Where the page goes in the window.
    pub window_offset: WindowOffset,
}

/// Why a buffer does not fit its area.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BufferError {
    /// It has no bytes.
    #[error("it is empty")]
    Empty,
    /// It ends behind the end of its file.
    #[error("{size:#x} bytes at {start} of a file of {file_len:#x} bytes")]
    BeyondFile {
        /// Where it starts in its file.
        start: FileOffset,
        /// Its length in bytes.
        size: u64,
        /// Length of the file in bytes.
        file_len: u64,
    },
    /// It is too long for the area, or for what the buffer before leaves of it.
    #[error("{size:#x} bytes, the window has room for {room:#x}")]
    NoRoom {
        /// Its length in bytes.
        size: u64,
        /// Bytes in one piece.
        room: u64,
    },
}

impl Area {
    /// The area of the dirty log.
    pub const LOG: Self = Self { start: LOG_OFFSET.0, len: LOG_LEN };

    /// The area of the inflight buffer.
    pub const INFLIGHT: Self = Self { start: INFLIGHT_OFFSET.0, len: INFLIGHT_LEN };

    /// Whether a span lies in this area.
    #[must_use]
    pub const fn holds(&self, span: &Span) -> bool {
        self.start <= span.window_offset.0 && span.window_offset.0 < self.start + self.len
    }

    /// Decides where `size` bytes at `start` of a file go: where they are mapped already, else at the start of the area, else
    /// at its end, whichever is free. `mapped` is all that is mapped in the window.
    ///
    /// # Errors
    /// [`BufferError`].
    pub fn place(
        &self,
        file: (FileId, u64),
        start: FileOffset,
        size: u64,
        mapped: &[Span],
    ) -> Result<Buffer, BufferError> {
        self.place_beside(file, start, size, mapped, mapped)
    }

    /// The same where nothing is mapped so far: the tail is another one than before.
    ///
    /// # Errors
    /// [`BufferError`].
    pub fn place_anew(
        &self,
        file: (FileId, u64),
        start: FileOffset,
        size: u64,
        mapped: &[Span],
    ) -> Result<Buffer, BufferError> {
        self.place_beside(file, start, size, mapped, &[])
    }

    fn place_beside(
        &self,
        (file, file_len): (FileId, u64),
        start: FileOffset,
        size: u64,
        mapped: &[Span],
        reusable: &[Span],
    ) -> Result<Buffer, BufferError> {
        let beyond = BufferError::BeyondFile { start, size, file_len };
        let file_ends = file_len.min(i64::MAX.unsigned_abs());
        let end = start.0.checked_add(size).filter(|end| *end <= file_ends).ok_or(beyond)?;
        if size == 0 {
            return Err(BufferError::Empty);
        }
        let first_page = start.0 - start.0 % PAGE_SIZE;
        let whole_end = end.next_multiple_of(PAGE_SIZE).min(file_len - file_len % PAGE_SIZE);
        let len = whole_end.saturating_sub(first_page);
        let known = reusable
            .iter()
            .find(|span| self.holds(span) && (span.file, span.file_offset.0, span.len) == (file, first_page, len));
        let place = match known {
            Some(span) => span.window_offset.0,
            None => self.free(end - first_page, mapped).ok_or(BufferError::NoRoom { size, room: self.len / 2 })?,
        };
        let span = Span { file, file_offset: FileOffset(first_page), len, window_offset: WindowOffset(place) };
        let tail = (whole_end < end).then(|| Tail {
            file_offset: FileOffset(whole_end),
            before: start.0.saturating_sub(whole_end),
            len: end - whole_end,
            window_offset: WindowOffset(place + len),
        });
        Ok(Buffer { span: (len > 0).then_some(span), tail, offset: WindowOffset(place + start.0 % PAGE_SIZE) })
    }

    /// A free place for `len` bytes: the start of the area, or as far at its end as possible.
    fn free(&self, len: u64, mapped: &[Span]) -> Option<u64> {
        let reserved = len.checked_next_multiple_of(ALIGNMENT)?;
        let last = self.len.checked_sub(reserved)?;
        let taken =
            |place: &u64| mapped.iter().any(|span| span.window_offset.0 < place + reserved && *place < span.end());
        [self.start, self.start + last].into_iter().find(|place| !taken(place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileId = FileId { device: 1, inode: 7 };
    const OTHER: FileId = FileId { device: 1, inode: 8 };

    fn place(file: FileId, file_len: u64, start: u64, size: u64, mapped: &[Span]) -> Result<Buffer, BufferError> {
        Area::LOG.place((file, file_len), FileOffset(start), size, mapped)
    }

    #[test]
    fn the_next_one_goes_beside_the_one_before_and_then_back() {
        let half = LOG_LEN / 2;
        let first = place(FILE, half, 0, half, &[]).unwrap();
        assert_eq!((first.offset, first.tail), (LOG_OFFSET, None));
        let mapped = [first.span.unwrap()];
        assert_eq!(place(FILE, half, 0, half, &mapped).unwrap(), first, "the same again");
        let anew = Area::LOG.place_anew((FILE, half), FileOffset(0), half, &mapped).unwrap();
        assert_eq!(anew.offset.0, LOG_OFFSET.0 + half);
        let second = place(OTHER, half, 0, half, &mapped).unwrap();
        assert_eq!(second.offset.0, LOG_OFFSET.0 + half);
        assert_eq!(place(OTHER, half, 0, half, &[second.span.unwrap()]).unwrap(), second);
        assert_eq!(place(FILE, half, 0, half, &[second.span.unwrap()]).unwrap(), first);
        let large = place(OTHER, LOG_LEN, 0, half + 1, &mapped);
        assert_eq!(large, Err(BufferError::NoRoom { size: half + 1, room: half }));
        assert!(place(OTHER, LOG_LEN, 0, LOG_LEN, &[]).is_ok());
        assert!(place(OTHER, 2 * LOG_LEN, 0, LOG_LEN + 1, &[]).is_err());
    }

    #[test]
    fn the_tail_of_a_log_at_the_end_of_its_area_leaves_the_next_area_alone() {
        let first = place(FILE, 0x2345, 0, 0x2340, &[]).unwrap().span.unwrap();
        let second = place(OTHER, 0x2345, 0, 0x2340, &[first]).unwrap();
        let tail = second.tail.unwrap();
        let tail = Span { file: FILE, file_offset: FileOffset(0), len: 0x1000, window_offset: tail.window_offset };
        let mapped = [second.span.unwrap(), tail];
        assert_eq!(tail.end(), INFLIGHT_OFFSET.0);
        let inflight = Area::INFLIGHT.place((FILE, 0x2000), FileOffset(0), 0x2000, &mapped).unwrap();
        assert_eq!(inflight.offset, INFLIGHT_OFFSET);
    }

    #[test]
    fn an_offset_within_the_file_is_kept() {
        let buffer = place(FILE, 0x1_0000, 0x2100, 0x3000, &[]).unwrap();
        let span = buffer.span.unwrap();
        assert_eq!((span.file_offset.0, span.len, span.window_offset), (0x2000, 0x4000, LOG_OFFSET));
        assert_eq!((buffer.offset.0, buffer.tail), (LOG_OFFSET.0 + 0x100, None));
    }

    #[test]
    fn a_file_that_ends_within_a_page_has_a_tail() {
        let buffer = place(FILE, 0x2345, 0, 0x2340, &[]).unwrap();
        assert_eq!(buffer.span.unwrap().len, 0x2000);
        let window_offset = WindowOffset(LOG_OFFSET.0 + 0x2000);
        let tail = Tail { file_offset: FileOffset(0x2000), before: 0, len: 0x340, window_offset };
        assert_eq!(buffer.tail, Some(tail));
        // Shorter than a page, and within it.
        let buffer = place(FILE, 0x2345, 0x2100, 0x200, &[]).unwrap();
        assert_eq!((buffer.span, buffer.offset.0), (None, LOG_OFFSET.0 + 0x100));
        let tail = Tail { file_offset: FileOffset(0x2000), before: 0x100, len: 0x300, window_offset: LOG_OFFSET };
        assert_eq!(buffer.tail, Some(tail));
        // The file goes on behind the buffer, to the end of the page.
        assert_eq!(place(FILE, 0x3000, 0, 0x2340, &[]).unwrap().tail, None);
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        for (start, size) in [(0, 0x1001), (0x1000, 1), (u64::MAX, 2), (1, u64::MAX), (u64::MAX, u64::MAX)] {
            assert!(matches!(place(FILE, 0x1000, start, size, &[]), Err(BufferError::BeyondFile { .. })), "{start:#x}");
        }
        assert_eq!(place(FILE, 0x1000, 0, 0, &[]), Err(BufferError::Empty));
        assert!(matches!(place(FILE, u64::MAX, 0, u64::MAX, &[]), Err(BufferError::BeyondFile { .. })));
    }
}
