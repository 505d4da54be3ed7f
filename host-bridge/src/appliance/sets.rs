//! Device sets: from the three listening sockets to the end of each appliance.
//!
//! The sockets stay open for as long as the bridge lives. An appliance's VMM connects to all three in any order; it waits for
//! answers on one before it connects to the next, so the task of each device starts as it comes. Which connections belong
//! together is said by the process that has made them (`SO_PEERCRED`, unix(7)). When all three are there they are an
//! [`Appliance`], and its number is the next one.
//!
//! Limits: at most [`COMPLETE_MAX`] appliances beside one that retires, and at most [`INCOMPLETE_MAX`] sets that are not
//! complete, each for at most [`COMPLETE_TIMEOUT`]. What is beyond is closed at once.
//!
//! A set has its own tasks, eventfds and window header. It ends when the first of its tasks does; whatever else it had goes
//! with it. Nothing here decides what an appliance is used for.

use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use anyhow::Context;
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};
use vvu_protocol::window::Layout;

use super::control::{Control, ControlPort, ControlState, WindowLink};
use super::doorbell::Doorbell;
use super::sockets::{Device, Sockets};
use super::window::{Window, WindowPort, WindowState, header_file};
use super::{Appliance, ApplianceError, CLEAR_TIMEOUT, file_identity};
use crate::doorbells::{Doorbells, Readers};

/// Most appliances: the one in use, and the one that is to take its place.
pub const COMPLETE_MAX: usize = 2;

/// Most sets that are over and wait to be taken notice of, while somebody is busy. Each holds up to three sockets and its eventfds.
const OVER_MAX: usize = 4;

/// Most sets that are not complete: an appliance that starts, and one that was killed while it did.
pub const INCOMPLETE_MAX: usize = 2;

/// How long a VMM may take to connect to all three sockets. QEMU does it before its guest runs.
pub const COMPLETE_TIMEOUT: Duration = Duration::from_secs(30);

/// What all device sets of a bridge have in common.
#[derive(Debug, Clone)]
pub struct Model {
    /// The uuid that ties the three devices together.
    pub uuid: [u8; 16],
    /// Most queues of the emulated device.
    pub queues: u16,
    /// Number of vectors of the doorbell device, if eventfds of the front-end are handed over to it.
    pub handed_over: Option<u16>,
    /// The window, with nothing mapped.
    pub layout: Layout,
}

/// What has become of an appliance.
#[derive(Debug)]
pub enum SetEvent {
    /// It has come.
    Came(Box<Appliance>),
    /// It can be used from now on: it has a window, and its back-end is up.
    Ready(u32),
    /// It cannot be used any more, and may come back.
    Down(u32),
    /// It has ended: with an error, or because it has retired.
    Ended(u32, Option<ApplianceError>),
}

/// What says whether an appliance can be used.
#[derive(Debug, Clone)]
struct Readiness {
    window: watch::Receiver<WindowState>,
    control: watch::Receiver<ControlState>,
}

impl Readiness {
    fn now(&self) -> bool {
        self.window.borrow().ready && self.control.borrow().back_end_up
    }
}

/// A set whose connections have not all come.
#[derive(Debug)]
struct Incomplete {
    deadline: Instant,
    doorbells: Doorbells,
    header: OwnedFd,
    /// The window device's, for both devices.
    window_state: watch::Sender<WindowState>,
    /// The control device's, for the window device.
    window_hold: watch::Sender<bool>,
    control: Option<ControlPort>,
    window: Option<WindowPort>,
    doorbell: bool,
}

/// A set that is an appliance.
#[derive(Debug)]
struct Complete {
    number: u32,
    /// Until somebody has taken it.
    came: Option<Box<Appliance>>,
    readiness: Readiness,
    /// What was said of it last.
    said_ready: bool,
    retires: bool,
    /// How it has ended, until somebody was told.
    ended: Option<Option<ApplianceError>>,
    over: bool,
}

#[derive(Debug)]
enum Stage {
    Incomplete(Box<Incomplete>),
    Complete(Complete),
}

#[derive(Debug)]
struct DeviceSet {
    /// The process on the other side.
    peer: i32,
    tasks: JoinSet<Result<(), ApplianceError>>,
    /// Ends the control device, and by that whatever waits for the agent.
    control: Option<AbortHandle>,
    stage: Stage,
}

/// All device sets. Needs a tokio `LocalSet`.
#[derive(Debug)]
pub struct DeviceSets {
    sockets: Sockets,
    model: Model,
    sets: Vec<DeviceSet>,
    accepted: u32,
    /// VMMs that were given eventfds of the front-end, beyond the life of their sets.
    readers: Rc<Readers>,
    /// Some appliance may have become ready, or no longer be.
    changed: Rc<Notify>,
}

impl DeviceSets {
    /// Makes the three sockets in `directory`.
    ///
    /// # Errors
    /// If they cannot be made there.
    pub fn bind(directory: &Path, model: Model) -> anyhow::Result<Self> {
        let sockets = Sockets::bind(directory)?;
        let (readers, changed) = (Rc::new(Readers::default()), Rc::new(Notify::new()));
        Ok(Self { sockets, model, sets: Vec::new(), accepted: 0, readers, changed })
    }

    /// Waits for one thing to happen to the sets, and takes it over; [`DeviceSets::take`] says what has become of it. May be
    /// cancelled.
    ///
    /// # Errors
    /// If a listening socket fails.
    pub async fn step(&mut self) -> anyhow::Result<()> {
        let deadline = self.next_deadline();
        tokio::select! {
            biased;
            (index, ended) = first_end(&mut self.sets) => self.ended(index, ended),
            () = self.changed.notified() => {}
            accepted = self.sockets.accept() => {
                let (device, stream) = accepted.context("cannot accept an appliance")?;
                self.connected(device, stream);
            }
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => self.drop_late(),
        }
        Ok(())
    }

    /// Whether [`DeviceSets::take`] has something.
    #[must_use]
    pub fn has_event(&self) -> bool {
        self.complete().any(|set| {
            set.came.is_some() || set.ended.is_some() || (!set.over && set.readiness.now() != set.said_ready)
        })
    }

    /// What has happened to appliances and was not said yet. The end of one comes before the beginning of another, which may
    /// need its place.
    pub fn take(&mut self) -> Option<SetEvent> {
        let ended = self.complete_mut().filter(|set| set.came.is_none()).find_map(|set| {
            let error = set.ended.take()?;
            Some(SetEvent::Ended(set.number, error))
        });
        ended.or_else(|| self.complete_mut().find_map(Complete::take))
    }

    /// Somebody has found by itself that an appliance can be used. If that is no longer so, it is said next.
    pub fn found_ready(&mut self, number: u32) {
        if let Some(set) = self.complete_mut().find(|set| set.number == number) {
            set.said_ready = true;
        }
    }

    /// Lets an appliance clear its session away and then end. One that retires already ends at once.
    pub fn retire(&mut self, appliance: Appliance) {
        for earlier in self.complete_mut().filter(|set| set.retires && !set.over) {
            earlier.ended = Some(None);
            earlier.over = true;
        }
        let number = appliance.number;
        let is_it = |set: &&mut DeviceSet| matches!(&set.stage, Stage::Complete(set) if set.number == number);
        let Some(set) = self.sets.iter_mut().find(is_it) else { return };
        if let Stage::Complete(complete) = &mut set.stage {
            complete.retires = true;
        }
        set.tasks.spawn_local(retire(appliance));
    }

    /// Ends what is left of an appliance: its sockets are closed afterwards.
    pub async fn release(&mut self, number: u32) {
        let is_it = |set: &DeviceSet| matches!(&set.stage, Stage::Complete(set) if set.number == number);
        if let Some(index) = self.sets.iter().position(is_it) {
            self.sets.swap_remove(index).tasks.shutdown().await;
        }
    }

    fn complete(&self) -> impl Iterator<Item = &Complete> {
        self.sets.iter().filter_map(|set| match &set.stage {
            Stage::Complete(complete) => Some(complete),
            Stage::Incomplete(_) => None,
        })
    }

    fn complete_mut(&mut self) -> impl Iterator<Item = &mut Complete> {
        self.sets.iter_mut().filter_map(|set| match &mut set.stage {
            Stage::Complete(complete) => Some(complete),
            Stage::Incomplete(_) => None,
        })
    }

    fn has_room(&self) -> bool {
        let over = self.complete().filter(|set| set.over).count();
        over < OVER_MAX && self.complete().filter(|set| !set.retires && !set.over).count() < COMPLETE_MAX
    }

    fn next_deadline(&self) -> Option<Instant> {
        let deadlines = self.sets.iter().filter_map(|set| match &set.stage {
            Stage::Incomplete(incomplete) => Some(incomplete.deadline),
            Stage::Complete(_) => None,
        });
        deadlines.min()
    }

    fn connected(&mut self, device: Device, stream: UnixStream) {
        // A process that cannot be seen from here is as good as any other.
        let peer = stream.peer_cred().ok().and_then(|credentials| credentials.pid()).unwrap_or(0);
        let waiting = |set: &DeviceSet| set.peer == peer && matches!(set.stage, Stage::Incomplete(_));
        let index = match self.sets.iter().position(waiting) {
            Some(index) => index,
            None => match self.begin(peer) {
                Some(index) => index,
                None => return,
            },
        };
        let Some(set) = self.sets.get_mut(index) else { return };
        if let Err(error) = set.connect(device, stream, &self.model, &self.readers) {
            let error = anyhow::Error::from(error);
            tracing::warn!(peer, "connection of an appliance's VMM refused: {error:#}");
            self.sets.remove(index);
            return;
        }
        self.complete_set(index);
    }

    /// A new set for this process, if there is room.
    fn begin(&mut self, peer: i32) -> Option<usize> {
        let incomplete = self.sets.iter().filter(|set| matches!(set.stage, Stage::Incomplete(_))).count();
        if !self.has_room() || incomplete == INCOMPLETE_MAX {
            tracing::warn!(peer, "appliance turned away: there are {COMPLETE_MAX} already, or others about to come");
            return None;
        }
        match DeviceSet::new(peer, &self.model) {
            Ok(set) => self.sets.push(set),
            Err(error) => {
                let error = anyhow::Error::from(error);
                tracing::warn!(peer, "appliance turned away: {error:#}");
                return None;
            }
        }
        Some(self.sets.len() - 1)
    }

    /// Makes an appliance of a set that has all its connections.
    fn complete_set(&mut self, index: usize) {
        let (room, number) = (self.has_room(), self.accepted.wrapping_add(1));
        let set = self.sets.swap_remove(index).completed(number, &self.model.layout, &self.changed);
        if matches!(set.stage, Stage::Complete(_)) {
            if !room {
                tracing::warn!(peer = set.peer, "appliance turned away: there are {COMPLETE_MAX} already");
                return;
            }
            tracing::info!(appliance = number, peer = set.peer, "appliance connected");
            self.accepted = number;
        }
        self.sets.push(set);
    }

    fn ended(&mut self, index: usize, ended: Result<Result<(), ApplianceError>, JoinError>) {
        let error = match ended {
            Ok(ended) => ended.err(),
            Err(failed) => Some(ApplianceError::Task { problem: failed.to_string() }),
        };
        let Some(set) = self.sets.get_mut(index) else { return };
        match &mut set.stage {
            Stage::Incomplete(_) => {
                let error = error.map(anyhow::Error::from).unwrap_or_else(|| anyhow::anyhow!("it ended early"));
                tracing::warn!(peer = set.peer, "appliance gone before it was there: {error:#}");
                self.sets.remove(index);
            }
            Stage::Complete(complete) => {
                complete.ended = Some(error);
                complete.over = true;
                // What waits for the agent waits in vain. The window may still be of use, to take driver memory out.
                set.control.iter().for_each(AbortHandle::abort);
            }
        }
    }

    fn drop_late(&mut self) {
        let now = Instant::now();
        self.sets.retain(|set| {
            let late = matches!(&set.stage, Stage::Incomplete(incomplete) if incomplete.deadline <= now);
            if late {
                let seconds = COMPLETE_TIMEOUT.as_secs();
                tracing::warn!(peer = set.peer, "appliance dropped: not all devices have connected in {seconds} s");
            }
            !late
        });
    }
}

impl Complete {
    fn take(&mut self) -> Option<SetEvent> {
        if let Some(appliance) = self.came.take() {
            return Some(SetEvent::Came(appliance));
        }
        let ready = self.readiness.now();
        if self.over || ready == self.said_ready {
            return None;
        }
        self.said_ready = ready;
        Some(if ready { SetEvent::Ready(self.number) } else { SetEvent::Down(self.number) })
    }
}

impl DeviceSet {
    fn new(peer: i32, model: &Model) -> Result<Self, ApplianceError> {
        let doorbells =
            Doorbells::new(model.queues).map_err(|source| ApplianceError::Event { device: "doorbell", source })?;
        let incomplete = Incomplete {
            deadline: Instant::now() + COMPLETE_TIMEOUT,
            doorbells,
            header: header_file(model.uuid, model.layout.len())?,
            window_state: watch::Sender::default(),
            window_hold: watch::Sender::default(),
            control: None,
            window: None,
            doorbell: false,
        };
        Ok(Self { peer, tasks: JoinSet::new(), control: None, stage: Stage::Incomplete(Box::new(incomplete)) })
    }

    /// Starts the task of a device. A second connection to the same one is closed, and changes nothing.
    fn connect(
        &mut self,
        device: Device,
        stream: UnixStream,
        model: &Model,
        readers: &Rc<Readers>,
    ) -> Result<(), ApplianceError> {
        let Stage::Incomplete(set) = &mut self.stage else { return Ok(()) };
        let io = |what| move |source| ApplianceError::Io { what, source };
        let stream = stream.into_std().map_err(io("socket of the appliance's VMM"))?;
        match device {
            Device::Control if set.control.is_none() => {
                let (header, _) = file_identity(&set.header)?;
                let (state, hold) = (set.window_state.subscribe(), set.window_hold.clone());
                let window = WindowLink { state, len: model.layout.len(), hold };
                let (task, port) = Control::new(stream, model.uuid, model.queues, header, window)?;
                self.control = Some(self.tasks.spawn_local(task.run()));
                set.control = Some(port);
            }
            Device::Window if set.window.is_none() => {
                let header = set.header.try_clone().map_err(io("duplicate of the window's header"))?;
                let (state, hold) = (set.window_state.clone(), set.window_hold.subscribe());
                let (task, port) = Window::new(stream, header, &model.layout, state, hold)?;
                self.tasks.spawn_local(task.run());
                set.window = Some(port);
            }
            Device::Doorbell if !set.doorbell => {
                let (task, port) = Doorbell::new(stream, model.uuid)?;
                let announcement = set.doorbells.announce().map_err(io("duplicates of eventfds"))?;
                self.tasks.spawn_local(task.run(announcement));
                if let Some(vectors) = model.handed_over {
                    set.doorbells.hand_over(port, Rc::clone(readers), vectors);
                }
                set.doorbell = true;
            }
            _ => tracing::warn!(peer = self.peer, ?device, "second connection of an appliance's VMM closed"),
        }
        Ok(())
    }

    /// The set as an appliance, if all its connections are there.
    fn completed(mut self, number: u32, layout: &Layout, changed: &Rc<Notify>) -> Self {
        let set = match self.stage {
            Stage::Incomplete(set) => *set,
            stage @ Stage::Complete(_) => return Self { stage, ..self },
        };
        let stage = match set {
            Incomplete { control: Some(control), window: Some(window), doorbell: true, doorbells, .. } => {
                let readiness = Readiness { window: window.state(), control: control.state() };
                self.tasks.spawn_local(watch_readiness(readiness.clone(), Rc::clone(changed)));
                let appliance = Appliance { control, window, doorbells, layout: layout.clone(), number, session: 0 };
                let (came, ended) = (Some(Box::new(appliance)), None);
                let (said_ready, retires, over) = (false, false, false);
                Stage::Complete(Complete { number, came, readiness, said_ready, retires, ended, over })
            }
            set => Stage::Incomplete(Box::new(set)),
        };
        Self { stage, ..self }
    }
}

/// Waits for the first task of a set to end. A set ends once.
async fn first_end(sets: &mut [DeviceSet]) -> (usize, Result<Result<(), ApplianceError>, JoinError>) {
    poll_fn(|context| {
        for (index, set) in sets.iter_mut().enumerate() {
            let over = matches!(&set.stage, Stage::Complete(set) if set.over);
            if !over && let Poll::Ready(Some(ended)) = set.tasks.poll_join_next(context) {
                return Poll::Ready((index, ended));
            }
        }
        Poll::Pending
    })
    .await
}

/// Says so when the appliance may have become ready, or no longer be.
async fn watch_readiness(mut readiness: Readiness, changed: Rc<Notify>) -> Result<(), ApplianceError> {
    loop {
        let alive = tokio::select! {
            window = readiness.window.changed() => window.is_ok(),
            control = readiness.control.changed() => control.is_ok(),
        };
        if !alive {
            return std::future::pending().await;
        }
        changed.notify_one();
    }
}

/// The appliance lets go of its last session; then it may end.
async fn retire(mut appliance: Appliance) -> Result<(), ApplianceError> {
    appliance.disconnect().await?;
    appliance.cleared(Instant::now() + CLEAR_TIMEOUT).await?;
    appliance.unmap().await
}
