//! What a run decides: events in, actions out. It starts no process, waits for nothing and reads no clock.
//!
//! A run keeps a bridge for each of its ports and, behind them, one appliance VM in use. Feed [`Supervisor::handle`] with everything that
//! happens and do what it returns; feed it [`Input::TimePassed`] when [`Supervisor::deadline`] has come.
//!
//! ```text
//!                  listening                   active                      replace
//!  BridgeStarts ─────────────► Boots ────────────────────────► Serves ─────────────────► Replaces
//!       ▲                      ▲   │ died                died │  ▲ ▲   standby active or died │ active died
//!       │                      │   ▼                          ▼  │ └──────────────────────────┤
//!       │              delay   └─ Pauses ◄────────────────────┘  │            Boots ◄─────────┘
//!       │                                                        │
//!       └──── Clears ◄──── a bridge died, in any state: its appliance VMs are killed first
//! ```
//!
//! Where two appliance VMs cannot be there at once, `replace` leads from `Serves` to `MakesWay` instead, and from there to
//! `Boots` when the first one is gone.
//!
//! Bridges act as one: they listen when all do, and an appliance VM is in use when all use it. One that dies takes the
//! appliance VMs along and is started again alone; the others keep their front-ends.
//!
//! A death before the device was ready for the first time ends the run: it is mostly a mistake that a second start would
//! repeat. After that deaths are repaired as [`Restarts`] allows. Before a run ends because of an appliance VM's death it
//! is `Blames` for a moment: a bridge that was killed makes QEMU abort, and then the bridge is the one to name. Appliance
//! VMs that are no longer needed are *retiring*: they lie beside the state, and only a replacement's answer and the start
//! of a new bridge wait for them.

mod bridges;
mod deaths;
mod naming;
mod ports;
mod replacing;
mod vocabulary;

#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use self::bridges::Bridges;
pub(crate) use self::ports::PortId;
use self::ports::{PerPort, PortSet};
use self::replacing::Replacement;
pub(crate) use self::vocabulary::{Accepted, Action, ApplianceId, Handover, Input, Part, Progress, Replaced, Report};
use self::vocabulary::{Appliance, Fault, Retiring, Stage};
use crate::ending::Ending;
use crate::restart_policy::Restarts;

/// Longest wait until the bridges listen; they only bind sockets.
const LISTENING_LIMIT: Duration = Duration::from_secs(30);

/// Longest wait until an appliance VM is in use: a boot under TCG on a loaded machine takes tens of seconds.
const READY_LIMIT: Duration = Duration::from_secs(180);

/// How long a bridge's death may come after that of its appliance VM and still be its cause.
const BRIDGE_FOLLOWS: Duration = Duration::from_millis(500);

/// How long the bridges may take to let go of an appliance VM that was replaced, until that is asked to end.
const LET_GO_LIMIT: Duration = Duration::from_secs(5);

/// How long a standby may take to become active after a bridge has dropped the appliance VM before it.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(1);

/// Time for an appliance VM that was asked to end: for a program to save what it has, and for QEMU to finish the disk's
/// requests.
pub(crate) const APPLIANCE_GRACE: Duration = Duration::from_secs(20);

/// Where a run stands.
#[derive(Debug)]
enum State {
    /// All bridges run, and some do not listen yet. No limit if these are killed already for being overdue.
    BridgeStarts { until: Option<Instant> },
    /// The bridges listen, an appliance VM boots, none is in use.
    Boots { appliance: Appliance, until: Instant },
    /// An appliance VM is in use.
    Serves { active: Appliance },
    /// An appliance VM is in use, another one boots to take its place.
    Replaces { active: Appliance, standby: Appliance, until: Instant },
    /// The appliance VM in use was asked to end, the next one is started when it is gone.
    MakesWay,
    /// The bridges live; an appliance VM is started at this time.
    Pauses { until: Instant },
    /// The run ends so at this time, unless a bridge turns out to be the cause.
    Blames { ending: Ending, until: Instant },
    /// A bridge is gone; its appliance VMs are retiring.
    Clears(Next),
    /// No appliance VM lives; the bridges that are gone are started at this time.
    PausesWithoutBridge { until: Instant },
    /// The run is over.
    Over,
}

/// What comes after a bridge's death.
#[derive(Debug, Clone)]
enum Next {
    /// A new one, not before this time.
    Start(Instant),
    /// The end.
    End { ending: Ending, by_signal: bool },
}

impl Next {
    /// The same, but no start before this time.
    fn not_before(self, earliest: Instant) -> Self {
        match self {
            Self::Start(at) => Self::Start(at.max(earliest)),
            Self::End { .. } => self,
        }
    }
}

/// A loss that is being repaired.
#[derive(Debug, Clone, Copy)]
struct Recovery {
    what: Part,
    since: Instant,
}

/// The decisions of one run.
#[derive(Debug)]
pub(crate) struct Supervisor {
    state: State,
    retiring: Vec<Retiring>,
    restarts: Restarts,
    bridges: Bridges,
    last_id: u32,
    was_ready: bool,
    recovery: Option<Recovery>,
    replacement: Option<Replacement>,
    actions: Vec<Action>,
}

impl Supervisor {
    /// A run whose bridges were just started, one for each of `ports` ports.
    pub(crate) fn new(restarts: Restarts, ports: u8, now: Instant) -> Self {
        Self {
            state: State::BridgeStarts { until: Some(now + LISTENING_LIMIT) },
            retiring: Vec::new(),
            restarts,
            bridges: Bridges::started(ports),
            last_id: 0,
            was_ready: false,
            recovery: None,
            replacement: None,
            actions: Vec::new(),
        }
    }

    /// Takes in what happened and returns what shall be done.
    pub(crate) fn handle(&mut self, input: Input, now: Instant) -> Vec<Action> {
        match input {
            Input::Listening(port) => self.listening(port, now),
            Input::Ready(port) => self.ready(port, now),
            Input::Active { port, accepted, pause_us } => self.active(port, accepted, pause_us, now),
            Input::Dropped(port, accepted) => self.dropped(port, accepted, now),
            Input::ApplianceEnded(id, death) => self.appliance_ended(id, death, now),
            Input::BridgeEnded(port, death) => self.bridge_ended(port, death, now),
            Input::Replace(how) => self.replace(how, now),
            Input::ReplaceAbandoned => self.abandon(),
            Input::Signal(name) => self.end(Ending::signal(name, self.was_ready)),
            Input::TimePassed => self.time_passed(now),
        }
        std::mem::take(&mut self.actions)
    }

    /// When [`Input::TimePassed`] is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let of_state = match &self.state {
            State::BridgeStarts { until } => *until,
            State::Boots { appliance, until } => appliance.fault.is_none().then_some(*until),
            State::Replaces { active, standby, until } => {
                let overdue = standby.fault.is_none().then_some(*until);
                let dropped = active.dropped_until.filter(|_| active.fault.is_none());
                overdue.into_iter().chain(dropped).min()
            }
            State::Pauses { until } | State::Blames { until, .. } | State::PausesWithoutBridge { until } => {
                Some(*until)
            }
            State::Serves { .. } | State::MakesWay | State::Clears(_) | State::Over => None,
        };
        let of_retiring = self.retiring.iter().filter_map(|retiring| match retiring.stage {
            Stage::LetGo(until) | Stage::Asked(until) => Some(until),
            Stage::Killed => None,
        });
        of_state.into_iter().chain(of_retiring).min()
    }

    /// The state in one word, for the operator.
    pub(crate) fn word(&self) -> &'static str {
        match &self.state {
            State::Serves { .. } => "serving",
            State::Replaces { .. } | State::MakesWay => "replacing",
            State::Blames { .. } | State::Over | State::Clears(Next::End { .. }) => "ending",
            _ if self.was_ready => "restarting",
            _ => "starting",
        }
    }

    /// The appliance VM in use.
    pub(crate) fn in_use(&self) -> Option<ApplianceId> {
        match &self.state {
            State::Serves { active } | State::Replaces { active, .. } => Some(active.id),
            _ => None,
        }
    }

    /// The appliance VM that boots to be the next one in use.
    pub(crate) fn booting(&self) -> Option<ApplianceId> {
        match &self.state {
            State::Boots { appliance, .. } => Some(appliance.id),
            State::Replaces { standby, .. } => Some(standby.id),
            _ => None,
        }
    }

    /// Restarts so far.
    pub(crate) fn restarts(&self) -> u64 {
        self.restarts.total()
    }

    fn listening(&mut self, port: PortId, now: Instant) {
        self.bridges.listen(port);
        if matches!(self.state, State::BridgeStarts { .. }) && self.bridges.all_listen() {
            self.start_appliance(now);
        }
    }

    fn start_appliance(&mut self, now: Instant) {
        let appliance = self.next_appliance();
        self.actions.push(Action::StartAppliance(appliance.id));
        self.enter(State::Boots { appliance, until: now + READY_LIMIT });
    }

    fn next_appliance(&mut self) -> Appliance {
        self.last_id += 1;
        Appliance {
            id: ApplianceId(self.last_id),
            accepted: PerPort::default(),
            active: PortSet::default(),
            dropped: PortSet::default(),
            dropped_until: None,
            pause_us: None,
            fault: None,
        }
    }

    fn ready(&mut self, port: PortId, now: Instant) {
        let count = self.bridges.count();
        if let State::Boots { appliance, .. } = &mut self.state
            && appliance.fault.is_none()
        {
            appliance.active.insert(port);
            if appliance.active.is_all(count) {
                let active = *appliance;
                self.enter(State::Serves { active });
                self.in_use_again(active.id, now);
            }
        }
    }

    fn active(&mut self, port: PortId, accepted: Accepted, pause_us: Option<u64>, now: Instant) {
        let Some(id) = self.identify(port, accepted, now, true) else { return };
        let Some(appliance) = self.alive_mut().find(|appliance| appliance.id == id) else { return };
        appliance.active.insert(port);
        appliance.pause_us = appliance.pause_us.max(pause_us);
        let longest_us = appliance.pause_us;
        let everywhere = appliance.active.is_all(self.bridges.count());
        let pause_us = match self.state {
            State::Boots { appliance, .. } if appliance.id == id && appliance.fault.is_none() && everywhere => {
                self.enter(State::Serves { active: appliance });
                self.note_replaced(id, longest_us, now);
                self.in_use_again(id, now);
                longest_us
            }
            State::Replaces { active, standby, .. } if standby.id == id && standby.fault.is_none() && everywhere => {
                self.enter(State::Serves { active: standby });
                self.note_replaced(id, longest_us, now);
                self.retire(active, now);
                longest_us
            }
            State::Serves { active } | State::Replaces { active, .. } if active.id == id => pause_us,
            _ => return self.forgive_drops(),
        };
        self.tell(Report::Active { appliance: id, pause_us });
        self.answer_replaced();
    }

    /// The appliance VM is in use; tells so if that is news.
    fn in_use_again(&mut self, id: ApplianceId, now: Instant) {
        self.restarts.recovered();
        if !self.was_ready {
            self.was_ready = true;
            self.tell(Report::Ready(id));
        }
        if let Some(Recovery { what, since }) = self.recovery.take() {
            self.tell(Report::Restarted { what, took: now.saturating_duration_since(since) });
        }
    }

    fn dropped(&mut self, port: PortId, accepted: Accepted, now: Instant) {
        let Some(id) = self.identify(port, accepted, now, false) else { return };
        let count = self.bridges.count();
        if let Some(retiring) = self.retiring.iter_mut().find(|retiring| retiring.appliance.id == id) {
            retiring.appliance.dropped.insert(port);
            if matches!(retiring.stage, Stage::LetGo(_)) && retiring.appliance.dropped.is_all(count) {
                retiring.stage = Stage::Asked(now + APPLIANCE_GRACE);
                self.actions.push(Action::Terminate(id));
            }
            return;
        }
        match &mut self.state {
            // It may have failed, or have been drained for the standby, which is announced in a moment then.
            State::Replaces { active, standby, .. } if active.id == id && standby.fault.is_none() => {
                active.dropped.insert(port);
                active.dropped_until.get_or_insert(now + TAKE_OVER_LIMIT);
                self.forgive_drops();
            }
            _ => self.kill_for(id, Fault::Dropped),
        }
    }

    /// Kills an appliance VM on which the state depends, once; its death decides what follows.
    fn kill_for(&mut self, id: ApplianceId, fault: Fault) {
        let known = self.alive_mut().find(|appliance| appliance.id == id && appliance.fault.is_none());
        if let Some(appliance) = known {
            appliance.fault = Some(fault);
            self.actions.push(Action::Kill(id));
        }
    }

    /// The one door through which the state changes.
    fn enter(&mut self, next: State) {
        #[cfg(test)]
        assert!(self.state.may_become(&next), "{:?} -> {next:?}", self.state);
        self.state = next;
    }

    /// The appliance VMs on which the state depends.
    fn alive(&self) -> impl Iterator<Item = Appliance> + use<> {
        let (first, second) = match self.state {
            State::Boots { appliance, .. } => (Some(appliance), None),
            State::Serves { active } => (Some(active), None),
            State::Replaces { active, standby, .. } => (Some(active), Some(standby)),
            _ => (None, None),
        };
        first.into_iter().chain(second)
    }

    fn alive_mut(&mut self) -> impl Iterator<Item = &mut Appliance> {
        let (first, second) = match &mut self.state {
            State::Boots { appliance, .. } => (Some(appliance), None),
            State::Serves { active } => (Some(active), None),
            State::Replaces { active, standby, .. } => (Some(active), Some(standby)),
            _ => (None, None),
        };
        first.into_iter().chain(second)
    }

    /// All appliance VMs that live.
    fn all(&self) -> impl Iterator<Item = Appliance> {
        self.alive().chain(self.retiring.iter().map(|retiring| retiring.appliance))
    }

    /// Starts the bridges that are gone.
    fn start_bridges(&mut self, now: Instant) {
        let gone = self.bridges.start();
        self.actions.extend(gone.into_iter().map(Action::StartBridge));
        self.enter(State::BridgeStarts { until: Some(now + LISTENING_LIMIT) });
    }

    fn time_passed(&mut self, now: Instant) {
        for retiring in &mut self.retiring {
            match retiring.stage {
                Stage::LetGo(until) if until <= now => {
                    retiring.stage = Stage::Asked(now + APPLIANCE_GRACE);
                    self.actions.push(Action::Terminate(retiring.appliance.id));
                }
                Stage::Asked(until) if until <= now => {
                    retiring.stage = Stage::Killed;
                    self.actions.push(Action::Kill(retiring.appliance.id));
                }
                _ => {}
            }
        }
        if let State::Replaces { active: Appliance { id, dropped_until: Some(until), .. }, .. } = self.state
            && until <= now
        {
            self.kill_for(id, Fault::Dropped);
        }
        match &mut self.state {
            State::BridgeStarts { until } if until.is_some_and(|until| until <= now) => {
                *until = None;
                let overdue = self.bridges.give_up();
                self.actions.extend(overdue.into_iter().map(Action::KillBridge));
            }
            State::Boots { appliance: Appliance { id, .. }, until }
            | State::Replaces { standby: Appliance { id, .. }, until, .. }
                if *until <= now =>
            {
                let id = *id;
                self.kill_for(id, Fault::Overdue);
            }
            State::Pauses { until } if *until <= now => self.start_appliance(now),
            State::PausesWithoutBridge { until } if *until <= now => self.start_bridges(now),
            State::Blames { ending, until } if *until <= now => {
                let ending = ending.clone();
                self.end(ending);
            }
            _ => {}
        }
    }

    fn tell(&mut self, report: Report) {
        self.actions.push(Action::Tell(report));
    }

    fn end(&mut self, ending: Ending) {
        self.fail_replacement("the run ends");
        self.actions.push(Action::End(ending));
        self.enter(State::Over);
    }
}
