//! The state of a device set, and the one door through which it changes.

use tracing::{error, info};
use vvu_protocol::control::{ConfigSpace, Status};

use crate::uuid::Uuid;

/// State of a device set, as the status field of the control device shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// No back-end is ready, or the last session is being cleared away.
    Down,
    /// A back-end is ready.
    Ready,
    /// A front-end is there, too.
    Connected { session: u32 },
    /// The session has ended on this side; the device has not taken note yet.
    Orphaned,
}

impl State {
    /// Whether the picture in [`super`] has an arrow to `next`.
    const fn leads_to(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::Down, Self::Ready)
                | (Self::Ready, Self::Connected { .. } | Self::Orphaned | Self::Down)
                | (Self::Connected { .. }, Self::Orphaned | Self::Down)
                | (Self::Orphaned, Self::Down)
        )
    }
}

/// Holds the state.
#[derive(Debug)]
pub(super) struct StateDoor {
    uuid: Uuid,
    state: State,
}

impl StateDoor {
    /// Down.
    pub(super) const fn new(uuid: Uuid) -> Self {
        Self { uuid, state: State::Down }
    }

    pub(super) const fn uuid(&self) -> Uuid {
        self.uuid
    }

    pub(super) const fn state(&self) -> State {
        self.state
    }

    /// Takes note of a change.
    pub(super) fn set(&mut self, next: State) {
        if !self.state.leads_to(next) {
            error!(set = %self.uuid, "{:?} -> {next:?} is no step that a device set may take", self.state);
            debug_assert!(false, "{:?} -> {next:?}", self.state);
        }
        info!(set = %self.uuid, "{:?} -> {next:?}", self.state);
        self.state = next;
    }
}

/// The session whose front-end is connected, if both sides are up.
pub(super) fn connected_session(config: &ConfigSpace) -> Option<u32> {
    config.status.contains(Status::BACK_END_UP | Status::FRONT_END_UP).then_some(config.session)
}
