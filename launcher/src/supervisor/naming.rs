//! Which appliance VM the bridge means by a number.

use std::time::{Duration, Instant};

use super::vocabulary::{Accepted, ApplianceId};
use super::{State, Supervisor};

/// How long an unnamed appliance VM's number may still come after its death.
const GHOST_LIMIT: Duration = Duration::from_secs(2);

/// The bridge's numbers of the appliance VMs.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    highest: Option<Accepted>,
    /// Until then an unknown number may be that of an appliance VM that died before it was named.
    ghost_until: Option<Instant>,
}

impl Numbers {
    /// An appliance VM died before the bridge had named it.
    pub(super) fn note_ghost(&mut self, now: Instant) {
        self.ghost_until = Some(now + GHOST_LIMIT);
    }
}

impl Supervisor {
    /// Finds out which appliance VM the bridge means. It counts them in the order in which they connect, and at most one at
    /// a time is without a number: a new number is that one's, unless one that had none has just died.
    pub(super) fn identify(&mut self, accepted: Accepted, now: Instant, lives: bool) -> Option<ApplianceId> {
        if matches!(self.state, State::BridgeStarts { .. } | State::PausesWithoutBridge { .. } | State::Clears(_)) {
            // Said by a bridge that is gone.
            return None;
        }
        if let Some(known) = self.all().find(|appliance| appliance.accepted == Some(accepted)) {
            return Some(known.id);
        }
        if self.numbers.highest.is_some_and(|highest| accepted <= highest) {
            return None;
        }
        self.numbers.highest = Some(accepted);
        let ghost = self.numbers.ghost_until.take().is_some_and(|until| now < until);
        if ghost && !lives {
            return None;
        }
        let unnamed = self.alive_mut().find(|appliance| appliance.accepted.is_none())?;
        unnamed.accepted = Some(accepted);
        Some(unnamed.id)
    }
}
