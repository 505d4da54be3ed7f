//! The figures, for people and for programs.

use std::fmt;

use serde_json::{Value, json};

use crate::baseline::{Baseline, Toolchain, Verdict};
use crate::measure::Measured;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Table<'a> {
    pub(crate) measured: &'a [Measured],
    pub(crate) baseline: &'a Baseline,
    pub(crate) toolchain: &'a Toolchain,
    /// How many functions of each scenario are shown.
    pub(crate) functions: usize,
}

impl Table<'_> {
    pub(crate) fn verdict(&self, found: &Measured) -> Verdict {
        self.baseline.judge(self.toolchain, found.scenario.name, found.instructions)
    }

    pub(crate) fn json(&self) -> Value {
        let row = |found: &Measured| {
            let functions = found.functions.iter().take(self.functions);
            let verdict = match self.verdict(found) {
                Verdict::Kept(_) => "kept",
                Verdict::Regression(_) => "regression",
                Verdict::OtherToolchain(_) => "other toolchain",
                Verdict::Unknown => "unknown",
            };
            json!({
                "scenario": found.scenario.name,
                "instructions_per_request": found.instructions,
                "baseline": self.baseline.instructions(found.scenario.name),
                "verdict": verdict,
                "functions": functions.map(|(name, own)| json!({ "name": name, "instructions": own })).collect::<Vec<_>>(),
            })
        };
        json!({
            "toolchain": self.toolchain,
            "baseline_toolchain": self.baseline.toolchain,
            "rows": self.measured.iter().map(row).collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Instructions per request, user mode, by callgrind; {}.\n", self.toolchain.text())?;
        writeln!(f, "| scenario | instructions | baseline | now ÷ baseline |\n| --- | --- | --- | --- |")?;
        for found in self.measured {
            let name = found.scenario.name;
            let baseline = self.baseline.instructions(name).map_or_else(String::new, |before| before.to_string());
            let verdict = match self.verdict(found) {
                Verdict::Kept(ratio) | Verdict::OtherToolchain(ratio) => format!("{ratio:.3}"),
                Verdict::Regression(ratio) => format!("**{ratio:.3}: more than 1.03**"),
                Verdict::Unknown => "**not in the baseline**".into(),
            };
            writeln!(f, "| {name} | {:.0} | {baseline} | {verdict} |", found.instructions)?;
        }
        if *self.toolchain != self.baseline.toolchain {
            let before = self.baseline.toolchain.text();
            writeln!(f, "\nThe baseline is of another toolchain ({before}): differences are no verdict.")?;
        } else if self.measured.iter().any(|found| self.verdict(found).is_failure()) {
            let remedy = "cargo xtask bench instructions";
            writeln!(f, "\n`{remedy}` shows where it goes; `{remedy} --accept` makes these figures the baseline.")?;
        }
        for found in self.measured.iter().filter(|_| self.functions > 0) {
            writeln!(f, "\n{}:", found.scenario.name)?;
            for (name, own) in found.functions.iter().take(self.functions) {
                writeln!(f, "{own:>10.1} {:>5.1} % {name}", own / found.instructions * 100.0)?;
            }
        }
        Ok(())
    }
}
