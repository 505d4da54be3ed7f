//! Figures: what one disk with an appliance VM of its own costs until it is ready, and while nobody uses it. The JSON document is
//! what [`crate::capacity`] computes with.
//!
//! CPU times and sizes are the same on a busy machine, times are not. Wake-ups are counted as voluntary context switches.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::backend::ServedImage;
use crate::capacity::{DEFAULT_WINDOW, Measured, Start};
use crate::driver_vm::kvm_is_usable;
use crate::evidence::{self, FileMap};
use crate::image_file::create;
use crate::testbed::{Testbed, Turn};
use crate::vvu_run::{VvuRun, appliance_dir, kernel_release};

/// Length of the disk in bytes.
const DISK_LEN: u64 = 64 << 20;

/// What follows the start is over after this time.
pub(super) const SETTLED_AFTER: Duration = Duration::from_secs(10);

/// How long idleness is watched.
const IDLE_TIME: Duration = Duration::from_secs(30);

/// Runs the benchmark and prints its report on standard output; progress goes to standard error.
///
/// # Errors
/// If a machine does not come up, or the output is closed.
pub fn run(rounds: u32, json: bool) -> Result<()> {
    let testbed = Testbed::open("bench-boot", Turn::Alone)?;
    let image = create(&testbed.folder().join("disk.img"), DISK_LEN)?;
    let mut all = Vec::new();
    for round in 1..=rounds {
        eprintln!("bench: round {round} of {rounds}");
        let run = VvuRun::start(&testbed, &format!("blk-{round}"), &ServedImage::writable(&image))?;
        all.push(measured(&run)?);
        run.stop()?;
    }
    testbed.remove_images()?;
    let figures = medians(&all).context("there was no round")?;
    let mut out = io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, &figures)?;
        return writeln!(out).context("cannot write the report");
    }
    print_tables(&figures, &mut out).context("cannot write the report")
}

/// Waits until the run is settled and idle, and looks at it.
pub(super) fn measured(run: &VvuRun) -> Result<Measured> {
    let appliance = run.appliance().pid();
    let others = [run.bridge().pid(), run.vvu().pid()];
    let pids = [appliance, others[0], others[1]];
    let of_all = |figure: fn(u32) -> Result<u64>| pids.into_iter().map(figure).sum::<Result<u64>>();
    let start_cpu_ms = of_all(cpu_ms)?;
    let start = run.start_steps().context("the appliance has not told the steps of its boot")?;
    sleep(SETTLED_AFTER);
    let memory = pids.into_iter().map(evidence::maps).collect::<Result<Vec<_>>>()?.concat();
    let vm = evidence::guest_memory(appliance)?;
    let descriptors = pids.into_iter().map(|pid| entries(pid, "fd")).collect::<Result<Vec<_>>>()?;
    let threads = pids.into_iter().map(|pid| entries(pid, "task")).sum::<Result<u64>>()?;

    let wakeups_of_others = || others.into_iter().map(wakeups).sum::<Result<u64>>();
    let before = (wakeups_of_others()?, wakeups(appliance)?, of_all(cpu_ms)?);
    sleep(IDLE_TIME);
    let per_hour = |count: u64| count * 3600 / IDLE_TIME.as_secs();
    let sum = |kind: Kind| resident(&memory, kind);
    Ok(Measured {
        accelerator: if kvm_is_usable() { "kvm" } else { "tcg" }.to_owned(),
        kernel: kernel_release(&appliance_dir()?)?,
        window_bytes: DEFAULT_WINDOW,
        start,
        start_cpu_ms,
        vm_bytes: vm.iter().map(|map| map.resident).sum(),
        translated_bytes: sum(Kind::Translated),
        private_bytes: sum(Kind::Private),
        shared_bytes: sum(Kind::Shared),
        processes: pids.len() as u64,
        threads,
        descriptors: descriptors.iter().sum(),
        most_descriptors: descriptors.iter().copied().max().unwrap_or_default(),
        bridge_wakeups_per_hour: per_hour(wakeups_of_others()?.saturating_sub(before.0)),
        appliance_wakeups_per_hour: per_hour(wakeups(appliance)?.saturating_sub(before.1)),
        idle_cpu_ms_per_hour: per_hour(of_all(cpu_ms)?.saturating_sub(before.2)),
    })
}

/// What a mapping is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A file that other devices map as well.
    Shared,
    /// Code that QEMU has made.
    Translated,
    /// The VM's memory, and what is in files of memory: the window.
    Memory,
    /// Everything else.
    Private,
}

fn kind(map: &FileMap) -> Kind {
    if map.path.contains("/memfd:") || map.path.contains("/dev/shm/") {
        Kind::Memory
    } else if Path::new(&map.path).is_absolute() {
        Kind::Shared
    } else if map.permissions.starts_with("rwx") {
        Kind::Translated
    } else {
        Kind::Private
    }
}

/// Bytes in memory of one kind.
fn resident(maps: &[FileMap], wanted: Kind) -> u64 {
    maps.iter().filter(|map| kind(map) == wanted).map(|map| map.resident).sum()
}

/// CPU time of a process's threads so far (`/proc/<pid>/task/<tid>/schedstat`, first field), in ms.
pub(super) fn cpu_ms(pid: u32) -> Result<u64> {
    let nanoseconds = sum_of_threads(pid, "schedstat", |text| text.split_whitespace().next())?;
    Ok(nanoseconds / 1_000_000)
}

/// Voluntary context switches of a process's threads so far (proc(5), `status`).
pub(super) fn wakeups(pid: u32) -> Result<u64> {
    sum_of_threads(pid, "status", |text| text.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")))
}

fn sum_of_threads(pid: u32, file: &str, number: fn(&str) -> Option<&str>) -> Result<u64> {
    let path = format!("/proc/{pid}/task");
    let mut sum = 0;
    for thread in fs::read_dir(&path).with_context(|| format!("cannot read {path}"))?.flatten() {
        // A thread may end between the two looks.
        let text = fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        sum += number(&text).and_then(|number| number.trim().parse::<u64>().ok()).unwrap_or_default();
    }
    Ok(sum)
}

fn entries(pid: u32, folder: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/{folder}");
    Ok(fs::read_dir(&path).with_context(|| format!("cannot read {path}"))?.count() as u64)
}

/// Of each figure the middle one.
fn medians(all: &[Measured]) -> Option<Measured> {
    let middle = |figure: fn(&Measured) -> u64| {
        let mut values: Vec<u64> = all.iter().map(figure).collect();
        values.sort_unstable();
        values.get(values.len() / 2).copied()
    };
    let first = all.first()?;
    Some(Measured {
        accelerator: first.accelerator.clone(),
        kernel: first.kernel.clone(),
        window_bytes: first.window_bytes,
        start: Start {
            qemu_started: middle(|one| one.start.qemu_started)?,
            kernel_started: middle(|one| one.start.kernel_started)?,
            agent_started: middle(|one| one.start.agent_started)?,
            modules_loaded: middle(|one| one.start.modules_loaded)?,
            controls_started: middle(|one| one.start.controls_started)?,
            windows_open: middle(|one| one.start.windows_open)?,
            ready: middle(|one| one.start.ready)?,
        },
        start_cpu_ms: middle(|one| one.start_cpu_ms)?,
        vm_bytes: middle(|one| one.vm_bytes)?,
        translated_bytes: middle(|one| one.translated_bytes)?,
        private_bytes: middle(|one| one.private_bytes)?,
        shared_bytes: middle(|one| one.shared_bytes)?,
        processes: middle(|one| one.processes)?,
        threads: middle(|one| one.threads)?,
        descriptors: middle(|one| one.descriptors)?,
        most_descriptors: middle(|one| one.most_descriptors)?,
        bridge_wakeups_per_hour: middle(|one| one.bridge_wakeups_per_hour)?,
        appliance_wakeups_per_hour: middle(|one| one.appliance_wakeups_per_hour)?,
        idle_cpu_ms_per_hour: middle(|one| one.idle_cpu_ms_per_hour)?,
    })
}

fn print_tables(figures: &Measured, out: &mut impl Write) -> io::Result<()> {
    let Measured { start, .. } = figures;
    writeln!(out, "one disk, one CPU, under {}, kernel {}; medians\n", figures.accelerator, figures.kernel)?;
    let steps = [
        ("sockets of the bridge, checks of the host", 0, start.qemu_started),
        ("QEMU and its firmware", start.qemu_started, start.kernel_started),
        ("kernel", start.kernel_started, start.agent_started),
        ("agent: file systems, modules", start.agent_started, start.modules_loaded),
        ("control device", start.modules_loaded, start.controls_started),
        ("window, doorbells", start.controls_started, start.windows_open),
        ("back-end", start.windows_open, start.ready),
    ];
    for (step, from, to) in steps {
        writeln!(out, "{step:<44} {:>8} ms", to.saturating_sub(from))?;
    }
    writeln!(out, "{:<44} {:>8} ms, {} ms of CPU\n", "ready", start.ready, figures.start_cpu_ms)?;
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let sizes = [
        ("memory of the appliance VM in use", figures.vm_bytes),
        ("code that QEMU has translated (TCG)", figures.translated_bytes),
        ("other memory of QEMU, bridge and launcher", figures.private_bytes),
        ("files shared with other devices", figures.shared_bytes),
    ];
    for (what, bytes) in sizes {
        writeln!(out, "{what:<44} {:>12}", mib(bytes))?;
    }
    let Measured { processes, threads, descriptors, most_descriptors, .. } = figures;
    writeln!(
        out,
        "{processes} processes, {threads} threads, {descriptors} descriptors, {most_descriptors} at most in one\n"
    )?;
    let second = |hour: u64| format!("{:.2}/s", hour as f64 / 3600.0);
    writeln!(out, "idle: bridge and launcher wake {}", second(figures.bridge_wakeups_per_hour))?;
    writeln!(out, "idle: QEMU wakes {}", second(figures.appliance_wakeups_per_hour))?;
    writeln!(out, "idle: CPU {:.3} %", figures.idle_cpu_ms_per_hour as f64 / 36_000.0)
}
