//! Chance that can be repeated: the same seed gives the same numbers, on every machine.

use std::cell::Cell;
use std::ops::Range;
use std::time::Duration;

/// A source of numbers, shared by all who draw from it.
#[derive(Debug)]
pub struct Random(Cell<u64>);

impl Random {
    /// A source that begins with `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(Cell::new(seed))
    }

    /// The next number: SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
    pub fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number of the range, which is not empty.
    pub fn within(&self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start).max(1)
    }

    /// An index below `len`.
    pub fn below(&self, len: usize) -> usize {
        usize::try_from(self.next() % (len as u64).max(1)).unwrap_or(0)
    }

    /// True in `of` of a hundred cases.
    pub fn percent(&self, of: u64) -> bool {
        self.next() % 100 < of
    }

    /// One of these.
    pub fn one_of<'a, T>(&self, things: &'a [T]) -> Option<&'a T> {
        things.get(self.below(things.len()))
    }

    /// A time up to `limit`.
    pub fn time(&self, limit: Duration) -> Duration {
        let micros = u64::try_from(limit.as_micros()).unwrap_or(u64::MAX - 1);
        Duration::from_micros(self.within(0..micros.saturating_add(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_says_it_all() {
        let numbers = |seed| {
            let random = Random::new(seed);
            std::array::from_fn::<u64, 8, _>(|_| random.next())
        };
        assert_eq!(numbers(7), numbers(7));
        assert_ne!(numbers(7), numbers(8));
        // The reference implementation's first number for 0.
        assert_eq!(Random::new(0).next(), 0xe220_a839_7b1d_cdaf);
        let random = Random::new(1);
        assert!((0..1000).all(|_| (3..7).contains(&random.within(3..7))));
    }
}
