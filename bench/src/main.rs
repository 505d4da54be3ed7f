//! `vvu-bench`: see the library's text and `--help`.

use std::io::{Write, stdout};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use serde::Serialize;
use vvu_bench::bare::BareLoad;
use vvu_bench::cli::{Cli, Command};
use vvu_bench::hop;
use vvu_bench::messages::Messages;
use vvu_bench::outcome::Outcome;
use vvu_bench::packets::Packets;

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Load(options) => {
            let json = options.json;
            let outcome = options.load().run()?;
            if json { print_json(&outcome) } else { print(&outcome) }
        }
        Command::Bare(options) => print_json(&BareLoad::from(options).run()?),
        Command::Packets(options) => print_json(&Packets::from(options).run()?),
        Command::Messages(options) => print_json(&Messages::from(options).run()?),
        Command::Hop { time } => print_json(&hop::run(time)?),
    }
}

fn print_json(outcome: &impl Serialize) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    serde_json::to_writer(&mut out, outcome)?;
    writeln!(out).context("cannot write the outcome")
}

fn print(outcome: &Outcome) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    let (latency, whole) = (&outcome.latency_us, &outcome.whole);
    writeln!(
        out,
        "{:.0} each second, {:.1} MiB/s; latency {:.1} us (p50 {:.1}, p99 {:.1}, most {:.1}); \
         {} kicks, {} calls, {} waits for {} requests",
        outcome.iops,
        outcome.mib_per_second,
        latency.mean,
        latency.p50,
        latency.p99,
        latency.max,
        whole.kicks,
        whole.calls,
        whole.waits,
        whole.requests
    )
    .context("cannot write the outcome")
}
