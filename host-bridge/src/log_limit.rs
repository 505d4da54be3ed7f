//! The log, bounded: a front-end that connects or is refused over and over cannot fill a disk with it.

use std::io::{self, Stderr, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// Length of a period.
const PERIOD: Duration = Duration::from_secs(10);

/// Most lines in one period: several times what any orderly device start or end needs.
const LINES_MAX: u32 = 100;

/// Standard error, with at most 100 lines of level "info" and above in 10 seconds. How many were dropped is said before the
/// next one.
#[derive(Debug, Default)]
pub struct LimitedStderr {
    budget: Mutex<Budget>,
}

#[derive(Debug, Default)]
struct Budget {
    period_start: Option<Instant>,
    lines: u32,
    dropped: u64,
}

impl Budget {
    /// Some if a line may be written; with the number of lines that were dropped since the last one that was.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.period_start.is_none_or(|start| now.duration_since(start) >= PERIOD) {
            self.period_start = Some(now);
            self.lines = 0;
        }
        if self.lines == LINES_MAX {
            self.dropped += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.dropped))
    }
}

/// Where one line goes.
#[derive(Debug)]
pub enum Line {
    /// To standard error.
    Written(Stderr),
    /// Nowhere.
    Dropped,
}

impl<'a> MakeWriter<'a> for LimitedStderr {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        let admitted = self.budget.lock().unwrap_or_else(PoisonError::into_inner).admit(Instant::now());
        let Some(dropped) = admitted else { return Line::Dropped };
        let mut stderr = io::stderr();
        if dropped > 0 {
            // As with the line itself: nothing can be done about a standard error that is closed.
            let _ = writeln!(stderr, "({dropped} lines of the log were dropped)");
        }
        Line::Written(stderr)
    }

    /// Lines below "info" come by the operator's wish alone, who wants all of them.
    fn make_writer_for(&'a self, line: &Metadata<'_>) -> Line {
        if *line.level() > Level::INFO { Line::Written(io::stderr()) } else { self.make_writer() }
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Written(stderr) => stderr.write(bytes),
            Self::Dropped => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Written(stderr) => stderr.flush(),
            Self::Dropped => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut budget = Budget::default();
        let start = Instant::now();
        let admitted = (0..1000).filter(|_| budget.admit(start).is_some()).count();
        assert_eq!(admitted, LINES_MAX as usize);
        assert_eq!(budget.admit(start + PERIOD), Some(1000 - u64::from(LINES_MAX)));
        assert_eq!(budget.admit(start + PERIOD), Some(0));
    }
}
