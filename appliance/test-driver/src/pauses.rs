//! Pauses between requests: of all lengths, and the same ones in each run.

use std::time::{Duration, Instant};

/// Lengths of pauses, one after the other.
#[derive(Debug)]
pub struct Pauses {
    state: u64,
    longest_ns: u64,
}

impl Pauses {
    /// Pauses shorter than so many nanoseconds, of which there must be one at least.
    #[must_use]
    pub const fn shorter_than(longest_ns: u64) -> Self {
        Self { state: 7, longest_ns }
    }

    /// Keeps the CPU busy for the next pause: a sleep would be too long.
    pub fn spin(&mut self) {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let pause = Duration::from_nanos((self.state >> 33) % self.longest_ns);
        let start = Instant::now();
        while start.elapsed() < pause {
            std::hint::spin_loop();
        }
    }
}
