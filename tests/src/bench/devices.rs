//! Figures: what disks with an appliance VM each cost together, by their number, beside what [`crate::capacity`] computes for it from
//! one that was measured in the same run.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use vvu_bench::report::{Plot, Report, Scale, Series, Table};

use super::boot::{SETTLED_AFTER, cpu_ms, measured, wakeups};
use super::finish_report;
use crate::backend::ServedImage;
use crate::capacity::{DEFAULT_WINDOW, Host, Measured, Model};
use crate::driver_vm::kvm_is_usable;
use crate::evidence;
use crate::image_file::create;
use crate::testbed::{Testbed, Turn};
use crate::vvu_run::VvuRun;

/// How many devices there are at once, in turn.
const NUMBERS: [u64; 5] = [1, 2, 4, 8, 16];

/// Length of each disk in bytes.
const DISK_LEN: u64 = 64 << 20;

/// How long idleness is watched.
const IDLE_TIME: Duration = Duration::from_secs(20);

/// What so many devices took.
#[derive(Debug, Serialize)]
struct Row {
    devices: u64,
    accelerator: &'static str,
    /// Proportional set size of all processes, in bytes: nothing that they share counts twice.
    memory_bytes: u64,
    modelled_memory_bytes: u64,
    /// From the first start to the last device's being ready, all being started at once.
    start_ms: u64,
    modelled_start_ms: u64,
    idle_milli_cpus: u64,
    modelled_idle_milli_cpus: u64,
    idle_wakeups_per_second: u64,
    modelled_idle_wakeups_per_second: u64,
}

/// Runs the benchmark and prints its report on standard output; progress goes to standard error.
///
/// # Errors
/// If a machine does not come up, or the output is closed.
pub fn run() -> Result<()> {
    let testbed = Testbed::open("bench-devices", Turn::Alone)?;
    eprintln!("bench: one disk, for the model");
    let one = one(&testbed)?;
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    let model = Model::new(&one, Host { cpus, ..Host::default() }, DEFAULT_WINDOW);
    let mut rows = Vec::new();
    for devices in NUMBERS {
        eprintln!("bench: {devices} at once");
        rows.push(together(&testbed, devices, &model).with_context(|| format!("{devices} at once"))?);
    }
    testbed.remove_images()?;
    let about = "Disks with an appliance VM each, all started at once, ready and idle, beside what the model of docs/capacity.md makes of one.";
    let mut report = Report::new("devices", about.to_owned(), "cargo xtask bench devices".to_owned());
    for row in &rows {
        report.add_row(row)?;
    }
    report.tables.push(table(&rows));
    report.plots = vec![
        plot("memory", "MiB", &rows, |row| [row.memory_bytes >> 20, row.modelled_memory_bytes >> 20]),
        plot("start", "ms until all are ready", &rows, |row| [row.start_ms, row.modelled_start_ms]),
    ];
    finish_report(&report)
}

fn one(testbed: &Testbed) -> Result<Measured> {
    let image = create(&testbed.folder().join("one.img"), DISK_LEN)?;
    let run = VvuRun::start(testbed, "one", &ServedImage::writable(&image))?;
    let measured = measured(&run)?;
    run.stop().map(|_| measured)
}

fn together(testbed: &Testbed, devices: u64, model: &Model<'_>) -> Result<Row> {
    let begun = Instant::now();
    let beginning = (1..=devices).map(|number| {
        let name = format!("blk-{devices}-{number}");
        let image = create(&testbed.folder().join(format!("{name}.img")), DISK_LEN)?;
        VvuRun::begin_with(testbed, &name, &ServedImage::writable(&image), &[])
    });
    let beginning = beginning.collect::<Result<Vec<_>>>()?;
    let runs = beginning.into_iter().map(|run| run.await_ready()).collect::<Result<Vec<_>>>()?;
    let start_ms = u64::try_from(begun.elapsed().as_millis())?;
    sleep(SETTLED_AFTER);
    let pids = || runs.iter().flat_map(|run| [run.appliance().pid(), run.bridge().pid(), run.vvu().pid()]);
    let sum = |figure: fn(u32) -> Result<u64>| pids().map(figure).sum::<Result<u64>>();
    let before = (sum(cpu_ms)?, sum(wakeups)?);
    sleep(IDLE_TIME);
    let (cpu_ms, wakeups) = (sum(cpu_ms)? - before.0, sum(wakeups)? - before.1);
    let memory_bytes = sum(|pid| Ok(evidence::maps(pid)?.iter().map(|map| map.proportional).sum()))?;
    for run in runs {
        run.stop()?;
    }
    let modelled = model.cost(devices);
    Ok(Row {
        devices,
        accelerator: if kvm_is_usable() { "kvm" } else { "tcg" },
        memory_bytes,
        modelled_memory_bytes: modelled.memory_bytes,
        start_ms,
        modelled_start_ms: modelled.start_ms,
        idle_milli_cpus: cpu_ms / IDLE_TIME.as_secs(),
        modelled_idle_milli_cpus: modelled.idle_milli_cpus,
        idle_wakeups_per_second: wakeups / IDLE_TIME.as_secs(),
        modelled_idle_wakeups_per_second: modelled.idle_wakeups_per_second,
    })
}

fn table(rows: &[Row]) -> Table {
    let columns =
        ["devices", "memory", "model", "all ready after", "model", "CPUs while idle", "model", "wake-ups/s", "model"];
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let thousandths = |number: u64, unit: &str| format!("{:.3}{unit}", number as f64 / 1e3);
    let cells = |row: &Row| {
        vec![
            row.devices.to_string(),
            mib(row.memory_bytes),
            mib(row.modelled_memory_bytes),
            thousandths(row.start_ms, " s"),
            thousandths(row.modelled_start_ms, " s"),
            thousandths(row.idle_milli_cpus, ""),
            thousandths(row.modelled_idle_milli_cpus, ""),
            row.idle_wakeups_per_second.to_string(),
            row.modelled_idle_wakeups_per_second.to_string(),
        ]
    };
    Table {
        title: "Measured, and modelled from one:".to_owned(),
        columns: columns.map(str::to_owned).to_vec(),
        rows: rows.iter().map(cells).collect(),
    }
}

/// A plot of a figure and its model over the number of devices.
fn plot(name: &str, y: &str, rows: &[Row], figures: fn(&Row) -> [u64; 2]) -> Plot {
    let series = |name: &str, index: usize| Series {
        name: name.to_owned(),
        points: rows.iter().filter_map(|row| Some((row.devices as f64, *figures(row).get(index)? as f64))).collect(),
    };
    Plot {
        name: name.to_owned(),
        title: "Disks with an appliance VM each".to_owned(),
        x: "devices".to_owned(),
        y: y.to_owned(),
        scale: Scale::Linear,
        series: vec![series("measured", 0), series("modelled from one", 1)],
    }
}
