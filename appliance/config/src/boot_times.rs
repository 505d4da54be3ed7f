//! How long an appliance took to boot, as its agent tells it on the console.

use std::fmt;
use std::str::FromStr;

/// What the line begins with.
const LINE_START: &str = "vvu-boot:";

/// When an appliance reached each step, in milliseconds since its kernel started to count (CLOCK_BOOTTIME). Each step comes after
/// the one before.
///
/// As text it is one line, whatever the log's filter. The launcher reads it, for whom nothing but what it shows depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BootTimes {
    /// The kernel was up, and the agent started.
    pub agent: u64,
    /// File systems were mounted, the modules of the devices loaded, the configuration read.
    pub modules: u64,
    /// The control devices were started.
    pub controls: u64,
    /// The windows were there.
    pub windows: u64,
}

impl BootTimes {
    fn steps(&self) -> [u64; 4] {
        [self.agent, self.modules, self.controls, self.windows]
    }
}

impl fmt::Display for BootTimes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { agent, modules, controls, windows } = self;
        write!(
            formatter,
            "{LINE_START} agent {agent} ms, modules {modules} ms, controls {controls} ms, windows {windows} ms"
        )
    }
}

/// A line that is no [`BootTimes`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("this is no line of boot times")]
pub struct NoBootTimes;

impl FromStr for BootTimes {
    type Err = NoBootTimes;

    fn from_str(line: &str) -> Result<Self, NoBootTimes> {
        let mut words = line.split([' ', ',']).filter_map(|word| word.parse().ok());
        let mut next = || words.next().ok_or(NoBootTimes);
        let times = Self { agent: next()?, modules: next()?, controls: next()?, windows: next()? };
        // What is not exactly what would have been written has another meaning.
        if times.to_string() == line && times.steps().is_sorted() { Ok(times) } else { Err(NoBootTimes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_as_it_is_written() {
        let times = BootTimes { agent: 10, modules: 20, controls: 30, windows: 40 };
        assert_eq!(times.to_string(), "vvu-boot: agent 10 ms, modules 20 ms, controls 30 ms, windows 40 ms");
        assert_eq!(times.to_string().parse(), Ok(times));
    }

    #[test]
    fn other_lines_are_none() {
        let lines = [
            "",
            "1 2 3 4",
            "vvu-boot: agent 10 ms, modules 20 ms, controls 30 ms",
            "vvu-boot: agent 10 ms, modules 20 ms, controls 30 ms, windows 29 ms",
            "vvu-boot: agent +1 ms, modules 20 ms, controls 30 ms, windows 40 ms",
            "vvu-boot: agent 10 ms, modules 20 ms, controls 30 ms, windows 99999999999999999999 ms",
        ];
        for line in lines {
            assert_eq!(line.parse::<BootTimes>(), Err(NoBootTimes), "{line}");
        }
    }
}
