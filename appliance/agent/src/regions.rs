//! From the front-end's memory table to one that a back-end can map from the device-DAX node.
//!
//! A device-DAX node is mapped in units of 2 MiB: the kernel refuses a mapping whose length is no multiple of it, and backs
//! one whose offset is none with small pages. A front-end's regions do not care: a PC has a hole at 640 KiB, for instance.
//! The window helps here. A file lies in it in one piece, congruent modulo 2 MiB, and its last unit is reserved as a whole.
//! So regions of one file that lie in the same or in adjacent units become one, holes included, and then grow to whole
//! units. What a region gains is either more of the same file, or not backed at all; the front-end never names an address in
//! it, for it is part of none of its regions.
//!
//! Addresses keep their distances: for each byte of each region, guest address, user address and window offset are the same
//! before and after.

use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress, WindowOffset};
use vvu_protocol::dax::NODE_OFFSET;
use vvu_protocol::memory::{MAX_TABLE_REGIONS, MemoryError, MemoryRegion, check_table};
use vvu_protocol::window::{ALIGNMENT, MEMORY_OFFSET};

/// Why a memory table cannot be mapped.
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
}

/// A region whose place in its file is a place in the window.
#[derive(Debug, Clone, Copy)]
struct Piece {
    guest: u64,
    user: u64,
    window: u64,
    len: u64,
}

impl Piece {
    fn new(region: &MemoryRegion, window_len: u64) -> Result<Self, RegionError> {
        let (start, len) = (WindowOffset(region.mmap_offset.0), region.size);
        let inside = start >= MEMORY_OFFSET && start.checked_add(len).is_some_and(|end| end.0 <= window_len);
        if !inside {
            return Err(RegionError::OutsideWindow { start, len, window_len });
        }
        Ok(Self { guest: region.guest_address.0, user: region.user_address.0, window: start.0, len })
    }

    /// What all regions of one mapping have in common.
    const fn distances(&self) -> (u64, u64) {
        (self.guest.wrapping_sub(self.window), self.user.wrapping_sub(self.window))
    }

    const fn window_end(&self) -> u64 {
        self.window.saturating_add(self.len)
    }

    /// Takes in the next piece, if nothing but whole units lie between this one's end and its start.
    fn join(&mut self, next: &Self) -> bool {
        let joins =
            self.distances() == next.distances() && next.window / ALIGNMENT <= self.window_end().div_ceil(ALIGNMENT);
        if joins {
            self.len = self.window_end().max(next.window_end()) - self.window;
        }
        joins
    }

    /// The region in whole units, as the back-end maps it.
    fn round(&self, window_len: u64) -> Result<MemoryRegion, RegionError> {
        let no_room = RegionError::NoRoom { guest_address: GuestAddress(self.guest) };
        let start = self.window - self.window % ALIGNMENT;
        let before = self.window - start;
        let end = self.window_end().checked_next_multiple_of(ALIGNMENT).ok_or(no_room)?;
        if end > window_len {
            return Err(RegionError::OutsideWindow { start: WindowOffset(self.window), len: self.len, window_len });
        }
        Ok(MemoryRegion {
            guest_address: GuestAddress(self.guest).checked_sub(before).ok_or(no_room)?,
            size: end - start,
            user_address: UserAddress(self.user).checked_sub(before).ok_or(no_room)?,
            mmap_offset: FileOffset(start.checked_sub(NODE_OFFSET).ok_or(no_room)?),
        })
    }
}

/// The back-end's table for a front-end's whose regions have window offsets in place of file offsets; sorted by guest
/// address, with offsets into the device-DAX node.
///
/// # Errors
/// [`RegionError`] if there is no such table.
pub fn mappable_regions(table: &[MemoryRegion], window_len: u64) -> Result<Vec<MemoryRegion>, RegionError> {
    check_table(table, MAX_TABLE_REGIONS).map_err(RegionError::Table)?;
    let pieces = table.iter().map(|region| Piece::new(region, window_len));
    let mut pieces = pieces.collect::<Result<Vec<_>, _>>()?;
    pieces.sort_by_key(|piece| (piece.distances(), piece.window));
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces {
        if !joined.last_mut().is_some_and(|last| last.join(&piece)) {
            joined.push(piece);
        }
    }
    let mut regions = joined.iter().map(|piece| piece.round(window_len)).collect::<Result<Vec<_>, _>>()?;
    regions.sort_by_key(|region| region.guest_address);
    check_table(&regions, MAX_TABLE_REGIONS).map_err(RegionError::Rounded)?;
    Ok(regions)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WINDOW_LEN: u64 = MEMORY_OFFSET.0 + (8 << 30);
    const USER: u64 = 0x7f12_3456_7000;
    const START: u64 = MEMORY_OFFSET.0;

    const fn region(guest: u64, size: u64, user: u64, offset: u64) -> MemoryRegion {
        MemoryRegion {
            guest_address: GuestAddress(guest),
            size,
            user_address: UserAddress(user),
            mmap_offset: FileOffset(offset),
        }
    }

    #[test]
    fn the_holes_of_a_pc() {
        let table = [
            region(0x1_0000_0000, 0x8000_0000, USER + 0x8000_0000, START + 0x8000_0000),
            region(0, 0xa_0000, USER, START),
            region(0xc_0000, 0x8000_0000 - 0xc_0000, USER + 0xc_0000, START + 0xc_0000),
        ];
        let expected = [
            region(0, 0x8000_0000, USER, START - NODE_OFFSET),
            region(0x1_0000_0000, 0x8000_0000, USER + 0x8000_0000, START + 0x8000_0000 - NODE_OFFSET),
        ];
        assert_eq!(mappable_regions(&table, WINDOW_LEN).unwrap(), expected);
    }

    #[test]
    fn two_files_stay_two_regions() {
        let table = [region(0, 2 << 20, USER, START), region(2 << 20, 2 << 20, USER + (64 << 20), START + (2 << 20))];
        let regions = mappable_regions(&table, WINDOW_LEN).unwrap();
        assert_eq!(regions.len(), 2);
        assert_eq!(mappable_regions(&[], WINDOW_LEN).unwrap(), []);
    }

    #[test]
    fn a_unit_between_two_regions_keeps_them_apart() {
        let far = |units: u64| {
            let step = units * ALIGNMENT;
            let table = [region(0, 0x1000, USER, START), region(step, 0x1000, USER + step, START + step)];
            mappable_regions(&table, WINDOW_LEN).unwrap().len()
        };
        assert_eq!((far(1), far(2), far(3)), (1, 2, 2));
    }

    #[test]
    fn what_cannot_be_mapped_is_refused() {
        let cases = [
            (vec![region(0, 0, USER, START)], "memory table of the front-end"),
            (vec![region(0, 0x1000, USER, START - 0x1000)], "has driver memory from"),
            (vec![region(0, 0x1000, USER, 0)], "has driver memory from"),
            (vec![region(0, 0x2000, USER, WINDOW_LEN - 0x1000)], "has driver memory from"),
            (vec![region(0, 0x1000, USER, START + 0x1000)], "no room"),
            (vec![region(0x1000, 0x1000, 0, START + 0x1000)], "no room"),
            (vec![region(u64::MAX - 0x1fff, 0x1000, USER, START)], "in whole units"),
            // Two files whose last and first unit fall upon each other in the driver VM.
            (
                vec![region(0, 0x1000, USER, START), region(0x1000, 0x1000, USER << 1, START + (4 << 20))],
                "in whole units",
            ),
        ];
        for (table, expected) in cases {
            let message = mappable_regions(&table, WINDOW_LEN).unwrap_err().to_string();
            assert!(message.contains(expected), "{message} does not say {expected}");
        }
        let last = [region(0, 0x1000, USER, WINDOW_LEN - 0x1000)];
        assert!(mappable_regions(&last, WINDOW_LEN - 0x800).is_err());
    }

    /// Tables as front-ends make them: some files, each with some regions, at any addresses.
    fn tables() -> impl Strategy<Value = Vec<MemoryRegion>> {
        let pages = |limit: u64| (0..limit).prop_map(|page| page * 4096);
        let file =
            (pages(1 << 22), pages(1 << 20), pages(1 << 22), prop::collection::vec((pages(2048), 1_u64..1024), 1..4));
        prop::collection::vec(file, 0..3).prop_map(|files| {
            let regions = files.into_iter().flat_map(|(guest, window, user, regions)| {
                regions.into_iter().map(move |(at, page_count)| {
                    region(guest + at, page_count * 4096, USER + user + at, START + window + at)
                })
            });
            regions.collect()
        })
    }

    proptest! {
        #[test]
        fn each_byte_keeps_its_addresses(table in tables()) {
            if let Ok(regions) = mappable_regions(&table, WINDOW_LEN) {
                for asked in &table {
                    let holds = regions.iter().filter(|given| {
                        let at = asked.guest_address.0.wrapping_sub(given.guest_address.0);
                        at < given.size
                            && at + asked.size <= given.size
                            && given.user_address.0 + at == asked.user_address.0
                            && given.mmap_offset.0 + NODE_OFFSET + at == asked.mmap_offset.0
                    });
                    prop_assert_eq!(holds.count(), 1);
                }
            }
        }

        #[test]
        fn what_is_given_can_be_mapped(table in tables()) {
            if let Ok(regions) = mappable_regions(&table, WINDOW_LEN) {
                prop_assert!(regions.len() <= table.len());
                prop_assert!(regions.is_sorted_by_key(|region| region.guest_address));
                check_table(&regions, MAX_TABLE_REGIONS).unwrap();
                for region in &regions {
                    prop_assert!(region.mmap_offset.0.is_multiple_of(ALIGNMENT) && region.size.is_multiple_of(ALIGNMENT));
                    prop_assert!(region.mmap_offset.0 + NODE_OFFSET >= MEMORY_OFFSET.0);
                    prop_assert!(region.file_end() + NODE_OFFSET <= WINDOW_LEN);
                }
            }
        }

        #[test]
        fn a_table_in_whole_units_stays_as_it_is(
            starts in prop::collection::btree_set(0_u64..1000, 1..=MAX_TABLE_REGIONS), shuffle: u64,
        ) {
            // Distances differ from region to region, so that none can be joined.
            let mut table = (0..).zip(&starts).map(|(index, unit)| {
                region((unit + index) * ALIGNMENT, ALIGNMENT, USER + unit * 3 * ALIGNMENT, START + unit * ALIGNMENT)
            }).collect::<Vec<_>>();
            let expected = table.iter().map(|region| {
                MemoryRegion { mmap_offset: FileOffset(region.mmap_offset.0 - NODE_OFFSET), ..*region }
            }).collect::<Vec<_>>();
            let middle = usize::try_from(shuffle % table.len() as u64).unwrap();
            table.rotate_left(middle);
            prop_assert_eq!(mappable_regions(&table, WINDOW_LEN).unwrap(), expected);
        }

        #[test]
        fn arbitrary_tables_never_panic(
            fields in prop::collection::vec(any::<[u64; 4]>(), 0..10), window_len: u64, aligned: bool,
        ) {
            let mask = if aligned { !0xfff } else { !0 };
            let table = fields.iter().map(|[guest, size, user, offset]| {
                region(guest & mask, (size >> 20) & mask, user & mask, (offset >> 20) & mask)
            }).collect::<Vec<_>>();
            let _ = mappable_regions(&table, window_len);
        }
    }
}
