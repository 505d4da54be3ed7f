use proptest::prelude::*;
use vvu_protocol::address::{FileOffset, GuestAddress};
use vvu_protocol::window::{ALIGNMENT, MEMORY_OFFSET};

use super::*;

const WINDOW_LEN: u64 = MEMORY_OFFSET.0 + (8 << 30);
const USER: u64 = 0x7f12_3456_7000;
const START: u64 = MEMORY_OFFSET.0;

/// A back-end with a table only, one with slots, and one with slots whose vrings run.
const TABLE: Situation<'_> = Situation { slots: None, running: false, seams: &[] };
const SLOTS: Situation<'_> = Situation { slots: Some(509), running: false, seams: &[] };
const RUNNING: Situation<'_> = Situation { slots: Some(509), running: true, seams: &[] };

const fn region(guest: u64, size: u64, user: u64, offset: u64) -> MemoryRegion {
    MemoryRegion {
        guest_address: GuestAddress(guest),
        size,
        user_address: UserAddress(user),
        mmap_offset: FileOffset(offset),
    }
}

/// A region at the same distance everywhere: regions of one file.
const fn of_file(at: u64, size: u64) -> MemoryRegion {
    region(at, size, USER + at, START + at)
}

/// A region of a file of its own: unit `index` of the window, far from its neighbours elsewhere.
const fn alone(index: u64) -> MemoryRegion {
    region(index * 2 * ALIGNMENT, ALIGNMENT, USER + index * 3 * ALIGNMENT, START + index * ALIGNMENT)
}

/// The back-end's table for a front-end's.
fn mappable(table: &[MemoryRegion], window_len: u64) -> Result<Vec<MemoryRegion>, RegionError> {
    let change = MemoryMap::new(window_len).replaced(table, TABLE)?;
    Ok(match change.steps.as_slice() {
        [] => Vec::new(),
        [Step::Table(extents)] => extents.iter().map(Extent::region).collect(),
        steps => panic!("{steps:?}"),
    })
}

impl MemoryMap {
    /// Does what the back-end and the session do.
    fn apply(&mut self, change: Result<Change, RegionError>) -> Result<Vec<Step>, RegionError> {
        let change = change?;
        let steps = change.steps.clone();
        steps.iter().for_each(|step| self.note_step(step));
        self.commit(change);
        Ok(steps)
    }

    fn replace(&mut self, table: &[MemoryRegion], situation: Situation<'_>) -> Result<Vec<Step>, RegionError> {
        self.apply(self.replaced(table, situation))
    }

    fn add(&mut self, region: MemoryRegion, situation: Situation<'_>) -> Result<Vec<Step>, RegionError> {
        self.apply(self.added(region, situation))
    }

    fn remove(&mut self, region: &MemoryRegion, situation: Situation<'_>) -> Result<Vec<Step>, RegionError> {
        self.apply(self.removed(region, situation))
    }

    fn of_back_end(&self) -> Vec<MemoryRegion> {
        sorted(self.back_end.clone()).iter().map(Extent::region).collect()
    }
}

/// Places of the regions that a step is about, in units from the start of driver memory in the window.
fn units(step: &Step) -> Vec<(u64, u64)> {
    let of = |extent: &Extent| {
        let region = extent.region();
        let start = (region.mmap_offset.0 - START) / ALIGNMENT;
        (start, start + region.size / ALIGNMENT)
    };
    match step {
        Step::Table(extents) => extents.iter().map(of).collect(),
        Step::Add(extent) | Step::Remove(extent) => vec![of(extent)],
    }
}

/// Two regions of two files that touch wherever one looks: one piece of a device-DAX node, two of files.
#[test]
fn no_piece_goes_over_a_seam() {
    let table = [region(0, ALIGNMENT, USER, START), region(ALIGNMENT, ALIGNMENT, USER + ALIGNMENT, START + ALIGNMENT)];
    let seams = [WindowOffset(START), WindowOffset(START + ALIGNMENT)];
    for (seams, expected) in [(&[][..], vec![(0, 2)]), (&seams[..], vec![(0, 1), (1, 2)])] {
        let mut memory = MemoryMap::new(WINDOW_LEN);
        let situation = Situation { seams, ..TABLE };
        let steps = memory.replace(&table, situation).unwrap();
        assert_eq!(steps.iter().map(units).collect::<Vec<_>>(), [expected]);
        assert_eq!(memory.replace(&table, situation).unwrap(), [], "nothing changes");
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
        region(0, 0x8000_0000, USER, START),
        region(0x1_0000_0000, 0x8000_0000, USER + 0x8000_0000, START + 0x8000_0000),
    ];
    assert_eq!(mappable(&table, WINDOW_LEN).unwrap(), expected);
}

#[test]
fn two_files_stay_two_regions() {
    let table = [region(0, 2 << 20, USER, START), region(2 << 20, 2 << 20, USER + (64 << 20), START + (2 << 20))];
    assert_eq!(mappable(&table, WINDOW_LEN).unwrap().len(), 2);
    assert_eq!(mappable(&[], WINDOW_LEN).unwrap(), []);
}

#[test]
fn a_unit_between_two_regions_keeps_them_apart() {
    let far = |units: u64| {
        let step = units * ALIGNMENT;
        mappable(&[of_file(0, 0x1000), of_file(step, 0x1000)], WINDOW_LEN).unwrap().len()
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
        (vec![region(0, 0x1000, USER, START), region(0x1000, 0x1000, USER << 1, START + (4 << 20))], "in whole units"),
        ((0..9).map(alone).collect(), "in 9 pieces"),
    ];
    for (table, expected) in cases {
        let message = mappable(&table, WINDOW_LEN).unwrap_err().to_string();
        assert!(message.contains(expected), "{message} does not say {expected}");
    }
    let last = [region(0, 0x1000, USER, WINDOW_LEN - 0x1000)];
    assert!(mappable(&last, WINDOW_LEN - 0x800).is_err());
}

#[test]
fn a_table_that_changes_nothing_needs_no_message() {
    let mut memory = MemoryMap::new(WINDOW_LEN);
    let table = [of_file(0, 0xa_0000), of_file(0xc_0000, (8 << 20) - 0xc_0000)];
    assert_eq!(memory.replace(&table, TABLE).unwrap().len(), 1);
    assert_eq!(memory.replace(&table, TABLE).unwrap(), []);
    // The same memory, cut otherwise.
    assert_eq!(memory.replace(&[of_file(0, 8 << 20)], TABLE).unwrap(), []);
    assert_eq!(memory.replace(&[of_file(0, 10 << 20)], TABLE).unwrap().len(), 1);
}

#[test]
fn firmware_that_moves_the_edge_of_a_region_disturbs_nothing() {
    for situation in [TABLE, SLOTS, RUNNING] {
        let mut memory = MemoryMap::new(WINDOW_LEN);
        memory.replace(&[of_file(0, 0xa_0000), of_file(0xc_0000, (64 << 20) - 0xc_0000)], TABLE).unwrap();
        assert_eq!(memory.remove(&of_file(0xc_0000, (64 << 20) - 0xc_0000), situation).unwrap(), []);
        assert_eq!(memory.add(of_file(0xc_0000, 0x4_0000), situation).unwrap(), []);
        assert_eq!(memory.add(of_file(0x10_0000, (64 << 20) - 0x10_0000), situation).unwrap(), []);
        assert_eq!(memory.of_back_end(), [region(0, 64 << 20, USER, START)]);
        // With its last region, the memory goes.
        memory.remove(&of_file(0, 0xa_0000), situation).unwrap();
        memory.remove(&of_file(0xc_0000, 0x4_0000), situation).unwrap();
        assert_eq!(memory.of_back_end().len(), 1);
        memory.remove(&of_file(0x10_0000, (64 << 20) - 0x10_0000), situation).unwrap();
        assert_eq!(memory.of_back_end(), []);
    }
}

#[test]
fn what_is_kept_of_a_removed_region_gives_way() {
    let mut memory = MemoryMap::new(WINDOW_LEN);
    memory.replace(&[of_file(0, 0xa_0000), of_file(0xc_0000, (8 << 20) - 0xc_0000)], TABLE).unwrap();
    assert_eq!(memory.remove(&of_file(0xc_0000, (8 << 20) - 0xc_0000), TABLE).unwrap(), []);
    // Another file, at guest addresses that the back-end still has from the region before.
    let other = region(4 << 20, 2 << 20, USER + (64 << 20), START + (64 << 20));
    let steps = memory.add(other, TABLE).unwrap();
    assert_eq!(steps.iter().flat_map(units).collect::<Vec<_>>(), [(0, 1), (32, 33)]);
}

#[test]
fn a_running_device_keeps_what_it_has() {
    let mut memory = MemoryMap::new(WINDOW_LEN);
    let first = memory.replace(&[alone(0), alone(1)], SLOTS).unwrap();
    assert!(matches!(first.as_slice(), [Step::Table(_)]), "{first:?}");
    let added = memory.add(alone(5), RUNNING).unwrap();
    assert!(matches!(added.as_slice(), [Step::Add(_)]), "{added:?}");
    // More of a file that is mapped in part.
    let more = memory.add(region(alone(5).guest_address.0 + ALIGNMENT, ALIGNMENT, 0, 0), RUNNING);
    assert!(more.is_err());
    let next = MemoryRegion {
        guest_address: GuestAddress(alone(5).guest_address.0 + ALIGNMENT),
        user_address: UserAddress(alone(5).user_address.0 + ALIGNMENT),
        mmap_offset: FileOffset(alone(5).mmap_offset.0 + ALIGNMENT),
        size: 3 * ALIGNMENT,
    };
    let more = memory.add(next, RUNNING).unwrap();
    assert_eq!((more.len(), units(&more[0])), (1, vec![(6, 9)]));
    assert!(matches!(more[0], Step::Add(_)));
    let removed = memory.remove(&next, RUNNING).unwrap();
    assert!(matches!(removed.as_slice(), [Step::Remove(_)]), "{removed:?}");
    assert_eq!(units(&removed[0]), [(6, 9)]);
    // Without slots, one step does it all.
    let table = memory.remove(&alone(0), Situation { slots: None, running: true, seams: &[] }).unwrap();
    assert!(matches!(table.as_slice(), [Step::Table(_)]), "{table:?}");
}

#[test]
fn a_part_of_what_a_running_device_has_goes_by_a_table() {
    let mut memory = MemoryMap::new(WINDOW_LEN);
    // Two regions that touch, but share no unit: they may be two files.
    memory.replace(&[of_file(0, 2 << 20), of_file(2 << 20, 2 << 20)], SLOTS).unwrap();
    let steps = memory.remove(&of_file(2 << 20, 2 << 20), RUNNING).unwrap();
    assert_eq!(steps.len(), 1);
    assert_eq!((matches!(steps[0], Step::Table(_)), units(&steps[0])), (true, vec![(0, 1)]));
}

#[test]
fn more_than_eight_pieces_need_slots() {
    let all: Vec<MemoryRegion> = (0..40).map(alone).collect();
    let mut memory = MemoryMap::new(WINDOW_LEN);
    memory.replace(&all[..8], TABLE).unwrap();
    let refused = memory.add(alone(8), TABLE).unwrap_err();
    assert_eq!(refused, RegionError::TooMany { found: 9, slots: 0 });
    let few = memory.add(alone(8), Situation { slots: Some(8), running: false, seams: &[] }).unwrap_err();
    assert_eq!(few, RegionError::TooMany { found: 9, slots: 8 });
    // What was refused has changed nothing.
    let steps = memory.add(alone(8), SLOTS).unwrap();
    assert_eq!((matches!(steps[0], Step::Add(_)), units(&steps[0])), (true, vec![(8, 9)]));
    let steps = memory.replace(&all, SLOTS).unwrap();
    assert_eq!(steps.len(), 31);
    assert!(steps.iter().all(|step| matches!(step, Step::Add(_))));
    let steps = memory.replace(&all[20..30], SLOTS).unwrap();
    assert!(steps.len() == 30 && steps.iter().all(|step| matches!(step, Step::Remove(_))), "{steps:?}");
    let steps = memory.replace(&all[22..30], SLOTS).unwrap();
    assert!(matches!(steps.as_slice(), [Step::Table(_)]), "{steps:?}");
}

#[test]
fn a_back_end_with_slots_never_gets_an_empty_table() {
    for (situation, empty_table) in [(TABLE, true), (SLOTS, false), (RUNNING, false)] {
        let mut memory = MemoryMap::new(WINDOW_LEN);
        memory.replace(&[alone(0), alone(1)], situation).unwrap();
        let steps = memory.replace(&[], situation).unwrap();
        assert_eq!(steps == [Step::Table(Vec::new())], empty_table, "{steps:?}");
        assert_eq!(memory.of_back_end(), []);
    }
}

#[test]
fn a_region_is_removed_by_its_addresses() {
    let mut memory = MemoryMap::new(WINDOW_LEN);
    memory.replace(&[alone(1), alone(2)], TABLE).unwrap();
    for wrong in [
        alone(3),
        MemoryRegion { size: 4096, ..alone(1) },
        MemoryRegion { user_address: UserAddress(USER), ..alone(1) },
    ] {
        assert!(matches!(memory.remove(&wrong, TABLE), Err(RegionError::NoSuchRegion { .. })));
    }
    memory.remove(&MemoryRegion { mmap_offset: FileOffset(0), ..alone(1) }, TABLE).unwrap();
    assert_eq!(memory.of_back_end().len(), 1);
    assert!(memory.add(alone(2), TABLE).is_err(), "a region may not be there twice");
}

#[test]
fn user_addresses_are_found_in_the_front_ends_own_regions() {
    let mut memory = MemoryMap::new(WINDOW_LEN);
    memory.replace(&[of_file(0x1000, 0x2000), of_file(0x4000, 0x1000)], TABLE).unwrap();
    let find = |at: u64, len| memory.window_offset(UserAddress(USER + at), len).map(|found| found.0 - START);
    assert_eq!(find(0x1000, 0x2000), Some(0x1000));
    assert_eq!(find(0x2ffe, 2), Some(0x2ffe));
    // In a unit that is mapped, but in no region.
    for (at, len) in [(0, 2), (0xffe, 4), (0x2ffe, 3), (0x3000, 2), (0x5000, 1), (0x4000, u64::MAX)] {
        assert_eq!(find(at, len), None, "{at:#x}");
    }
    assert_eq!(memory.window_offset(UserAddress(0), 2), None);
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

/// How many regions of the back-end have all bytes of `asked` where the front-end says they are.
fn holders(given: &[MemoryRegion], asked: &MemoryRegion) -> usize {
    let whole = given.iter().filter(|given| {
        let at = asked.guest_address.0.wrapping_sub(given.guest_address.0);
        at < given.size
            && at + asked.size <= given.size
            && given.user_address.0 + at == asked.user_address.0
            && given.mmap_offset.0 + at == asked.mmap_offset.0
    });
    whole.count()
}

fn check_mappable(regions: &[MemoryRegion], limit: usize) {
    check_table(regions, limit).unwrap();
    for region in regions {
        assert!(region.mmap_offset.0.is_multiple_of(ALIGNMENT) && region.size.is_multiple_of(ALIGNMENT));
        assert!(region.mmap_offset.0 >= MEMORY_OFFSET.0);
        assert!(region.file_end() <= WINDOW_LEN);
    }
}

/// One page of each unit of a region, each as a region of its own.
fn pages_of(asked: &MemoryRegion) -> impl Iterator<Item = MemoryRegion> {
    (0..asked.size / ALIGNMENT + 1).map(move |index| {
        let at = (index * ALIGNMENT).min(asked.size - 4096);
        region(asked.guest_address.0 + at, 4096, asked.user_address.0 + at, asked.mmap_offset.0 + at)
    })
}

proptest! {
    #[test]
    fn each_byte_keeps_its_addresses(table in tables()) {
        if let Ok(regions) = mappable(&table, WINDOW_LEN) {
            for asked in &table {
                prop_assert_eq!(holders(&regions, asked), 1);
            }
        }
    }

    #[test]
    fn what_is_given_can_be_mapped(table in tables()) {
        if let Ok(regions) = mappable(&table, WINDOW_LEN) {
            prop_assert!(regions.len() <= table.len());
            prop_assert!(regions.is_sorted_by_key(|region| region.guest_address));
            check_mappable(&regions, MAX_TABLE_REGIONS);
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
            MemoryRegion { mmap_offset: FileOffset(region.mmap_offset.0), ..*region }
        }).collect::<Vec<_>>();
        let middle = usize::try_from(shuffle % table.len() as u64).unwrap();
        table.rotate_left(middle);
        prop_assert_eq!(mappable(&table, WINDOW_LEN).unwrap(), expected);
    }

    #[test]
    fn arbitrary_tables_never_panic(
        fields in prop::collection::vec(any::<[u64; 4]>(), 0..10), window_len: u64, aligned: bool, running: bool,
    ) {
        let mask = if aligned { !0xfff } else { !0 };
        let mut memory = MemoryMap::new(window_len);
        for [guest, size, user, offset] in fields {
            let region = region(guest & mask, (size >> 20) & mask, user & mask, (offset >> 20) & mask);
            let situation = Situation { slots: Some(509), running, seams: &[] };
            let _ = memory.add(region, situation);
            let _ = memory.remove(&region, situation);
            let _ = memory.replace(&[region], situation);
        }
    }

    /// Whatever regions come and go, in whatever situation: the back-end has each byte of each region once, at its place,
    /// and what it has can be mapped. A step while vrings run takes away nothing that is wanted, if there are slots.
    #[test]
    fn the_back_end_always_has_what_the_front_end_has(
        changes in prop::collection::vec((0_usize..60, any::<bool>()), 1..60), slots: bool,
    ) {
        // Six files of ten regions each, of which some touch, some share a unit and some stand alone.
        let sizes = [3 << 20, 1 << 20, 4096, 4 << 20, 2 << 20, 1 << 20, 8 << 20, 8192, 2 << 20, 512 << 10];
        let catalogue: Vec<MemoryRegion> = (0..60).map(|index| {
            let (file, number) = (index / 10, index % 10);
            let at = file * (1 << 30) + sizes.iter().take(usize::try_from(number).unwrap()).sum::<u64>()
                + if number > 6 { 6 << 20 } else { 0 };
            let size = sizes[usize::try_from(number).unwrap()];
            let start = file * (1 << 30);
            region(start * 2 + (at - start), size, USER + start * 3 + (at - start), START + at)
        }).collect();
        let mut memory = MemoryMap::new(WINDOW_LEN);
        let mut present: Vec<MemoryRegion> = Vec::new();
        for (index, running) in changes {
            let situation = Situation { slots: slots.then_some(509), running, seams: &[] };
            let region = catalogue[index];
            let before = memory.of_back_end();
            let done = match present.iter().position(|other| *other == region) {
                Some(position) => memory.remove(&region, situation).inspect(|_| {
                    present.remove(position);
                }),
                None => memory.add(region, situation).inspect(|_| {
                    present.push(region);
                }),
            };
            let Ok(steps) = done else {
                prop_assert!(!slots, "{:?}", done);
                prop_assert_eq!(memory.of_back_end(), before);
                continue;
            };
            let has = memory.of_back_end();
            check_mappable(&has, if slots { MAX_SLOTS } else { MAX_TABLE_REGIONS });
            for asked in &present {
                for page in pages_of(asked) {
                    prop_assert_eq!(holders(&has, &page), 1, "{:?}", page);
                }
            }
            if steps.len() > 1 {
                prop_assert!(slots && steps.iter().all(|step| !matches!(step, Step::Table(_))));
            }
        }
        memory.replace(&[], Situation { slots: slots.then_some(509), running: false, seams: &[] }).unwrap();
        prop_assert_eq!(memory.of_back_end(), []);
    }
}
