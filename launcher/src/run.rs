//! One device, from start to end.
//!
//! This is the part that waits: for the operator's signals and requests, for children that die, for the bridges'
//! announcements, for a deadline. What any of it means is decided by the [`Supervisor`], whose actions are done here. All
//! waits happen together, so none is missed. However a run ends, [`Run::bring_down`] does it in one order: appliance VMs
//! first, so that the back-end stops working in the driver VM's memory, then the bridges, then the sockets and the runtime
//! directory.

mod requests;
mod starting;

use std::collections::VecDeque;
use std::future::pending;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::task::JoinHandle;

use self::requests::{Changed, Wanted};
use crate::channel_links::ChannelLinks;
use crate::cli::MachineArgs;
use crate::control_socket::ControlSocket;
use crate::ending::{Death, Ending};
use crate::events::{BootMs, ChannelFacts, Event, Pids, TimingsMs};
use crate::fleet::{Fleet, Member};
use crate::log_follow::{Pass, RateLimit};
use crate::notify::{Notice, NotifySocket};
use crate::output::Output;
use crate::plan::{Channel, Class, Draft, Plan};
use crate::restart_policy::Restarts;
use crate::runtime_dir::RuntimeDir;
use crate::signals::Signals;
use crate::socket_path::SocketFile;
use crate::supervisor::{Action, ApplianceId, Input, Part, PortId, Progress, Report, Supervisor};
use crate::vmm_lines;

/// Announcements of a bridge that are read before a death is handled: its view of what came before it. The system keeps
/// fewer in a socket.
const MAX_NOTICES_BEFORE_DEATH: usize = 1024;

/// How long a drop by the bridge waits for the death that may be its cause, and that is the better reason to tell.
const DEATH_FOLLOWS: Duration = Duration::from_millis(200);

/// Serves what is drafted until a signal or a death ends it.
pub(crate) async fn run(
    draft: impl FnOnce() -> anyhow::Result<Draft>,
    args: &MachineArgs,
    output: &Output,
    started: Instant,
) -> Ending {
    let plan = match draft() {
        Ok(draft) => Plan::make(draft, args).await,
        Err(error) => Err(error),
    };
    let plan = match plan {
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
    let mut fleet = Fleet::new(&directory, output);
    let notify = fleet.listen_to_bridges(&plan)?;
    let control = ControlSocket::bind(&plan.control)?;
    let mut links = ChannelLinks::new(plan.channels.iter().filter_map(|channel| channel.link.clone()));
    for (number, channel) in plan.channels.iter().enumerate() {
        if let Some(link) = &channel.link {
            links.lead(link, fleet.channel(number, ApplianceId(1)))?;
        }
    }
    output.event(&starting::event(&plan, &directory));
    let mut ports = Vec::new();
    for (number, port) in (0..).map(PortId).zip(&plan.ports) {
        fleet.start_bridge(number, port, &plan.machine)?;
        ports.push(PortState::default());
    }
    let now = Instant::now();
    let count = u8::try_from(ports.len()).context("there are too many ports")?;
    let mut run = Run {
        supervisor: Supervisor::new(Restarts::new(plan.machine.restart_limit), count, now),
        plan,
        ports,
        output,
        started,
        directory: &directory,
        signals,
        notify,
        control,
        fleet,
        inputs: VecDeque::new(),
        event_limit: RateLimit::new(now),
        wanted: None,
        changing: None,
        links,
        bridge_listening_ms: 0,
        qemu_started_ms: 0,
        last_pause_us: None,
    };
    let ending = run.run().await;
    run.bring_down().await;
    ending
}

/// What is known of a port beside the plan.
#[derive(Debug, Default)]
struct PortState {
    socket_file: Option<SocketFile>,
    status_text: String,
}

/// A run whose bridges are started.
#[derive(Debug)]
struct Run<'a> {
    plan: Plan,
    /// In the order of the plan's.
    ports: Vec<PortState>,
    output: &'a Output,
    started: Instant,
    directory: &'a RuntimeDir,
    signals: Signals,
    /// In the order of the ports.
    notify: Vec<NotifySocket>,
    control: ControlSocket,
    fleet: Fleet<'a>,
    supervisor: Supervisor,
    /// What has happened and is not handled yet.
    inputs: VecDeque<Input>,
    event_limit: RateLimit,
    /// The replacement that an operator waits for.
    wanted: Option<Wanted>,
    /// The change of the device that is under way; it yields what has changed if it was done.
    changing: Option<JoinHandle<Option<Changed>>>,
    links: ChannelLinks,
    bridge_listening_ms: u64,
    qemu_started_ms: u64,
    last_pause_us: Option<u64>,
}

impl Run<'_> {
    async fn run(&mut self) -> anyhow::Result<Ending> {
        loop {
            while let Some(input) = self.inputs.pop_front() {
                let actions = self.supervisor.handle(input, Instant::now());
                self.lead_links();
                for action in actions {
                    if let Some(ending) = self.perform(action) {
                        return Ok(ending);
                    }
                }
            }
            self.wait().await?;
        }
    }

    /// Lets the operator's links lead to the appliance VM in use, and its agent end a program that is the operator's.
    fn lead_links(&mut self) {
        let Some(id) = self.supervisor.in_use() else { return };
        if let (Class::Exec, Some(channel)) = (self.plan.class, self.plan.control_channel()) {
            self.fleet.ends_from_inside(id, channel);
        }
        for (number, link) in self.plan.channels.iter().map(|channel| channel.link.as_ref()).enumerate() {
            if let Some(link) = link {
                // They could be made at the start. If the directory has gone since, that is no reason to end the device.
                let _ = self.links.lead(link, self.fleet.channel(number, id));
            }
        }
    }

    /// Waits for one thing to happen.
    async fn wait(&mut self) -> anyhow::Result<()> {
        let deadline = self.supervisor.deadline().map(tokio::time::Instant::from_std);
        tokio::select! {
            biased;
            name = self.signals.next() => self.inputs.push_back(Input::Signal(name)),
            // Before deaths: what was agreed is for the next appliance VM, too.
            changed = finished(self.changing.as_mut()) => {
                self.changing = None;
                self.take_over(changed);
            }
            death = self.fleet.next_death() => {
                let (member, death) = death?;
                self.died(member, death);
            }
            notice = NotifySocket::next_of(&self.notify) => {
                let (port, notice) = notice.context("cannot read the notification socket")?;
                self.noticed_in_order(port, notice).await?;
            }
            asked = self.control.next() => self.asked(asked),
            () = requests::gone(self.wanted.as_ref()) => {
                self.wanted = None;
                self.inputs.push_back(Input::ReplaceAbandoned);
            }
            () = until(deadline) => self.inputs.push_back(Input::TimePassed),
        }
        Ok(())
    }

    fn died(&mut self, member: Member, death: Death) {
        // What the bridges said before is older than the death, and may tell which appliance VM is which. That one was
        // dropped mostly follows from the death.
        let mut dropped = Vec::new();
        for port in self.port_ids() {
            for _ in 0..MAX_NOTICES_BEFORE_DEATH {
                let notice = self.notify.get(port.index()).and_then(NotifySocket::try_next);
                let Some(mut notice) = notice else { break };
                dropped.extend(notice.lost.take().map(|accepted| (port, accepted)));
                self.noticed(port, notice);
            }
        }
        let of_dead_bridge = |port: PortId| member == Member::Bridge(port);
        let dropped: Vec<_> = dropped.into_iter().filter(|(port, _)| !of_dead_bridge(*port)).collect();
        self.inputs.push_back(match member {
            Member::Bridge(port) => Input::BridgeEnded(port, death),
            Member::Appliance(id) => Input::ApplianceEnded(id, death),
        });
        self.inputs.extend(dropped.into_iter().map(|(port, accepted)| Input::Dropped(port, accepted)));
    }

    fn port_ids(&self) -> impl Iterator<Item = PortId> + use<> {
        (0..).map(PortId).take(self.ports.len())
    }

    /// Handles an announcement, after the death that is its cause if it has one.
    async fn noticed_in_order(&mut self, port: PortId, notice: Notice) -> anyhow::Result<()> {
        if notice.lost.is_some()
            && let Ok(death) = tokio::time::timeout(DEATH_FOLLOWS, self.fleet.next_death()).await
        {
            let (member, death) = death?;
            self.died(member, death);
        }
        self.noticed(port, notice);
        Ok(())
    }

    fn noticed(&mut self, port: PortId, notice: Notice) {
        let at_ms = self.elapsed_ms();
        if let Some(text) = notice.status {
            if let Some(state) = self.ports.get_mut(port.index()) {
                state.status_text.clone_from(&text);
            }
            self.tell_often(&Event::Status { port, text, at_ms });
        }
        if let Some(accepted) = notice.lost {
            self.inputs.push_back(Input::Dropped(port, accepted));
        }
        if notice.listening {
            if let (Some(state), Some(port)) = (self.ports.get_mut(port.index()), self.plan.ports.get(port.index())) {
                state.socket_file = SocketFile::at(&port.socket);
            }
            self.bridge_listening_ms = at_ms;
            self.inputs.push_back(Input::Listening(port));
        }
        if let Some(accepted) = notice.active {
            self.inputs.push_back(Input::Active { port, accepted, pause_us: notice.pause_us });
        }
        if notice.ready {
            self.inputs.push_back(Input::Ready(port));
        }
    }

    /// Does what the supervisor wants; returns the run's end.
    fn perform(&mut self, action: Action) -> Option<Ending> {
        match action {
            Action::StartBridge(port) => self.start_bridge(port),
            Action::StartAppliance(id) => self.start_appliance(id),
            Action::StartStandby(id) => self.start_standby(id),
            Action::AdoptImage => self.adopt_image(),
            Action::Terminate(id) => self.fleet.terminate(Member::Appliance(id)),
            Action::Kill(id) => self.fleet.kill(Member::Appliance(id)),
            Action::KillBridge(port) => self.fleet.kill(Member::Bridge(port)),
            Action::Tell(report) => self.tell(report),
            Action::Progress(progress) => self.progress(progress),
            Action::Answer(result) => self.answer(result),
            Action::End(ending) => return Some(ending),
        }
        None
    }

    fn start_bridge(&mut self, number: PortId) {
        let Some(port) = self.plan.ports.get(number.index()) else { return };
        if let Some(file) = self.ports.get_mut(number.index()).and_then(|state| state.socket_file.take()) {
            file.remove(&port.socket);
        }
        if let Err(error) = self.fleet.start_bridge(number, port, &self.plan.machine) {
            self.inputs.push_back(Input::BridgeEnded(number, Death::NotStarted(format!("{error:#}"))));
        }
    }

    fn start_appliance(&mut self, id: ApplianceId) {
        self.qemu_started_ms = self.elapsed_ms();
        let started = self.fleet.start_appliance(id, &self.plan, &self.plan.machine.appliance);
        self.note_start(id, started);
    }

    fn start_standby(&mut self, id: ApplianceId) {
        // Who wanted it may have gone while another one made way.
        let Some(wanted) = &self.wanted else { return self.start_appliance(id) };
        let started = self.fleet.start_appliance(id, &self.plan, &wanted.appliance);
        if started.is_ok() {
            let pid = self.fleet.pid(Member::Appliance(id)).unwrap_or_default();
            let place = if self.plan.can_stand_by { "beside the one in use" } else { "in the place of the one before" };
            wanted.progress("booting", format!("appliance {id} boots {place} (pid {pid})"));
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
        Event::Ready {
            socket: self.plan.socket().to_owned(),
            pids: self.pids(),
            timings_ms: TimingsMs {
                bridge_listening: self.bridge_listening_ms,
                qemu_started: self.qemu_started_ms,
                boot: self.boot(),
                ready: self.elapsed_ms(),
            },
            ports: starting::ports(&self.plan),
            channels: self.channel_facts(),
            vmms: vmm_lines::all(&self.plan),
        }
    }

    /// The steps of the boot of the appliance VM in use.
    fn boot(&self) -> Option<BootMs> {
        let (told, times) = self.supervisor.in_use().and_then(|id| self.fleet.boot(id))?;
        Some(BootMs::new(in_ms(told.saturating_duration_since(self.started)), times))
    }

    /// Where the operator finds the channels.
    fn channel_facts(&self) -> Vec<ChannelFacts> {
        let facts = |channel: &Channel| Some(ChannelFacts { name: channel.name.clone(), path: channel.link.clone()? });
        self.plan.channels.iter().filter_map(facts).collect()
    }

    /// The process ids while an appliance VM is in use.
    fn pids(&self) -> Pids {
        let pid = |member| self.fleet.pid(member).unwrap_or_default();
        let qemu = self.supervisor.in_use().map(|id| pid(Member::Appliance(id)));
        Pids { vvu: std::process::id(), bridge: pid(Member::Bridge(PortId(0))), qemu: qemu.unwrap_or_default() }
    }

    /// Ends what still runs, in order; a further signal kills it.
    async fn bring_down(&mut self) {
        tokio::select! {
            _ = self.fleet.end() => {}
            _ = self.signals.next() => {}
        }
        self.fleet.kill_all().await;
        for (state, port) in self.ports.iter().zip(&self.plan.ports) {
            if let Some(file) = state.socket_file {
                file.remove(&port.socket);
            }
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

async fn finished(task: Option<&mut JoinHandle<Option<Changed>>>) -> Option<Changed> {
    match task {
        Some(task) => task.await.unwrap_or(None),
        None => pending().await,
    }
}
