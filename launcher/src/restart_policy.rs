//! How often a device that dies is started again, and how soon. Pure.

use std::collections::VecDeque;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// Most restarts that a limit may allow.
const MAX_COUNT: u32 = 1000;

/// Longest time over which a limit may count, in seconds: a week.
const MAX_SECONDS: u64 = 7 * 24 * 3600;

/// Wait before a restart after one that never got ready; doubled for each further one.
const FIRST_DELAY: Duration = Duration::from_millis(250);

/// Longest wait before a restart.
const MAX_DELAY: Duration = Duration::from_secs(8);

/// So many restarts within such a time and no more: `5/60`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RestartLimit {
    count: u32,
    within: Duration,
}

/// Why a text is no limit.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected NUMBER/SECONDS with 1 to {MAX_COUNT} restarts within 1 to {MAX_SECONDS} seconds, such as 5/60")]
pub(crate) struct RestartLimitError;

impl FromStr for RestartLimit {
    type Err = RestartLimitError;

    fn from_str(text: &str) -> Result<Self, RestartLimitError> {
        let (count, seconds) = text.split_once('/').ok_or(RestartLimitError)?;
        let count = count.parse().ok().filter(|count| (1..=MAX_COUNT).contains(count)).ok_or(RestartLimitError)?;
        let seconds =
            seconds.parse().ok().filter(|seconds| (1..=MAX_SECONDS).contains(seconds)).ok_or(RestartLimitError)?;
        Ok(Self { count, within: Duration::from_secs(seconds) })
    }
}

/// What to do about a death.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Start again after this time, mostly none.
    Restart(Duration),
    /// Give up, for this reason if there is more to say than that restarts are not wanted.
    GiveUp(Option<String>),
}

/// The count of restarts. Ask [`Restarts::judge`] once for each death, and tell [`Restarts::recovered`].
#[derive(Debug)]
pub(crate) struct Restarts {
    /// None: never restart.
    limit: Option<RestartLimit>,
    /// Times of those that still count, oldest first; at most as many as the limit allows.
    recent: VecDeque<Instant>,
    total: u64,
    /// Restarts in a row after which the device was not in use again.
    failures: u32,
}

impl Restarts {
    /// No restarts yet; `limit` is `None` if there shall never be one.
    pub(crate) fn new(limit: Option<RestartLimit>) -> Self {
        Self { limit, recent: VecDeque::new(), total: 0, failures: 0 }
    }

    /// Restarts in the whole run.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Judges a death. `was_active` says that the device worked until then: such a death is repaired at once.
    pub(crate) fn judge(&mut self, was_active: bool, now: Instant) -> Verdict {
        let Some(limit) = self.limit else { return Verdict::GiveUp(None) };
        while self.recent.front().is_some_and(|&then| now.saturating_duration_since(then) >= limit.within) {
            self.recent.pop_front();
        }
        if self.recent.len() >= limit.count as usize {
            let seconds = limit.within.as_secs();
            return Verdict::GiveUp(Some(format!(
                "after {} restarts within {seconds} s it is not started again (--restart-limit)",
                limit.count
            )));
        }
        self.recent.push_back(now);
        self.total += 1;
        if was_active {
            return Verdict::Restart(Duration::ZERO);
        }
        self.failures = self.failures.saturating_add(1);
        let doubled = 2_u32.saturating_pow(self.failures - 1);
        Verdict::Restart(FIRST_DELAY.saturating_mul(doubled).min(MAX_DELAY))
    }

    /// The device works again.
    pub(crate) fn recovered(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT_ONCE: Verdict = Verdict::Restart(Duration::ZERO);

    #[test]
    fn limits_are_read_as_people_write_them() {
        assert_eq!("5/60".parse(), Ok(RestartLimit { count: 5, within: Duration::from_secs(60) }));
        for text in ["", "5", "5/", "/60", "0/60", "5/0", "1001/60", "5/604801", "-1/60", "5/60/7", "5 / 60"] {
            assert_eq!(text.parse::<RestartLimit>(), Err(RestartLimitError), "{text}");
        }
    }

    #[test]
    fn a_limit_holds_within_its_time_and_not_longer() {
        let mut restarts = Restarts::new(Some("2/60".parse().unwrap()));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(restarts.judge(true, at(0)), AT_ONCE);
        assert_eq!(restarts.judge(true, at(30)), AT_ONCE);
        let Verdict::GiveUp(Some(words)) = restarts.judge(true, at(59)) else { panic!("restarted a third time") };
        assert_eq!(words, "after 2 restarts within 60 s it is not started again (--restart-limit)");
        assert_eq!(restarts.judge(true, at(60)), AT_ONCE);
        assert_eq!(restarts.total(), 3);
        assert_eq!(Restarts::new(None).judge(true, start), Verdict::GiveUp(None));
    }

    #[test]
    fn what_does_not_get_ready_is_tried_at_growing_intervals() {
        let mut restarts = Restarts::new(Some("100/60".parse().unwrap()));
        let now = Instant::now();
        assert_eq!(restarts.judge(true, now), AT_ONCE);
        let mut last = Duration::ZERO;
        for _ in 0..50 {
            let Verdict::Restart(delay) = restarts.judge(false, now) else { panic!("given up") };
            assert!(delay == MAX_DELAY || delay > last, "{delay:?} after {last:?}");
            last = delay;
        }
        assert_eq!(last, MAX_DELAY);
        restarts.recovered();
        assert_eq!(restarts.judge(false, now), Verdict::Restart(FIRST_DELAY));
    }
}
