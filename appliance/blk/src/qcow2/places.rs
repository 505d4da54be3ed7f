//! Where parts of a disk lie in its files, as far as that is known: what lies in one piece is read from there without the format's
//! driver and without another thread.
//!
//! # Theory of operation
//! A thread that has read from the disk learns where the parts that it touched are, each [`PART_LEN`] long, if they are in one
//! piece, and with them those that follow in the same piece. What changes the tables of the image is a [`Change`] for that time: it
//! forgets the parts of all clusters of its range when it begins, and nothing at all is learnt until it ends. For as soon as
//! a cluster has its place in the image, others write to it without changing any table. A thread that has looked at the tables
//! before must not teach what it has seen after that, so it says which state it has looked at ([`Places::changes`]); any
//! change in between makes it learn nothing.
//!
//! A place that is known may be read from as long as no cluster is freed. Clusters are freed only by those who have the disk alone
//! ([`Qcow2Disk`](super::disk::Qcow2Disk)), so a reader shares the disk until it is done.
//!
//! The threads of the rings never wait here: a lookup that would have to finds nothing.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::request::ByteRange;

/// Length of a part in bytes: a cluster, unless the image has others.
pub(super) const PART_LEN: u64 = 64 << 10;

/// Most bytes of a piece that are learnt at a time.
pub(super) const PIECE_LEN: u64 = 4 << 20;

/// Parts that are remembered, at the most; 1.5 to 3 MiB, for 4 GiB of the disk.
const MAX_PARTS: usize = 1 << 16;

/// A place in one of the disk's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// The file's number, from the image downwards.
    pub(crate) layer: u32,
    /// In the file, in bytes.
    pub(crate) offset: u64,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Places {
    /// Of the image that is written to, in bytes: a power of two.
    cluster_len: u64,
    known: RwLock<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Places of parts, by their numbers.
    parts: HashMap<u64, Place>,
    /// Beginnings and ends of changes.
    changes: u64,
    under_way: usize,
}

/// Tables of the image are being changed. Ends when it is dropped.
#[must_use]
#[derive(Debug)]
pub(super) struct Change<'a>(&'a Places);

impl Drop for Change<'_> {
    fn drop(&mut self) {
        let mut known = self.0.write();
        known.changes += 1;
        known.under_way -= 1;
    }
}

/// The numbers of the parts that a range touches; at least one.
pub(super) fn parts_of(range: ByteRange) -> RangeInclusive<u64> {
    range.offset / PART_LEN..=range.offset.saturating_add(range.len.saturating_sub(1)) / PART_LEN
}

impl Places {
    /// Of a disk whose image has clusters of this length.
    pub(super) fn new(cluster_len: u64) -> Self {
        Self { cluster_len, known: RwLock::default() }
    }

    /// Where all of a range lies in one piece, if that is known.
    pub(super) fn find(&self, range: ByteRange) -> Option<Place> {
        let known = self.known.try_read().ok()?;
        let (mut parts, in_part) = (parts_of(range), range.offset % PART_LEN);
        let first = *known.parts.get(&parts.next()?)?;
        let mut end = first.offset;
        for part in parts {
            end += PART_LEN;
            if *known.parts.get(&part)? != (Place { offset: end, ..first }) {
                return None;
            }
        }
        Some(Place { offset: first.offset + in_part, ..first })
    }

    /// The state that tables are looked at in from now on.
    pub(super) fn changes(&self) -> u64 {
        self.read().changes
    }

    pub(super) fn knows(&self, part: u64) -> bool {
        self.read().parts.contains_key(&part)
    }

    /// `count` parts from this one on were there, one behind the other, in this state.
    pub(super) fn learn(&self, part: u64, count: u64, place: Place, changes: u64) {
        let mut known = self.write();
        if known.changes != changes || known.under_way > 0 {
            return;
        }
        if known.parts.len() as u64 + count > MAX_PARTS as u64 {
            known.parts.clear();
        }
        let place = |index| Place { offset: place.offset + index * PART_LEN, ..place };
        known.parts.extend((0..count).map(|index| (part + index, place(index))));
    }

    /// The tables of this range's clusters are going to be changed.
    pub(super) fn change(&self, range: ByteRange) -> Change<'_> {
        let offset = range.offset - range.offset % self.cluster_len;
        let end = range.offset.saturating_add(range.len).checked_next_multiple_of(self.cluster_len).unwrap_or(u64::MAX);
        let gone = parts_of(ByteRange { offset, len: end - offset, ..range });
        let mut known = self.write();
        known.changes += 1;
        known.under_way += 1;
        if gone.end() - gone.start() < known.parts.len() as u64 {
            for part in gone {
                known.parts.remove(&part);
            }
        } else {
            known.parts.retain(|part, _| !gone.contains(part));
        }
        drop(known);
        Change(self)
    }

    /// Others may change the image from now on.
    pub(super) fn forget_all(&self) {
        let mut known = self.write();
        known.changes += 1;
        known.parts.clear();
    }

    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Known> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn range(offset: u64, len: u64) -> ByteRange {
        ByteRange { offset, len, unmap: false }
    }

    fn place(layer: u32, offset: u64) -> Place {
        Place { layer, offset }
    }

    /// Parts 0 and 1 in one piece, 2 elsewhere, 3 behind 2 but in another file.
    fn places() -> Places {
        let places = Places::new(PART_LEN);
        let known = [place(0, 9 * MIB), place(1, 9 * MIB + PART_LEN)];
        (2..).zip(known).for_each(|(part, place)| places.learn(part, 1, place, 0));
        places.learn(0, 2, place(0, MIB), 0);
        places
    }

    #[test]
    fn a_range_is_found_where_all_of_it_is_in_one_piece() {
        let places = places();
        assert_eq!(places.find(range(512, 512)), Some(place(0, MIB + 512)));
        assert_eq!(places.find(range(512, 2 * PART_LEN - 512)), Some(place(0, MIB + 512)));
        assert_eq!(places.find(range(2 * PART_LEN, PART_LEN)), Some(place(0, 9 * MIB)));
        assert_eq!(places.find(range(3 * PART_LEN + 4096, 4096)), Some(place(1, 9 * MIB + PART_LEN + 4096)));
        for elsewhere in [PART_LEN + 512, 3 * PART_LEN - 512, 4 * PART_LEN - 512] {
            assert_eq!(places.find(range(elsewhere, PART_LEN)), None, "{elsewhere:#x}");
        }
    }

    #[test]
    fn what_changes_is_forgotten_and_nothing_is_learnt_that_was_seen_before() {
        let places = places();
        let before = places.changes();
        let change = places.change(range(PART_LEN - 1, 2));
        assert!(places.find(range(0, 512)).is_none() && places.find(range(PART_LEN, 512)).is_none());
        assert!(places.knows(2) && places.knows(3));
        places.learn(0, 2, place(0, MIB), before);
        assert!(!places.knows(0), "what was looked at before the change");
        let meanwhile = places.changes();
        places.learn(0, 2, place(0, MIB), meanwhile);
        assert!(!places.knows(0), "what was looked at while the tables changed");
        drop(change);
        places.learn(0, 2, place(0, MIB), meanwhile);
        assert!(!places.knows(0), "the same, when they have changed");
        places.learn(0, 1, place(0, 5 * MIB), places.changes());
        assert_eq!(places.find(range(0, 512)), Some(place(0, 5 * MIB)));
        places.forget_all();
        assert!((0..4).all(|part| !places.knows(part)));
    }

    #[test]
    fn a_change_is_of_whole_clusters() {
        let places = Places::new(4 * PART_LEN);
        places.learn(0, 16, place(1, 0), 0);
        drop(places.change(range(5 * PART_LEN, 512)));
        assert_eq!((0..16).filter(|part| !places.knows(*part)).collect::<Vec<_>>(), [4, 5, 6, 7]);
        drop(places.change(range(u64::MAX - 512, 512)));
        let small = Places::new(512);
        small.learn(0, 4, place(1, 0), 0);
        drop(small.change(range(PART_LEN, 512)));
        assert_eq!((0..4).filter(|part| !small.knows(*part)).collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let places = Places::new(PART_LEN);
        (0..=MAX_PARTS as u64).for_each(|part| places.learn(part, 1, place(0, part * PART_LEN), 0));
        assert_eq!(places.read().parts.len(), 1);
    }
}
