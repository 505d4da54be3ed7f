//! A TCP stream between two driver VMs that lasts as long as it is let, each byte of which the receiver checks.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::driver_vm::DriverVm;

/// Where the receiver listens.
const PORT: u16 = 7000;

/// Bytes that tell that a stream goes on.
const SIGN_OF_LIFE: u64 = 1 << 20;

/// How long the stream may stand still: the longest outage, and as long again until TCP tries anew.
const PATIENCE: Duration = Duration::from_secs(180);

/// A stream that runs.
#[derive(Debug)]
pub struct Stream(());

impl Stream {
    /// Starts it, and waits until it flows.
    ///
    /// # Errors
    /// If it does not.
    pub fn start(from: &mut DriverVm, to: &mut DriverVm, address: &str) -> Result<Self> {
        to.run(&format!("(vvu-station stream-from {PORT} /tmp/progress; echo status $?) > /tmp/taken 2>&1 &"))?;
        from.run("rm -f /tmp/enough")?;
        from.run(&format!("(vvu-station stream-to {address}:{PORT} /tmp/enough; echo status $?) > /tmp/given 2>&1 &"))?;
        let stream = Self(());
        stream.await_progress(to)?;
        Ok(stream)
    }

    /// Waits until the stream has gone on; returns how long that took.
    ///
    /// # Errors
    /// If it does not, or something wrong has come.
    pub fn await_progress(&self, to: &mut DriverVm) -> Result<Duration> {
        let start = Instant::now();
        let now = to.run("until test -s /tmp/progress; do sleep 0.1; done; cat /tmp/progress")?;
        let goal = now.trim().parse::<u64>().with_context(|| format!("progress is {now}"))? + SIGN_OF_LIFE;
        let is_over = "grep -q status /tmp/taken";
        to.run_within(
            PATIENCE,
            &format!("until test $(cat /tmp/progress) -ge $(({goal})) || {is_over}; do sleep 0.1; done"),
        )?;
        let taken = to.run("cat /tmp/taken")?;
        ensure!(taken.is_empty(), "the receiver says {taken}");
        Ok(start.elapsed())
    }

    /// Ends it, and checks that all that was sent has arrived; returns how many bytes.
    ///
    /// # Errors
    /// If that is not so.
    pub fn finish(self, from: &mut DriverVm, to: &mut DriverVm) -> Result<u64> {
        from.run("touch /tmp/enough")?;
        let outcome = |vm: &mut DriverVm, file: &str| {
            vm.run_within(PATIENCE, &format!("until grep -q status {file}; do sleep 0.1; done; cat {file}"))
        };
        let (given, taken) = (outcome(from, "/tmp/given")?, outcome(to, "/tmp/taken")?);
        let sent = given.lines().next().and_then(|line| line.strip_prefix("sent "));
        let received = taken.lines().next().and_then(|line| line.strip_prefix("received "));
        ensure!(sent.is_some() && sent == received, "the sender says {given}, the receiver {taken}");
        sent.unwrap_or_default().parse().context("that is no number")
    }
}
