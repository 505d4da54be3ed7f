//! Figures: frames from one port of the switch to another one, by `vvu-bench packets`, which plays both driver VMs.

use anyhow::{Context, Result};
use serde::Serialize;
use vvu_bench::packets::Outcome;
use vvu_bench::report::{Report, Table};

use super::side_by_side::Runs;
use super::{Spread, finish_report, load_program};
use crate::network::{Port, ServedSwitch};
use crate::process::output_of;
use crate::testbed::{Testbed, Turn};

/// Lengths of frames in bytes, without their checksums: the least, and the most with an MTU of 1500.
const FRAMES: [u16; 2] = [60, 1514];

/// Frames that the sender has under way.
const DEPTHS: [u16; 2] = [1, 64];

/// One way at one point.
#[derive(Debug, Serialize)]
struct Row {
    way: &'static str,
    frame: u16,
    depth: u16,
    received_per_second: Spread,
    p50_us: Spread,
    /// Of those that the switch took from the sender.
    lost_share: Spread,
    kicks_per_frame: Spread,
    calls_per_frame: Spread,
    /// Compared with the first way, within each round.
    ratio: Spread,
}

/// Runs the benchmark and prints its table on standard output; progress goes to standard error.
///
/// # Errors
/// If a switch does not come up, a load fails, or the output is closed.
pub fn run(runs: Runs) -> Result<()> {
    let testbed = Testbed::open("bench-packets", Turn::Alone)?;
    let mut document = Report::new(
        "packets",
        "Frames from one port of the switch to another one by `vvu-bench packets`, in turns; median [least..most] of the rounds. \
         Frames that the receiver has no buffer for are lost, as on a wire."
            .to_owned(),
        format!("cargo xtask bench packets --rounds {} --runtime {}", runs.rounds, runs.runtime.as_secs_f64()),
    );
    let ports: Vec<_> = (1..=6).map(|number| Port::new(&testbed, number)).collect();
    let mut ways = Vec::new();
    let mut switches = Vec::new();
    for (pair, way) in ports.chunks_exact(2).zip(["on the host, no polling", "on the host", "in an appliance VM"]) {
        let [from, to] = pair else { continue };
        switches.push(match way {
            "on the host, no polling" => ServedSwitch::on_host(&testbed, &[from, to], &["--poll", "off"])?,
            "on the host" => ServedSwitch::on_host(&testbed, &[from, to], &[])?,
            _ => ServedSwitch::in_appliance(&testbed, &[from, to], &[])?,
        });
        ways.push((way, from, to));
    }
    let mut table = Table {
        title: "Frames that arrive in a second:".to_owned(),
        columns: [
            "frame",
            "depth",
            "switch",
            "each second",
            "÷ the first",
            "half of them within, µs",
            "lost, %",
            "kicks",
            "calls",
        ]
        .map(str::to_owned)
        .to_vec(),
        rows: Vec::new(),
    };
    for frame in FRAMES {
        for depth in DEPTHS {
            eprintln!("bench: frames of {frame} bytes, {depth} under way");
            for row in measure(&ways, frame, depth, runs)? {
                table.rows.push(row.cells());
                document.add_row(&row)?;
            }
        }
    }
    document.tables.push(table);
    for switch in switches {
        switch.stop()?;
    }
    finish_report(&document)
}

fn measure(ways: &[(&'static str, &Port, &Port)], frame: u16, depth: u16, runs: Runs) -> Result<Vec<Row>> {
    let mut outcomes: Vec<Vec<Outcome>> = ways.iter().map(|_| Vec::new()).collect();
    for round in 0..runs.rounds.max(1) as usize {
        let mut turns: Vec<_> = ways.iter().zip(&mut outcomes).collect();
        turns.rotate_left(round % ways.len().max(1));
        for ((_, from, to), outcomes) in turns {
            let mut command = load_program()?;
            command.arg("packets").arg("--from").arg(from.socket()).arg("--to").arg(to.socket());
            command.args(["--frame", &frame.to_string(), "--depth", &depth.to_string()]);
            command.args(["--time", &runs.runtime.as_secs_f64().to_string()]);
            let output = output_of(&mut command)?;
            outcomes.push(serde_json::from_str(&output).context("vvu-bench says something else than expected")?);
        }
    }
    let first = outcomes.first().cloned().unwrap_or_default();
    let row = |((way, ..), own): (&(&'static str, _, _), &Vec<Outcome>)| {
        let spread = |figure: &dyn Fn(&Outcome) -> f64| Spread::of(own.iter().map(figure).collect());
        let each = |figure: &dyn Fn(&Outcome) -> u64| {
            spread(&|outcome| figure(outcome) as f64 / outcome.whole.requests.max(1) as f64)
        };
        let ratio = |(own, first): (&Outcome, &Outcome)| own.received_per_second / first.received_per_second;
        Row {
            way,
            frame,
            depth,
            received_per_second: spread(&|outcome| outcome.received_per_second),
            p50_us: spread(&|outcome| outcome.latency_us.p50),
            lost_share: spread(&|outcome| {
                outcome.sent.saturating_sub(outcome.whole.requests) as f64 / outcome.sent.max(1) as f64
            }),
            kicks_per_frame: each(&|outcome| outcome.whole.kicks),
            calls_per_frame: each(&|outcome| outcome.whole.calls),
            ratio: Spread::of(own.iter().zip(&first).map(ratio).collect()),
        }
    };
    Ok(ways.iter().zip(&outcomes).map(row).collect())
}

impl Row {
    fn cells(&self) -> Vec<String> {
        let Spread { median, least, most } = self.received_per_second;
        vec![
            self.frame.to_string(),
            self.depth.to_string(),
            self.way.to_owned(),
            format!("{median:.0} [{least:.0}..{most:.0}]"),
            format!("{:.2} [{:.2}..{:.2}]", self.ratio.median, self.ratio.least, self.ratio.most),
            format!("{:.1}", self.p50_us.median),
            format!("{:.1}", self.lost_share.median * 100.0),
            format!("{:.2}", self.kicks_per_frame.median),
            format!("{:.2}", self.calls_per_frame.median),
        ]
    }
}
