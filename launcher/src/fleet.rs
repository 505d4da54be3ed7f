//! The processes of a run: a bridge for each port and the appliance VMs, of which there are two while one replaces the other.
//!
//! Each bridge has a directory of its own in the runtime directory. Each appliance VM has files there, which vanish with it: the
//! QMP socket and those of the channels, which QEMU makes, a FIFO that is QEMU's standard input, and so the serial console's,
//! and its initial RAM file system if that is not the image's.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::future::{Future, poll_fn};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{ExitStatus, Stdio};
use std::task::Poll;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::process::Command;
use vvu_appliance_config::BootTimes;
use vvu_protocol::doorbell::vector_count;

use crate::children::Child;
use crate::control::ApplianceStatus;
use crate::ending::Death;
use crate::events::Source;
use crate::inherit::keep_open;
use crate::notify::NotifySocket;
use crate::output::Output;
use crate::plan::{MAX_CHANNELS, Machine, Plan, Port};
use crate::programs::ApplianceFiles;
use crate::qemu_args::{ApplianceVm, BRIDGE_SOCKETS, CONFIG_FILE, channel_socket, port_dir, qmp_socket};
use crate::runtime_dir::RuntimeDir;
use crate::supervisor::{APPLIANCE_GRACE, ApplianceId, PortId};

/// Time for a bridge to disconnect its front-end after SIGTERM.
const BRIDGE_GRACE: Duration = Duration::from_secs(5);

/// Name of the notification socket in a bridge's directory.
const NOTIFY_SOCKET: &str = "notify.sock";

/// One of the processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Member {
    /// A port's bridge.
    Bridge(PortId),
    /// An appliance VM's QEMU.
    Appliance(ApplianceId),
}

/// The processes that live.
#[derive(Debug)]
pub(crate) struct Fleet<'a> {
    directory: &'a RuntimeDir,
    output: &'a Output,
    bridges: BTreeMap<PortId, Child>,
    appliances: BTreeMap<ApplianceId, Child>,
}

impl<'a> Fleet<'a> {
    /// Nobody yet.
    pub(crate) fn new(directory: &'a RuntimeDir, output: &'a Output) -> Self {
        Self { directory, output, bridges: BTreeMap::new(), appliances: BTreeMap::new() }
    }

    /// Makes the directories of all bridges and the sockets on which these will tell what they do.
    ///
    /// # Errors
    /// The system refuses one.
    pub(crate) fn listen_to_bridges(&self, plan: &Plan) -> anyhow::Result<Vec<NotifySocket>> {
        let socket = |number| {
            let directory = self.port_dir(PortId(number));
            DirBuilder::new().mode(0o700).create(&directory).context("cannot write to the runtime directory")?;
            NotifySocket::bind(&directory.join(NOTIFY_SOCKET)).context("cannot bind the notification socket")
        };
        (0..).zip(&plan.ports).map(|(number, _)| socket(number)).collect()
    }

    /// Starts the bridge of a port. Sockets of an earlier one that was killed are removed; no appliance VM may live.
    ///
    /// # Errors
    /// The program cannot be started.
    pub(crate) fn start_bridge(&mut self, number: PortId, port: &Port, machine: &Machine) -> anyhow::Result<()> {
        let directory = self.port_dir(number);
        for socket in BRIDGE_SOCKETS {
            // Mostly there is none.
            let _ = std::fs::remove_file(directory.join(socket));
        }
        let mut command = Command::new(&machine.bridge);
        command.args(["--socket-path", &port.socket, "--uuid", &port.uuid, "--appliance-dir"]).arg(&directory);
        command.args(["--queues", &port.vrings.to_string(), "--window", &machine.window.0.to_string()]);
        command.args(["--vectors", &vector_count(port.vrings).to_string()]);
        if machine.relay {
            command.arg("--relay");
        }
        command.arg("--exit-with-parent").stdin(Stdio::null());
        command.env("NOTIFY_SOCKET", directory.join(NOTIFY_SOCKET)).env("RUST_LOG", &machine.log);
        let child = Child::spawn("bridge", command, Source::Bridge(number), None, self.output)?;
        self.bridges.insert(number, child);
        Ok(())
    }

    fn port_dir(&self, port: PortId) -> PathBuf {
        self.directory.path().join(port_dir(port))
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
        let machine = &plan.machine;
        let initrd = match plan.overlay {
            Some(_) => format!("{}/{}", self.directory.text(), initrd_file(id)),
            None => files.initrd.clone(),
        };
        let vm = ApplianceVm {
            accel: machine.accel,
            memory: machine.memory,
            cpus: machine.cpus,
            ports: &plan.ports,
            id,
            append: machine.append.as_deref(),
            runtime_dir: self.directory.text(),
            kernel: &files.kernel,
            initrd: &initrd,
            disks: &plan.disks,
            nic: plan.nic.as_ref(),
            channels: &plan.channels,
        };
        self.write_config(plan)?;
        if let Some(overlay) = &plan.overlay {
            overlay.append_to(Path::new(&files.initrd), Path::new(&initrd))?;
        }
        let console = new_fifo(&self.console(id))?;
        let mut command = Command::new(&machine.qemu);
        command.args(vm.arguments()).env_remove("NOTIFY_SOCKET").stdin(console);
        for lock in plan.disks.iter().filter_map(|disk| disk.lock.as_ref()) {
            keep_open(&mut command, lock.file());
        }
        let child = Child::spawn("QEMU", command, Source::Qemu(id), Some(Source::Appliance(id)), self.output);
        if child.is_err() {
            self.remove_files(id);
        }
        self.appliances.insert(id, child?);
        Ok(())
    }

    /// Writes the document for the agent as it is now. QEMU reads it at its start, and one starts at a time.
    fn write_config(&self, plan: &Plan) -> anyhow::Result<()> {
        let document = plan.config.to_json().context("cannot write the appliance's configuration")?;
        std::fs::write(self.directory.path().join(CONFIG_FILE), document)
            .context("cannot write to the runtime directory")
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
            Member::Bridge(port) => drop(self.bridges.remove(&port)),
            Member::Appliance(id) => {
                drop(self.appliances.remove(&id));
                self.remove_files(id);
            }
        }
        Ok((member, death))
    }

    /// Waits until one has ended. An appliance VM comes before a bridge: if both have ended, a bridge of its own accord
    /// mostly went because QEMU did.
    async fn next_exit(&mut self) -> anyhow::Result<(Member, ExitStatus)> {
        type Exit<'b> = (Member, Pin<Box<dyn Future<Output = anyhow::Result<ExitStatus>> + 'b>>);
        let appliances = self
            .appliances
            .iter_mut()
            .map(|(id, child)| -> Exit<'_> { (Member::Appliance(*id), Box::pin(child.exited())) });
        let bridges = self
            .bridges
            .iter_mut()
            .map(|(port, child)| -> Exit<'_> { (Member::Bridge(*port), Box::pin(child.exited())) });
        let mut exits: Vec<Exit<'_>> = appliances.chain(bridges).collect();
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
            Member::Bridge(port) => self.bridges.get_mut(&port),
            Member::Appliance(id) => self.appliances.get_mut(&id),
        }
    }

    /// Asks one to end; its death is told by [`Fleet::next_death`].
    pub(crate) fn terminate(&mut self, member: Member) {
        if let Some(child) = self.child(member) {
            child.terminate();
        }
    }

    /// From now on this appliance VM's agent listens on a channel to end it in order.
    pub(crate) fn ends_from_inside(&mut self, id: ApplianceId, channel: usize) {
        let socket = self.channel(channel, id);
        if let Some(child) = self.appliances.get_mut(&id) {
            child.ends_from_inside(socket);
        }
    }

    /// Kills one; its death is told by [`Fleet::next_death`].
    pub(crate) fn kill(&mut self, member: Member) {
        if let Some(child) = self.child(member) {
            child.start_kill();
        }
    }

    /// What an appliance VM that lives told of its boot, and when that came.
    pub(crate) fn boot(&self, id: ApplianceId) -> Option<(Instant, BootTimes)> {
        self.appliances.get(&id).and_then(Child::boot)
    }

    /// Process id of one that lives.
    pub(crate) fn pid(&self, member: Member) -> Option<u32> {
        match member {
            Member::Bridge(port) => self.bridges.get(&port).map(Child::pid),
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

    /// Socket of an appliance VM's channel; they are counted from 0.
    pub(crate) fn channel(&self, channel: usize, id: ApplianceId) -> PathBuf {
        self.directory.path().join(channel_socket(channel, id))
    }

    fn console(&self, id: ApplianceId) -> PathBuf {
        self.directory.path().join(format!("console-{id}.in"))
    }

    fn remove_files(&self, id: ApplianceId) {
        let initrd = self.directory.path().join(initrd_file(id));
        let channels = (0..MAX_CHANNELS).map(|channel| self.channel(channel, id));
        for path in [self.qmp(id), self.console(id), initrd].into_iter().chain(channels) {
            // What is left, and what QEMU has removed itself, goes with the directory.
            let _ = std::fs::remove_file(path);
        }
    }

    /// Ends all in order: the appliance VMs first, so that nothing works in a driver VM's memory any more, then the
    /// bridges. May be dropped; [`Fleet::kill_all`] does the rest.
    ///
    /// # Errors
    /// The system does not tell a child's state.
    pub(crate) async fn end(&mut self) -> anyhow::Result<()> {
        for child in self.appliances.values_mut() {
            child.terminate();
        }
        for child in self.appliances.values_mut() {
            child.ended_within(APPLIANCE_GRACE).await?;
        }
        for bridge in self.bridges.values_mut() {
            bridge.terminate();
        }
        for bridge in self.bridges.values_mut() {
            bridge.ended_within(BRIDGE_GRACE).await?;
        }
        Ok(())
    }

    /// Kills who still lives and waits for the rest of all output, so that it is written before the run's end is told.
    pub(crate) async fn kill_all(&mut self) {
        for child in self.appliances.values_mut().chain(self.bridges.values_mut()) {
            // A child whose state cannot be told is killed again when it is dropped.
            let _ = child.kill().await;
            child.last_lines().await;
        }
    }
}

/// Name of an appliance VM's initial RAM file system in the runtime directory, if it is not that of the image.
fn initrd_file(id: ApplianceId) -> String {
    format!("initrd-{id}")
}

/// A new FIFO, open in both directions so that neither end waits for the other.
fn new_fifo(path: &Path) -> anyhow::Result<File> {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
        .map_err(std::io::Error::from)
        .and_then(|()| OpenOptions::new().read(true).write(true).open(path))
        .context("cannot make the console's FIFO in the runtime directory")
}
