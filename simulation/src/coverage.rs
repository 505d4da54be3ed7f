//! Which combinations have occurred: what was done, in which state of the bridge, in which state of the front-end.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// An account of combinations.
#[derive(Debug, Default)]
pub struct Coverage {
    seen: BTreeMap<(String, &'static str, &'static str), u64>,
}

impl Coverage {
    /// `action` was done while the bridge was in the state `life`, and the front-end in the state `session`.
    pub fn note(&mut self, life: &str, session: &'static str, action: &'static str) {
        *self.seen.entry((life.to_owned(), session, action)).or_default() += 1;
    }

    /// Adds another account to this one.
    pub fn add(&mut self, other: Self) {
        for (combination, count) in other.seen {
            *self.seen.entry(combination).or_default() += count;
        }
    }

    /// Number of all that was done.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.seen.values().sum()
    }

    /// Number of different combinations.
    #[must_use]
    pub fn len(&self) -> usize {
        self.seen.len()
    }

    /// Whether nothing has occurred.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }

    /// States of the bridge that occurred.
    #[must_use]
    pub fn lives(&self) -> BTreeSet<&str> {
        self.seen.keys().map(|(life, ..)| life.as_str()).collect()
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sessions: BTreeSet<_> = self.seen.keys().map(|(_, session, _)| session).collect();
        let actions: BTreeSet<_> = self.seen.keys().map(|(.., action)| action).collect();
        write!(
            formatter,
            "{} combinations of {} states of the bridge, {} of the front-end and {} actions",
            self.len(),
            self.lives().len(),
            sessions.len(),
            actions.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn combinations_count_once() {
        let mut all = Coverage::default();
        for action in ["kill", "kill", "reboot"] {
            let mut coverage = Coverage::default();
            coverage.note("down", "none", action);
            all.add(coverage);
        }
        assert_eq!(all.len(), 2);
        assert_eq!(all.to_string(), "2 combinations of 1 states of the bridge, 1 of the front-end and 2 actions");
    }
}
