//! How long the thread of a queue looks for work by itself before it sleeps. Pure: it is told the time.
//!
//! # Theory of operation
//! A thread that has nothing to do is *idle* from [`Polling::begin`] to [`Polling::end`]. It spends the first part of that
//! looking at the ring, the *window*, with the driver's notifications switched off, and sleeps after that. What the window
//! should be depends on how long the last idle times were:
//!
//! | an idle time | the next window |
//! | --- | --- |
//! | ended inside of the window | stays: looking was worth it |
//! | ended after it, but would have ended inside of the largest window | doubles, from [`SMALLEST_WINDOW`] on |
//! | was longer than the largest window | halves, and falls to nothing below [`SMALLEST_WINDOW`] |
//!
//! So a queue that is used rarely is looked at no more after a few idle times ([`Polling::begin`] says that there is nothing to
//! look for), one that is used again is back after as few, and no thread ever looks for longer than the largest window.
//! KVM's halt polling and QEMU's I/O threads adapt in this way.

use std::str::FromStr;
use std::time::{Duration, Instant};

/// First window that is more than nothing.
pub const SMALLEST_WINDOW: Duration = Duration::from_micros(4);

/// Largest window unless another is asked for.
pub const DEFAULT_WINDOW: Duration = Duration::from_micros(32);

/// Longest window that may be asked for.
pub const LONGEST_WINDOW: Duration = Duration::from_secs(1);

/// When threads look for work by themselves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PollMode {
    /// Never: the driver has to notify of everything.
    Off,
    /// For a while, as the module's text says.
    #[default]
    Auto,
    /// Without end: a CPU for each queue, and no notifications.
    Always,
}

impl FromStr for PollMode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "off" => Ok(Self::Off),
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            _ => Err("expected off, auto or always"),
        }
    }
}

/// What the operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PollSettings {
    /// When threads look for work.
    pub mode: PollMode,
    /// Largest window; for [`PollMode::Auto`].
    pub window: Duration,
}

impl Default for PollSettings {
    fn default() -> Self {
        Self { mode: PollMode::default(), window: DEFAULT_WINDOW }
    }
}

impl PollSettings {
    /// Reads a largest window in microseconds, at most [`LONGEST_WINDOW`].
    ///
    /// # Errors
    /// What was expected, for the user.
    pub fn parse_window(text: &str) -> Result<Duration, String> {
        let micros = text.parse::<u64>().ok().map(Duration::from_micros).filter(|window| *window <= LONGEST_WINDOW);
        micros.ok_or_else(|| format!("expected microseconds, at most {}", LONGEST_WINDOW.as_micros()))
    }
}

/// Until when to look for work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Not at all.
    Not,
    /// Until there is something, but not for longer than this.
    Until(Instant),
    /// Until there is something.
    Endlessly,
}

/// The windows of one queue. See the module's text.
#[derive(Debug)]
pub struct Polling {
    settings: PollSettings,
    window: Duration,
    idle_since: Option<Instant>,
}

impl Polling {
    /// Has not seen any work yet, and expects none.
    #[must_use]
    pub fn new(settings: PollSettings) -> Self {
        Self { settings, window: Duration::ZERO, idle_since: None }
    }

    /// The mode; with [`PollMode::Off`] the clock need not be asked, nor anything else here.
    #[must_use]
    pub fn mode(&self) -> PollMode {
        self.settings.mode
    }

    /// Between [`Polling::begin`] and [`Polling::end`], where that counts.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.idle_since.is_some()
    }

    /// There is nothing to do. [`Polling::end`] is to come when there is something again, whether it was found by looking or
    /// by being woken.
    pub fn begin(&mut self, now: Instant) -> Look {
        match self.settings.mode {
            PollMode::Off => Look::Not,
            PollMode::Always => Look::Endlessly,
            PollMode::Auto => {
                self.idle_since = Some(now);
                if self.window.is_zero() { Look::Not } else { Look::Until(now + self.window) }
            }
        }
    }

    /// There is something to do. Without [`Polling::begin`] before, this says nothing.
    pub fn end(&mut self, now: Instant) {
        let Some(since) = self.idle_since.take() else { return };
        let idle = now.saturating_duration_since(since);
        if idle > self.settings.window {
            self.window /= 2;
            if self.window < SMALLEST_WINDOW {
                self.window = Duration::ZERO;
            }
        } else if idle > self.window {
            self.window = (self.window * 2).max(SMALLEST_WINDOW).min(self.settings.window);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WINDOW: Duration = Duration::from_micros(32);

    /// A queue and its clock.
    struct Queue {
        polling: Polling,
        now: Instant,
        /// Time that was spent looking, and that part of it in which nothing came.
        looked: Duration,
        in_vain: Duration,
    }

    impl Queue {
        fn new(window: Duration) -> Self {
            let polling = Polling::new(PollSettings { mode: PollMode::Auto, window });
            Self { polling, now: Instant::now(), looked: Duration::ZERO, in_vain: Duration::ZERO }
        }

        /// Is idle for this long; whether the end was found by looking.
        fn idle(&mut self, idle: Duration) -> bool {
            let looks = match self.polling.begin(self.now) {
                Look::Until(until) => until - self.now,
                Look::Not => Duration::ZERO,
                Look::Endlessly => panic!("nobody asked for this"),
            };
            let found = idle <= looks;
            self.looked += looks.min(idle);
            self.in_vain += if found { Duration::ZERO } else { looks };
            self.now += idle;
            self.polling.end(self.now);
            found
        }
    }

    #[test]
    fn a_busy_queue_is_looked_at_after_a_few_requests_and_an_idle_one_drops_out_after_a_few() {
        let mut queue = Queue::new(WINDOW);
        let micros = Duration::from_micros;
        assert_eq!([(); 5].map(|()| queue.idle(micros(20))), [false, false, false, false, true]);
        assert!((0..100).all(|_| queue.idle(micros(31))), "its window has the full length");
        assert!(!queue.idle(micros(1000)) && queue.idle(micros(10)), "one pause does not undo it all");
        let (looked, pauses) = (queue.looked, 100);
        assert!((0..pauses).all(|_| !queue.idle(micros(1000))));
        assert!(queue.looked - looked <= WINDOW, "{:?} for {pauses} pauses", queue.looked - looked);
        assert_eq!(queue.polling.begin(queue.now), Look::Not);
    }

    #[test]
    fn always_is_always_and_off_is_never() {
        let now = Instant::now();
        for (mode, look) in [(PollMode::Off, Look::Not), (PollMode::Always, Look::Endlessly)] {
            let mut polling = Polling::new(PollSettings { mode, window: WINDOW });
            for seconds in [0, 1, 1000] {
                assert_eq!(polling.begin(now + Duration::from_secs(seconds)), look);
                polling.end(now + Duration::from_secs(2 * seconds));
            }
        }
        assert!("Auto".parse::<PollMode>().is_err() && PollSettings::parse_window("1000001").is_err());
        assert_eq!(PollSettings::parse_window("50"), Ok(Duration::from_micros(50)));
    }

    proptest! {
        #[test]
        fn whatever_comes_no_more_is_spent_in_vain_than_was_slept(
            idle_times in prop::collection::vec(prop_oneof![0u64..100, 0u64..5000], 1..500), window in 0u64..200,
        ) {
            let window = Duration::from_micros(window);
            let mut queue = Queue::new(window);
            let mut slept = Duration::ZERO;
            for micros in idle_times {
                let (idle, looked) = (Duration::from_micros(micros), queue.looked);
                queue.idle(idle);
                slept += idle;
                prop_assert!(queue.looked - looked <= window.min(idle));
                prop_assert!(queue.polling.window <= window);
            }
            prop_assert!(queue.in_vain <= slept);
            // A pause of any length costs one window at the most, and all further ones together one more.
            let looked = queue.looked;
            for _ in 0..100 {
                queue.idle(window * 2 + Duration::from_micros(1));
            }
            prop_assert!(queue.looked - looked <= window * 2);
        }
    }
}
