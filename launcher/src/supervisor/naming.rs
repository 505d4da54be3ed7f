//! Which appliance VM a bridge means by a number.

use std::time::{Duration, Instant};

use super::Supervisor;
use super::ports::PortId;
use super::vocabulary::{Accepted, ApplianceId};

/// How long an unnamed appliance VM's number may still come after its death.
const GHOST_LIMIT: Duration = Duration::from_secs(2);

/// One bridge's numbers of the appliance VMs.
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
    /// Finds out which appliance VM the bridge of a port means. It counts them in the order in which they connect, and at most
    /// one at a time is without a number: a new number is that one's, unless one that had none has just died.
    pub(super) fn identify(
        &mut self,
        port: PortId,
        accepted: Accepted,
        now: Instant,
        lives: bool,
    ) -> Option<ApplianceId> {
        let known = self.all().find(|appliance| appliance.accepted.get(port) == Some(accepted));
        // What was said by a bridge that is gone has no meaning any more.
        let numbers = self.bridges.numbers(port)?;
        if let Some(known) = known {
            return Some(known.id);
        }
        if numbers.highest.is_some_and(|highest| accepted <= highest) {
            return None;
        }
        numbers.highest = Some(accepted);
        let ghost = numbers.ghost_until.take().is_some_and(|until| now < until);
        if ghost && !lives {
            return None;
        }
        let unnamed = self.alive_mut().find(|appliance| appliance.accepted.get(port).is_none())?;
        unnamed.accepted.set(port, accepted);
        Some(unnamed.id)
    }
}
