//! Counts the instructions that the block and the network back-end execute per request, and compares them with a baseline.
//!
//! `cargo xtask bench instructions` and a step of `cargo xtask test` start it. It never measures time, and never changes the
//! back-ends: it runs the very programs of the appliance image.
//!
//! # Theory of operation
//! Valgrind's callgrind counts every instruction that the program executes in user mode; the kernel's are not among them. A
//! scenario is run twice, with few and with many requests: the difference, by the difference of their numbers, is what one
//! request costs, without start and end of the program.
//!
//! The count is the same on each machine and in each run, although the program has threads, because driver and back-end go in
//! lock-step: the driver makes a batch of requests available, kicks once, waits until all are used, and then until all threads
//! of the back-end sleep ([`asleep`]). So nothing depends on who is faster. A back-end must not poll then, which it does by the
//! clock. Requests of a disk read a hole of a sparse image: the kernel has each of them done before it looks at the next, like
//! an infinitely fast disk. Writes do reach a disk, which completes them when it likes; therefore they go one at a time. Start
//! and end of the program are not quite the same each time: that is why a run is long.
//!
//! What is left to differ is the code: another compiler makes another program. So the baseline says which compiler it is of,
//! and a difference is a verdict only if it is the same one. How the C library copies memory depends on the processor; it is
//! told to use what every processor of the architecture has.
//!
//! # Map
//! - pure: `baseline`, `profile`, `scenario`, `table`
//! - what is run: `callgrind`, `asleep`, `disk`, `network`, `measure`

mod asleep;
mod baseline;
mod callgrind;
mod disk;
mod measure;
mod network;
mod profile;
mod scenario;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

use crate::baseline::{Baseline, Toolchain};
use crate::callgrind::Callgrind;
use crate::measure::{Measured, Programs};
use crate::scenario::Scenario;
use crate::table::Table;

/// Counts the instructions that the back-ends execute per request.
///
/// Ends with status 1 if a scenario takes over 3 % more than in the baseline, if that was made with the same compiler.
#[derive(Debug, Parser)]
#[command(name = "instructions")]
struct Cli {
    /// The block back-end
    #[arg(long, value_name = "PROGRAM")]
    blk: PathBuf,
    /// The network back-end
    #[arg(long, value_name = "PROGRAM")]
    net: PathBuf,
    /// Directory for disk images, on a file system that has direct I/O
    #[arg(long, value_name = "DIR")]
    directory: PathBuf,
    /// What is compared with
    #[arg(long, value_name = "FILE")]
    baseline: PathBuf,
    /// Make the figures of this run the baseline
    #[arg(long)]
    accept: bool,
    /// Show so many functions of each scenario; programs without symbols have none
    #[arg(long, value_name = "N", default_value_t = 0)]
    functions: usize,
    /// Only scenarios with this in their name
    #[arg(long, value_name = "NAME", conflicts_with = "accept")]
    only: Option<String>,
    /// Leave callgrind's files of the short and the long run of each scenario in DIR
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// False if there is a regression.
fn run(cli: &Cli) -> anyhow::Result<bool> {
    let callgrind = Callgrind::find()?;
    let toolchain = Toolchain::of_this_machine(&callgrind)?;
    let baseline = Baseline::load(&cli.baseline)?;
    let (directory, keep) = (&cli.directory, cli.keep.as_deref());
    let programs = Programs { callgrind, blk: &cli.blk, net: &cli.net, directory, keep };
    let disks = disk::has_direct_io(directory)?;
    if !disks {
        eprintln!("disks are left out: {} is on a file system without direct I/O", directory.display());
    }
    let is_wanted = |scenario: &Scenario| {
        let is_named = cli.only.as_ref().is_none_or(|part| scenario.name.contains(part.as_str()));
        is_named && (disks || !scenario.work.is_disk())
    };
    let scenarios = scenario::all().into_iter().filter(is_wanted).collect();
    let mut measured = programs.measure(scenarios)?;
    let fails = |found: &Measured| baseline.judge(&toolchain, found.scenario.name, found.instructions).is_failure();
    for suspect in measured.iter_mut().filter(|found| fails(found) && !cli.accept) {
        // What disturbs a run can only add to it.
        let again = programs.measure(vec![suspect.scenario])?;
        let less = again.into_iter().find(|again| again.instructions < suspect.instructions);
        *suspect = less.unwrap_or_else(|| suspect.clone());
    }
    let table = Table { measured: &measured, baseline: &baseline, toolchain: &toolchain, functions: cli.functions };
    if cli.json {
        println!("{}", serde_json::to_string_pretty(&table.json())?);
    } else {
        print!("{table}");
    }
    if cli.accept {
        let accepted = Baseline::new(toolchain, &measured);
        accepted.save(&cli.baseline).with_context(|| format!("cannot write {}", cli.baseline.display()))?;
        return Ok(true);
    }
    Ok(!measured.iter().any(fails))
}
