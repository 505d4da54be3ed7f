//! Runs scenarios, and makes figures of what was counted.

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZero;
use std::path::Path;
use std::sync::Mutex;
use std::thread::{self, available_parallelism};

use anyhow::{Context, anyhow};

use crate::callgrind::Callgrind;
use crate::disk::Disk;
use crate::network::Network;
use crate::profile::Profile;
use crate::scenario::Scenario;

/// Requests of the short run: what grows or is learnt with the first of them is not counted.
const FEW: u32 = 64;

/// Requests of the long run.
const MANY: u32 = FEW + 2048;

/// What is measured, and with what.
#[derive(Debug)]
pub(crate) struct Programs<'a> {
    pub(crate) callgrind: Callgrind,
    pub(crate) blk: &'a Path,
    pub(crate) net: &'a Path,
    /// For images.
    pub(crate) directory: &'a Path,
    /// Where callgrind's files are left.
    pub(crate) keep: Option<&'a Path>,
}

/// What one request of a scenario costs.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Measured {
    pub(crate) scenario: Scenario,
    pub(crate) instructions: f64,
    /// Of each function itself, most first.
    pub(crate) functions: Vec<(String, f64)>,
}

impl Programs<'_> {
    /// Measures scenarios, as many at the same time as there are processors. The results have the order of the scenarios.
    pub(crate) fn measure(&self, scenarios: Vec<Scenario>) -> anyhow::Result<Vec<Measured>> {
        let count = scenarios.len();
        let waiting = Mutex::new(scenarios.into_iter().enumerate());
        let done = Mutex::new(BTreeMap::new());
        let work = || {
            while let Some((index, scenario)) = waiting.lock().ok().and_then(|mut waiting| waiting.next()) {
                let outcome = self.measure_one(scenario).with_context(|| scenario.name.to_owned());
                if let Ok(mut done) = done.lock() {
                    done.insert(index, outcome);
                }
            }
        };
        thread::scope(|scope| {
            let threads = available_parallelism().map_or(1, NonZero::get).min(count);
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            threads.into_iter().try_for_each(|thread| thread.join().map_err(|_panic| anyhow!("a scenario failed")))
        })?;
        done.into_inner().map_err(|_poison| anyhow!("a scenario failed"))?.into_values().collect()
    }

    fn measure_one(&self, scenario: Scenario) -> anyhow::Result<Measured> {
        let few = self.run(scenario, FEW)?;
        let many = self.run(scenario, MANY)?;
        let per_request = |many: u64, few: u64| (many as f64 - few as f64) / f64::from(MANY - FEW);
        let own = |(name, many): (&String, &u64)| {
            let few = few.functions.get(name).copied().unwrap_or(0);
            (name.clone(), per_request(*many, few))
        };
        let mut functions: Vec<_> = many.functions.iter().map(own).collect();
        functions.sort_by(|(_, left), (_, right)| right.total_cmp(left));
        Ok(Measured { scenario, instructions: per_request(many.total, few.total), functions })
    }

    /// Runs a scenario with this many requests from the start of the program to its end.
    fn run(&self, scenario: Scenario, requests: u32) -> anyhow::Result<Profile> {
        let directory = tempfile::tempdir_in(self.directory).context("no room for an image")?;
        let output = directory.path().join("callgrind.out");
        if scenario.work.is_disk() {
            let command = self.callgrind.command(self.blk, &output);
            Disk::start(command, directory.path(), scenario)?.run(requests)?;
        } else {
            let command = self.callgrind.command(self.net, &output);
            Network::start(command, directory.path(), scenario)?.run(requests)?;
        }
        let text = fs::read_to_string(&output).context("callgrind has left nothing")?;
        if let Some(keep) = self.keep {
            let name = scenario.name.replace(|char: char| !char.is_ascii_alphanumeric(), "-");
            fs::copy(&output, keep.join(format!("{name}-{requests}.callgrind"))).context("callgrind's file")?;
        }
        Profile::parse(&text).context("callgrind's file")
    }
}
