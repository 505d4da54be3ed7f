//! How often a back-end may be started again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Most starts that follow a failure within [`PERIOD`].
pub const MAX_RESTARTS: usize = 5;

/// Length of the period that is looked at.
pub const PERIOD: Duration = Duration::from_secs(60);

/// Counts the failures of the last [`PERIOD`].
#[derive(Debug, Default)]
pub struct RestartLimit {
    failures: VecDeque<Instant>,
}

impl RestartLimit {
    /// Takes note of a failure at `now`, and says whether another start is worth trying.
    pub fn may_restart(&mut self, now: Instant) -> bool {
        while self.failures.front().is_some_and(|failure| now.duration_since(*failure) >= PERIOD) {
            self.failures.pop_front();
        }
        self.failures.push_back(now);
        self.failures.len() <= MAX_RESTARTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_count_for_one_period() {
        let start = Instant::now();
        let mut limit = RestartLimit::default();
        for second in 0..5 {
            assert!(limit.may_restart(start + Duration::from_secs(second)));
        }
        assert!(!limit.may_restart(start + Duration::from_secs(59)));
        // The failures of seconds 0 to 4 are forgotten by then, the one of second 59 is not.
        for second in 65..69 {
            assert!(limit.may_restart(start + Duration::from_secs(second)));
        }
        assert!(!limit.may_restart(start + Duration::from_secs(69)));
    }

    #[test]
    fn a_back_end_that_always_fails_takes_no_memory() {
        let start = Instant::now();
        let mut limit = RestartLimit::default();
        for second in 0..1000 {
            limit.may_restart(start + Duration::from_secs(second));
        }
        assert!(limit.failures.len() <= 60);
    }
}
