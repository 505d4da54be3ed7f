//! The words that the supervisor and its caller speak: what happens, what shall be done.

use std::fmt;
use std::time::{Duration, Instant};

use super::ports::{PerPort, PortId, PortSet};
use crate::ending::{Death, Ending};

/// Number of an appliance VM in this run, from 1 in the order of their starts; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub(crate) struct ApplianceId(pub(crate) u32);

impl fmt::Display for ApplianceId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// Number that a bridge gives an appliance VM when it accepts its connections: each bridge counts for itself, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Accepted(pub(crate) u32);

/// What can happen.
#[derive(Debug)]
pub(crate) enum Input {
    /// The sockets of a port's bridge accept connections.
    Listening(PortId),
    /// The bridge can serve a driver VM for the first time.
    Ready(PortId),
    /// The bridge uses this appliance VM now.
    Active {
        /// Whose bridge.
        port: PortId,
        /// Which one.
        accepted: Accepted,
        /// How long the front-end had to wait for it, in microseconds, if there was one.
        pause_us: Option<u64>,
    },
    /// The bridge has dropped this appliance VM.
    Dropped(PortId, Accepted),
    /// An appliance VM's QEMU is gone.
    ApplianceEnded(ApplianceId, Death),
    /// A port's bridge is gone.
    BridgeEnded(PortId, Death),
    /// The operator wants another appliance VM in the place of the active one. Ask [`super::Supervisor::may_replace`]
    /// first.
    Replace(Handover),
    /// The operator no longer wants it.
    ReplaceAbandoned,
    /// The operator wants the run to end.
    Signal(&'static str),
    /// [`super::Supervisor::deadline`] has come, or nothing in particular.
    TimePassed,
}

/// How one appliance VM takes the place of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handover {
    /// It boots while the other one serves.
    StandBy,
    /// It boots when the other one is gone: both cannot be there at once.
    InTurn,
}

/// What shall be done, in this order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Start a port's bridge; no appliance VM is alive.
    StartBridge(PortId),
    /// Start an appliance VM from the run's image.
    StartAppliance(ApplianceId),
    /// Start an appliance VM from the image that the operator wants.
    StartStandby(ApplianceId),
    /// The image that the operator wanted is the run's from now on.
    AdoptImage,
    /// Ask an appliance VM to end.
    Terminate(ApplianceId),
    /// Kill an appliance VM.
    Kill(ApplianceId),
    /// Kill a port's bridge.
    KillBridge(PortId),
    /// Tell the operator.
    Tell(Report),
    /// Tell whoever asked for the replacement.
    Progress(Progress),
    /// Tell whoever asked for the replacement how it ended, or why it failed.
    Answer(Result<Replaced, String>),
    /// The run is over: end in order what still lives.
    End(Ending),
}

/// What the operator is told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Report {
    /// The device can be used for the first time.
    Ready(ApplianceId),
    /// An appliance VM is the one in use.
    Active {
        /// Which one.
        appliance: ApplianceId,
        /// The front-end's pause in microseconds, if there was one; the longest if there are several ports.
        pause_us: Option<u64>,
    },
    /// The appliance VM in use, or the one that was to be, is gone.
    ApplianceLost {
        /// Which one.
        appliance: ApplianceId,
        /// What happened.
        ending: Ending,
        /// Whether another takes its place.
        restart: bool,
    },
    /// A bridge is gone, and with it the appliance VMs.
    BridgeLost {
        /// What happened.
        ending: Ending,
        /// Whether it is started again.
        restart: bool,
    },
    /// What was lost is in use again.
    Restarted {
        /// What had been lost.
        what: Part,
        /// Time since then.
        took: Duration,
    },
}

/// What can be lost and started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// The appliance VM alone.
    Appliance,
    /// A bridge and its appliance VM.
    Bridge,
}

/// A step of a replacement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The standby is the one in use.
    Active(Replaced),
    /// The one that was active died; the standby takes its place as soon as it can.
    ActiveLost,
}

/// A replacement that came off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Replaced {
    /// The appliance VM in use now.
    pub(crate) appliance: ApplianceId,
    /// The front-end's pause in microseconds, if there was one; the longest if there are several ports.
    pub(crate) pause_us: Option<u64>,
    /// Time from the request until it was in use.
    pub(crate) took: Duration,
}

/// Why an appliance VM is killed that did not end by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// A bridge has dropped it.
    Dropped,
    /// It took too long to get ready.
    Overdue,
}

/// An appliance VM that lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Appliance {
    pub(super) id: ApplianceId,
    /// The number that each bridge has given it.
    pub(super) accepted: PerPort<Option<Accepted>>,
    /// Ports whose bridges use it.
    pub(super) active: PortSet,
    /// Ports whose bridges have dropped it.
    pub(super) dropped: PortSet,
    /// Set when a bridge has dropped it for a standby, it seems: killed then unless that is in use there.
    pub(super) dropped_until: Option<Instant>,
    /// The longest time that a front-end had to wait for it, in microseconds.
    pub(super) pause_us: Option<u64>,
    /// Set when it is killed; its death is still to come.
    pub(super) fault: Option<Fault>,
}

/// An appliance VM that is on its way out, and on which nothing depends any more.
#[derive(Debug)]
pub(super) struct Retiring {
    pub(super) appliance: Appliance,
    pub(super) stage: Stage,
}

/// How far a retiring appliance VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The bridge still lets go of it; asked to end at this time at the latest.
    LetGo(Instant),
    /// Asked to end; killed at this time.
    Asked(Instant),
    /// Killed.
    Killed,
}
