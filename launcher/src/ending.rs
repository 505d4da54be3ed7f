//! How a run ended: the reason, one line for the operator, the exit code.

use std::process::ExitStatus;
use std::time::Duration;

use crate::events::Event;

/// Failures that QEMU reports in its own words, and what they mean for the operator.
const KNOWN_FAILURES: [(&str, &str); 3] = [
    ("Failed to get \"write\" lock", "the image is in use by another process; end that one, or give both --read-only"),
    ("Failed to get shared \"write\" lock", "the image is in use by another process; end that one"),
    ("Cannot allocate memory", "the host has too little memory; lower --memory or --window"),
];

/// How the appliance's kernel begins its last words.
const PANIC: &str = "Kernel panic - not syncing";

/// The end of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ending {
    reason: &'static str,
    message: String,
    exit_code: u8,
    last_lines: Vec<String>,
}

impl Ending {
    /// A signal ended it; before the device was ready that is a failure.
    pub(crate) fn signal(name: &str, was_ready: bool) -> Self {
        let (message, exit_code) = if was_ready {
            (format!("ended by {name}"), 0)
        } else {
            (format!("interrupted by {name} before the device was ready"), 1)
        };
        Self { reason: "signal", message, exit_code, last_lines: Vec::new() }
    }

    /// Arguments or host do not allow the run; nothing was started.
    pub(crate) fn refused(error: &anyhow::Error) -> Self {
        Self::failure("refused", one_line(error), Vec::new())
    }

    /// Something of this host failed while the run went on.
    pub(crate) fn failed(error: &anyhow::Error) -> Self {
        Self::failure("failed", one_line(error), Vec::new())
    }

    /// A step took longer than its limit.
    pub(crate) fn not_ready(what: &str, limit: Duration, last_lines: Vec<String>) -> Self {
        Self::failure("not-ready", format!("{what} after {} s", limit.as_secs()), last_lines)
    }

    /// The bridge ended by itself.
    pub(crate) fn bridge_ended(status: ExitStatus, had_appliance: bool, last_lines: Vec<String>) -> Self {
        let consequence = if had_appliance { "its appliance VM was killed" } else { "no appliance VM was started" };
        let message = format!("the bridge ended ({status}), {consequence}");
        Self::failure("bridge-ended", message, last_lines)
    }

    /// The appliance VM ended by itself.
    pub(crate) fn appliance_ended(status: ExitStatus, last_lines: Vec<String>) -> Self {
        let panic = last_lines.iter().find_map(|line| line.find(PANIC).and_then(|at| line.get(at..)));
        let known = KNOWN_FAILURES.iter().find(|(text, _)| last_lines.iter().any(|line| line.contains(text)));
        let message = match known.map(|(_, meaning)| *meaning).or(panic) {
            Some(meaning) => format!("the appliance VM ended ({status}): {meaning}"),
            None => format!("the appliance VM ended ({status})"),
        };
        Self::failure("appliance-ended", message, last_lines)
    }

    /// The exit code of `vvu`.
    pub(crate) fn exit_code(&self) -> u8 {
        self.exit_code
    }

    /// The event that tells it.
    pub(crate) fn into_event(self) -> Event {
        let Self { reason, message, exit_code, last_lines } = self;
        Event::Ended { reason, message, exit_code, last_lines }
    }

    fn failure(reason: &'static str, message: String, last_lines: Vec<String>) -> Self {
        Self { reason, message, exit_code: 1, last_lines }
    }
}

/// An error and its causes in one line.
fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_signal_is_success_only_after_ready() {
        assert_eq!(Ending::signal("SIGTERM", true).exit_code(), 0);
        assert_eq!(Ending::signal("SIGINT", false).exit_code(), 1);
    }

    #[test]
    fn a_death_is_explained_where_its_last_words_tell() {
        let lines = vec!["qemu: -device {...}: Failed to get \"write\" lock".to_owned()];
        let ending = Ending::appliance_ended(ExitStatus::from_raw(1 << 8), lines);
        assert!(ending.message.contains("in use by another process"), "{}", ending.message);
        let lines =
            vec!["[    5.7] Kernel panic - not syncing: no init".to_owned(), "[    5.8] Call Trace:".to_owned()];
        let panic = Ending::appliance_ended(ExitStatus::from_raw(0), lines);
        assert_eq!(panic.message, "the appliance VM ended (exit status: 0): Kernel panic - not syncing: no init");
        let unknown = Ending::appliance_ended(ExitStatus::from_raw(9), vec![]);
        assert_eq!(unknown.message, "the appliance VM ended (signal: 9 (SIGKILL))");
    }

    #[test]
    fn an_error_is_one_line_with_its_causes() {
        let error = anyhow::anyhow!("low\nlevel").context("high level");
        assert_eq!(Ending::failed(&error).message, "high level: low level");
    }
}
