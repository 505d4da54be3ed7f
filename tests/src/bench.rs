//! Figures. Here those of the disk; [`network`] and [`memory`] have theirs.
//!
//! The disk: fio in one driver VM, in turns on two disks that are the same image, one served by the appliance VM and one
//! by qemu-storage-daemon on the host.
//!
//! Times depend on the machine, and under TCG they say nothing; ratios of neighbouring runs do. So each round runs one job
//! on one disk and at once on the other, and the ratio is taken within the round. Each disk goes first in every other
//! round. Only one of the disks is used at a time, so sharing an image is sound.

use std::fs::File;
use std::io::{self, Write};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::backend::{Backend, Served, ServedImage};
use crate::counters::BlkCounters;
use crate::driver_vm::{Disk, DriverVm, DriverVmPlan, kvm_is_usable};
use crate::evidence;
use crate::fio::{Figures, Job};
use crate::image_file::create;
use crate::process::command_that_dies_with_us;
use crate::testbed::{Testbed, Turn, target_dir, workspace_program};

pub mod back_ends;
pub mod boot;
pub mod bridge;
pub mod devices;
pub mod memory;
pub mod network;
pub mod packets;
pub mod paths;
mod side_by_side;
mod ways;

pub use side_by_side::Runs;

/// The jobs, in the order of the table.
const JOBS: [Job; 6] = [
    Job { pattern: "randread", block_size: "4k", depth: 1 },
    Job { pattern: "randread", block_size: "4k", depth: 32 },
    Job { pattern: "randwrite", block_size: "4k", depth: 1 },
    Job { pattern: "randwrite", block_size: "4k", depth: 32 },
    Job { pattern: "read", block_size: "128k", depth: 16 },
    Job { pattern: "write", block_size: "128k", depth: 16 },
];

/// The disk behind the appliance VM, as the driver VM names it.
const THROUGH_VVU: &str = "/dev/vda";

/// The disk behind qemu-storage-daemon.
const ON_HOST: &str = "/dev/vdb";

/// What a person may choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BenchOptions {
    /// Rounds of each job, at least one.
    pub rounds: u32,
    /// Length of one run of fio.
    pub runtime: Duration,
    /// Length of the image in bytes.
    pub image_len: u64,
    /// What is compared with qemu-storage-daemon. With `vvu-blk` on the host, what remains is the price of the VM.
    pub measured: Backend,
    /// One JSON document on standard output instead of a table.
    pub json: bool,
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self { rounds: 3, runtime: Duration::from_secs(4), image_len: 256 << 20, measured: Backend::Vvu, json: false }
    }
}

/// Middle, least and most of one figure over all rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

/// One job on both disks.
#[derive(Debug, Clone, Serialize)]
struct Row {
    job: String,
    block_size: &'static str,
    measured_iops: Spread,
    host_iops: Spread,
    measured_latency_us: Spread,
    host_latency_us: Spread,
    /// Requests per second through what is measured divided by those through the host's back-end, within each round.
    ratio: Spread,
}

/// The whole document.
#[derive(Debug, Serialize)]
struct Report {
    measured: String,
    accelerator: &'static str,
    rounds: u32,
    seconds_per_run: f64,
    rows: Vec<Row>,
    /// Only if `vvu` is measured.
    vvu: Option<VvuFigures>,
}

/// What `vvu run` takes.
#[derive(Debug, Serialize)]
struct VvuFigures {
    seconds_to_ready: f64,
    /// Memory of the appliance's QEMU without the driver VM's memory, which it maps, too.
    appliance_resident_bytes: u64,
    appliance_proportional_bytes: u64,
    bridge_resident_bytes: u64,
    /// Of the whole benchmark.
    back_end: BlkCounters,
}

/// Runs the benchmark and prints its report on standard output; progress goes to standard error.
///
/// # Errors
/// If a machine does not come up, fio fails, or the output is closed.
pub fn run(options: &BenchOptions) -> Result<()> {
    let testbed = Testbed::open("bench", Turn::Alone)?;
    let image = create(&testbed.folder().join("disk.img"), options.image_len)?;
    fill(&image, options.image_len)?;
    let served = ServedImage::writable(&image);
    let measured = options.measured.serve(&testbed, "measured", &served)?;
    let host = Backend::QemuStorageDaemon.serve(&testbed, "host", &served)?;
    let plan = DriverVmPlan::new(&testbed, "driver").disk(Disk::at(measured.socket())).disk(Disk::at(host.socket()));
    let mut vm = plan.boot()?;

    let mut rows = Vec::new();
    for job in JOBS {
        eprintln!("bench: {} ({} rounds)", job.title(), options.rounds);
        rows.push(compare(&mut vm, &job, options)?);
    }
    let vvu = finish(measured, vm)?;
    host.stop()?;
    std::fs::remove_file(&image).context("cannot remove the image")?;
    let report = Report {
        measured: options.measured.to_string(),
        accelerator: if kvm_is_usable() { "kvm" } else { "tcg" },
        rounds: options.rounds,
        seconds_per_run: options.runtime.as_secs_f64(),
        rows,
        vvu,
    };
    let mut text = Vec::new();
    print_table(&report, &mut text)?;
    let repeat = format!(
        "cargo xtask bench disk --rounds {} --runtime {} --image-size {}{}",
        options.rounds,
        options.runtime.as_secs_f64(),
        options.image_len >> 20,
        if options.measured == Backend::Vvu { "" } else { " --measured vvu-blk" }
    );
    hand_in("disk", "One disk beside qemu-storage-daemon's, in one driver VM.", repeat, &report, text, options.json)
}

/// Ends the driver VM and what is measured, and takes the last figures of both.
fn finish(measured: Served, vm: DriverVm) -> Result<Option<VvuFigures>> {
    let Served::Vvu(mut run) = measured else {
        vm.power_off()?;
        return measured.stop().map(|()| None);
    };
    let driver_memory = evidence::guest_memory(vm.qemu().pid())?;
    let (resident, proportional) = evidence::memory_without(run.appliance().pid(), &driver_memory)?;
    let (bridge_resident, _) = evidence::memory_without(run.bridge().pid(), &driver_memory)?;
    vm.power_off()?;
    let figures = VvuFigures {
        seconds_to_ready: run.time_to_ready().as_secs_f64(),
        appliance_resident_bytes: resident,
        appliance_proportional_bytes: proportional,
        bridge_resident_bytes: bridge_resident,
        back_end: run.await_counters()?,
    };
    run.stop()?;
    Ok(Some(figures))
}

/// Writes the whole image once: reads of holes and first writes into them measure the host's file system.
fn fill(image: &std::path::Path, len: u64) -> Result<()> {
    let mut file = File::options().write(true).open(image).context("cannot open the image")?;
    let piece = vec![0xa5; 1 << 20];
    for _ in 0..len.div_ceil(1 << 20) {
        file.write_all(&piece).context("cannot fill the image")?;
    }
    file.set_len(len).and_then(|()| file.sync_all()).context("cannot fill the image")
}

/// The program that plays front-end and driver.
pub(crate) fn load_program() -> Result<Command> {
    Ok(command_that_dies_with_us(workspace_program("vvu-bench", "VVU_BENCH_BIN")?))
}

/// Prints what was measured, as JSON or as text, and leaves both in `target/bench`, with the machine and the command that repeats
/// it. The field `rows` of `report` has the rows.
pub(crate) fn hand_in(
    name: &'static str,
    about: &str,
    repeat: String,
    report: &impl Serialize,
    text: Vec<u8>,
    json: bool,
) -> Result<()> {
    let mut document = vvu_bench::report::Report::new(name, about.to_owned(), repeat);
    let measured = serde_json::to_value(report).context("a report is not to be written as JSON")?;
    if let serde_json::Value::Object(mut fields) = measured.clone() {
        for row in fields.remove("rows").as_ref().and_then(|rows| rows.as_array()).into_iter().flatten() {
            document.add_row(row)?;
        }
        document.other = fields;
    }
    document.text = String::from_utf8(text).context("a report is no text")?;
    for file in document.write(&target_dir()?.join("bench"))? {
        eprintln!("bench: {}", file.display());
    }
    let mut out = io::stdout().lock();
    if json { writeln!(out, "{measured:#}") } else { out.write_all(document.text.as_bytes()) }
        .context("cannot write the report")
}

/// Writes a report's files to `target/bench`, and its tables to standard output.
pub(crate) fn finish_report(report: &vvu_bench::report::Report) -> Result<()> {
    let files = report.write(&target_dir()?.join("bench"))?;
    write!(io::stdout(), "{}", report.markdown()).context("cannot write the report")?;
    for file in files {
        eprintln!("bench: {}", file.display());
    }
    Ok(())
}

fn compare(vm: &mut DriverVm, job: &Job, options: &BenchOptions) -> Result<Row> {
    let mut pairs = Vec::new();
    for round in 0..options.rounds.max(1) {
        let mut on = |device| job.run(vm, device, options.runtime);
        let pair = if round % 2 == 0 {
            let vvu = on(THROUGH_VVU)?;
            (vvu, on(ON_HOST)?)
        } else {
            let host = on(ON_HOST)?;
            (on(THROUGH_VVU)?, host)
        };
        pairs.push(pair);
    }
    let spread = |figure: &dyn Fn(&(Figures, Figures)) -> f64| Spread::of(pairs.iter().map(figure).collect());
    Ok(Row {
        job: job.title(),
        block_size: job.block_size,
        measured_iops: spread(&|pair| pair.0.iops),
        host_iops: spread(&|pair| pair.1.iops),
        measured_latency_us: spread(&|pair| pair.0.latency_us),
        host_latency_us: spread(&|pair| pair.1.latency_us),
        ratio: spread(&|pair| pair.0.iops / pair.1.iops),
    })
}

impl Spread {
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        let last = values.len().saturating_sub(1);
        // Of an even number the mean of the two in the middle.
        let median = f64::midpoint(at(last / 2), at(last.div_ceil(2)));
        Self { median, least: at(0), most: at(last) }
    }
}

fn print_table(report: &Report, out: &mut impl Write) -> io::Result<()> {
    const MIB: f64 = 1_048_576.0;
    writeln!(
        out,
        "fio in the driver VM, O_DIRECT, libaio; VMs under {}; median [least..most] of {} rounds of {} s\n",
        report.accelerator, report.rounds, report.seconds_per_run
    )?;
    writeln!(
        out,
        "{:<26} {:>26} {:>26} {:>22}",
        "",
        format!("{}, IOPS", report.measured),
        "qemu-storage-daemon, IOPS",
        "ratio"
    )?;
    for row in &report.rows {
        writeln!(
            out,
            "{:<26} {:>26} {:>26} {:>22}",
            row.job,
            iops(&row.measured_iops),
            iops(&row.host_iops),
            format!("{:.2} [{:.2}..{:.2}]", row.ratio.median, row.ratio.least, row.ratio.most)
        )?;
        if row.block_size == "128k" {
            let rate = |spread: &Spread| format!("{:.0} MiB/s", spread.median * 131_072.0 / MIB);
            writeln!(out, "{:<26} {:>26} {:>26}", "", rate(&row.measured_iops), rate(&row.host_iops))?;
        }
    }
    report.vvu.as_ref().map_or(Ok(()), |figures| print_vvu_figures(figures, out))
}

fn print_vvu_figures(figures: &VvuFigures, out: &mut impl Write) -> io::Result<()> {
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let back_end = &figures.back_end;
    writeln!(out, "\nfrom vvu run to ready  {:.2} s", figures.seconds_to_ready)?;
    writeln!(
        out,
        "appliance's QEMU       RSS {}, PSS {} (driver VM memory not counted)",
        mib(figures.appliance_resident_bytes),
        mib(figures.appliance_proportional_bytes)
    )?;
    writeln!(out, "bridge                 RSS {}", mib(figures.bridge_resident_bytes))?;
    writeln!(
        out,
        "back-end               {} zero-copy, {} bytes bounced, {} bytes through a page cache",
        mib(back_end.zero_copy_bytes),
        back_end.bounced_bytes,
        back_end.page_cache_bytes
    )?;
    let requests = back_end.reads + back_end.writes + back_end.flushes;
    writeln!(out, "                       {requests} requests, {} kicks, {} calls", back_end.kicks, back_end.calls)
}

fn iops(spread: &Spread) -> String {
    format!("{:.0} [{:.0}..{:.0}]", spread.median, spread.least, spread.most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Spread { median: 2.0, least: 1.0, most: 3.0 });
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]).median, 2.5);
        assert_eq!(Spread::of(vec![7.0]), Spread { median: 7.0, least: 7.0, most: 7.0 });
    }
}
