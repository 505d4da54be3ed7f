//! Bounds how often something that a peer can cause is logged.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Length of a period.
const PERIOD: Duration = Duration::from_secs(10);

/// Most lines in one period.
const MAX_LINES: u32 = 10;

/// One budget of log lines: at most 10 in 10 seconds.
#[derive(Debug, Default)]
pub struct LogLimit {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    period_start: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl LogLimit {
    /// A whole budget.
    #[must_use]
    pub const fn new() -> Self {
        Self { state: Mutex::new(State { period_start: None, lines: 0, suppressed: 0 }) }
    }

    /// Some if a line may be written; with the number of lines that were not, since the last one that was.
    #[must_use]
    pub fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.period_start.is_none_or(|start| now.duration_since(start) >= PERIOD) {
            state.period_start = Some(now);
            state.lines = 0;
        }
        if state.lines == MAX_LINES {
            state.suppressed += 1;
            return None;
        }
        state.lines += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let limit = LogLimit::default();
        let start = Instant::now();
        let admitted = (0..1000).filter(|_| limit.admit(start).is_some()).count();
        assert_eq!(admitted, MAX_LINES as usize);
        assert_eq!(limit.admit(start + PERIOD), Some(1000 - u64::from(MAX_LINES)));
        assert_eq!(limit.admit(start + PERIOD), Some(0));
    }
}
