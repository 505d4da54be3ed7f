//! What callgrind has counted (callgrind's manual, "Callgrind Format Specification").

use std::collections::BTreeMap;

use anyhow::{Context, bail};

/// Instructions of one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Profile {
    pub(crate) total: u64,
    /// Of each function itself, without those that it calls.
    pub(crate) functions: BTreeMap<String, u64>,
}

impl Profile {
    /// Reads callgrind's file. Names must not be compressed, and nothing but instructions and lines be counted.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let mut total = None;
        let mut functions = BTreeMap::<String, u64>::new();
        let mut function = None;
        let mut is_call = false;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix("fn=") {
                function = Some(functions.entry(name.to_owned()).or_default());
            } else if line.starts_with("calls=") {
                // The next line says what the callee has cost, which is its own.
                is_call = true;
            } else if line.starts_with(|first: char| first.is_ascii_digit()) {
                let cost = line.split_ascii_whitespace().nth(1).context("a line has no cost")?;
                if !std::mem::take(&mut is_call) {
                    **function.as_mut().context("a cost is nobody's")? += cost.parse::<u64>()?;
                }
            } else if let Some(events) = line.strip_prefix("events:") {
                if events.trim() != "Ir" {
                    bail!("events are {events}, expected Ir");
                }
            } else if let Some(sum) = line.strip_prefix("totals:") {
                total = Some(sum.trim().parse()?);
            }
        }
        let total = total.context("the program did not come to its end")?;
        let sum: u64 = functions.values().sum();
        if sum != total {
            bail!("functions have {sum} instructions, and the program {total}");
        }
        Ok(Self { total, functions })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "\
version: 1
positions: line
events: Ir
summary: 160

ob=/program
fl=ring.rs
fn=take
12 40
fi=chain.rs
7 20
cfi=copy.c
cfn=memcpy
calls=3 100
13 90

fl=copy.c
fn=memcpy
100 90

fl=ring.rs
fn=take
14 10

totals: 160
";

    #[test]
    fn each_function_has_its_own_instructions() {
        let profile = Profile::parse(FILE).unwrap();
        assert_eq!(profile.total, 160);
        assert_eq!(profile.functions, BTreeMap::from([("memcpy".into(), 90), ("take".into(), 70)]));
    }

    #[test]
    fn what_does_not_add_up_is_refused() {
        assert!(Profile::parse(&FILE.replace("totals: 160", "totals: 161")).is_err());
        assert!(Profile::parse(&FILE.replace("events: Ir", "events: Ir Dr")).is_err());
        assert!(Profile::parse(&FILE.replace("totals: 160", "")).is_err());
    }
}
