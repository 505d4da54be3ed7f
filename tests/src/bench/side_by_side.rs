//! Several vhost-user sockets under the same load, in turns: the load program, `vvu-bench`, is the same for all of them.
//!
//! At each point every way gets its run, and the next round begins with another way; ratios are those of neighbouring runs.
//!
//! For a disk in a file each round begins with the *limit*: the same reads without any back-end, by the faster of the two methods
//! of `vvu-bench bare`. Where a back-end is near it, none can be much faster.

use std::path::{Path, PathBuf};
use std::process::Command;
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
    /// Within each round, its IOPS divided by those of the limit, if that was measured.
    of_limit: Option<Spread>,
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

/// Measures all ways at each point, and with `bare` the limit of the file that their disk is in.
pub(crate) fn measure(ways: &[Way], bare: Option<&Path>, points: &[Point], runs: Runs) -> Result<Vec<Vec<Cell>>> {
    let mut all = Vec::new();
    for point in points {
        eprintln!("bench: {}", point.title());
        let mut outcomes: Vec<Vec<Outcome>> = ways.iter().map(|_| Vec::new()).collect();
        let mut limits = Vec::new();
        for round in 0..runs.rounds.max(1) as usize {
            if let Some(file) = bare {
                limits.push(limit(file, point, runs.runtime).with_context(|| format!("limit, {}", point.title()))?);
            }
            let mut turns: Vec<_> = ways.iter().zip(&mut outcomes).collect();
            turns.rotate_left(round % ways.len().max(1));
            for (way, outcomes) in turns {
                outcomes
                    .push(load(way, point, runs.runtime).with_context(|| format!("{}, {}", way.name, point.title()))?);
            }
        }
        let is_limited = !limits.is_empty();
        let limit = is_limited.then(|| cell("limit", &[], point, &limits));
        let cells = ways.iter().zip(&outcomes).map(|(way, own)| Cell {
            compared: way.against.and_then(|other| Some(compared(ways.get(other)?, own, outcomes.get(other)?))),
            of_limit: is_limited.then(|| ratio(own, &limits, &|outcome| outcome.iops)),
            ..cell(&way.name, &way.processes, point, own)
        });
        all.push(limit.into_iter().chain(cells).collect());
    }
    Ok(all)
}

/// The better one of what `vvu-bench bare` reaches.
fn limit(file: &Path, point: &Point, runtime: Duration) -> Result<Outcome> {
    let bare = |method: &str| {
        let mut command = load_program()?;
        command.args(["bare", "--method", method, "--file"]).arg(file);
        add_point(&mut command, point, runtime);
        read_outcome(command)
    };
    let (io_uring, pread) = (bare("io-uring")?, bare("pread")?);
    Ok(if pread.iops > io_uring.iops { pread } else { io_uring })
}

fn load(way: &Way, point: &Point, runtime: Duration) -> Result<Outcome> {
    let mut command = load_program()?;
    command.args(["load", "--json", "--pattern", point.pattern, "--socket"]).arg(&way.socket);
    for (_, pid) in &way.processes {
        command.args(["--watch", &pid.to_string()]);
    }
    add_point(&mut command, point, runtime);
    read_outcome(command)
}

fn add_point(command: &mut Command, point: &Point, runtime: Duration) {
    command.args(["--block", point.block, "--depth", &point.depth.to_string()]);
    command.args(["--time", &runtime.as_secs_f64().to_string(), "--warm-up", &WARM_UP.as_secs_f64().to_string()]);
    if point.polled {
        command.arg("--polled");
    }
}

fn read_outcome(mut command: Command) -> Result<Outcome> {
    serde_json::from_str(&output_of(&mut command)?).context("vvu-bench says something else than expected")
}

fn ratio(own: &[Outcome], theirs: &[Outcome], figure: &dyn Fn(&Outcome) -> f64) -> Spread {
    Spread::of(own.iter().zip(theirs).map(|(own, theirs)| figure(own) / figure(theirs)).collect())
}

fn compared(with: &Way, own: &[Outcome], theirs: &[Outcome]) -> Compared {
    Compared {
        with: with.name.clone(),
        iops: ratio(own, theirs, &|o| o.iops),
        p50: ratio(own, theirs, &|o| o.latency_us.p50),
        processor: ratio(own, theirs, &processor_per_request),
    }
}

/// Not compared with anything.
fn cell(name: &str, processes: &[(&'static str, u32)], point: &Point, own: &[Outcome]) -> Cell {
    let spread = |figure: &dyn Fn(&Outcome) -> f64| Spread::of(own.iter().map(figure).collect());
    let each = |figure: &dyn Fn(&Outcome) -> u64| spread(&|o| figure(o) as f64 / o.whole.requests.max(1) as f64);
    let mut costs = vec![Cost {
        process: "load".to_owned(),
        switches_per_request: each(&|o| o.whole.load.voluntary_switches + o.whole.load.involuntary_switches),
        processor_us_per_request: spread(&|o| o.whole.load.processor_ns as f64 / 1e3 / o.whole.requests.max(1) as f64),
    }];
    costs.extend(processes.iter().enumerate().map(|(index, (name, _))| {
        let usage = move |outcome: &Outcome| outcome.whole.processes.get(index).map(|p| p.usage).unwrap_or_default();
        Cost {
            process: (*name).to_owned(),
            switches_per_request: each(&|o| usage(o).voluntary_switches + usage(o).involuntary_switches),
            processor_us_per_request: spread(&|o| usage(o).processor_ns as f64 / 1e3 / o.whole.requests.max(1) as f64),
        }
    }));
    Cell {
        way: name.to_owned(),
        point: point.clone(),
        iops: spread(&|o| o.iops),
        p50_us: spread(&|o| o.latency_us.p50),
        mean_us: spread(&|o| o.latency_us.mean),
        p99_us: spread(&|o| o.latency_us.p99),
        kicks_per_request: each(&|o| o.whole.kicks),
        calls_per_request: each(&|o| o.whole.calls),
        costs,
        compared: None,
        of_limit: None,
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
        let shares =
            if row.iter().any(|cell| cell.of_limit.is_some()) { ", and the share of the limit's IOPS" } else { "" };
        let title = format!("{storage}, {pattern}: IOPS, and half of the requests took at most so many µs{shares}");
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
        let figures = |cell: &Cell| {
            let share = cell.of_limit.map_or_else(String::new, |share| format!("; {:.2}", share.median));
            format!("{:.0}; {:.1}{share}", cell.iops.median, cell.p50_us.median)
        };
        line.extend(row.iter().map(figures));
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
