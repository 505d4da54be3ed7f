use proptest::prelude::*;

use super::*;

fn message(kind: u8, iova: u64, size: u64, user_address: u64, permission: u8) -> message::Iotlb {
    message::Iotlb { iova, size, user_address, permission, kind }
}

fn update(iova: u64, size: u64, user_address: u64, permission: u8) -> message::Iotlb {
    message(UPDATE, iova, size, user_address, permission)
}

fn invalidate(iova: u64, size: u64) -> message::Iotlb {
    message(INVALIDATE, iova, size, 0, 0)
}

fn with(messages: &[message::Iotlb]) -> Iotlb {
    let mut iotlb = Iotlb::default();
    for message in messages {
        iotlb.apply(message).unwrap();
    }
    iotlb
}

fn translate(iotlb: &Iotlb, iova: u64, len: u64, access: Access) -> Result<Vec<(u64, u64)>, TranslateError> {
    let mut ranges = Vec::new();
    iotlb.translate(iova, len, access, &mut ranges)?;
    Ok(ranges.into_iter().map(|range| (range.address.0, range.len)).collect())
}

fn miss(iova: u64, access: Access) -> TranslateError {
    TranslateError::Miss(Miss { iova, access })
}

#[test]
fn a_range_over_several_entries_comes_in_pieces_and_neighbours_are_merged() {
    let iotlb =
        with(&[update(0x1000, 0x1000, 0xa000, 3), update(0x2000, 0x1000, 0xb000, 3), update(0x3000, 16, 0x77, 1)]);
    assert_eq!(translate(&iotlb, 0x1800, 0x1000, Access::Write), Ok(vec![(0xa800, 0x1000)]));
    assert_eq!(translate(&iotlb, 0x1ffe, 0x1012, Access::Read), Ok(vec![(0xaffe, 0x1002), (0x77, 16)]));
    assert_eq!(translate(&iotlb, 0x1ffe, 0x1012, Access::Write), Err(miss(0x3000, Access::Write)));
    assert_eq!(translate(&iotlb, 0x3008, 9, Access::Read), Err(miss(0x3010, Access::Read)));
    assert_eq!(translate(&iotlb, 0xfff, 2, Access::Read), Err(miss(0xfff, Access::Read)));
    assert_eq!(translate(&iotlb, 0xdead, 0, Access::Read), Ok(vec![]));
}

#[test]
fn what_was_appended_before_is_not_merged_with() {
    let iotlb = with(&[update(0, 0x1000, 0xa000, 3)]);
    let mut ranges = Vec::new();
    for _ in 0..2 {
        iotlb.translate(0, 8, Access::Read, &mut ranges).unwrap();
    }
    iotlb.translate(8, 8, Access::Read, &mut ranges).unwrap();
    assert_eq!(ranges.iter().map(|range| range.len).collect::<Vec<_>>(), [8, 8, 8]);
}

#[test]
fn the_last_byte_of_the_address_space_is_one_like_others() {
    let top = u64::MAX - 0xfff;
    let iotlb = with(&[update(top, 0x1000, top, 3)]);
    assert_eq!(translate(&iotlb, u64::MAX, 1, Access::Read), Ok(vec![(u64::MAX, 1)]));
    assert_eq!(translate(&iotlb, top, 0x1000, Access::Read), Ok(vec![(top, 0x1000)]));
    for (iova, len) in [(u64::MAX, 2), (top, 0x1001), (1, u64::MAX), (u64::MAX, u64::MAX)] {
        let error = translate(&iotlb, iova, len, Access::Read).unwrap_err();
        assert!(matches!(error, TranslateError::Wraps { .. }) || iova == 1, "{error}");
    }
    let whole = with(&[update(0, u64::MAX, 0, 3)]);
    assert_eq!(translate(&whole, 5, u64::MAX - 5, Access::Read), Ok(vec![(5, u64::MAX - 5)]));
    assert_eq!(translate(&whole, u64::MAX, 1, Access::Read), Err(miss(u64::MAX, Access::Read)));
}

#[test]
fn wrong_messages_change_nothing() {
    let mut iotlb = with(&[update(0x1000, 0x1000, 0xa000, 3)]);
    for wrong in [
        update(0x1000, 0, 0, 3),
        update(u64::MAX, 2, 0, 3),
        update(0x1000, u64::MAX, 0, 3),
        update(0x1000, 0x1000, u64::MAX - 0xffe, 3),
        update(0x1000, 0x1000, 0, 4),
        update(0x1000, 0x1000, 0, 0xff),
        message(0, 0x1000, 0x1000, 0, 3),
        message(1, 0x1000, 0x1000, 0, 3),
        message(4, 0x1000, 0x1000, 0, 3),
        message(5, 0, 0, 0, 0),
        message(u8::MAX, 0, 0, 0, 0),
    ] {
        iotlb.apply(&wrong).unwrap_err();
        assert_eq!(translate(&iotlb, 0x1000, 0x1000, Access::Write), Ok(vec![(0xa000, 0x1000)]), "{wrong:?}");
    }
}

#[test]
fn an_invalidation_that_is_no_range_takes_everything_back() {
    for (iova, size) in [(0, 0), (0x5000, 0), (u64::MAX, 2), (1, u64::MAX), (0x8000, u64::MAX)] {
        let iotlb = with(&[update(0x1000, 0x1000, 0, 3), update(0x7000, 1, 0, 1), invalidate(iova, size)]);
        assert!(iotlb.is_empty(), "{iova:#x} {size:#x}");
    }
}

/// What the driver VM may no longer use is gone when the invalidation has been applied, also from the middle of an entry.
#[test]
fn an_invalidation_takes_exactly_its_range() {
    let iotlb = with(&[update(0, 0x3000, 0xa000, 3), invalidate(0x1000, 0x1000)]);
    assert_eq!(iotlb.len(), 2);
    assert_eq!(translate(&iotlb, 0, 0x1000, Access::Write), Ok(vec![(0xa000, 0x1000)]));
    assert_eq!(translate(&iotlb, 0xfff, 2, Access::Write), Err(miss(0x1000, Access::Write)));
    assert_eq!(translate(&iotlb, 0x1fff, 1, Access::Read), Err(miss(0x1fff, Access::Read)));
    assert_eq!(translate(&iotlb, 0x2000, 0x1000, Access::Write), Ok(vec![(0xc000, 0x1000)]));
}

#[test]
fn the_number_of_entries_is_bounded_and_the_oldest_go() {
    let mut iotlb = Iotlb::default();
    let beyond = 1000;
    let count = MAX_ENTRIES as u64 + beyond;
    for page in 0..count {
        // From the top down, so that age is not the order of addresses.
        iotlb.apply(&update((count - page) * 0x2000, 0x1000, page, 3)).unwrap();
    }
    assert_eq!(iotlb.len(), MAX_ENTRIES);
    for page in 0..count {
        let found = translate(&iotlb, (count - page) * 0x2000, 1, Access::Read);
        assert_eq!(found.is_ok(), page >= beyond, "{page}");
    }
    // Holes make more entries out of few, and are bounded too.
    iotlb.clear();
    iotlb.apply(&update(0, 1 << 40, 0, 3)).unwrap();
    for hole in 0..count {
        iotlb.apply(&update(hole * 0x2000, 1, 0, 1)).unwrap();
    }
    assert!(iotlb.len() <= MAX_ENTRIES);
    assert_eq!(iotlb.by_age.len(), iotlb.len());
}

/// Addresses of the model; the real ones are shifted so that the last one is the last of the address space.
const SPACE: u64 = 48;

fn shifted(address: u64) -> u64 {
    u64::MAX - (SPACE - 1) + address
}

proptest! {
    /// A table with one line for each address does the same.
    #[test]
    fn translations_are_those_of_a_naive_table(
        acts in prop::collection::vec((any::<bool>(), 0..SPACE, 1..SPACE, 0..1000_u64, 0..4_u8), 0..30),
        (iova, len, write) in (0..SPACE, 1..SPACE, any::<bool>()),
    ) {
        let mut table: Vec<Option<(u64, u8)>> = vec![None; usize::try_from(SPACE).unwrap()];
        let mut iotlb = Iotlb::default();
        for (updates, start, size, user_address, permission) in acts {
            let size = size.min(SPACE - start);
            for (address, line) in (0..).zip(&mut table) {
                if (start..start + size).contains(&address) {
                    *line = (updates && permission != 0).then_some((user_address + address - start, permission));
                }
            }
            let act = if updates { update } else { |iova, size, _, _| invalidate(iova, size) };
            iotlb.apply(&act(shifted(start), size, user_address, permission)).unwrap();
            prop_assert_eq!(iotlb.by_age.len(), iotlb.len());
        }
        let len = len.min(SPACE - iova);
        let access = if write { Access::Write } else { Access::Read };
        let mut expected: Vec<(u64, u64)> = Vec::new();
        let mut missed = None;
        for address in iova..iova + len {
            match table[usize::try_from(address).unwrap()] {
                Some((user, permission)) if permission & access.permission() != 0 => match expected.last_mut() {
                    Some((start, len)) if *start + *len == user => *len += 1,
                    _ => expected.push((user, 1)),
                },
                _ => {
                    missed = Some(miss(shifted(address), access));
                    break;
                }
            }
        }
        prop_assert_eq!(translate(&iotlb, shifted(iova), len, access), missed.map_or(Ok(expected), Err));
    }
}
