//! One device, from start to end.
//!
//! Actors: the bridge and the appliance VM's QEMU, both children of this process; the operator, who sends signals.
//! Steps: the bridge listens, QEMU starts and connects, the device is ready, the device serves. In every step the same
//! four things may happen ([`Happening`]) and all are awaited together, so none is missed. Each step but the last has a
//! limit. However a run ends, [`Session::end`] brings it down in one order: QEMU first, so that the back-end stops
//! working in the driver VM's memory, then the bridge, then the socket and the runtime directory.

use std::future::pending;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::process::Command;

use crate::children::Child;
use crate::cli::BlkArgs;
use crate::ending::Ending;
use crate::events::{Event, Output, Pids, Source, TimingsMs};
use crate::log_follow::{Pass, RateLimit};
use crate::notify::{Notice, NotifySocket};
use crate::plan::Plan;
use crate::qemu_args::{ApplianceVm, CONFIG_FILE};
use crate::runtime_dir::RuntimeDir;
use crate::signals::Signals;
use crate::socket_path::SocketFile;
use crate::vmm_lines::{self, DeviceAddress};

/// How long a bridge may take to end after QEMU: it only has to see a closed socket.
const BRIDGE_FOLLOWS: Duration = Duration::from_millis(500);

/// Longest wait until the bridge listens; it only binds sockets.
const LISTENING_LIMIT: Duration = Duration::from_secs(30);

/// Longest wait until the device is ready: a boot under TCG on a loaded machine takes tens of seconds.
const READY_LIMIT: Duration = Duration::from_secs(180);

/// Time for QEMU to finish the disk's requests after SIGTERM.
const APPLIANCE_GRACE: Duration = Duration::from_secs(10);

/// Time for the bridge to disconnect its front-end after SIGTERM.
const BRIDGE_GRACE: Duration = Duration::from_secs(5);

/// Name of the notification socket in the runtime directory.
const NOTIFY_SOCKET: &str = "notify.sock";

/// Signal number of SIGKILL (signal(7)).
const SIGKILL: i32 = 9;

/// Serves one block device until a signal or a death ends it.
pub(crate) async fn run_blk(args: &BlkArgs, output: &Output, started: Instant) -> Ending {
    let plan = match Plan::make(args).await {
        Ok(plan) => plan,
        Err(error) => return Ending::refused(&error),
    };
    match serve(&plan, output, started).await {
        Ok(ending) => ending,
        Err(error) => Ending::failed(&error),
    }
}

async fn serve(plan: &Plan, output: &Output, started: Instant) -> anyhow::Result<Ending> {
    let signals = Signals::catch()?;
    let directory = RuntimeDir::create()?;
    std::fs::write(directory.path().join(CONFIG_FILE), &plan.config)
        .context("cannot write to the runtime directory")?;
    let notify_path = directory.path().join(NOTIFY_SOCKET);
    let notify = NotifySocket::bind(&notify_path).context("cannot bind the notification socket")?;
    output.event(&starting(plan, &directory));
    let bridge = start_bridge(plan, &directory, output)?;
    let mut session = Session {
        plan,
        output,
        started,
        directory: &directory,
        signals,
        notify,
        bridge,
        appliance: None,
        socket_file: None,
        status_limit: RateLimit::new(Instant::now()),
    };
    let ending = session.run().await;
    session.end().await;
    ending
}

/// What can happen at any time of a run.
#[derive(Debug)]
enum Happening {
    Signal(&'static str),
    ApplianceEnded(ExitStatus),
    BridgeEnded(ExitStatus),
    Notice(Notice),
}

/// What a step waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Awaited {
    /// The bridge's sockets accept connections.
    Listening,
    /// The device can serve.
    Ready,
    /// Nothing: the run goes on until something ends it.
    End,
}

impl Awaited {
    fn is_in(self, notice: &Notice) -> bool {
        match self {
            Self::Listening => notice.listening,
            Self::Ready => notice.ready,
            Self::End => false,
        }
    }

    /// What did not happen in time, for a person.
    fn words(self) -> &'static str {
        match self {
            Self::Listening => "the bridge does not listen",
            Self::Ready => "the device is not ready",
            Self::End => "the run has not ended",
        }
    }
}

/// A run whose bridge is started.
#[derive(Debug)]
struct Session<'a> {
    plan: &'a Plan,
    output: &'a Output,
    started: Instant,
    directory: &'a RuntimeDir,
    signals: Signals,
    notify: NotifySocket,
    bridge: Child,
    appliance: Option<Child>,
    socket_file: Option<SocketFile>,
    status_limit: RateLimit,
}

impl Session<'_> {
    async fn run(&mut self) -> anyhow::Result<Ending> {
        if let Some(ending) = self.wait_for(Awaited::Listening, Some(LISTENING_LIMIT)).await? {
            return Ok(ending);
        }
        self.socket_file = SocketFile::at(&self.plan.socket);
        let bridge_listening = self.elapsed_ms();
        let appliance = self.start_appliance()?;
        let qemu = appliance.pid();
        self.appliance = Some(appliance);
        let qemu_started = self.elapsed_ms();
        if let Some(ending) = self.wait_for(Awaited::Ready, Some(READY_LIMIT)).await? {
            return Ok(ending);
        }
        let address = DeviceAddress { socket: &self.plan.socket, queues: self.plan.queues };
        self.output.event(&Event::Ready {
            socket: self.plan.socket.clone(),
            pids: Pids { vvu: std::process::id(), bridge: self.bridge.pid(), qemu },
            timings_ms: TimingsMs { bridge_listening, qemu_started, ready: self.elapsed_ms() },
            vmms: vmm_lines::all(address),
        });
        let ending = self.wait_for(Awaited::End, None).await?;
        ending.context("the run ended without a reason")
    }

    /// Handles what happens until the bridge announces `awaited` (returns `None`) or the run is over.
    async fn wait_for(&mut self, awaited: Awaited, limit: Option<Duration>) -> anyhow::Result<Option<Ending>> {
        let deadline = limit.map(|limit| tokio::time::Instant::now() + limit);
        loop {
            let happening = match deadline {
                None => self.next().await?,
                Some(deadline) => match tokio::time::timeout_at(deadline, self.next()).await {
                    Ok(happening) => happening?,
                    Err(_) => return Ok(Some(self.overdue(awaited, limit.unwrap_or_default()).await)),
                },
            };
            match happening {
                Happening::Signal(name) => return Ok(Some(Ending::signal(name, awaited == Awaited::End))),
                Happening::ApplianceEnded(status) => return Ok(Some(self.appliance_gone(status).await)),
                Happening::BridgeEnded(status) => return self.bridge_ended(status).await.map(Some),
                Happening::Notice(notice) => {
                    self.tell_status(&notice);
                    if awaited.is_in(&notice) {
                        return Ok(None);
                    }
                }
            }
        }
    }

    async fn next(&mut self) -> anyhow::Result<Happening> {
        let appliance = async {
            match self.appliance.as_mut() {
                Some(child) => child.exited().await,
                None => pending().await,
            }
        };
        // The appliance before the bridge: if both have ended, the bridge mostly went because QEMU did.
        tokio::select! {
            biased;
            name = self.signals.next() => Ok(Happening::Signal(name)),
            status = appliance => status.map(Happening::ApplianceEnded),
            status = self.bridge.exited() => status.map(Happening::BridgeEnded),
            notice = self.notify.next() => notice.map(Happening::Notice).context("cannot read the notification socket"),
        }
    }

    fn tell_status(&mut self, notice: &Notice) {
        // A front-end that comes and goes makes the bridge change its state as often as it likes.
        let Some(text) = notice.status.clone() else { return };
        if self.status_limit.pass(Instant::now()) != Pass::No {
            self.output.event(&Event::Status { text, at_ms: self.elapsed_ms() });
        }
    }

    async fn overdue(&mut self, awaited: Awaited, limit: Duration) -> Ending {
        let child = self.appliance.as_mut().unwrap_or(&mut self.bridge);
        // A failure to kill shows again when the session is brought down.
        let _ = child.kill().await;
        Ending::not_ready(awaited.words(), limit, child.last_lines().await)
    }

    /// The appliance VM has ended, and the bridge is about to or was first. A bridge that sees QEMU go ends by itself; one that
    /// a signal has ended went first, and QEMU aborts without it.
    async fn appliance_gone(&mut self, status: ExitStatus) -> Ending {
        match tokio::time::timeout(BRIDGE_FOLLOWS, self.bridge.exited()).await {
            Ok(Ok(bridge)) if bridge.signal().is_some() => {
                Ending::bridge_ended(bridge, true, self.bridge.last_lines().await)
            }
            _ => self.appliance_ended(status).await,
        }
    }

    async fn appliance_ended(&mut self, status: ExitStatus) -> Ending {
        let lines = match self.appliance.as_mut() {
            Some(child) => child.last_lines().await,
            None => Vec::new(),
        };
        Ending::appliance_ended(status, lines)
    }

    /// The appliance VM is killed at once: the driver VM's VMM has seen its back-end go and may use the memory for
    /// something else, while QEMU keeps it mapped.
    async fn bridge_ended(&mut self, status: ExitStatus) -> anyhow::Result<Ending> {
        if let Some(appliance) = self.appliance.as_mut() {
            let killed = appliance.kill().await?;
            if status.signal().is_none() && killed.signal() != Some(SIGKILL) {
                // It was on its way out already, and the bridge saw that before we did.
                return Ok(self.appliance_ended(killed).await);
            }
        }
        Ok(Ending::bridge_ended(status, self.appliance.is_some(), self.bridge.last_lines().await))
    }

    /// Ends what still runs, in order; a further signal kills it.
    async fn end(&mut self) {
        let (appliance, bridge) = (&mut self.appliance, &mut self.bridge);
        let in_order = async {
            if let Some(child) = appliance.as_mut() {
                child.end(APPLIANCE_GRACE).await?;
            }
            bridge.end(BRIDGE_GRACE).await
        };
        // Children that could not be ended in order are killed when they are dropped.
        tokio::select! {
            _ = in_order => {}
            _ = self.signals.next() => {}
        }
        for child in self.appliance.iter_mut().chain([&mut self.bridge]) {
            let _ = child.kill().await;
            // Drained, so that the last lines are written before the run's end is told.
            child.last_lines().await;
        }
        if let Some(file) = self.socket_file {
            file.remove(&self.plan.socket);
        }
    }

    fn start_appliance(&self) -> anyhow::Result<Child> {
        let plan = self.plan;
        let vm = ApplianceVm {
            accel: plan.accel,
            memory: plan.memory,
            cpus: plan.cpus,
            queues: plan.queues,
            uuid: &plan.uuid,
            runtime_dir: self.directory.text(),
            kernel: &plan.appliance.kernel,
            initrd: &plan.appliance.initrd,
            image: &plan.image,
            disk_io: plan.disk_io,
        };
        let mut command = Command::new(&plan.qemu);
        command.args(vm.arguments()).env_remove("NOTIFY_SOCKET");
        Child::spawn("QEMU", command, Source::Qemu, Some(Source::Appliance), self.output)
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

fn start_bridge(plan: &Plan, directory: &RuntimeDir, output: &Output) -> anyhow::Result<Child> {
    let mut command = Command::new(&plan.bridge);
    command.args(["--socket-path", &plan.socket, "--appliance-dir", directory.text(), "--uuid", &plan.uuid]);
    command.args(["--class", "blk", "--queues", &plan.queues.to_string(), "--window", &plan.window.0.to_string()]);
    command.arg("--exit-with-parent");
    command.env("NOTIFY_SOCKET", directory.path().join(NOTIFY_SOCKET)).env("RUST_LOG", &plan.log);
    Child::spawn("bridge", command, Source::Bridge, None, output)
}

fn starting(plan: &Plan, directory: &RuntimeDir) -> Event {
    let cache = if plan.disk_io.direct { "O_DIRECT" } else { "page cache" };
    Event::Starting {
        image: plan.image.path.clone(),
        image_bytes: plan.image.size_bytes,
        read_only: plan.image.read_only,
        socket: plan.socket.clone(),
        uuid: plan.uuid.clone(),
        queues: plan.queues,
        window_bytes: plan.window.0,
        memory_bytes: plan.memory.0,
        cpus: plan.cpus,
        accel: plan.accel,
        accel_reason: plan.accel_reason.clone(),
        qemu_version: plan.qemu_version.to_string(),
        disk_io: format!("{}, {cache}", plan.disk_io.aio),
        runtime_dir: directory.text().to_owned(),
    }
}
