//! Several vhost-user sockets under the same load, in turns: the load program, `vvu-bench`, is the same for all of them.
//!
//! At each point every way gets its run, and the next round begins with another way; ratios are those of neighbouring runs.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use vvu_bench::latency::shares;
use vvu_bench::outcome::Outcome;
use vvu_bench::report::{Plot, Report, Scale, Series, Table};

use super::{Spread, load_program};
use crate::process::output_of;

/// Ranges of a plotted histogram for each power of ten.
const RANGES_PER_DECADE: u32 = 16;

/// Part of a run that is not measured.
const WARM_UP: Duration = Duration::from_millis(100);

/// A way to a disk.
#[derive(Debug)]
pub(crate) struct Way {
    /// What it is called in tables.
    pub(crate) name: String,
    /// Where its front-end connects.
    pub(crate) socket: PathBuf,
    /// Processes that the way is made of: what they are, and their ids.
    pub(crate) processes: Vec<(&'static str, u32)>,
    /// The way, by its number, that it is compared with.
    pub(crate) against: Option<usize>,
}

/// A load.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Point {
    /// What stores the data.
    pub(crate) storage: &'static str,
    /// As fio calls it.
    pub(crate) pattern: &'static str,
    /// Length of a request.
    pub(crate) block: &'static str,
    /// Requests under way.
    pub(crate) depth: u16,
    /// Whether the driver looks at its ring all the time, instead of waiting for calls.
    pub(crate) polled: bool,
}

/// One way at one point.
#[derive(Debug, Serialize)]
pub(crate) struct Cell {
    way: String,
    #[serde(flatten)]
    point: Point,
    iops: Spread,
    p50_us: Spread,
    mean_us: Spread,
    p99_us: Spread,
    kicks_per_request: Spread,
    calls_per_request: Spread,
    /// Of the load, then of each process of the way.
    costs: Vec<Cost>,
    /// What it is compared with, if it is.
    compared: Option<Compared>,
    /// Of all rounds: upper ends of ranges in microseconds, and requests.
    histogram: Vec<(f64, u64)>,
}

/// What a process takes for a request.
#[derive(Debug, Serialize)]
struct Cost {
    process: String,
    /// Times that one of its threads was taken off a processor, by itself or not.
    switches_per_request: Spread,
    processor_us_per_request: Spread,
}

/// Within each round, the one's figure divided by the other's.
#[derive(Debug, Serialize)]
struct Compared {
    with: String,
    iops: Spread,
    p50: Spread,
    /// Processor time of load and processes together, for each request.
    processor: Spread,
}

/// How often and how long.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Runs {
    /// Rounds at each point, at least one.
    pub rounds: u32,
    /// Length of one run.
    pub runtime: Duration,
}

impl Point {
    fn title(&self) -> String {
        let mode = if self.polled { "polled" } else { "interrupt" };
        format!("{}, {} {}, {}, {mode}", self.storage, self.block, self.pattern, self.depth)
    }
}

/// All block sizes, depths and modes of one storage.
pub(crate) fn all_points(storage: &'static str, pattern: &'static str) -> Vec<Point> {
    let mut points = Vec::new();
    for block in ["4k", "128k"] {
        for polled in [false, true] {
            points.extend([1, 4, 32, 128].map(|depth| Point { storage, pattern, block, depth, polled }));
        }
    }
    points
}

/// Measures all ways at each point.
pub(crate) fn measure(ways: &[Way], points: &[Point], runs: Runs) -> Result<Vec<Vec<Cell>>> {
    let mut all = Vec::new();
    for point in points {
        eprintln!("bench: {}", point.title());
        let mut outcomes: Vec<Vec<Outcome>> = ways.iter().map(|_| Vec::new()).collect();
        for round in 0..runs.rounds.max(1) as usize {
            let mut turns: Vec<_> = ways.iter().zip(&mut outcomes).collect();
            turns.rotate_left(round % ways.len().max(1));
            for (way, outcomes) in turns {
                outcomes
                    .push(load(way, point, runs.runtime).with_context(|| format!("{}, {}", way.name, point.title()))?);
            }
        }
        all.push(ways.iter().zip(&outcomes).map(|(way, own)| cell(way, point, own, ways, &outcomes)).collect());
    }
    Ok(all)
}

fn load(way: &Way, point: &Point, runtime: Duration) -> Result<Outcome> {
    let mut command = load_program()?;
    command.args(["load", "--json", "--pattern", point.pattern, "--block", point.block, "--socket"]).arg(&way.socket);
    command.args(["--depth", &point.depth.to_string(), "--time", &runtime.as_secs_f64().to_string()]);
    command.args(["--warm-up", &WARM_UP.as_secs_f64().to_string()]);
    if point.polled {
        command.arg("--polled");
    }
    for (_, pid) in &way.processes {
        command.args(["--watch", &pid.to_string()]);
    }
    serde_json::from_str(&output_of(&mut command)?).context("vvu-bench says something else than expected")
}

fn cell(way: &Way, point: &Point, own: &[Outcome], ways: &[Way], outcomes: &[Vec<Outcome>]) -> Cell {
    let spread = |figure: &dyn Fn(&Outcome) -> f64| Spread::of(own.iter().map(figure).collect());
    let compared = way.against.and_then(|other| ways.get(other).zip(outcomes.get(other))).map(|(other, theirs)| {
        let ratio = |figure: &dyn Fn(&Outcome) -> f64| {
            Spread::of(own.iter().zip(theirs).map(|(own, theirs)| figure(own) / figure(theirs)).collect())
        };
        Compared {
            with: other.name.clone(),
            iops: ratio(&|o| o.iops),
            p50: ratio(&|o| o.latency_us.p50),
            processor: ratio(&processor_per_request),
        }
    });
    let each = |figure: &dyn Fn(&Outcome) -> u64| spread(&|o| figure(o) as f64 / o.whole.requests.max(1) as f64);
    let mut costs = vec![Cost {
        process: "load".to_owned(),
        switches_per_request: each(&|o| o.whole.load.voluntary_switches + o.whole.load.involuntary_switches),
        processor_us_per_request: spread(&|o| o.whole.load.processor_ns as f64 / 1e3 / o.whole.requests.max(1) as f64),
    }];
    costs.extend(way.processes.iter().enumerate().map(|(index, (name, _))| {
        let usage = move |outcome: &Outcome| outcome.whole.processes.get(index).map(|p| p.usage).unwrap_or_default();
        Cost {
            process: (*name).to_owned(),
            switches_per_request: each(&|o| usage(o).voluntary_switches + usage(o).involuntary_switches),
            processor_us_per_request: spread(&|o| usage(o).processor_ns as f64 / 1e3 / o.whole.requests.max(1) as f64),
        }
    }));
    Cell {
        way: way.name.clone(),
        point: point.clone(),
        iops: spread(&|o| o.iops),
        p50_us: spread(&|o| o.latency_us.p50),
        mean_us: spread(&|o| o.latency_us.mean),
        p99_us: spread(&|o| o.latency_us.p99),
        kicks_per_request: each(&|o| o.whole.kicks),
        calls_per_request: each(&|o| o.whole.calls),
        costs,
        compared,
        histogram: own.iter().flat_map(|outcome| outcome.latency_us.histogram.clone()).collect(),
    }
}

/// Of the load and of all that is watched, in nanoseconds.
fn processor_per_request(outcome: &Outcome) -> f64 {
    let processes = outcome.whole.processes.iter().map(|process| process.usage.processor_ns);
    (outcome.whole.load.processor_ns + processes.sum::<u64>()) as f64 / outcome.whole.requests.max(1) as f64
}

/// Adds rows, tables and plots of all cells. `counts` adds the table of kicks, calls and switches.
pub(crate) fn report(report: &mut Report, cells: &[Vec<Cell>], counts: bool) -> Result<()> {
    for cell in cells.iter().flatten() {
        report.add_row(cell)?;
    }
    let mut groups: Vec<(String, Vec<&Vec<Cell>>)> = Vec::new();
    for row in cells {
        let Some(first) = row.first() else { continue };
        let Point { storage, pattern, .. } = first.point;
        let title = format!("{storage}, {pattern}: IOPS, and half of the requests took at most so many µs");
        match groups.last_mut().filter(|group| group.0 == title) {
            Some(group) => group.1.push(row),
            None => groups.push((title, vec![row])),
        }
    }
    for (title, rows) in &groups {
        report.tables.push(speeds(title, rows));
        if counts {
            report.tables.push(counts_of(rows));
        }
        report.plots.extend(plots(rows));
    }
    Ok(())
}

/// What the first columns of all tables say.
const POINT_COLUMNS: [&str; 3] = ["block", "depth", "driver"];

fn point_cells(point: &Point) -> [String; 3] {
    let mode = if point.polled { "polled" } else { "interrupt" };
    [point.block.to_owned(), point.depth.to_string(), mode.to_owned()]
}

fn speeds(title: &str, rows: &[&Vec<Cell>]) -> Table {
    let mut columns = POINT_COLUMNS.map(str::to_owned).to_vec();
    let ways = rows.first().map_or(&[][..], |row| row);
    columns.extend(ways.iter().map(|cell| cell.way.clone()));
    let ratio = |cell: &Cell| cell.compared.as_ref().map(|with| format!("{} ÷ {}", cell.way, with.with));
    columns.extend(ways.iter().filter_map(ratio));
    let line = |row: &&Vec<Cell>| {
        let mut line = row.first().map_or_else(Vec::new, |cell| point_cells(&cell.point).to_vec());
        line.extend(row.iter().map(|cell| format!("{:.0}; {:.1}", cell.iops.median, cell.p50_us.median)));
        let ratios = |with: &Compared| {
            let Spread { median, least, most } = with.iops;
            format!("**{median:.2}** [{least:.2}..{most:.2}]; {:.2}; {:.2}", with.p50.median, with.processor.median)
        };
        line.extend(row.iter().filter_map(|cell| cell.compared.as_ref().map(ratios)));
        line
    };
    Table { title: title.to_owned(), columns, rows: rows.iter().map(line).collect() }
}

fn counts_of(rows: &[&Vec<Cell>]) -> Table {
    let mut columns = POINT_COLUMNS.map(str::to_owned).to_vec();
    columns.extend(["way", "kicks", "calls", "switches", "processor time, µs"].map(str::to_owned));
    let list = |cell: &Cell, figure: &dyn Fn(&Cost) -> String| {
        let costs: Vec<_> = cell.costs.iter().map(|cost| format!("{} {}", cost.process, figure(cost))).collect();
        costs.join(", ")
    };
    let line = |cell: &Cell| {
        let mut line = point_cells(&cell.point).to_vec();
        line.extend([
            cell.way.clone(),
            format!("{:.2}", cell.kicks_per_request.median),
            format!("{:.2}", cell.calls_per_request.median),
            list(cell, &|cost| format!("{:.3}", cost.switches_per_request.median)),
            list(cell, &|cost| format!("{:.1}", cost.processor_us_per_request.median)),
        ]);
        line
    };
    let rows = rows.iter().flat_map(|row| row.iter().map(line)).collect();
    Table { title: "The same, for each request:".to_owned(), columns, rows }
}

/// IOPS over depth for each block size and mode, and the latencies of one request at a time.
fn plots(rows: &[&Vec<Cell>]) -> Vec<Plot> {
    let mut plots: Vec<Plot> = Vec::new();
    for row in rows {
        let Some(Cell { point, .. }) = row.first() else { continue };
        let mode = if point.polled { "polled" } else { "interrupt" };
        let place = format!("{}-{}-{}-{mode}", point.storage.replace(' ', "-"), point.pattern, point.block);
        let title = format!("{}, {} {}, {mode}", point.storage, point.block, point.pattern);
        let name = format!("iops-{place}");
        if plots.iter().all(|plot| plot.name != name) {
            let empty = |cell: &Cell| Series { name: cell.way.clone(), points: Vec::new() };
            plots.push(Plot {
                name: name.clone(),
                title: title.clone(),
                x: "requests under way".to_owned(),
                y: "requests per second".to_owned(),
                scale: Scale::Logarithmic,
                series: row.iter().map(empty).collect(),
            });
        }
        if let Some(plot) = plots.iter_mut().find(|plot| plot.name == name) {
            for (series, cell) in plot.series.iter_mut().zip(*row) {
                series.points.push((f64::from(point.depth), cell.iops.median));
            }
        }
        if point.depth == 1 && point.block == "4k" {
            let series =
                |cell: &Cell| Series { name: cell.way.clone(), points: shares(&cell.histogram, RANGES_PER_DECADE) };
            plots.push(Plot {
                name: format!("latency-{place}"),
                title: format!("Latency, one request at a time: {title}"),
                x: "latency in µs".to_owned(),
                y: "share of the requests in %".to_owned(),
                scale: Scale::Mixed,
                series: row.iter().map(series).collect(),
            });
        }
    }
    plots
}
