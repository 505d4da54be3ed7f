//! How the threads of queues work: options that the programs of all devices have alike.

use std::time::Duration;

use clap::Args;

use crate::cpus::{CpuList, UnusableCpu};
use crate::polling::{PollMode, PollSettings};

/// What the operator wants of the queues' threads. For [`clap`]'s `flatten`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct Threads {
    /// When a queue's thread looks for work by itself instead of having the driver notify of it: off, never; auto, for a while
    /// that adapts to what it finds; always, without end, on a CPU of its own.
    #[arg(long, value_name = "MODE", default_value = "auto")]
    pub poll: PollMode,

    /// Longest time that auto looks for work before the thread sleeps, in microseconds.
    #[arg(long, value_name = "MICROSECONDS", default_value = "32", value_parser = PollSettings::parse_window)]
    pub poll_window: Duration,

    /// Run the threads of queues on these CPUs, one after the other: a list as 0,2-3 [default: where the kernel wants].
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<CpuList>,
}

impl Default for Threads {
    fn default() -> Self {
        let PollSettings { mode, window } = PollSettings::default();
        Self { poll: mode, poll_window: window, cpus: None }
    }
}

impl Threads {
    /// Checks that this process may use all of the CPUs.
    ///
    /// # Errors
    /// The first that it may not use.
    pub fn check(&self) -> Result<(), UnusableCpu> {
        self.cpus.as_ref().map_or(Ok(()), CpuList::check)
    }

    /// How long they look for work.
    #[must_use]
    pub const fn polling(&self) -> PollSettings {
        PollSettings { mode: self.poll, window: self.poll_window }
    }

    /// The CPU of a queue; None if the kernel is to choose.
    #[must_use]
    pub fn cpu_of_queue(&self, index: u16) -> Option<usize> {
        self.cpus.as_ref()?.of_queue(index)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        threads: Threads,
    }

    fn threads(line: &str) -> Result<Threads, String> {
        let program = Program::try_parse_from(line.split(' ')).map_err(|error| error.to_string())?;
        Ok(program.threads)
    }

    #[test]
    fn options_are_read_and_mistakes_are_named() {
        let default = threads("program").unwrap();
        assert_eq!(default, Threads::default());
        assert_eq!((default.polling(), default.cpu_of_queue(7)), (PollSettings::default(), None));
        let chosen = threads("program --poll always --poll-window 50 --cpus 1,3").unwrap();
        assert_eq!(chosen.polling(), PollSettings { mode: PollMode::Always, window: Duration::from_micros(50) });
        assert_eq!([0, 1, 2].map(|queue| chosen.cpu_of_queue(queue)), [1, 3, 1].map(Some));
        for (line, expected) in [
            ("program --poll sometimes", "off, auto or always"),
            ("program --poll-window 2s", "microseconds"),
            ("program --cpus 1-", "0,2-3"),
        ] {
            let message = threads(line).unwrap_err();
            assert!(message.contains(expected), "{line}: {message}");
        }
    }
}
