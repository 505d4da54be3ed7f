//! One device, from start to end.
//!
//! This is the part that waits: for the operator's signals and requests, for children that die, for the bridge's
//! announcements, for a deadline. What any of it means is decided by the [`Supervisor`], whose actions are done here. All
//! waits happen together, so none is missed. However a run ends, [`Run::bring_down`] does it in one order: appliance VMs
//! first, so that the back-end stops working in the driver VM's memory, then the bridge, then the sockets and the runtime
//! directory.

mod requests;

use std::collections::VecDeque;
use std::future::pending;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::task::JoinHandle;

use self::requests::Wanted;
use crate::cli::BlkArgs;
use crate::control_socket::ControlSocket;
use crate::ending::{Death, Ending};
use crate::events::{Event, Pids, TimingsMs};
use crate::fleet::{Fleet, Member, NOTIFY_SOCKET};
use crate::log_follow::{Pass, RateLimit};
use crate::notify::{Notice, NotifySocket};
use crate::output::Output;
use crate::plan::Plan;
use crate::qemu_args::CONFIG_FILE;
use crate::restart_policy::Restarts;
use crate::runtime_dir::RuntimeDir;
use crate::signals::Signals;
use crate::socket_path::SocketFile;
use crate::supervisor::{Action, ApplianceId, Input, Part, Progress, Report, Supervisor};
use crate::vmm_lines::{self, DeviceAddress};

/// Announcements that are read before a death is handled: the bridge's view of what came before it. The system keeps fewer
/// in a socket.
const MAX_NOTICES_BEFORE_DEATH: usize = 1024;

/// How long a drop by the bridge waits for the death that may be its cause, and that is the better reason to tell.
const DEATH_FOLLOWS: Duration = Duration::from_millis(200);

/// Serves one block device until a signal or a death ends it.
pub(crate) async fn run_blk(args: &BlkArgs, output: &Output, started: Instant) -> Ending {
    let plan = match Plan::make(args).await {
        Ok(plan) => plan,
        Err(error) => return Ending::refused(&error),
    };
    match serve(plan, output, started).await {
        Ok(ending) => ending,
        Err(error) => Ending::failed(&error),
    }
}

async fn serve(plan: Plan, output: &Output, started: Instant) -> anyhow::Result<Ending> {
    let signals = Signals::catch()?;
    let directory = RuntimeDir::create()?;
    std::fs::write(directory.path().join(CONFIG_FILE), &plan.config)
        .context("cannot write to the runtime directory")?;
    let notify_path = directory.path().join(NOTIFY_SOCKET);
    let notify = NotifySocket::bind(&notify_path).context("cannot bind the notification socket")?;
    let control = ControlSocket::bind(&plan.control)?;
    output.event(&starting(&plan, &directory));
    let mut fleet = Fleet::new(&directory, output);
    fleet.start_bridge(&plan)?;
    let now = Instant::now();
    let mut run = Run {
        supervisor: Supervisor::new(Restarts::new(plan.restart_limit), now),
        plan,
        output,
        started,
        directory: &directory,
        signals,
        notify,
        control,
        fleet,
        inputs: VecDeque::new(),
        socket_file: None,
        event_limit: RateLimit::new(now),
        wanted: None,
        resizing: None,
        bridge_listening_ms: 0,
        qemu_started_ms: 0,
        status_text: String::new(),
        last_pause_us: None,
    };
    let ending = run.run().await;
    run.bring_down().await;
    ending
}

/// A run whose bridge is started.
#[derive(Debug)]
struct Run<'a> {
    plan: Plan,
    output: &'a Output,
    started: Instant,
    directory: &'a RuntimeDir,
    signals: Signals,
    notify: NotifySocket,
    control: ControlSocket,
    fleet: Fleet<'a>,
    supervisor: Supervisor,
    /// What has happened and is not handled yet.
    inputs: VecDeque<Input>,
    socket_file: Option<SocketFile>,
    event_limit: RateLimit,
    /// The replacement that an operator waits for.
    wanted: Option<Wanted>,
    /// The change of the disk's size that is under way; it yields the new size if it was done.
    resizing: Option<JoinHandle<Option<u64>>>,
    bridge_listening_ms: u64,
    qemu_started_ms: u64,
    status_text: String,
    last_pause_us: Option<u64>,
}

impl Run<'_> {
    async fn run(&mut self) -> anyhow::Result<Ending> {
        loop {
            while let Some(input) = self.inputs.pop_front() {
                for action in self.supervisor.handle(input, Instant::now()) {
                    if let Some(ending) = self.perform(action) {
                        return Ok(ending);
                    }
                }
            }
            self.wait().await?;
        }
    }

    /// Waits for one thing to happen.
    async fn wait(&mut self) -> anyhow::Result<()> {
        let deadline = self.supervisor.deadline().map(tokio::time::Instant::from_std);
        tokio::select! {
            biased;
            name = self.signals.next() => self.inputs.push_back(Input::Signal(name)),
            death = self.fleet.next_death() => {
                let (member, death) = death?;
                self.died(member, death);
            }
            notice = self.notify.next() => {
                let notice = notice.context("cannot read the notification socket")?;
                self.noticed_in_order(notice).await?;
            }
            asked = self.control.next() => self.asked(asked),
            () = requests::gone(self.wanted.as_ref()) => {
                self.wanted = None;
                self.inputs.push_back(Input::ReplaceAbandoned);
            }
            size = resized(self.resizing.as_mut()) => {
                self.resizing = None;
                self.plan.image.size_bytes = size.unwrap_or(self.plan.image.size_bytes);
            }
            () = until(deadline) => self.inputs.push_back(Input::TimePassed),
        }
        Ok(())
    }

    fn died(&mut self, member: Member, death: Death) {
        // What the bridge said before is older than the death, and may tell which appliance VM is which. That it dropped
        // one mostly follows from the death.
        let mut dropped = Vec::new();
        for _ in 0..MAX_NOTICES_BEFORE_DEATH {
            let Some(mut notice) = self.notify.try_next() else { break };
            dropped.extend(notice.lost.take());
            self.noticed(notice);
        }
        self.inputs.push_back(match member {
            Member::Bridge => Input::BridgeEnded(death),
            Member::Appliance(id) => Input::ApplianceEnded(id, death),
        });
        if member != Member::Bridge {
            self.inputs.extend(dropped.into_iter().map(Input::Dropped));
        }
    }

    /// Handles an announcement, after the death that is its cause if it has one.
    async fn noticed_in_order(&mut self, notice: Notice) -> anyhow::Result<()> {
        if notice.lost.is_some()
            && let Ok(death) = tokio::time::timeout(DEATH_FOLLOWS, self.fleet.next_death()).await
        {
            let (member, death) = death?;
            self.died(member, death);
        }
        self.noticed(notice);
        Ok(())
    }

    fn noticed(&mut self, notice: Notice) {
        if let Some(text) = notice.status {
            self.status_text.clone_from(&text);
            self.tell_often(&Event::Status { text, at_ms: self.elapsed_ms() });
        }
        if let Some(accepted) = notice.lost {
            self.inputs.push_back(Input::Dropped(accepted));
        }
        if notice.listening {
            self.socket_file = SocketFile::at(&self.plan.socket);
            self.bridge_listening_ms = self.elapsed_ms();
            self.inputs.push_back(Input::Listening);
        }
        if let Some(accepted) = notice.active {
            self.inputs.push_back(Input::Active { accepted, pause_us: notice.pause_us });
        }
        if notice.ready {
            self.inputs.push_back(Input::Ready);
        }
    }

    /// Does what the supervisor wants; returns the run's end.
    fn perform(&mut self, action: Action) -> Option<Ending> {
        match action {
            Action::StartBridge => self.start_bridge(),
            Action::StartAppliance(id) => self.start_appliance(id),
            Action::StartStandby(id) => self.start_standby(id),
            Action::AdoptImage => self.adopt_image(),
            Action::Terminate(id) => self.fleet.terminate(Member::Appliance(id)),
            Action::Kill(id) => self.fleet.kill(Member::Appliance(id)),
            Action::KillBridge => self.fleet.kill(Member::Bridge),
            Action::Tell(report) => self.tell(report),
            Action::Progress(progress) => self.progress(progress),
            Action::Answer(result) => self.answer(result),
            Action::End(ending) => return Some(ending),
        }
        None
    }

    fn start_bridge(&mut self) {
        if let Some(file) = self.socket_file.take() {
            file.remove(&self.plan.socket);
        }
        if let Err(error) = self.fleet.start_bridge(&self.plan) {
            self.inputs.push_back(Input::BridgeEnded(Death::NotStarted(format!("{error:#}"))));
        }
    }

    fn start_appliance(&mut self, id: ApplianceId) {
        self.qemu_started_ms = self.elapsed_ms();
        let started = self.fleet.start_appliance(id, &self.plan, &self.plan.appliance);
        self.note_start(id, started);
    }

    fn start_standby(&mut self, id: ApplianceId) {
        let Some(wanted) = &self.wanted else { return };
        let started = self.fleet.start_appliance(id, &self.plan, &wanted.appliance);
        if started.is_ok() {
            let pid = self.fleet.pid(Member::Appliance(id)).unwrap_or_default();
            wanted.progress("booting", format!("appliance {id} boots beside the one in use (pid {pid})"));
        }
        self.note_start(id, started);
    }

    fn note_start(&mut self, id: ApplianceId, started: anyhow::Result<()>) {
        if let Err(error) = started {
            self.inputs.push_back(Input::ApplianceEnded(id, Death::NotStarted(format!("{error:#}"))));
        }
    }

    fn progress(&self, progress: Progress) {
        let Some(wanted) = &self.wanted else { return };
        match progress {
            Progress::Active(done) => {
                wanted.progress("active", format!("appliance {} is in use; the one before is ended", done.appliance));
            }
            Progress::ActiveLost => {
                wanted.progress(
                    "active-lost",
                    "the appliance VM in use is gone, the new one takes over when it can".into(),
                );
            }
        }
    }

    fn tell(&mut self, report: Report) {
        match report {
            Report::Ready(_) => self.output.event(&self.ready()),
            Report::Active { appliance, pause_us } => {
                self.last_pause_us = pause_us.or(self.last_pause_us);
                self.tell_often(&Event::Active { appliance, pause_us });
            }
            Report::ApplianceLost { appliance, ending, restart } => {
                let (reason, last_lines) = ending.into_words();
                self.output.event(&Event::ApplianceLost { appliance, reason, last_lines, restart });
            }
            Report::BridgeLost { ending, restart } => {
                let (reason, last_lines) = ending.into_words();
                self.output.event(&Event::BridgeLost { reason, last_lines, restart });
            }
            Report::Restarted { what, took } => {
                let what = match what {
                    Part::Appliance => "appliance",
                    Part::Bridge => "bridge",
                };
                self.output.event(&Event::Restarted { what, pids: self.pids(), took_ms: in_ms(took) });
            }
        }
    }

    /// Tells an event that the bridge, a front-end or a back-end can cause as often as it likes.
    fn tell_often(&mut self, event: &Event) {
        if self.event_limit.pass(Instant::now()) != Pass::No {
            self.output.event(event);
        }
    }

    fn ready(&self) -> Event {
        let address = DeviceAddress { socket: &self.plan.socket, queues: self.plan.queues };
        Event::Ready {
            socket: self.plan.socket.clone(),
            pids: self.pids(),
            timings_ms: TimingsMs {
                bridge_listening: self.bridge_listening_ms,
                qemu_started: self.qemu_started_ms,
                ready: self.elapsed_ms(),
            },
            vmms: vmm_lines::all(address),
        }
    }

    /// The process ids while an appliance VM is in use.
    fn pids(&self) -> Pids {
        let pid = |member| self.fleet.pid(member).unwrap_or_default();
        let qemu = self.supervisor.in_use().map(|id| pid(Member::Appliance(id)));
        Pids { vvu: std::process::id(), bridge: pid(Member::Bridge), qemu: qemu.unwrap_or_default() }
    }

    fn qmp_in_use(&self) -> Option<PathBuf> {
        self.supervisor.in_use().map(|id| self.fleet.qmp(id))
    }

    /// Ends what still runs, in order; a further signal kills it.
    async fn bring_down(&mut self) {
        tokio::select! {
            _ = self.fleet.end() => {}
            _ = self.signals.next() => {}
        }
        self.fleet.kill_all().await;
        if let Some(file) = self.socket_file {
            file.remove(&self.plan.socket);
        }
    }

    fn elapsed_ms(&self) -> u64 {
        in_ms(self.started.elapsed())
    }
}

fn in_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

async fn until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => pending().await,
    }
}

async fn resized(task: Option<&mut JoinHandle<Option<u64>>>) -> Option<u64> {
    match task {
        Some(task) => task.await.unwrap_or(None),
        None => pending().await,
    }
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
        control: plan.control.clone(),
    }
}
