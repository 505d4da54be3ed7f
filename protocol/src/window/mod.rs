//! Where things lie in the window: the shared memory region through which the appliance sees driver memory.
//!
//! ```text
//! 0        2 MiB              + LOG_LEN            + INFLIGHT_LEN          len
//! ├─header──┼─dirty log─────────┼─inflight buffer────┼─driver memory─────────┤ filler: a region of its own, never mapped
//! ```
//!
//! Each *file* of driver memory is mapped once, not each region: front-ends list several regions of one file (below and
//! above the holes of a PC). A [`Span`] is such a mapping: of the whole file if there is room for it, so that regions which
//! are added later are there already; else of the part that regions use; else, if there is no room for that in one piece, of
//! its pieces. A region that is mapped never moves as long as it is in the table. The place of a span is congruent to its
//! file offset modulo 2 MiB, so that huge pages stay huge and the appliance can map it with huge pages.
//!
//! [`Layout`] decides; it maps nothing. Its user applies a [`Plan`] in the order: map new, tell the appliance, unmap old,
//! [`Layout::commit`]. Log and inflight buffer have an [`Area`] each, with room for two: the next one is mapped before the
//! one before is unmapped.

mod area;

pub use area::{Area, Buffer, BufferError, Tail};

use crate::address::{FileOffset, WindowOffset};
use crate::memory::{MAX_SLOTS, MemoryRegion, PAGE_SIZE};

/// Alignment of everything in the window, in bytes: the size of a huge page, and of a device-DAX mapping.
pub const ALIGNMENT: u64 = 2 << 20;

/// Length of the header area in bytes.
pub const HEADER_LEN: u64 = ALIGNMENT;

/// Length of the area for the dirty log in bytes. One bit stands for 4 KiB, so it covers 1 TiB of guest-physical addresses.
pub const LOG_LEN: u64 = 32 << 20;

/// Start of the area for the dirty log.
pub const LOG_OFFSET: WindowOffset = WindowOffset(HEADER_LEN);

/// Length of the area for the inflight buffer in bytes. 64 queues of 1,024 entries, each of 32 bytes as for a packed ring,
/// take a little more than 2 MiB.
pub const INFLIGHT_LEN: u64 = 8 << 20;

/// Start of the area for the inflight buffer.
pub const INFLIGHT_OFFSET: WindowOffset = WindowOffset(HEADER_LEN + LOG_LEN);

/// Start of the area for driver memory.
pub const MEMORY_OFFSET: WindowOffset = WindowOffset(HEADER_LEN + LOG_LEN + INFLIGHT_LEN);

/// Smallest driver memory that a window can be made for, in bytes.
pub const MEMORY_LEN_MIN: u64 = ALIGNMENT;

/// Largest driver memory that a window can be made for, in bytes: 512 GiB, half of what the dirty log covers.
pub const MEMORY_LEN_MAX: u64 = 512 << 30;

/// Most spans: one for each memory slot of a front-end. (QEMU's limit of eight RAM slots for a vhost-user device is one of
/// its memory table; mappings beyond it work, and QEMU logs an error.)
pub const SPANS_MAX: usize = MAX_SLOTS;

/// Identity of a file, as `fstat` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// A memory region together with the file that came with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionOfFile {
    /// The region.
    pub region: MemoryRegion,
    /// Its file.
    pub file: FileId,
    /// Length of the file in bytes.
    pub file_len: u64,
}

/// A part of one file that is mapped into the window in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The file.
    pub file: FileId,
    /// Where in the file it starts; a multiple of [`ALIGNMENT`].
    pub file_offset: FileOffset,
    /// Length in bytes; a multiple of the page size that ends within the file.
    pub len: u64,
    /// Where in the window it starts; a multiple of [`ALIGNMENT`].
    pub window_offset: WindowOffset,
}

impl Span {
    /// Bytes of the window that it takes: its length, rounded up to [`ALIGNMENT`].
    #[must_use]
    pub const fn reserved(&self) -> u64 {
        self.len.next_multiple_of(ALIGNMENT)
    }

    /// First window offset behind what it takes: a multiple of [`ALIGNMENT`], even behind the tail of a dirty log, which may
    /// start anywhere.
    #[must_use]
    pub const fn end(&self) -> u64 {
        (self.window_offset.0 + self.len).next_multiple_of(ALIGNMENT)
    }

    fn covers(&self, entry: &RegionOfFile) -> bool {
        let (start, end) = (entry.region.mmap_offset.0, entry.region.file_end());
        self.file == entry.file && self.file_offset.0 <= start && end <= self.file_offset.0 + self.len
    }

    /// Where in the window a file offset within this span lies.
    const fn place(&self, offset: FileOffset) -> WindowOffset {
        WindowOffset(self.window_offset.0 + (offset.0 - self.file_offset.0))
    }
}

/// Why a memory table does not fit the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// The window's size is out of range.
    #[error("window for {found:#x} bytes of driver memory: expected {MEMORY_LEN_MIN:#x} to {MEMORY_LEN_MAX:#x}")]
    Size {
        /// Bytes of driver memory that were asked for.
        found: u64,
    },
    /// A region ends behind the end of its file.
    #[error("memory region ends at {end:#x} of a file of {file_len:#x} bytes")]
    BeyondFile {
        /// Where the region ends in its file.
        end: u64,
        /// Length of the file in bytes.
        file_len: u64,
    },
    /// More files than can be mapped.
    #[error("driver memory comes in {found} files, at most {SPANS_MAX} can be mapped")]
    TooManyFiles {
        /// Number of files.
        found: usize,
    },
    /// No room for a file.
    #[error(
        "driver memory needs {wanted:#x} more bytes of window in one piece, the window has {len:#x} in all: start with a larger --window"
    )]
    Full {
        /// Bytes that are wanted in one piece.
        wanted: u64,
        /// Bytes of driver memory that the window was made for.
        len: u64,
    },
}

/// What has to be done so that a new memory table can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// To be mapped first.
    pub map: Vec<Span>,
    /// To be unmapped when nobody uses them any more.
    pub unmap: Vec<Span>,
    /// All that is mapped afterwards.
    pub spans: Vec<Span>,
    /// Where each region of the table lies, in the table's order.
    pub offsets: Vec<WindowOffset>,
}

/// Size of one window, and what is mapped in it.
#[derive(Debug, Clone)]
pub struct Layout {
    memory_len: u64,
    spans: Vec<Span>,
}

impl RegionOfFile {
    fn check(&self) -> Result<(), WindowError> {
        let (end, file_len) = (self.region.file_end(), self.file_len);
        let fits = end <= file_len && file_len <= i64::MAX.unsigned_abs();
        if fits { Ok(()) } else { Err(WindowError::BeyondFile { end, file_len }) }
    }
}

/// Part of a file, rounded outwards to [`ALIGNMENT`] as far as the file reaches.
#[derive(Debug, Clone, Copy)]
struct Extent {
    file: FileId,
    file_len: u64,
    start: u64,
    end: u64,
}

impl Extent {
    /// The part that a region uses.
    const fn new(entry: &RegionOfFile) -> Self {
        let RegionOfFile { region, file, file_len } = *entry;
        let (start, end) = (region.mmap_offset.0, region.file_end().next_multiple_of(ALIGNMENT));
        let whole_pages = file_len - file_len % PAGE_SIZE;
        let end = if end < whole_pages { end } else { whole_pages };
        Self { file, file_len, start: start - start % ALIGNMENT, end }
    }

    /// The part that reaches from the start of one to the end of the other. (A file may have grown between two looks at it.)
    fn hull(self, other: Self) -> Self {
        let file_len = self.file_len.max(other.file_len);
        Self { file: self.file, file_len, start: self.start.min(other.start), end: self.end.max(other.end) }
    }

    /// All whole pages of the file.
    const fn whole_file(&self) -> Self {
        let end = self.file_len - self.file_len % PAGE_SIZE;
        Self { file: self.file, file_len: self.file_len, start: 0, end }
    }
}

impl Layout {
    /// A window for `memory_len` bytes of driver memory, rounded up to [`ALIGNMENT`], with nothing mapped.
    ///
    /// # Errors
    /// [`WindowError::Size`] if it is smaller than [`MEMORY_LEN_MIN`] or larger than [`MEMORY_LEN_MAX`].
    pub const fn new(memory_len: u64) -> Result<Self, WindowError> {
        if memory_len < MEMORY_LEN_MIN || memory_len > MEMORY_LEN_MAX {
            return Err(WindowError::Size { found: memory_len });
        }
        Ok(Self { memory_len: memory_len.next_multiple_of(ALIGNMENT), spans: Vec::new() })
    }

    /// Length of the window in bytes, all areas included.
    #[must_use]
    pub const fn len(&self) -> u64 {
        MEMORY_OFFSET.0 + self.memory_len
    }

    /// Whether nothing of the driver VM is mapped.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Bytes that a second, never mapped region has to have, so that both add up to a power of two: QEMU asserts that.
    #[must_use]
    pub const fn filler_len(&self) -> u64 {
        self.len().next_power_of_two() - self.len()
    }

    /// The spans that are mapped.
    #[must_use]
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Decides where the regions of a checked memory table go. Regions that are mapped stay where they are.
    ///
    /// # Errors
    /// [`WindowError`] if a region leaves its file or the files do not fit. The layout is as before then.
    pub fn plan(&self, table: &[RegionOfFile]) -> Result<Plan, WindowError> {
        table.iter().try_for_each(RegionOfFile::check)?;
        let covering = |entry: &RegionOfFile| self.spans.iter().find(|span| span.covers(entry));
        let kept = |span: &Span| table.iter().any(|entry| covering(entry) == Some(span));
        let (mut spans, unmap): (Vec<Span>, Vec<Span>) = self.spans.iter().partition(|span| kept(span));
        let mut missing: Vec<RegionOfFile> = table.iter().filter(|entry| covering(entry).is_none()).copied().collect();
        missing.sort_by_key(|entry| (entry.file, entry.region.mmap_offset));
        let found = spans.len() + missing.chunk_by(|one, next| one.file == next.file).count();
        if found > SPANS_MAX {
            return Err(WindowError::TooManyFiles { found });
        }
        let mut map = Vec::new();
        for regions in missing.chunk_by(|one, next| one.file == next.file) {
            let partly_mapped = spans.iter().any(|span| regions.iter().any(|entry| entry.file == span.file));
            let placed = self.place_file(regions, partly_mapped, &map)?;
            map.extend(placed);
        }
        spans.extend(&map);
        let offsets = table.iter().filter_map(|entry| window_offset(&spans, entry)).collect();
        Ok(Plan { map, unmap, spans, offsets })
    }

    /// Places regions of one file, sorted by file offset: in one piece if possible, else in as many as it takes.
    fn place_file(
        &self,
        regions: &[RegionOfFile],
        partly_mapped: bool,
        planned: &[Span],
    ) -> Result<Vec<Span>, WindowError> {
        let extents: Vec<Extent> = regions.iter().map(Extent::new).collect();
        let hull = extents.iter().copied().reduce(Extent::hull);
        let whole = hull.filter(|_| !partly_mapped).map(|hull| hull.whole_file());
        for extent in whole.into_iter().chain(hull) {
            if let Ok(span) = self.place(&extent, planned) {
                return Ok(vec![span]);
            }
        }
        let mut placed = Vec::new();
        for pieces in extents.chunk_by(|one, next| next.start <= one.end) {
            let taken: Vec<Span> = planned.iter().chain(&placed).copied().collect();
            if let Some(extent) = pieces.iter().copied().reduce(Extent::hull) {
                placed.push(self.place(&extent, &taken)?);
            }
        }
        Ok(placed)
    }

    /// Takes over what a plan has mapped, after all its steps are done.
    pub fn commit(&mut self, plan: &Plan) {
        self.spans.clone_from(&plan.spans);
    }

    /// Takes over what is mapped in the area of driver memory, in whatever way that came to be.
    pub fn adopt(&mut self, mapped: &[Span]) {
        self.spans = mapped.iter().filter(|span| span.window_offset >= MEMORY_OFFSET).copied().collect();
    }

    /// Forgets all spans: the appliance has dropped the mappings, or they have been undone.
    pub fn clear(&mut self) {
        self.spans.clear();
    }

    /// First fit between what is mapped now and what the plan maps.
    fn place(&self, extent: &Extent, planned: &[Span]) -> Result<Span, WindowError> {
        let len = extent.end - extent.start;
        let mut taken: Vec<(u64, u64)> =
            self.spans.iter().chain(planned).map(|span| (span.window_offset.0, span.reserved())).collect();
        taken.sort_unstable();
        let mut start = MEMORY_OFFSET.0;
        for (offset, reserved) in taken {
            if start + len.next_multiple_of(ALIGNMENT) <= offset {
                break;
            }
            start = offset + reserved;
        }
        let span =
            Span { file: extent.file, file_offset: FileOffset(extent.start), len, window_offset: WindowOffset(start) };
        let fits = start.checked_add(span.reserved()).is_some_and(|end| end <= self.len());
        if fits { Ok(span) } else { Err(WindowError::Full { wanted: span.reserved(), len: self.memory_len }) }
    }
}

fn window_offset(spans: &[Span], entry: &RegionOfFile) -> Option<WindowOffset> {
    let span = spans.iter().find(|span| span.covers(entry))?;
    Some(span.place(entry.region.mmap_offset))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::address::{GuestAddress, UserAddress};

    const GIB: u64 = 1 << 30;

    fn entry(inode: u64, file_len: u64, offset: u64, size: u64) -> RegionOfFile {
        let region = MemoryRegion {
            guest_address: GuestAddress(offset),
            size,
            user_address: UserAddress(0x7000_0000_0000 + offset),
            mmap_offset: FileOffset(offset),
        };
        RegionOfFile { region, file: FileId { device: 1, inode }, file_len }
    }

    fn pc(inode: u64, len: u64) -> Vec<RegionOfFile> {
        vec![entry(inode, len, 0, 0xa_0000), entry(inode, len, 0xc_0000, len - 0xc_0000)]
    }

    #[test]
    fn regions_of_one_file_share_one_span() {
        let layout = Layout::new(GIB).unwrap();
        let plan = layout.plan(&pc(7, GIB)).unwrap();
        assert_eq!(plan.map.len(), 1);
        assert_eq!(plan.map[0].len, GIB);
        assert_eq!(plan.offsets, [MEMORY_OFFSET, WindowOffset(MEMORY_OFFSET.0 + 0xc_0000)]);
        assert!(plan.unmap.is_empty());
    }

    #[test]
    fn the_same_table_again_changes_nothing() {
        let mut layout = Layout::new(GIB).unwrap();
        let plan = layout.plan(&pc(7, GIB)).unwrap();
        layout.commit(&plan);
        let again = layout.plan(&pc(7, GIB)).unwrap();
        assert!(again.map.is_empty() && again.unmap.is_empty());
        assert_eq!(again.offsets, plan.offsets);
    }

    #[test]
    fn a_new_file_is_mapped_beside_the_old_one_and_then_replaces_it() {
        let mut layout = Layout::new(GIB).unwrap();
        let first = layout.plan(&pc(7, GIB / 2)).unwrap();
        layout.commit(&first);
        let second = layout.plan(&pc(8, GIB / 2)).unwrap();
        assert_eq!(second.map[0].window_offset.0, MEMORY_OFFSET.0 + GIB / 2);
        assert_eq!(second.unmap, first.spans);
        layout.commit(&second);
        let third = layout.plan(&pc(9, GIB / 2)).unwrap();
        assert_eq!(third.map[0].window_offset, MEMORY_OFFSET);
    }

    #[test]
    fn a_file_of_odd_length_is_mapped_to_its_last_whole_page() {
        let len = 5 * ALIGNMENT + 3 * PAGE_SIZE;
        let table = [entry(7, len + 100, ALIGNMENT + PAGE_SIZE, 2 * PAGE_SIZE)];
        let plan = Layout::new(GIB).unwrap().plan(&table).unwrap();
        assert_eq!((plan.map[0].file_offset.0, plan.map[0].len), (0, len));
        // Without room for the whole file, the part in use is mapped.
        let small = Layout::new(4 * ALIGNMENT).unwrap();
        let plan = small.plan(&table).unwrap();
        assert_eq!((plan.map[0].file_offset.0, plan.map[0].len), (ALIGNMENT, ALIGNMENT));
        assert_eq!(plan.offsets, [WindowOffset(MEMORY_OFFSET.0 + PAGE_SIZE)]);
        let tail = small.plan(&[entry(7, len + 100, len - PAGE_SIZE, PAGE_SIZE)]).unwrap();
        assert_eq!(tail.map[0].file_offset.0 + tail.map[0].len, len);
    }

    #[test]
    fn a_region_added_later_is_there_already() {
        let mut layout = Layout::new(GIB).unwrap();
        let first = layout.plan(&[entry(7, GIB / 2, 0, ALIGNMENT)]).unwrap();
        layout.commit(&first);
        let more = layout.plan(&[entry(7, GIB / 2, 0, ALIGNMENT), entry(7, GIB / 2, GIB / 4, ALIGNMENT)]).unwrap();
        assert!(more.map.is_empty() && more.unmap.is_empty());
        assert_eq!(more.offsets[1].0 - more.offsets[0].0, GIB / 4);
    }

    #[test]
    fn a_region_never_moves_while_it_is_in_the_table() {
        // The file is larger than the window, so only parts of it are mapped.
        let mut layout = Layout::new(8 * ALIGNMENT).unwrap();
        let region = |at: u64| entry(7, GIB, at * ALIGNMENT, ALIGNMENT);
        let first = layout.plan(&[region(100)]).unwrap();
        layout.commit(&first);
        let both = layout.plan(&[region(101), region(100)]).unwrap();
        assert_eq!((both.map.len(), both.unmap.len()), (1, 0));
        assert_eq!(both.offsets[1], first.offsets[0]);
        layout.commit(&both);
        let second = layout.plan(&[region(101)]).unwrap();
        assert_eq!((second.unmap, second.offsets[0]), (first.spans, both.offsets[0]));
    }

    #[test]
    fn a_file_with_a_hole_that_does_not_fit_is_mapped_in_pieces() {
        let layout = Layout::new(8 * ALIGNMENT).unwrap();
        let table = [0, 1, 2, 200, 201, 100].map(|at| entry(7, GIB, at * ALIGNMENT, ALIGNMENT));
        let plan = layout.plan(&table).unwrap();
        let pieces: Vec<_> =
            plan.map.iter().map(|span| (span.file_offset.0 / ALIGNMENT, span.len / ALIGNMENT)).collect();
        assert_eq!(pieces, [(0, 3), (100, 1), (200, 2)]);
        assert_eq!(plan.offsets.len(), table.len());
        let more = [0, 20, 40, 60, 80, 100, 120, 140, 160].map(|at| entry(7, GIB, at * ALIGNMENT, ALIGNMENT));
        assert!(matches!(layout.plan(&more), Err(WindowError::Full { .. })));
    }

    #[test]
    fn what_is_mapped_is_adopted_from_its_own_area() {
        let mut layout = Layout::new(GIB).unwrap();
        let plan = layout.plan(&pc(7, GIB / 2)).unwrap();
        let log = Span { window_offset: LOG_OFFSET, ..plan.map[0] };
        layout.adopt(&[log, plan.map[0]]);
        assert_eq!(layout.spans(), plan.spans);
        assert!(layout.plan(&pc(7, GIB / 2)).unwrap().map.is_empty());
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_remedy() {
        let layout = Layout::new(64 << 20).unwrap();
        let error = layout.plan(&pc(7, GIB)).unwrap_err();
        assert!(error.to_string().contains("--window"), "{error}");
        let found = SPANS_MAX + 1;
        let many: Vec<_> = (1..).take(found).map(|inode| entry(inode, ALIGNMENT, 0, PAGE_SIZE)).collect();
        assert_eq!(layout.plan(&many), Err(WindowError::TooManyFiles { found }));
        let beyond = layout.plan(&[entry(1, PAGE_SIZE, 0, 2 * PAGE_SIZE)]);
        assert_eq!(beyond, Err(WindowError::BeyondFile { end: 2 * PAGE_SIZE, file_len: PAGE_SIZE }));
    }

    #[test]
    fn window_and_filler_make_a_power_of_two() {
        for len in [MEMORY_LEN_MIN, GIB, 3 * GIB + 5, MEMORY_LEN_MAX] {
            let layout = Layout::new(len).unwrap();
            assert!((layout.len() + layout.filler_len()).is_power_of_two());
            assert!(layout.len().is_multiple_of(ALIGNMENT));
        }
        assert!(Layout::new(0).is_err());
        assert!(Layout::new(u64::MAX).is_err());
    }

    proptest! {
        /// Whatever tables come one after the other: spans never overlap, stay inside, and are congruent.
        #[test]
        fn spans_never_overlap(tables in prop::collection::vec(
            prop::collection::vec((0_u64..9, 1_u64..4000, 0_u64..4000, 1_u64..4000), 1..8), 1..20)
        ) {
            let mut layout = Layout::new(128 << 20).unwrap();
            for table in tables {
                let entries: Vec<_> = table.iter().map(|(inode, len, offset, size)| {
                    entry(*inode, len * PAGE_SIZE * 2, offset * PAGE_SIZE, size * PAGE_SIZE)
                }).collect();
                let Ok(plan) = layout.plan(&entries) else { continue };
                prop_assert_eq!(plan.offsets.len(), entries.len());
                let mut alive: Vec<Span> = layout.spans().iter().chain(&plan.map).copied().collect();
                alive.sort_by_key(|span| span.window_offset);
                for pair in alive.windows(2) {
                    prop_assert!(pair[0].window_offset.0 + pair[0].reserved() <= pair[1].window_offset.0);
                }
                for (entry, offset) in entries.iter().zip(&plan.offsets) {
                    prop_assert_eq!(offset.0 % ALIGNMENT, entry.region.mmap_offset.0 % ALIGNMENT);
                    prop_assert!(offset.0 + entry.region.size <= layout.len());
                }
                layout.commit(&plan);
            }
        }
    }
}
