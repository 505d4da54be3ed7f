//! How a run ended: the reason, one line for the operator, the exit code.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use crate::events::Event;
use crate::supervisor::PortId;

/// Failures that QEMU reports in its own words, and what they mean for the operator.
const KNOWN_FAILURES: [(&str, &str); 1] =
    [("Cannot allocate memory", "the host has too little memory; lower --memory or --window")];

/// Signal number of SIGKILL (signal(7)).
const SIGKILL: i32 = 9;

/// How the appliance's kernel begins its last words.
const PANIC: &str = "Kernel panic - not syncing";

/// How a child went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Death {
    /// It ran and ended.
    Ended {
        /// Its exit code or signal.
        status: ExitStatus,
        /// The last lines that it wrote, oldest first.
        last_lines: Vec<String>,
    },
    /// It could not be started, for this reason.
    NotStarted(String),
}

impl Death {
    /// Whether a signal ended it.
    pub(crate) fn is_by_signal(&self) -> bool {
        self.signal().is_some()
    }

    /// Whether it was killed and did not go by itself.
    pub(crate) fn is_by_sigkill(&self) -> bool {
        self.signal() == Some(SIGKILL)
    }

    fn into_last_lines(self) -> Vec<String> {
        match self {
            Self::Ended { last_lines, .. } => last_lines,
            Self::NotStarted(message) => vec![message],
        }
    }

    fn signal(&self) -> Option<i32> {
        match self {
            Self::Ended { status, .. } => status.signal(),
            Self::NotStarted(_) => None,
        }
    }
}

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
    pub(crate) fn not_ready(what: &str, limit: Duration, death: Death) -> Self {
        Self::failure("not-ready", format!("{what} after {} s", limit.as_secs()), death.into_last_lines())
    }

    /// The bridge ended by itself; `port` tells which, if there are several.
    pub(crate) fn bridge_ended(death: Death, port: Option<PortId>, had_appliance: bool) -> Self {
        let (status, last_lines) = match death {
            Death::Ended { status, last_lines } => (status, last_lines),
            Death::NotStarted(message) => return Self::not_started(message),
        };
        let consequence = if had_appliance { "its appliance VM was killed" } else { "no appliance VM was started" };
        let which = port.map(|port| format!(" of port {port}")).unwrap_or_default();
        let message = format!("the bridge{which} ended ({status}), {consequence}");
        Self::failure("bridge-ended", message, last_lines)
    }

    /// The appliance VM ended by itself.
    pub(crate) fn appliance_ended(death: Death) -> Self {
        let (status, last_lines) = match death {
            Death::Ended { status, last_lines } => (status, last_lines),
            Death::NotStarted(message) => return Self::not_started(message),
        };
        let message = with_meaning(format!("the appliance VM ended ({status})"), &last_lines);
        Self::failure("appliance-ended", message, last_lines)
    }

    /// The bridge had dropped the appliance VM, which was killed for it.
    pub(crate) fn appliance_given_up(death: Death) -> Self {
        let last_lines = death.into_last_lines();
        let message = with_meaning("the bridge gave the appliance VM up, which was killed".to_owned(), &last_lines);
        Self::failure("appliance-ended", message, last_lines)
    }

    /// The same ending with a further remark in its message.
    pub(crate) fn with_remark(mut self, remark: &str) -> Self {
        self.message.push_str("; ");
        self.message.push_str(remark);
        self
    }

    /// What happened, in one line.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// What happened, in one line, and the last lines of whoever died, oldest first.
    pub(crate) fn into_words(self) -> (String, Vec<String>) {
        (self.message, self.last_lines)
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

    /// A child could not even be started.
    fn not_started(message: String) -> Self {
        Self::failure("failed", message, Vec::new())
    }

    fn failure(reason: &'static str, message: String, last_lines: Vec<String>) -> Self {
        Self { reason, message, exit_code: 1, last_lines }
    }
}

/// The message with what the last words mean, as far as they are understood.
fn with_meaning(message: String, last_lines: &[String]) -> String {
    let panic = last_lines.iter().find_map(|line| line.find(PANIC).and_then(|at| line.get(at..)));
    let known = KNOWN_FAILURES.iter().find(|(text, _)| last_lines.iter().any(|line| line.contains(text)));
    match known.map(|(_, meaning)| *meaning).or(panic) {
        Some(meaning) => format!("{message}: {meaning}"),
        None => message,
    }
}

/// An error and its causes in one line.
fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(status: i32, last_lines: Vec<String>) -> Death {
        Death::Ended { status: ExitStatus::from_raw(status), last_lines }
    }

    #[test]
    fn a_signal_is_success_only_after_ready() {
        assert_eq!(Ending::signal("SIGTERM", true).exit_code(), 0);
        assert_eq!(Ending::signal("SIGINT", false).exit_code(), 1);
    }

    #[test]
    fn a_death_is_explained_where_its_last_words_tell() {
        let lines = vec!["qemu: cannot set up guest memory 'ram': Cannot allocate memory".to_owned()];
        let ending = Ending::appliance_ended(ended(1 << 8, lines));
        assert!(ending.message.contains("too little memory"), "{}", ending.message);
        let lines =
            vec!["[    5.7] Kernel panic - not syncing: no init".to_owned(), "[    5.8] Call Trace:".to_owned()];
        let panic = Ending::appliance_ended(ended(0, lines));
        assert_eq!(panic.message, "the appliance VM ended (exit status: 0): Kernel panic - not syncing: no init");
        let lines = vec!["Kernel panic - not syncing: no init".to_owned()];
        let dropped = Ending::appliance_given_up(ended(9, lines));
        assert!(dropped.message.ends_with("killed: Kernel panic - not syncing: no init"), "{}", dropped.message);
        let unknown = Ending::appliance_ended(ended(9, vec![]));
        assert_eq!(unknown.message, "the appliance VM ended (signal: 9 (SIGKILL))");
    }

    #[test]
    fn an_error_is_one_line_with_its_causes() {
        let error = anyhow::anyhow!("low\nlevel").context("high level");
        assert_eq!(Ending::failed(&error).message, "high level: low level");
    }
}
