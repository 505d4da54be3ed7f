//! `vvu-witness DEVICE`: loads the disk DEVICE as the ledger says until the ledger says stop.
//!
//! It first reads every block and compares it with the ledger, which may be that of a machine that was killed. Then each
//! writer writes and reads blocks of its own share, one request at a time: half of them in a few hot blocks, which are
//! written again at once after their last write was acknowledged (a request that is done twice, out of order, leaves an
//! old generation there), and now and then flushes. At the end all blocks are read again. Exit code 0: nothing was wrong.

mod mapping;
mod share;
mod writer;

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use vvu_witness::ledger::{BLOCKS_MAX, Control, State};

use crate::mapping::Ledger;
use crate::writer::{Fault, Writer};

/// Most writers: requests that a driver keeps in flight in one queue of QEMU's default size.
const WRITERS_MAX: u64 = 128;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vvu-witness: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let device = std::env::args_os().nth(1).context("usage: vvu-witness DEVICE")?;
    let device = File::options()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed())
        .open(&device)
        .with_context(|| format!("cannot open {}", device.display()))?;
    let ledger = Ledger::open()?;
    let clock = Clock { start: Instant::now(), last: AtomicU64::new(0), failed: AtomicBool::new(false), ledger };
    let mut writers = writers(&device, &clock)?;
    ledger.store(Control::State, State::Verifying as u64);
    each(&mut writers, &clock, |writer| writer.verify())?;
    clock.restart();
    ledger.store(Control::State, State::Running as u64);
    each(&mut writers, &clock, |writer| {
        while ledger.load(Control::Stop) == 0 && !clock.failed.load(Ordering::SeqCst) {
            writer.step()?;
        }
        Ok(())
    })?;
    each(&mut writers, &clock, |writer| writer.verify())?;
    ledger.store(Control::State, State::Stopped as u64);
    Ok(())
}

/// Divides the blocks among the writers.
fn writers<'a>(device: &'a File, clock: &'a Clock) -> Result<Vec<Writer<'a>>> {
    let ledger = clock.ledger;
    let (blocks, count) = (ledger.load(Control::Blocks), ledger.load(Control::Writers));
    if blocks > BLOCKS_MAX || !(1..=WRITERS_MAX).contains(&count) || blocks < count {
        bail!("the ledger asks for {count} writers on {blocks} blocks");
    }
    Ok((0..count).map(|n| Writer::new(device, clock, n, n * blocks / count..(n + 1) * blocks / count)).collect())
}

/// Runs `work` of all writers at the same time; the first fault goes to the ledger.
fn each<'a>(
    writers: &mut [Writer<'a>],
    clock: &Clock,
    work: impl Fn(&mut Writer<'a>) -> Result<(), Fault> + Sync,
) -> Result<()> {
    thread::scope(|scope| {
        for writer in writers {
            let work = &work;
            scope.spawn(move || {
                if let Err(fault) = work(writer) {
                    eprintln!("vvu-witness: {fault}");
                    fault.report(clock.ledger);
                    clock.failed.store(true, Ordering::SeqCst);
                }
            });
        }
    });
    if clock.failed.load(Ordering::SeqCst) {
        clock.ledger.store(Control::State, State::Failed as u64);
        bail!("the disk is not as it must be");
    }
    Ok(())
}

/// Counts completions and measures the time between them.
#[derive(Debug)]
pub(crate) struct Clock {
    start: Instant,
    /// Nanoseconds from `start` to the last completion.
    last: AtomicU64,
    /// Whether something was wrong: said here as well, because a migration may lose what the ledger says.
    failed: AtomicBool,
    pub(crate) ledger: Ledger,
}

impl Clock {
    fn restart(&self) {
        self.last.store(self.now(), Ordering::SeqCst);
        self.ledger.store(Control::LongestGap, 0);
    }

    /// Notes that a request has completed now.
    pub(crate) fn complete(&self) {
        let now = self.now();
        // Another writer may have noted a later time: then there was no gap.
        let gap = now.saturating_sub(self.last.fetch_max(now, Ordering::SeqCst));
        self.ledger.control(Control::LongestGap).fetch_max(gap, Ordering::SeqCst);
        self.ledger.control(Control::Completions).fetch_add(1, Ordering::SeqCst);
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}
