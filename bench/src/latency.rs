//! Latencies: a histogram that never allocates while it is filled.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Longest latency that is told from longer ones.
const LONGEST: Duration = Duration::from_secs(60);

/// Significant decimal digits.
const DIGITS: u8 = 2;

/// Latencies of many requests.
#[derive(Debug, Clone)]
pub struct Latencies(Histogram<u64>);

/// What is reported of them. Times are in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Arithmetic mean.
    pub mean: f64,
    /// Least.
    pub min: f64,
    /// Half of the requests took no longer.
    pub p50: f64,
    /// 90 % of them.
    pub p90: f64,
    /// 99 % of them.
    pub p99: f64,
    /// 99.9 % of them.
    pub p999: f64,
    /// Most.
    pub max: f64,
    /// Upper ends of ranges and the number of requests in each, those without any left out.
    pub histogram: Vec<(f64, u64)>,
}

impl Latencies {
    /// None so far.
    ///
    /// # Errors
    /// Never: the bounds are right.
    pub fn new() -> Result<Self, Error> {
        let longest = u64::try_from(LONGEST.as_nanos()).unwrap_or(u64::MAX);
        let histogram = Histogram::new_with_bounds(1, longest, DIGITS);
        histogram.map(Self).map_err(|error| Error::Usage(format!("no histogram: {error}")))
    }

    /// Adds one.
    #[inline]
    pub fn record(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Adds all of another one.
    ///
    /// # Errors
    /// Never: all have the same bounds.
    pub fn add(&mut self, other: &Self) -> Result<(), Error> {
        self.0.add(&other.0).map_err(|error| Error::Usage(format!("histograms differ: {error}")))
    }

    /// What is reported.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let us = |ns: u64| ns as f64 / 1e3;
        let at = |quantile| us(self.0.value_at_quantile(quantile));
        let ranges = self.0.iter_recorded();
        Summary {
            mean: self.0.mean() / 1e3,
            min: us(self.0.min()),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: us(self.0.max()),
            histogram: ranges.map(|r| (us(r.value_iterated_to()), r.count_at_value())).collect(),
        }
    }
}

/// A histogram for the eye: shares of all requests, in per cent, in ranges that are as many to each power of ten; each stands at
/// its middle, with an empty one before and behind. Takes what [`Summary::histogram`] has, of several runs one after the other.
#[must_use]
pub fn shares(histogram: &[(f64, u64)], ranges_per_decade: u32) -> Vec<(f64, f64)> {
    let per_decade = f64::from(ranges_per_decade);
    let all: u64 = histogram.iter().map(|(_, count)| count).sum();
    let mut ranges = BTreeMap::new();
    for (us, count) in histogram.iter().filter(|(us, _)| *us > 0.0) {
        #[expect(clippy::cast_possible_truncation, reason = "a logarithm of microseconds is a small number")]
        let range = (us.log10() * per_decade).floor() as i32;
        *ranges.entry(range).or_insert(0) += count;
    }
    let middle = |range: i32| 10f64.powf((f64::from(range) + 0.5) / per_decade);
    let (first, last) = (ranges.keys().next().copied(), ranges.keys().last().copied());
    let span = first.zip(last).map(|(first, last)| first - 1..=last + 1);
    let share = |range| ranges.get(&range).copied().unwrap_or(0) as f64 * 100.0 / all as f64;
    span.into_iter().flatten().map(|range| (middle(range), share(range))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_to_two_digits_and_the_longest_is_no_error() {
        let mut latencies = Latencies::new().unwrap();
        for us in 1..=100 {
            latencies.record(Duration::from_micros(us));
        }
        let mut all = Latencies::new().unwrap();
        all.add(&latencies).unwrap();
        let summary = all.summary();
        assert!((summary.p50 - 50.0).abs() < 1.0 && (summary.p99 - 99.0).abs() < 1.0, "{summary:?}");
        assert_eq!(summary.histogram.iter().map(|(_, count)| count).sum::<u64>(), 100);
        all.record(LONGEST * 3);
        assert!(all.summary().max >= 6e7);
    }

    #[test]
    fn shares_add_up_and_have_no_gaps() {
        let shares = shares(&[(1.0, 1), (1.5, 1), (150.0, 2)], 1);
        let rounded: Vec<_> = shares.iter().map(|(us, share)| (us.round(), *share)).collect();
        assert_eq!(rounded, [(0.0, 0.0), (3.0, 50.0), (32.0, 0.0), (316.0, 50.0), (3162.0, 0.0)]);
    }
}
