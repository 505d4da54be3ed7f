//! Live migration of a driver VM: from one QEMU to another one on the same host.

use std::os::unix::net::UnixListener;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{DriverVm, Incoming};
use crate::testbed::Testbed;

/// How fast memory goes to the other side, and for how long the machine may stand still.
struct Pace {
    bytes_per_second: u64,
    downtime_ms: u64,
}

/// A pass takes a while, and a rest has to be as small as 16 KiB to be the last one.
const SLOW: Pace = Pace { bytes_per_second: 16 << 20, downtime_ms: 1 };
/// No pass comes to its end.
const CRAWL: Pace = Pace { bytes_per_second: 4 << 10, downtime_ms: 1 };
/// QEMU's own choice.
const FULL: Pace = Pace { bytes_per_second: 128 << 20, downtime_ms: 300 };

/// What QEMU reports of a migration that has completed (`query-migrate`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Migration {
    /// From the stop of the machine on one side to its start on the other one, as the source estimates it.
    pub downtime: Duration,
    /// From the command to the end.
    pub total: Duration,
    /// How often the dirty memory was collected and sent.
    pub rounds: u64,
}

impl DriverVm {
    /// Moves the machine, with all that runs in it, to the QEMU that waits for it. The old one ends.
    ///
    /// # Errors
    /// If QEMU fails or cancels the migration.
    pub fn migrate(mut self, incoming: Incoming) -> Result<(Self, Migration)> {
        self.start_migration(&incoming.uri)?;
        self.finish_migration(incoming)
    }

    /// Moves the machine as [`DriverVm::migrate`] does, and does `meanwhile` when all of its memory has been sent once: what a
    /// device writes to memory then gets to the other side by the dirty log alone.
    ///
    /// # Errors
    /// As [`DriverVm::migrate`], and what `meanwhile` returns.
    pub fn migrate_after(
        mut self,
        incoming: Incoming,
        meanwhile: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<(Self, Migration)> {
        self.set_pace(&SLOW)?;
        self.start_migration(&incoming.uri)?;
        self.qmp.await_event(|name, data| {
            let pass = data.get("pass").and_then(Value::as_u64);
            (name == "MIGRATION_PASS" && pass >= Some(2)).then_some(())
        })?;
        self.set_pace(&CRAWL)?;
        meanwhile(&mut self)?;
        self.set_pace(&FULL)?;
        self.finish_migration(incoming)
    }

    fn set_pace(&mut self, pace: &Pace) -> Result<()> {
        let parameters = json!({ "max-bandwidth": pace.bytes_per_second, "downtime-limit": pace.downtime_ms });
        self.qmp.execute_with("migrate-set-parameters", &parameters).map(drop)
    }

    fn finish_migration(mut self, incoming: Incoming) -> Result<(Self, Migration)> {
        let Incoming { mut vm, .. } = incoming;
        self.await_migration_state("completed")
            .with_context(|| format!("cannot migrate {} to {}\n{}", self.name, vm.name, super::last_words(&vm.qemu)))?;
        let report = self.qmp.execute("query-migrate")?;
        let number = |path: &str| report.pointer(path).and_then(Value::as_u64).with_context(|| format!("no {path}"));
        let migration = Migration {
            downtime: Duration::from_millis(number("/downtime")?),
            total: Duration::from_millis(number("/total-time")?),
            rounds: number("/ram/dirty-sync-count")?,
        };
        vm.qmp.await_event(|name, _| (name == "RESUME").then_some(()))?;
        // What the shell has said and been told goes on where it was.
        (vm.token_seed, vm.commands) = (self.token_seed, self.commands);
        vm.boot_id.clone_from(&self.boot_id);
        self.kill()?;
        Ok((vm, migration))
    }

    /// Starts a migration to a peer that takes nothing, does `meanwhile` while it is under way, and cancels it: all that
    /// a migration switches on (dirty logging) is switched off again.
    ///
    /// # Errors
    /// If QEMU refuses or ends the migration in another way, and what `meanwhile` returns.
    pub fn cancel_migration(
        &mut self,
        testbed: &Testbed,
        meanwhile: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let socket = testbed.socket("nobody.migration");
        let nobody = UnixListener::bind(&socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
        self.start_migration(&format!("unix:{}", socket.display()))?;
        self.await_migration_state("active")?;
        let (held, _) = nobody.accept()?;
        meanwhile(self)?;
        self.qmp.execute("migrate_cancel")?;
        self.await_migration_state("cancelled")?;
        drop(held);
        let status = self.qmp.execute("query-status")?;
        ensure!(status.get("running").and_then(Value::as_bool) == Some(true), "after a cancelled migration: {status}");
        std::fs::remove_file(&socket).context("cannot remove a socket")
    }

    fn start_migration(&mut self, uri: &str) -> Result<()> {
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.qmp.execute_with("migrate-set-capabilities", &events)?;
        self.qmp.execute_with("migrate", &json!({ "uri": uri })).map(drop)
    }

    fn await_migration_state(&mut self, awaited: &str) -> Result<()> {
        let state = self.qmp.await_event(|name, data| {
            let state = data.get("status")?.as_str()?;
            let over = ["completed", "cancelled", "failed"].contains(&state);
            (name == "MIGRATION" && (state == awaited || over)).then(|| state.to_owned())
        })?;
        if state != awaited {
            let report = self.qmp.execute("query-migrate")?;
            bail!("the migration of {} is {state} instead of {awaited}: {report}", self.name);
        }
        Ok(())
    }
}
