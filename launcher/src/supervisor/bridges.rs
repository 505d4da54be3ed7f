//! The bridges of a run as one: they listen when all of them do.

use super::naming::Numbers;
use super::ports::PortId;

/// One bridge.
#[derive(Debug, Default)]
struct Bridge {
    stage: Stage,
    numbers: Numbers,
}

/// How far a bridge is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    /// It does not run.
    #[default]
    Gone,
    /// It runs and does not listen yet.
    Starts,
    /// It is killed, since it took too long for that.
    Overdue,
    /// Its sockets accept connections.
    Listens,
}

/// All bridges, in the order of their ports.
#[derive(Debug)]
pub(super) struct Bridges(Vec<Bridge>);

impl Bridges {
    /// `count` bridges that were just started.
    pub(super) fn started(count: u8) -> Self {
        Self(PortId::first(count).map(|_| Bridge { stage: Stage::Starts, ..Bridge::default() }).collect())
    }

    /// Number of ports.
    pub(super) fn count(&self) -> u8 {
        u8::try_from(self.0.len()).unwrap_or(u8::MAX)
    }

    pub(super) fn listen(&mut self, port: PortId) {
        if let Some(bridge) = self.0.get_mut(port.index())
            && bridge.stage == Stage::Starts
        {
            bridge.stage = Stage::Listens;
        }
    }

    pub(super) fn all_listen(&self) -> bool {
        self.0.iter().all(|bridge| bridge.stage == Stage::Listens)
    }

    /// What a bridge has said of appliance VMs, unless it is gone or none can have come to it.
    pub(super) fn numbers(&mut self, port: PortId) -> Option<&mut Numbers> {
        self.0.get_mut(port.index()).filter(|bridge| bridge.stage == Stage::Listens).map(|bridge| &mut bridge.numbers)
    }

    /// A bridge is gone; returns whether it was killed for being overdue.
    pub(super) fn end(&mut self, port: PortId) -> bool {
        let Some(bridge) = self.0.get_mut(port.index()) else { return false };
        std::mem::take(bridge).stage == Stage::Overdue
    }

    /// Those that do not run count as started from now on; returns which.
    pub(super) fn start(&mut self) -> Vec<PortId> {
        self.shift(Stage::Gone, Stage::Starts)
    }

    /// Those that run and do not listen count as killed from now on; returns which.
    pub(super) fn give_up(&mut self) -> Vec<PortId> {
        self.shift(Stage::Starts, Stage::Overdue)
    }

    fn shift(&mut self, from: Stage, to: Stage) -> Vec<PortId> {
        let ports = PortId::first(self.count());
        let moved = self.0.iter_mut().zip(ports).filter(|(bridge, _)| bridge.stage == from);
        moved.map(|(bridge, port)| (bridge.stage = to, port).1).collect()
    }
}
