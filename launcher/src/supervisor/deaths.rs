//! What follows from a death: the half of the supervisor's decisions that an operator hopes not to need.

use std::time::{Duration, Instant};

use super::ports::PortId;
use super::vocabulary::{Action, Appliance, ApplianceId, Fault, Part, Progress, Report, Retiring, Stage};
use super::{BRIDGE_FOLLOWS, LISTENING_LIMIT, Next, READY_LIMIT, Recovery, State, Supervisor};
use crate::ending::{Death, Ending};
use crate::restart_policy::Verdict;

impl Supervisor {
    pub(super) fn appliance_ended(&mut self, id: ApplianceId, death: Death, now: Instant) {
        let known = self.all().find(|appliance| appliance.id == id);
        if let Some(known) = known {
            for port in PortId::first(self.bridges.count()).filter(|port| known.accepted.get(*port).is_none()) {
                if let Some(numbers) = self.bridges.numbers(port) {
                    numbers.note_ghost(now);
                }
            }
        }
        if let Some(at) = self.retiring.iter().position(|retiring| retiring.appliance.id == id) {
            let Retiring { appliance, .. } = self.retiring.remove(at);
            return self.retired(appliance, death, now);
        }
        match self.state {
            State::Boots { appliance, .. } if appliance.id == id => self.lost(appliance, death, false, now),
            State::Serves { active } if active.id == id => self.lost(active, death, true, now),
            State::Replaces { active, standby, until } if active.id == id => {
                self.tell(Report::ApplianceLost { appliance: id, ending: ending_of(active, death), restart: true });
                self.actions.push(Action::Progress(Progress::ActiveLost));
                self.recovery.get_or_insert(Recovery { what: Part::Appliance, since: now });
                self.enter(State::Boots { appliance: standby, until });
            }
            State::Replaces { active, standby, .. } if standby.id == id => {
                self.keep_active(active);
                self.fail_replacement(ending_of(standby, death).message());
            }
            _ => {}
        }
    }

    /// One that was on its way out is gone.
    fn retired(&mut self, appliance: Appliance, death: Death, now: Instant) {
        if let State::Clears(_) = self.state {
            return self.cleared(Some(death), now);
        }
        if let State::MakesWay = self.state
            && self.retiring.is_empty()
        {
            return self.start_next(now);
        }
        if appliance.fault == Some(Fault::Dropped) {
            // It was in use, and another one has taken its place already.
            let ending = ending_of(appliance, death);
            self.tell(Report::ApplianceLost { appliance: appliance.id, ending, restart: true });
        }
        self.answer_replaced();
    }

    /// The appliance VM on which the device depends is gone.
    fn lost(&mut self, appliance: Appliance, death: Death, was_active: bool, now: Instant) {
        let ending = ending_of(appliance, death);
        self.fail_replacement(ending.message());
        if !self.was_ready {
            if appliance.fault.is_some() {
                return self.end(ending);
            }
            self.enter(State::Blames { ending, until: now + BRIDGE_FOLLOWS });
            return;
        }
        match self.restarts.judge(was_active, now) {
            Verdict::Restart(delay) => {
                self.tell(Report::ApplianceLost { appliance: appliance.id, ending, restart: true });
                self.recovery.get_or_insert(Recovery { what: Part::Appliance, since: now });
                if delay.is_zero() {
                    self.start_appliance(now);
                } else {
                    self.enter(State::Pauses { until: now + delay });
                }
            }
            Verdict::GiveUp(why) => {
                self.tell(Report::ApplianceLost { appliance: appliance.id, ending: ending.clone(), restart: false });
                let ending = why.iter().fold(ending, |ending, why| ending.with_remark(why));
                self.enter(State::Blames { ending, until: now + BRIDGE_FOLLOWS });
            }
        }
    }

    pub(super) fn bridge_ended(&mut self, port: PortId, death: Death, now: Instant) {
        let overdue = self.bridges.end(port);
        let of_state: Vec<Appliance> = self.alive().collect();
        let had_appliance = !of_state.is_empty();
        self.retiring.extend(of_state.into_iter().map(|appliance| Retiring { appliance, stage: Stage::LetGo(now) }));
        for retiring in self.retiring.iter_mut().filter(|retiring| retiring.stage != Stage::Killed) {
            // At once: the driver VM's VMM has seen its back-end go and may use the memory for something else, while QEMU
            // keeps it mapped.
            retiring.stage = Stage::Killed;
            if retiring.appliance.fault.is_none() {
                self.actions.push(Action::Kill(retiring.appliance.id));
            }
        }
        let by_signal = death.is_by_signal();
        let which = (self.bridges.count() > 1).then_some(port);
        let ending = match &self.state {
            State::Over => return,
            State::Blames { ending, .. } if !by_signal => {
                let ending = ending.clone();
                return self.end(ending);
            }
            State::Blames { .. } => return self.end(Ending::bridge_ended(death, which, true)),
            _ if overdue => Ending::not_ready("the bridge does not listen", LISTENING_LIMIT, death),
            _ => Ending::bridge_ended(death, which, had_appliance),
        };
        self.fail_replacement(ending.message());
        let next = match self.state {
            // The first death decides how the run ends.
            State::Clears(Next::End { .. }) => return,
            State::Clears(Next::Start(at)) | State::PausesWithoutBridge { until: at } => {
                self.after_bridge(ending, by_signal, now).not_before(at)
            }
            _ => self.after_bridge(ending, by_signal, now),
        };
        self.enter(State::Clears(next));
        self.cleared(None, now);
    }

    /// Decides what comes after a bridge's death.
    fn after_bridge(&mut self, ending: Ending, by_signal: bool, now: Instant) -> Next {
        if !self.was_ready {
            return Next::End { ending, by_signal };
        }
        // One blow may hit both, and the appliance VM's death be seen first: that is one loss, and judged already.
        let same = self.recovery.filter(|recovery| now.saturating_duration_since(recovery.since) < BRIDGE_FOLLOWS);
        let verdict = match same {
            Some(_) => Verdict::Restart(Duration::ZERO),
            None => self.restarts.judge(self.recovery.is_none(), now),
        };
        match verdict {
            Verdict::Restart(delay) => {
                self.tell(Report::BridgeLost { ending, restart: true });
                let since = self.recovery.map_or(now, |recovery| recovery.since);
                self.recovery = Some(Recovery { what: Part::Bridge, since });
                Next::Start(now + delay)
            }
            Verdict::GiveUp(why) => {
                self.tell(Report::BridgeLost { ending: ending.clone(), restart: false });
                Next::End { ending: why.iter().fold(ending, |ending, why| ending.with_remark(why)), by_signal }
            }
        }
    }

    /// Goes on after a bridge's death once no appliance VM of it is left; `last` is how the last one went.
    fn cleared(&mut self, last: Option<Death>, now: Instant) {
        if !self.retiring.is_empty() {
            return;
        }
        let State::Clears(next) = &self.state else { return };
        match (next.clone(), last) {
            (Next::Start(at), _) if at <= now => self.start_bridges(now),
            (Next::Start(until), _) => self.enter(State::PausesWithoutBridge { until }),
            // It was on its way out already, and the bridge saw that before we did.
            (Next::End { by_signal: false, .. }, Some(death)) if !death.is_by_sigkill() => {
                self.end(Ending::appliance_ended(death));
            }
            (Next::End { ending, .. }, _) => self.end(ending),
        }
    }
}

fn ending_of(appliance: Appliance, death: Death) -> Ending {
    match appliance.fault {
        None => Ending::appliance_ended(death),
        Some(Fault::Dropped) => Ending::appliance_given_up(death),
        Some(Fault::Overdue) => Ending::not_ready("the device is not ready", READY_LIMIT, death),
    }
}
