//! Bounds what the driver of a device may ask for: operations and bytes in a second. Pure: it is told the time.
//!
//! Each of the two is a token bucket, which fills at the limit's speed and holds what comes in a tenth of a second. A request
//! takes one token for each operation and for each byte, or none at all if one of the buckets has too little. What is larger
//! than a whole bucket passes when the bucket is full, and leaves a debt that fills up first.
//!
//! All queues of a device share its limit. Nobody waits in here: who is refused learns when it is worth asking again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What a bucket holds, as the time in which it fills.
const BURST: Duration = Duration::from_millis(100);

/// Longest time until somebody who was refused is to ask again: there may be other limits by then.
const LONGEST_WAIT: Duration = Duration::from_millis(100);

const NANOS_PER_SECOND: i128 = 1_000_000_000;

/// Most that may be asked of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Requests or packets in a second; 0 is no limit.
    pub operations_per_second: u64,
    /// Bytes of data in a second; 0 is no limit.
    pub bytes_per_second: u64,
}

/// The limit of one device. See the module's text.
#[derive(Debug)]
pub struct RateLimit {
    /// There is a limit at all; without one nobody takes the lock.
    limited: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    limits: Limits,
    operations: Bucket,
    bytes: Bucket,
}

impl RateLimit {
    /// With full buckets.
    #[must_use]
    pub fn new(limits: Limits, now: Instant) -> Self {
        let operations = Bucket::full(limits.operations_per_second, now);
        let bytes = Bucket::full(limits.bytes_per_second, now);
        let limited = AtomicBool::new(limits != Limits::default());
        Self { limited, state: Mutex::new(State { limits, operations, bytes }) }
    }

    /// What counts now.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.lock().limits
    }

    /// Changes the limits. Debts stay, except where there is no limit any more. Whoever waits notices within a tenth of a
    /// second.
    pub fn set(&self, limits: Limits, now: Instant) {
        let mut state = self.lock();
        state.limits = limits;
        state.operations.set_rate(limits.operations_per_second, now);
        state.bytes.set_rate(limits.bytes_per_second, now);
        self.limited.store(limits != Limits::default(), Ordering::Relaxed);
    }

    /// There is a limit. If not, [`RateLimit::take`] always succeeds, and nobody needs to ask the clock for it.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed)
    }

    /// Takes the tokens for `operations` with `bytes` of data in all.
    ///
    /// # Errors
    /// When to ask again, less than or at a tenth of a second from now; nothing was taken.
    pub fn take(&self, operations: u64, bytes: u64, now: Instant) -> Result<(), Instant> {
        if !self.is_limited() {
            return Ok(());
        }
        let mut state = self.lock();
        let missing = state.operations.missing(operations, now).max(state.bytes.missing(bytes, now));
        if let Some(time) = missing {
            return Err(now + time.min(LONGEST_WAIT));
        }
        state.operations.take(operations);
        state.bytes.take(bytes);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tokens of one kind. They are counted in billionths: each nanosecond brings as many of these as the rate says.
#[derive(Debug)]
struct Bucket {
    /// Tokens in a second; 0 is no limit.
    rate: u64,
    /// Negative while there is a debt.
    level: i128,
    /// When the level was right.
    updated: Instant,
}

impl Bucket {
    fn full(rate: u64, now: Instant) -> Self {
        let mut bucket = Self { rate, level: 0, updated: now };
        bucket.level = bucket.capacity();
        bucket
    }

    fn capacity(&self) -> i128 {
        i128::from(self.rate) * nanos(BURST)
    }

    fn set_rate(&mut self, rate: u64, now: Instant) {
        self.refill(now);
        let was_unlimited = self.rate == 0;
        self.rate = rate;
        self.level = if was_unlimited { self.capacity() } else { self.level.min(self.capacity()) };
    }

    fn refill(&mut self, now: Instant) {
        // A clock that another thread has read earlier adds nothing.
        let gained = i128::from(self.rate).saturating_mul(nanos(now.saturating_duration_since(self.updated)));
        self.level = self.level.saturating_add(gained).min(self.capacity());
        self.updated = self.updated.max(now);
    }

    /// How long it takes until there are enough tokens; None if there are.
    fn missing(&mut self, tokens: u64, now: Instant) -> Option<Duration> {
        if self.rate == 0 {
            return None;
        }
        self.refill(now);
        let needed = (i128::from(tokens) * NANOS_PER_SECOND).min(self.capacity());
        let nanos = (needed - self.level).max(0).div_euclid(i128::from(self.rate));
        // Rounded up: who comes at that time finds enough.
        (self.level < needed).then(|| Duration::from_nanos(u64::try_from(nanos + 1).unwrap_or(u64::MAX)))
    }

    fn take(&mut self, tokens: u64) {
        if self.rate != 0 {
            self.level -= i128::from(tokens) * NANOS_PER_SECOND;
        }
    }
}

fn nanos(duration: Duration) -> i128 {
    // Not above 2^94: seconds have 64 bits.
    i128::try_from(duration.as_nanos()).unwrap_or(i128::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(operations_per_second: u64, bytes_per_second: u64) -> Limits {
        Limits { operations_per_second, bytes_per_second }
    }

    /// Takes whenever that is possible, in `duration`; returns how often it was.
    fn count(limit: &RateLimit, start: Instant, duration: Duration, operations: u64, bytes: u64) -> u32 {
        let (mut now, mut count) = (start, 0);
        while now < start + duration {
            match limit.take(operations, bytes, now) {
                Ok(()) => count += 1,
                Err(later) => {
                    assert!(later > now && later <= now + LONGEST_WAIT);
                    now = later;
                }
            }
        }
        count
    }

    #[test]
    fn a_second_passes_what_the_limit_says_and_a_burst_at_most() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        for (limits, bytes, expected) in [
            (limits(1000, 0), 4096, 1000),
            (limits(0, 1 << 20), 4096, 256),
            // The smaller of the two counts.
            (limits(1000, 1 << 20), 4096, 256),
            (limits(100, 1 << 20), 4096, 100),
        ] {
            let limit = RateLimit::new(limits, start);
            let passed = count(&limit, start, second, 1, bytes);
            assert!((expected..=expected + expected / 10 + 1).contains(&passed), "{limits:?}: {passed}");
            // The burst is spent: the next second has no more than its own.
            let passed = count(&limit, start + second, second, 1, bytes);
            assert!((expected - 1..=expected + 1).contains(&passed), "{limits:?}: {passed}");
        }
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_when_it_is_full_and_leaves_a_debt() {
        let start = Instant::now();
        let limit = RateLimit::new(limits(0, 1000), start);
        limit.take(1, 1000, start).unwrap();
        // 900 bytes of debt, then 100 to fill the bucket.
        let full = start + Duration::from_secs(1);
        assert!(limit.take(1, 1, start + Duration::from_millis(890)).is_err());
        assert!(limit.take(1, 1000, full - Duration::from_millis(1)).is_err());
        limit.take(1, 1000, full).unwrap();
        // A bucket that holds less than one operation lets one pass.
        let slow = RateLimit::new(limits(2, 0), start);
        assert_eq!(count(&slow, start, Duration::from_secs(10), 1, 0), 20);
    }

    #[test]
    fn who_is_refused_takes_nothing() {
        let start = Instant::now();
        let limit = RateLimit::new(limits(10, 1_000_000), start);
        limit.take(1, 0, start).unwrap();
        for _ in 0..1000 {
            assert!(limit.take(1, 50_000, start).is_err(), "no operation is left");
        }
        limit.take(0, 100_000, start).unwrap();
    }

    #[test]
    fn limits_change_under_way() {
        let start = Instant::now();
        let limit = RateLimit::new(Limits::default(), start);
        limit.take(u64::MAX, u64::MAX, start).unwrap();
        limit.set(limits(0, 1000), start);
        assert_eq!(limit.limits(), limits(0, 1000));
        limit.take(1, 100_000, start).unwrap();
        assert!(limit.take(1, 1, start + Duration::from_secs(1)).is_err());
        // The debt is paid at the new speed.
        limit.set(limits(0, 1_000_000), start + Duration::from_secs(1));
        limit.take(1, 1, start + Duration::from_millis(1200)).unwrap();
        limit.take(1, u64::MAX, start + Duration::from_secs(2)).unwrap();
        limit.set(Limits::default(), start + Duration::from_secs(2));
        limit.take(1, u64::MAX, start + Duration::from_secs(2)).unwrap();
        limit.set(limits(0, 1000), start + Duration::from_secs(2));
        limit.take(1, 100, start + Duration::from_secs(2)).expect("a new limit begins without the debt of an old one");
    }

    proptest! {
        #[test]
        fn nothing_overflows_and_the_promised_time_is_enough(
            operations in any::<u64>(), bytes in any::<u64>(), rates in any::<(u64, u64)>(), wait in any::<u32>(),
        ) {
            let mut now = Instant::now();
            let limit = RateLimit::new(limits(rates.0, rates.1), now);
            let _first = limit.take(operations, bytes, now);
            now += Duration::from_secs(u64::from(wait));
            let mut bucket = Bucket::full(rates.0, now);
            bucket.take(operations);
            if let Some(time) = bucket.missing(operations, now)
                && let Some(then) = now.checked_add(time)
            {
                prop_assert!(bucket.missing(operations, then).is_none());
            }
        }
    }
}
