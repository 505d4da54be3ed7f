//! Figures: our block back-end and qemu-storage-daemon, both on the host, under the same load: what the back-end costs without
//! any VM.
//!
//! Beside them the limit: the same reads without a back-end. Each in two ways: as it waits for kicks, and as it polls for a while first (`--poll auto`; the daemon with an I/O thread).

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use vvu_bench::report::Report;

use super::side_by_side::{Cell, Point, Runs, Way, all_points, measure, report};
use super::{fill, finish_report};
use crate::image_file::create;
use crate::process::{Process, command_that_dies_with_us};
use crate::testbed::{Testbed, Turn, workspace_program};

/// Length of each disk in bytes.
pub(crate) const DISK_LEN: u64 = 256 << 20;

/// How long a program may take to listen.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// What a disk's data is kept in.
#[derive(Debug, Clone)]
pub(crate) enum Storage<'p> {
    /// Nothing: requests succeed at once.
    Null,
    /// A file.
    File(&'p Path),
}

/// Runs the benchmark and prints its tables on standard output; progress goes to standard error.
///
/// # Errors
/// If a back-end does not come up, a load fails, or the output is closed.
pub fn run(runs: Runs) -> Result<()> {
    let testbed = Testbed::open("bench-backend", Turn::Alone)?;
    let image = create(&testbed.folder().join("disk.img"), DISK_LEN)?;
    fill(&image, DISK_LEN)?;
    let in_memory = File::from(memfd_create("disk", MemfdFlags::empty()).context("cannot make a file in memory")?);
    let in_memory_path = format!("/proc/{}/fd/{}", std::process::id(), in_memory.as_raw_fd());
    let in_memory_path = Path::new(&in_memory_path);
    fill(in_memory_path, DISK_LEN)?;

    let mut document = Report::new(
        "backend",
        "vvu-blk and qemu-storage-daemon on the host, random reads by `vvu-bench load`, in turns; median of the rounds. The limit is \
         what the kernel gives to the faster of an io_uring and a pread(2) for each CPU (`vvu-bench bare`). Ratios, each of one round: \
         **IOPS** [least..most]; latency; processor time of load and back-end together."
            .to_owned(),
        format!("cargo xtask bench backend --rounds {} --runtime {}", runs.rounds, runs.runtime.as_secs_f64()),
    );
    let storages = [("null", Storage::Null), ("tmpfs", Storage::File(in_memory_path)), ("file", Storage::File(&image))];
    for (name, storage) in storages {
        let points = all_points(name, "randread");
        let cells = measure_storage(&testbed, name, &storage, &points, runs)?;
        report(&mut document, &cells, true)?;
    }
    testbed.remove_images()?;
    finish_report(&document)
}

fn measure_storage(
    testbed: &Testbed,
    name: &str,
    storage: &Storage<'_>,
    points: &[Point],
    runs: Runs,
) -> Result<Vec<Vec<Cell>>> {
    let (mut ways, mut processes) = (Vec::new(), Vec::new());
    for (polls, word, daemon) in [(false, "off", "main loop"), (true, "auto", "I/O thread")] {
        let label = format!("{name}-{word}");
        let (way, process) = serve_daemon(testbed, &label, storage, polls)?;
        ways.push(Way { name: format!("q-s-d, {daemon}"), ..way });
        processes.push(process);
        let (way, process) = serve_vvu_blk(testbed, &label, storage, word)?;
        ways.push(Way { name: format!("vvu-blk, {word}"), against: Some(ways.len() - 1), ..way });
        processes.push(process);
    }
    let file = match storage {
        Storage::Null => None,
        Storage::File(path) => Some(*path),
    };
    measure(&ways, file, points, runs)
}

/// Serves a disk by vvu-blk. The socket listens before the program starts and is inherited, so there is nothing to wait for.
pub(crate) fn serve_vvu_blk(
    testbed: &Testbed,
    name: &str,
    storage: &Storage<'_>,
    poll: &str,
) -> Result<(Way, Process)> {
    let socket = testbed.socket(&format!("blk-{name}.sock"));
    let listener = UnixListener::bind(&socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
    fcntl_setfd(&listener, FdFlags::empty()).context("cannot pass a socket on")?;
    let mut command = command_that_dies_with_us(workspace_program("vvu-blk", "VVU_BLK_BIN")?);
    command.args(["--fd", &listener.as_raw_fd().to_string(), "--poll", poll]);
    match storage {
        Storage::Null => command.args(["--null", &DISK_LEN.to_string()]),
        // Two of them are measured in turns on one file, which is only read.
        Storage::File(path) => command.arg("--read-only").arg("--image").arg(path),
    };
    let process = Process::spawn(&format!("vvu-blk-{name}"), command, testbed.folder())?;
    let processes = vec![("back-end", process.watched().pid())];
    Ok((Way { name: name.to_owned(), socket, processes, against: None }, process))
}

fn serve_daemon(testbed: &Testbed, name: &str, storage: &Storage<'_>, polls: bool) -> Result<(Way, Process)> {
    let socket = testbed.socket(&format!("qsd-{name}.sock"));
    let disk = match storage {
        Storage::Null => format!("driver=null-co,node-name=disk,size={DISK_LEN}"),
        Storage::File(path) => format!(
            "driver=file,node-name=disk,filename={},cache.direct=on,aio=io_uring,locking=off,read-only=on",
            path.display()
        ),
    };
    let thread = if polls { ",iothread=thread" } else { "" };
    let export =
        format!("type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={}{thread}", socket.display());
    let mut command = command_that_dies_with_us(&testbed.setup().qemu_storage_daemon);
    command.args(["--object", "iothread,id=thread", "--blockdev", &disk, "--export", &export]);
    // Options are acted upon in their order: once the monitor greets, the export is there.
    command.args(["--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"]);
    let mut process = Process::spawn(&format!("qsd-{name}"), command, testbed.folder())?;
    process.await_line("QMP greeting", START_PATIENCE, |line| line.contains("\"QMP\"").then_some(()))?;
    let processes = vec![("back-end", process.watched().pid())];
    Ok((Way { name: name.to_owned(), socket, processes, against: None }, process))
}
