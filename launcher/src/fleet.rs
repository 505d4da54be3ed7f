//! The processes of a run: its bridge and its appliance VMs, of which there are two while one replaces the other.
//!
//! Each appliance VM has files of its own in the runtime directory, which vanish with it: the QMP socket, which QEMU makes,
//! and a FIFO that is QEMU's standard input, and so the serial console's.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::future::{Future, poll_fn};
use std::path::PathBuf;
use std::pin::Pin;
use std::process::{ExitStatus, Stdio};
use std::task::Poll;
use std::time::Duration;

use anyhow::Context;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::process::Command;

use crate::children::Child;
use crate::control::ApplianceStatus;
use crate::ending::Death;
use crate::events::Source;
use crate::inherit::keep_open;
use crate::output::Output;
use crate::plan::Plan;
use crate::programs::ApplianceFiles;
use crate::qemu_args::{ApplianceVm, BRIDGE_SOCKETS, qmp_socket};
use crate::runtime_dir::RuntimeDir;
use crate::supervisor::{APPLIANCE_GRACE, ApplianceId};

/// Time for the bridge to disconnect its front-end after SIGTERM.
const BRIDGE_GRACE: Duration = Duration::from_secs(5);

/// Name of the notification socket in the runtime directory.
pub(crate) const NOTIFY_SOCKET: &str = "notify.sock";

/// One of the processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Member {
    /// The bridge.
    Bridge,
    /// An appliance VM's QEMU.
    Appliance(ApplianceId),
}

/// The processes that live.
#[derive(Debug)]
pub(crate) struct Fleet<'a> {
    directory: &'a RuntimeDir,
    output: &'a Output,
    bridge: Option<Child>,
    appliances: BTreeMap<ApplianceId, Child>,
}

impl<'a> Fleet<'a> {
    /// Nobody yet.
    pub(crate) fn new(directory: &'a RuntimeDir, output: &'a Output) -> Self {
        Self { directory, output, bridge: None, appliances: BTreeMap::new() }
    }

    /// Starts the bridge. Sockets of an earlier one that was killed are removed; nobody of the run may live.
    ///
    /// # Errors
    /// The program cannot be started.
    pub(crate) fn start_bridge(&mut self, plan: &Plan) -> anyhow::Result<()> {
        for socket in BRIDGE_SOCKETS {
            // Mostly there is none.
            let _ = std::fs::remove_file(self.directory.path().join(socket));
        }
        let mut command = Command::new(&plan.bridge);
        command.args(["--socket-path", &plan.socket, "--appliance-dir", self.directory.text(), "--uuid", &plan.uuid]);
        command.args(["--class", "blk", "--queues", &plan.queues.to_string(), "--window", &plan.window.0.to_string()]);
        command.arg("--exit-with-parent").stdin(Stdio::null());
        command.env("NOTIFY_SOCKET", self.directory.path().join(NOTIFY_SOCKET)).env("RUST_LOG", &plan.log);
        self.bridge = Some(Child::spawn("bridge", command, Source::Bridge, None, self.output)?);
        Ok(())
    }

    /// Starts an appliance VM from the image `files`.
    ///
    /// # Errors
    /// The program cannot be started.
    pub(crate) fn start_appliance(
        &mut self,
        id: ApplianceId,
        plan: &Plan,
        files: &ApplianceFiles,
    ) -> anyhow::Result<()> {
        let vm = ApplianceVm {
            accel: plan.accel,
            memory: plan.memory,
            cpus: plan.cpus,
            queues: plan.queues,
            uuid: &plan.uuid,
            id,
            append: plan.append.as_deref(),
            runtime_dir: self.directory.text(),
            kernel: &files.kernel,
            initrd: &files.initrd,
            image: &plan.image,
            disk_io: plan.disk_io,
        };
        let console = new_fifo(&self.console(id))?;
        let mut command = Command::new(&plan.qemu);
        command.args(vm.arguments()).env_remove("NOTIFY_SOCKET").stdin(console);
        if let Some(lock) = &plan.image_lock {
            keep_open(&mut command, lock.file());
        }
        let child = Child::spawn("QEMU", command, Source::Qemu(id), Some(Source::Appliance(id)), self.output);
        if child.is_err() {
            self.remove_files(id);
        }
        self.appliances.insert(id, child?);
        Ok(())
    }

    /// Waits for the next death. May be dropped at any time without losing one.
    ///
    /// # Errors
    /// The system does not tell a child's state.
    pub(crate) async fn next_death(&mut self) -> anyhow::Result<(Member, Death)> {
        let (member, status) = self.next_exit().await?;
        // Only taken out of the list when all is known: until then this function may be dropped and called again.
        let death = match self.child(member) {
            Some(child) => child.death(status).await,
            None => Death::NotStarted("it was never started".to_owned()),
        };
        match member {
            Member::Bridge => drop(self.bridge.take()),
            Member::Appliance(id) => {
                drop(self.appliances.remove(&id));
                self.remove_files(id);
            }
        }
        Ok((member, death))
    }

    /// Waits until one has ended. An appliance VM comes before the bridge: if both have ended, a bridge of its own accord
    /// mostly went because QEMU did.
    async fn next_exit(&mut self) -> anyhow::Result<(Member, ExitStatus)> {
        type Exit<'b> = (Member, Pin<Box<dyn Future<Output = anyhow::Result<ExitStatus>> + 'b>>);
        let appliances = self
            .appliances
            .iter_mut()
            .map(|(id, child)| -> Exit<'_> { (Member::Appliance(*id), Box::pin(child.exited())) });
        let bridge = self.bridge.iter_mut().map(|child| -> Exit<'_> { (Member::Bridge, Box::pin(child.exited())) });
        let mut exits: Vec<Exit<'_>> = appliances.chain(bridge).collect();
        poll_fn(move |context| {
            for (member, exit) in &mut exits {
                if let Poll::Ready(status) = exit.as_mut().poll(context) {
                    return Poll::Ready(status.map(|status| (*member, status)));
                }
            }
            Poll::Pending
        })
        .await
    }

    fn child(&mut self, member: Member) -> Option<&mut Child> {
        match member {
            Member::Bridge => self.bridge.as_mut(),
            Member::Appliance(id) => self.appliances.get_mut(&id),
        }
    }

    /// Asks one to end; its death is told by [`Fleet::next_death`].
    pub(crate) fn terminate(&mut self, member: Member) {
        if let Some(child) = self.child(member) {
            child.terminate();
        }
    }

    /// Kills one; its death is told by [`Fleet::next_death`].
    pub(crate) fn kill(&mut self, member: Member) {
        if let Some(child) = self.child(member) {
            child.start_kill();
        }
    }

    /// Process id of one that lives.
    pub(crate) fn pid(&self, member: Member) -> Option<u32> {
        match member {
            Member::Bridge => self.bridge.as_ref().map(Child::pid),
            Member::Appliance(id) => self.appliances.get(&id).map(Child::pid),
        }
    }

    /// An appliance VM that lives, for the operator.
    pub(crate) fn appliance(&self, id: ApplianceId) -> Option<ApplianceStatus> {
        let pid = self.pid(Member::Appliance(id))?;
        Some(ApplianceStatus { number: id, pid, qmp: self.qmp(id), console: self.console(id) })
    }

    /// QMP socket of an appliance VM.
    pub(crate) fn qmp(&self, id: ApplianceId) -> PathBuf {
        self.directory.path().join(qmp_socket(id))
    }

    fn console(&self, id: ApplianceId) -> PathBuf {
        self.directory.path().join(format!("console-{id}.in"))
    }

    fn remove_files(&self, id: ApplianceId) {
        for path in [self.qmp(id), self.console(id)] {
            // What is left, and what QEMU has removed itself, goes with the directory.
            let _ = std::fs::remove_file(path);
        }
    }

    /// Ends all in order: the appliance VMs first, so that nothing works in the driver VM's memory any more, then the
    /// bridge. May be dropped; [`Fleet::kill_all`] does the rest.
    ///
    /// # Errors
    /// The system does not tell a child's state.
    pub(crate) async fn end(&mut self) -> anyhow::Result<()> {
        for child in self.appliances.values() {
            child.terminate();
        }
        for child in self.appliances.values_mut() {
            child.ended_within(APPLIANCE_GRACE).await?;
        }
        if let Some(bridge) = self.bridge.as_mut() {
            bridge.end(BRIDGE_GRACE).await?;
        }
        Ok(())
    }

    /// Kills who still lives and waits for the rest of all output, so that it is written before the run's end is told.
    pub(crate) async fn kill_all(&mut self) {
        for child in self.appliances.values_mut().chain(self.bridge.as_mut()) {
            // A child whose state cannot be told is killed again when it is dropped.
            let _ = child.kill().await;
            child.last_lines().await;
        }
    }
}

/// A new FIFO, open in both directions so that neither end waits for the other.
fn new_fifo(path: &std::path::Path) -> anyhow::Result<File> {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
        .map_err(std::io::Error::from)
        .and_then(|()| OpenOptions::new().read(true).write(true).open(path))
        .context("cannot make the console's FIFO in the runtime directory")
}
