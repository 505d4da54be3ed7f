//! Driver memory in units that a back-end can map from the device-DAX node.
//!
//! A device-DAX node is mapped in units of 2 MiB: the kernel refuses a mapping whose length is no multiple of it, and backs
//! one whose offset is none with small pages. A front-end's regions do not care: a PC has a hole at 640 KiB, for instance.
//! The window helps here. A file lies in it in one piece, congruent modulo 2 MiB, and its last unit is reserved as a whole.
//! So a region grows to whole units, an [`Extent`], and extents that touch become one, unless the window has a seam between
//! them ([`crate::window::Window::seams`]; a device-DAX node has none). What a region gains
//! is either more of the same file, or not backed at all; the front-end never names an address in it, for it is part of none
//! of its regions.
//!
//! Addresses keep their distances: for each byte of each region, guest address, user address and window offset are the same
//! before and after.

use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress, WindowOffset};
use vvu_protocol::memory::{MAX_TABLE_REGIONS, MemoryError, MemoryRegion};
use vvu_protocol::window::{ALIGNMENT, MEMORY_OFFSET};

/// Why driver memory cannot be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// The table itself is not valid.
    #[error("memory table of the front-end")]
    Table(#[source] MemoryError),
    /// A region is not in the window's area for driver memory.
    #[error(
        "memory region at window offset {start} with {len:#x} bytes, the window has driver memory from {MEMORY_OFFSET} to {window_len:#x}"
    )]
    OutsideWindow {
        /// Where it starts.
        start: WindowOffset,
        /// Its length in bytes.
        len: u64,
        /// Length of the window in bytes.
        window_len: u64,
    },
    /// Rounded to whole units, a region starts before address 0 or ends behind the last address.
    #[error("memory region at guest address {guest_address} leaves no room to map it in whole units of 2 MiB")]
    NoRoom {
        /// Where the driver VM sees it.
        guest_address: GuestAddress,
    },
    /// Rounded to whole units, the table is not valid any more.
    #[error("memory table in whole units of 2 MiB")]
    Rounded(#[source] MemoryError),
    /// The front-end removes what it has not added.
    #[error("no memory region at guest address {guest_address} with {size:#x} bytes at user address {user_address}")]
    NoSuchRegion {
        /// Where the driver VM would see it.
        guest_address: GuestAddress,
        /// Its length in bytes.
        size: u64,
        /// Where the front-end would see it.
        user_address: UserAddress,
    },
    /// More than the back-end takes.
    #[error(
        "driver memory is in {found} pieces that do not touch; the back-end takes {MAX_TABLE_REGIONS} in a table, {slots} in memory slots"
    )]
    TooMany {
        /// Pieces there are.
        found: usize,
        /// Memory slots of the back-end, 0 if it has none.
        slots: usize,
    },
}

/// Whole units of the window that belong to one mapping, and where driver VM and front-end see them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    guest: u64,
    user: u64,
    /// Window offsets, both multiples of [`ALIGNMENT`].
    start: u64,
    end: u64,
}

impl Extent {
    /// The units that a region uses, whose place in its file is a place in the window. The region has passed
    /// [`MemoryRegion::check`].
    ///
    /// # Errors
    /// [`RegionError::OutsideWindow`] or [`RegionError::NoRoom`].
    pub fn new(region: &MemoryRegion, window_len: u64) -> Result<Self, RegionError> {
        let (window, len) = (WindowOffset(region.mmap_offset.0), region.size);
        let outside = RegionError::OutsideWindow { start: window, len, window_len };
        let no_room = RegionError::NoRoom { guest_address: region.guest_address };
        let end = window.checked_add(len).ok_or(outside)?.0.checked_next_multiple_of(ALIGNMENT).ok_or(outside)?;
        if window < MEMORY_OFFSET || end > window_len {
            return Err(outside);
        }
        let before = window.0 % ALIGNMENT;
        Ok(Self {
            guest: region.guest_address.checked_sub(before).ok_or(no_room)?.0,
            user: region.user_address.checked_sub(before).ok_or(no_room)?.0,
            start: window.0 - before,
            end,
        })
    }

    /// The region as the front-end would give it: with its offset in the window.
    #[must_use]
    pub const fn region(&self) -> MemoryRegion {
        MemoryRegion {
            guest_address: GuestAddress(self.guest),
            size: self.end - self.start,
            user_address: UserAddress(self.user),
            mmap_offset: FileOffset(self.start),
        }
    }

    /// What all regions of one mapping have in common, and then its place: extents sorted by it stand beside those that they
    /// may be joined with.
    #[must_use]
    pub const fn order(&self) -> ((u64, u64), u64) {
        (self.distances(), self.start)
    }

    const fn distances(&self) -> (u64, u64) {
        (self.guest.wrapping_sub(self.start), self.user.wrapping_sub(self.start))
    }

    /// Whether both have a unit of the same mapping. Only regions of one file can: each file has its own units.
    #[must_use]
    pub fn shares_unit(&self, other: &Self) -> bool {
        self.distances() == other.distances() && self.start < other.end && other.start < self.end
    }

    /// Whether both are one piece, as guest addresses, user addresses and window offsets go, and none of the `seams` is
    /// between them.
    #[must_use]
    pub fn touches(&self, other: &Self, seams: &[WindowOffset]) -> bool {
        let neighbours = self.distances() == other.distances() && (self.end == other.start || other.end == self.start);
        let seam = WindowOffset(self.start.max(other.start));
        self.shares_unit(other) || neighbours && !seams.contains(&seam)
    }

    /// Whether all of the other one is in this one.
    #[must_use]
    pub fn holds(&self, other: &Self) -> bool {
        self.distances() == other.distances() && self.start <= other.start && other.end <= self.end
    }

    /// Both and what lies between.
    fn hull(&self, other: &Self) -> Self {
        let first = if self.start <= other.start { self } else { other };
        Self { end: self.end.max(other.end), ..*first }
    }

    /// The parts that are in none of `taken`.
    #[must_use]
    pub fn without(&self, taken: &[Self]) -> Vec<Self> {
        let mut taken: Vec<&Self> = taken.iter().filter(|other| self.shares_unit(other)).collect();
        taken.sort_unstable_by_key(|other| other.start);
        let mut parts = Vec::new();
        let mut start = self.start;
        for other in taken {
            parts.extend(self.part(start, other.start));
            start = start.max(other.end);
        }
        parts.extend(self.part(start, self.end));
        parts
    }

    /// The part between two window offsets within this extent, if there is anything between them.
    fn part(&self, start: u64, end: u64) -> Option<Self> {
        let skipped = start.saturating_sub(self.start);
        let (guest, user) = (self.guest.wrapping_add(skipped), self.user.wrapping_add(skipped));
        (start < end).then_some(Self { guest, user, start, end })
    }
}

/// Joins all extents for which `joins` says so; [`Extent::shares_unit`] or [`Extent::touches`].
#[must_use]
pub fn joined(mut extents: Vec<Extent>, joins: impl Fn(&Extent, &Extent) -> bool) -> Vec<Extent> {
    extents.sort_unstable_by_key(Extent::order);
    let mut result: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents {
        match result.last_mut() {
            Some(last) if joins(last, &extent) => *last = last.hull(&extent),
            _ => result.push(extent),
        }
    }
    result
}
