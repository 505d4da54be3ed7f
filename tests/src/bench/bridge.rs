//! Figures: the bridge by itself. What a control message takes on each way, what a memory map takes, and what is between a kick
//! and the back-end that it is for.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use vvu_bench::latency::Summary;
use vvu_bench::messages::{Latency, Outcome};
use vvu_bench::report::{Report, Table};

use super::back_ends::{DISK_LEN, Storage};
use super::side_by_side::{Point, Runs, Way, measure, report};
use super::ways::{Signals, straight, through_appliance, through_loopback};
use super::{Spread, fill, finish_report, load_program};
use crate::backend::ServedImage;
use crate::image_file::create;
use crate::process::output_of;
use crate::testbed::{Testbed, Turn};

/// Messages on one way.
#[derive(Debug, Serialize)]
struct Row {
    way: String,
    message: &'static str,
    per_second: Spread,
    p50_us: Spread,
    p99_us: Spread,
}

/// Runs the benchmark and prints its tables on standard output; progress goes to standard error.
///
/// # Errors
/// If a program does not come up, a load fails, or the output is closed.
pub fn run(runs: Runs) -> Result<()> {
    let testbed = Testbed::open("bench-bridge", Turn::Alone)?;
    let image = create(&testbed.folder().join("disk.img"), DISK_LEN)?;
    fill(&image, DISK_LEN)?;
    let mut document = Report::new(
        "bridge",
        "Control messages one at a time by `vvu-bench messages`: GET_FEATURES, and SET_MEM_TABLE with 64 MiB of other memory than \
         before, each until it is answered; median [least..most] of the rounds. A hop is an eventfd from one thread that waits to \
         another one, by `vvu-bench hop`. Then one request at a time on a disk that keeps nothing: it takes two signals, so half of \
         what it takes more than on the straight way is what a signal takes more."
            .to_owned(),
        format!("cargo xtask bench bridge --rounds {} --runtime {}", runs.rounds, runs.runtime.as_secs_f64()),
    );
    let (first, _process) = straight(&testbed, &Storage::Null, "off")?;
    let (handed_over, _processes) = through_loopback(&testbed, &Storage::Null, "off", Signals::HandedOver)?;
    let (relayed, _more) = through_loopback(&testbed, &Storage::Null, "off", Signals::Relayed)?;
    let served = ServedImage::writable(&image).read_only();
    let (in_vm, vm) = through_appliance(&testbed, &served, "off", Signals::HandedOver)?;

    eprintln!("bench: control messages");
    let behind = Way { name: "bridge and loopback".to_owned(), ..handed_over };
    let in_vm = Way { name: "bridge and appliance VM".to_owned(), ..in_vm };
    messages(&mut document, &[&first, &behind, &in_vm], runs)?;
    vm.stop()?;
    let hops = repeat(runs, || program(&["hop", "--time", &seconds(runs.runtime)]))?;
    hop(&mut document, &hops)?;
    let handed_over = Way { name: "loopback, handed over".to_owned(), against: Some(0), ..behind };
    let ways = [first, handed_over, Way { against: Some(0), ..relayed }];
    let one = [false, true].map(|polled| Point { storage: "null", pattern: "randread", block: "4k", depth: 1, polled });
    report(&mut document, &measure(&ways, None, &one, runs)?, true)?;
    testbed.remove_images()?;
    finish_report(&document)
}

fn messages(document: &mut Report, ways: &[&Way], runs: Runs) -> Result<()> {
    let mut all: Vec<Vec<Outcome>> = ways.iter().map(|_| Vec::new()).collect();
    for _ in 0..runs.rounds.max(1) {
        for (way, outcomes) in ways.iter().zip(&mut all) {
            let socket = way.socket.display().to_string();
            outcomes.push(program(&["messages", "--socket", &socket, "--time", &seconds(runs.runtime)])?);
        }
    }
    let mut table = Table {
        title: "Control messages:".to_owned(),
        columns: ["message", "way", "each second", "half of them within, µs", "99 % within, µs"]
            .map(str::to_owned)
            .to_vec(),
        rows: Vec::new(),
    };
    for (message, maps) in [("GET_FEATURES", false), ("SET_MEM_TABLE", true)] {
        let kind = |outcome: &Outcome| if maps { outcome.memory_map.clone() } else { outcome.message.clone() };
        for (way, outcomes) in ways.iter().zip(&all) {
            let spread = |figure: &dyn Fn(&Latency) -> f64| {
                Spread::of(outcomes.iter().map(|outcome| figure(&kind(outcome))).collect())
            };
            let row = Row {
                way: way.name.clone(),
                message,
                per_second: spread(&|latency| latency.per_second),
                p50_us: spread(&|latency| latency.latency_us.p50),
                p99_us: spread(&|latency| latency.latency_us.p99),
            };
            let cells = [row.per_second, row.p50_us, row.p99_us].map(|spread| spread_text(&spread));
            table.rows.push([vec![message.to_owned(), way.name.clone()], cells.to_vec()].concat());
            document.add_row(&row)?;
        }
    }
    document.tables.push(table);
    Ok(())
}

/// What the system itself takes.
fn hop(document: &mut Report, hops: &[Summary]) -> Result<()> {
    let spread = |figure: &dyn Fn(&Summary) -> f64| Spread::of(hops.iter().map(figure).collect());
    let row = Row {
        way: "eventfd".to_owned(),
        message: "a hop",
        per_second: spread(&|hop| 1e6 / hop.mean),
        p50_us: spread(&|hop| hop.p50),
        p99_us: spread(&|hop| hop.p99),
    };
    if let Some(table) = document.tables.last_mut() {
        let cells = [row.per_second, row.p50_us, row.p99_us].map(|spread| spread_text(&spread));
        table.rows.push([vec![row.message.to_owned(), row.way.clone()], cells.to_vec()].concat());
    }
    Ok(document.add_row(&row)?)
}

fn repeat<T>(runs: Runs, run: impl Fn() -> Result<T>) -> Result<Vec<T>> {
    (0..runs.rounds.max(1)).map(|_| run()).collect()
}

fn program<T: DeserializeOwned>(arguments: &[&str]) -> Result<T> {
    let mut command = load_program()?;
    serde_json::from_str(&output_of(command.args(arguments))?).context("vvu-bench says something else than expected")
}

fn seconds(time: Duration) -> String {
    time.as_secs_f64().to_string()
}

fn spread_text(spread: &Spread) -> String {
    let digits = if spread.median < 100.0 { 1 } else { 0 };
    format!("{:.digits$} [{:.digits$}..{:.digits$}]", spread.median, spread.least, spread.most)
}
