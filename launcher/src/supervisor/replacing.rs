//! How one appliance VM takes the place of another because the operator wants it.

use std::time::Instant;

use super::vocabulary::{Action, Appliance, ApplianceId, Fault, Handover, Progress, Replaced, Retiring, Stage};
use super::{APPLIANCE_GRACE, LET_GO_LIMIT, READY_LIMIT, State, Supervisor};

/// A replacement that somebody waits for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Replacement {
    pub(super) since: Instant,
    /// Set when it came off; what it replaced is retiring.
    pub(super) done: Option<Replaced>,
}

impl Supervisor {
    /// The appliance VM in use, if it stays that for the time being.
    ///
    /// # Errors
    /// One line that says why it does not.
    pub(crate) fn may_replace(&self) -> Result<ApplianceId, String> {
        match &self.state {
            _ if self.replacement.is_some() => {
                Err("another upgrade or restart is under way; wait for its end".to_owned())
            }
            State::Serves { active } if active.fault.is_none() && self.retiring.is_empty() => Ok(active.id),
            State::Serves { .. } => Err("an earlier appliance VM is still ending; try again".to_owned()),
            _ => Err(format!("the device is {}; wait until it is serving (vvu status)", self.word())),
        }
    }

    /// What dropped the appliance VM in use has moved on to the standby, where that is so.
    pub(super) fn forgive_drops(&mut self) {
        if let State::Replaces { active, standby, .. } = &mut self.state
            && active.dropped.is_within(standby.active)
        {
            active.dropped_until = None;
        }
    }

    /// Sends an appliance VM on its way out that another one has replaced.
    pub(super) fn retire(&mut self, appliance: Appliance, now: Instant) {
        let stage = if appliance.fault.is_some() {
            Stage::Killed
        } else if appliance.dropped.is_all(self.bridges.count()) {
            self.actions.push(Action::Terminate(appliance.id));
            Stage::Asked(now + APPLIANCE_GRACE)
        } else {
            Stage::LetGo(now + LET_GO_LIMIT)
        };
        self.retiring.push(Retiring { appliance, stage });
    }

    pub(super) fn note_replaced(&mut self, appliance: ApplianceId, pause_us: Option<u64>, now: Instant) {
        if let Some(replacement) = self.replacement.as_mut() {
            let took = now.saturating_duration_since(replacement.since);
            let done = Replaced { appliance, pause_us, took };
            replacement.done = Some(done);
            self.actions.extend([Action::AdoptImage, Action::Progress(Progress::Active(done))]);
        }
    }

    /// Answers a replacement that came off as soon as nothing of what it replaced is left.
    pub(super) fn answer_replaced(&mut self) {
        if let Some(Replacement { done: Some(done), .. }) = self.replacement
            && self.retiring.is_empty()
        {
            self.replacement = None;
            self.actions.push(Action::Answer(Ok(done)));
        }
    }

    pub(super) fn fail_replacement(&mut self, why: &str) {
        if let Some(replacement) = self.replacement.take() {
            // Once the new one is in use, that is the result, whatever comes later.
            let answer = replacement.done.ok_or_else(|| why.to_owned());
            self.actions.push(Action::Answer(answer));
        }
    }

    /// The standby is no more; the one in use stays that, unless a bridge has dropped it in the meantime.
    pub(super) fn keep_active(&mut self, active: Appliance) {
        self.enter(State::Serves { active });
        if !active.dropped.is_empty() {
            self.kill_for(active.id, Fault::Dropped);
        }
    }

    pub(super) fn replace(&mut self, how: Handover, now: Instant) {
        let (Ok(_), State::Serves { active }) = (self.may_replace(), &self.state) else { return };
        let active = *active;
        self.replacement = Some(Replacement { since: now, done: None });
        match how {
            Handover::StandBy => {
                let standby = self.next_appliance();
                self.actions.push(Action::StartStandby(standby.id));
                self.enter(State::Replaces { active, standby, until: now + READY_LIMIT });
            }
            Handover::InTurn => {
                self.actions.push(Action::Terminate(active.id));
                self.retiring.push(Retiring { appliance: active, stage: Stage::Asked(now + APPLIANCE_GRACE) });
                self.enter(State::MakesWay);
            }
        }
    }

    /// Starts the appliance VM for which the one before it has made way.
    pub(super) fn start_next(&mut self, now: Instant) {
        let appliance = self.next_appliance();
        self.actions.push(Action::StartStandby(appliance.id));
        self.enter(State::Boots { appliance, until: now + READY_LIMIT });
    }

    pub(super) fn abandon(&mut self) {
        self.replacement = None;
        if let State::Replaces { active, standby, .. } = self.state
            // What some of the bridges use already is not taken from them.
            && standby.active.is_empty()
        {
            self.keep_active(active);
            if standby.fault.is_none() {
                self.actions.push(Action::Kill(standby.id));
            }
            // Nobody asks any more why it goes.
            let appliance = Appliance { fault: None, ..standby };
            self.retiring.push(Retiring { appliance, stage: Stage::Killed });
        }
    }
}
