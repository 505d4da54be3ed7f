//! What a request cost when somebody last looked at it and found it right.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::{fs, io};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use crate::callgrind::Callgrind;
use crate::measure::Measured;

/// Most that a request may cost, by the baseline.
const LIMIT: f64 = 1.03;

/// What makes other figures of the same source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Toolchain {
    /// As `rustc --version` says it.
    rustc: String,
    /// The library that programs are linked with, as `getconf` says it.
    libc: String,
    /// As valgrind says it.
    valgrind: String,
}

impl Toolchain {
    pub(crate) fn of_this_machine(callgrind: &Callgrind) -> anyhow::Result<Self> {
        Ok(Self {
            rustc: line_of(Command::new("rustc").arg("--version"))?,
            libc: line_of(Command::new("getconf").arg("GNU_LIBC_VERSION"))?,
            valgrind: line_of(&mut callgrind.version())?,
        })
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        format!("{}, {}, {}", self.rustc, self.libc, self.valgrind)
    }
}

/// What a command prints.
fn line_of(command: &mut Command) -> anyhow::Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot start {name}"))?;
    ensure!(output.status.success(), "{name} failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// The figures of one run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Baseline {
    pub(crate) toolchain: Toolchain,
    instructions_per_request: BTreeMap<String, f64>,
}

/// How a figure compares with the baseline's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Verdict {
    /// As much as before, or less. The ratio of now to before.
    Kept(f64),
    /// More than is allowed. The ratio of now to before.
    Regression(f64),
    /// The baseline is of another toolchain: the ratio says nothing of the source.
    OtherToolchain(f64),
    /// It is not in the baseline.
    Unknown,
}

impl Verdict {
    /// Something has to be done: by the source, or by a look at the figures and `--accept`.
    pub(crate) fn is_failure(self) -> bool {
        matches!(self, Self::Regression(_) | Self::Unknown)
    }
}

impl Baseline {
    pub(crate) fn new(toolchain: Toolchain, measured: &[Measured]) -> Self {
        let figure = |found: &Measured| (found.scenario.name.to_owned(), found.instructions.round());
        Self { toolchain, instructions_per_request: measured.iter().map(figure).collect() }
    }

    pub(crate) fn load(path: &Path) -> anyhow::Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not as expected", path.display()))
    }

    pub(crate) fn save(&self, path: &Path) -> io::Result<()> {
        fs::write(path, serde_json::to_string_pretty(self)? + "\n")
    }

    /// What a request of a scenario cost.
    pub(crate) fn instructions(&self, scenario: &str) -> Option<f64> {
        self.instructions_per_request.get(scenario).copied()
    }

    /// Compares a figure, which was made with `toolchain`.
    pub(crate) fn judge(&self, toolchain: &Toolchain, scenario: &str, instructions: f64) -> Verdict {
        let Some(before) = self.instructions(scenario) else { return Verdict::Unknown };
        let ratio = instructions / before;
        if *toolchain != self.toolchain {
            Verdict::OtherToolchain(ratio)
        } else if ratio > LIMIT {
            Verdict::Regression(ratio)
        } else {
            Verdict::Kept(ratio)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toolchain(rustc: &str) -> Toolchain {
        Toolchain { rustc: rustc.into(), libc: "2.36".into(), valgrind: "3.24".into() }
    }

    fn baseline() -> Baseline {
        Baseline { toolchain: toolchain("1.95"), instructions_per_request: BTreeMap::from([("read".into(), 1000.0)]) }
    }

    #[test]
    fn more_than_three_percent_are_a_regression_if_the_compiler_is_the_same() {
        let judge = |rustc, instructions| baseline().judge(&toolchain(rustc), "read", instructions);
        assert_eq!(judge("1.95", 1030.0), Verdict::Kept(1.03));
        assert_eq!(judge("1.95", 1031.0), Verdict::Regression(1.031));
        assert_eq!(judge("1.95", 700.0), Verdict::Kept(0.7));
        assert_eq!(judge("1.96", 2000.0), Verdict::OtherToolchain(2.0));
        assert!(judge("1.95", 1031.0).is_failure() && !judge("1.96", 2000.0).is_failure());
    }

    #[test]
    fn a_scenario_that_was_never_looked_at_fails() {
        assert!(baseline().judge(&toolchain("1.95"), "write", 1.0).is_failure());
    }
}
