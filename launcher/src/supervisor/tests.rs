//! Deaths in every state, limits, replacements.

mod ports;
mod random;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use super::*;
use crate::ending::Death;

impl State {
    /// The picture above as a table; every state may become `Over` by a signal, and `Clears` by the bridge's death.
    pub(super) fn may_become(&self, next: &Self) -> bool {
        use State::*;
        match (self, next) {
            (Over, _) => false,
            (_, Over) => true,
            (Blames { .. } | Clears(Next::End { .. }), Clears(_)) => false,
            (_, Clears(_)) => true,
            (BridgeStarts { .. } | Pauses { .. }, Boots { .. }) => true,
            (Boots { .. }, Serves { .. } | Boots { .. } | Pauses { .. } | Blames { .. }) => true,
            (Serves { .. }, Replaces { .. } | MakesWay | Boots { .. } | Pauses { .. } | Blames { .. }) => true,
            (MakesWay, Boots { .. }) => true,
            (Replaces { .. }, Serves { .. } | Boots { .. }) => true,
            (Clears(_), BridgeStarts { .. } | PausesWithoutBridge { .. }) => true,
            (PausesWithoutBridge { .. }, BridgeStarts { .. }) => true,
            _ => false,
        }
    }
}

const KILLED: i32 = 9;
const ABORTED: i32 = 6;
const EXIT_1: i32 = 1 << 8;

fn death(status: i32) -> Death {
    Death::Ended { status: ExitStatus::from_raw(status), last_lines: vec!["last words".to_owned()] }
}

/// The port of a run that has one, and the first of a run that has several.
const FIRST: PortId = PortId(0);
const SECOND: PortId = PortId(1);

/// A supervisor with a clock that moves when it is told to.
struct Story {
    supervisor: Supervisor,
    now: Instant,
}

impl Story {
    fn new(limit: Option<&str>) -> Self {
        Self::with_ports(1, limit)
    }

    fn with_ports(ports: u8, limit: Option<&str>) -> Self {
        let now = Instant::now();
        let restarts = Restarts::new(limit.map(|limit| limit.parse().unwrap()));
        Self { supervisor: Supervisor::new(restarts, ports, now), now }
    }

    /// A run with two ports whose appliance 1 is in use.
    fn serving_two() -> Self {
        let mut story = Self::with_ports(2, Some("5/60"));
        assert_eq!(story.handle(Input::Listening(SECOND)), [], "the other bridge does not listen");
        assert_eq!(story.handle(Input::Listening(FIRST)), [Action::StartAppliance(ApplianceId(1))]);
        assert_eq!(story.active_at(FIRST, 1, None), []);
        assert_eq!(story.handle(Input::Ready(FIRST)), [], "the other bridge is not ready");
        assert_eq!(story.supervisor.word(), "starting");
        let ready = Action::Tell(Report::Ready(ApplianceId(1)));
        assert_eq!(story.active_at(SECOND, 1, None)[0], ready);
        story
    }

    /// The same with appliance 2 as its standby.
    fn replacing_two() -> Self {
        let mut story = Self::serving_two();
        assert_eq!(story.handle(Input::Replace(Handover::StandBy)), [Action::StartStandby(ApplianceId(2))]);
        story
    }

    /// A run whose appliance 1 is in use.
    fn serving(limit: Option<&str>) -> Self {
        let mut story = Self::new(limit);
        assert_eq!(story.handle(Input::Listening(FIRST)), [Action::StartAppliance(ApplianceId(1))]);
        let first = story.active(1, None);
        assert_eq!(first[0], Action::Tell(Report::Ready(ApplianceId(1))));
        assert_eq!(story.supervisor.word(), "serving");
        story
    }

    /// The same with appliance 2 as its standby.
    fn replacing() -> Self {
        let mut story = Self::serving(Some("5/60"));
        assert_eq!(story.handle(Input::Replace(Handover::StandBy)), [Action::StartStandby(ApplianceId(2))]);
        assert_eq!(story.supervisor.word(), "replacing");
        story
    }

    fn handle(&mut self, input: Input) -> Vec<Action> {
        self.supervisor.handle(input, self.now)
    }

    fn active(&mut self, accepted: u32, pause_us: Option<u64>) -> Vec<Action> {
        self.active_at(FIRST, accepted, pause_us)
    }

    fn active_at(&mut self, port: PortId, accepted: u32, pause_us: Option<u64>) -> Vec<Action> {
        self.handle(Input::Active { port, accepted: Accepted(accepted), pause_us })
    }

    fn dropped(&mut self, accepted: u32) -> Vec<Action> {
        self.dropped_at(FIRST, accepted)
    }

    fn dropped_at(&mut self, port: PortId, accepted: u32) -> Vec<Action> {
        self.handle(Input::Dropped(port, Accepted(accepted)))
    }

    fn appliance_dies(&mut self, id: u32, status: i32) -> Vec<Action> {
        self.handle(Input::ApplianceEnded(ApplianceId(id), death(status)))
    }

    fn bridge_dies(&mut self, status: i32) -> Vec<Action> {
        self.handle(Input::BridgeEnded(FIRST, death(status)))
    }

    /// Lets the clock come to the next deadline.
    fn wait(&mut self) -> Vec<Action> {
        self.now = self.supervisor.deadline().expect("something to wait for");
        self.handle(Input::TimePassed)
    }
}

fn message(ending: &Ending) -> String {
    ending.clone().into_words().0
}

/// The one ending among the actions.
fn ending(actions: &[Action]) -> String {
    let all: Vec<_> = actions.iter().filter_map(|it| if let Action::End(it) = it { Some(it) } else { None }).collect();
    assert_eq!(all.len(), 1, "{actions:?}");
    message(all[0])
}

/// The reports of a loss among the actions: what was lost, in which words, and whether it comes back.
fn losses(actions: &[Action]) -> Vec<(&'static str, String, bool)> {
    let report = |action: &Action| match action {
        Action::Tell(Report::ApplianceLost { ending, restart, .. }) => Some(("appliance", message(ending), *restart)),
        Action::Tell(Report::BridgeLost { ending, restart }) => Some(("bridge", message(ending), *restart)),
        _ => None,
    };
    actions.iter().filter_map(report).collect()
}

const WAS_KILLED: &str = "the appliance VM ended (signal: 9 (SIGKILL))";
const BRIDGE_KILLED: &str = "the bridge ended (signal: 9 (SIGKILL)), its appliance VM was killed";

#[test]
fn a_death_before_the_device_was_ready_ends_the_run() {
    let mut story = Story::new(Some("5/60"));
    assert_eq!(ending(&story.bridge_dies(EXIT_1)), "the bridge ended (exit status: 1), no appliance VM was started");

    let mut story = Story::new(Some("5/60"));
    story.handle(Input::Listening(FIRST));
    assert_eq!(story.appliance_dies(1, EXIT_1), []);
    assert_eq!(story.supervisor.word(), "ending");
    assert_eq!(ending(&story.wait()), "the appliance VM ended (exit status: 1)");
}

#[test]
fn a_bridge_that_was_killed_is_named_though_its_appliance_aborts_first() {
    let mut story = Story::serving(None);
    assert_eq!(losses(&story.appliance_dies(1, ABORTED)).len(), 1);
    assert_eq!(ending(&story.bridge_dies(KILLED)), BRIDGE_KILLED);

    let mut story = Story::serving(None);
    story.appliance_dies(1, ABORTED);
    let ended = ending(&story.bridge_dies(EXIT_1));
    assert_eq!(ended, "the appliance VM ended (signal: 6 (SIGABRT))", "a bridge that only follows is not to blame");
}

#[test]
fn what_takes_too_long_at_the_start_ends_the_run() {
    let mut story = Story::new(Some("5/60"));
    assert_eq!(story.wait(), [Action::KillBridge(FIRST)]);
    assert_eq!(ending(&story.bridge_dies(KILLED)), "the bridge does not listen after 30 s");

    let mut story = Story::new(Some("5/60"));
    story.handle(Input::Listening(FIRST));
    assert_eq!(story.wait(), [Action::Kill(ApplianceId(1))]);
    assert_eq!(story.supervisor.deadline(), None, "it is killed once");
    assert_eq!(ending(&story.appliance_dies(1, KILLED)), "the device is not ready after 180 s");
}

#[test]
fn a_dead_appliance_is_started_again_at_once() {
    let mut story = Story::serving(Some("5/60"));
    let actions = story.appliance_dies(1, KILLED);
    assert_eq!(losses(&actions), [("appliance", WAS_KILLED.to_owned(), true)]);
    assert_eq!(actions.last(), Some(&Action::StartAppliance(ApplianceId(2))));
    assert_eq!((story.supervisor.word(), story.supervisor.restarts()), ("restarting", 1));
    story.dropped(1);
    story.now += Duration::from_secs(3);
    let active = Report::Active { appliance: ApplianceId(2), pause_us: Some(3_000_000) };
    let restarted = Report::Restarted { what: Part::Appliance, took: Duration::from_secs(3) };
    assert_eq!(story.active(2, Some(3_000_000)), [Action::Tell(restarted), Action::Tell(active)]);
}

#[test]
fn restarts_wait_longer_while_none_gets_ready_and_end_at_the_limit() {
    let mut story = Story::serving(Some("3/60"));
    story.appliance_dies(1, KILLED);
    for next in [3, 4] {
        let actions = story.appliance_dies(next - 1, EXIT_1);
        assert_eq!(actions.len(), 1, "only the loss is told: {actions:?}");
        assert_eq!(story.wait(), [Action::StartAppliance(ApplianceId(next))]);
    }
    let actions = story.appliance_dies(4, EXIT_1);
    assert_eq!(losses(&actions), [("appliance", "the appliance VM ended (exit status: 1)".to_owned(), false)]);
    let ended = ending(&story.wait());
    assert_eq!(
        ended,
        "the appliance VM ended (exit status: 1); after 3 restarts within 60 s it is not started again (--restart-limit)"
    );
}

#[test]
fn a_restarted_appliance_that_never_gets_ready_is_killed_and_counted() {
    let mut story = Story::serving(Some("5/60"));
    story.appliance_dies(1, KILLED);
    assert_eq!(story.wait(), [Action::Kill(ApplianceId(2))]);
    let actions = story.appliance_dies(2, KILLED);
    assert_eq!(losses(&actions), [("appliance", "the device is not ready after 180 s".to_owned(), true)]);
}

#[test]
fn restarts_can_be_turned_off() {
    let mut story = Story::serving(None);
    let actions = story.appliance_dies(1, KILLED);
    assert_eq!(losses(&actions), [("appliance", WAS_KILLED.to_owned(), false)]);
    assert_eq!(ending(&story.wait()), WAS_KILLED);
    let mut story = Story::serving(None);
    assert_eq!(losses(&story.bridge_dies(KILLED)), [("bridge", BRIDGE_KILLED.to_owned(), false)]);
    assert_eq!(ending(&story.appliance_dies(1, KILLED)), BRIDGE_KILLED);
}

#[test]
fn a_dead_bridge_takes_its_appliances_along_and_both_come_back() {
    let mut story = Story::replacing();
    let actions = story.bridge_dies(KILLED);
    let killed: Vec<_> = actions.iter().filter(|action| matches!(action, Action::Kill(_))).collect();
    assert_eq!(killed, [&Action::Kill(ApplianceId(1)), &Action::Kill(ApplianceId(2))]);
    assert!(actions.contains(&Action::Answer(Err(BRIDGE_KILLED.to_owned()))), "{actions:?}");
    assert_eq!(losses(&actions), [("bridge", BRIDGE_KILLED.to_owned(), true)]);
    assert_eq!(story.supervisor.deadline(), None, "nothing more is done to what is killed");
    assert_eq!(story.appliance_dies(1, KILLED), []);
    assert_eq!(story.appliance_dies(2, KILLED), [Action::StartBridge(FIRST)], "only once all are gone");
    assert_eq!(story.handle(Input::Listening(FIRST)), [Action::StartAppliance(ApplianceId(3))]);
    let actions = story.active(1, Some(7));
    assert!(actions.contains(&Action::Tell(Report::Restarted { what: Part::Bridge, took: Duration::ZERO })));
    assert!(actions.contains(&Action::Tell(Report::Active { appliance: ApplianceId(3), pause_us: Some(7) })));
}

#[test]
fn one_blow_to_both_counts_once() {
    let mut story = Story::serving(Some("1/60"));
    story.appliance_dies(1, ABORTED);
    let actions = story.bridge_dies(KILLED);
    assert_eq!(losses(&actions).len(), 1);
    assert_eq!(story.appliance_dies(2, KILLED), [Action::StartBridge(FIRST)]);
    assert_eq!(story.supervisor.restarts(), 1);
}

#[test]
fn a_bridge_dies_while_nothing_runs_behind_it() {
    let mut story = Story::serving(Some("5/60"));
    story.appliance_dies(1, KILLED);
    story.appliance_dies(2, EXIT_1);
    story.now += Duration::from_secs(1);
    let actions = story.bridge_dies(EXIT_1);
    assert_eq!(losses(&actions).len(), 1);
    assert!(!actions.contains(&Action::StartBridge(FIRST)), "not at once: it was a restart that failed");
    assert_eq!(story.wait(), [Action::StartBridge(FIRST)]);
    assert_eq!(story.wait(), [Action::KillBridge(FIRST)], "it does not listen");
    assert_eq!(losses(&story.bridge_dies(KILLED)), [("bridge", "the bridge does not listen after 30 s".into(), true)]);
}

#[test]
fn an_appliance_that_the_bridge_has_dropped_is_killed() {
    let mut story = Story::serving(Some("5/60"));
    assert_eq!(story.dropped(1), [Action::Kill(ApplianceId(1))]);
    assert_eq!(story.dropped(1), [], "once");
    assert!(story.supervisor.may_replace().is_err());
    let actions = story.appliance_dies(1, KILLED);
    let words = "the bridge gave the appliance VM up, which was killed".to_owned();
    assert_eq!(losses(&actions), [("appliance", words, true)]);
}

#[test]
fn a_standby_takes_over_and_the_old_one_ends_in_order() {
    let mut story = Story::replacing();
    story.now += Duration::from_secs(4);
    let actions = story.active(2, Some(1500));
    let done = Replaced { appliance: ApplianceId(2), pause_us: Some(1500), took: Duration::from_secs(4) };
    assert!(actions.contains(&Action::AdoptImage) && actions.contains(&Action::Progress(Progress::Active(done))));
    assert!(story.supervisor.may_replace().is_err());
    assert_eq!(story.dropped(1), [Action::Terminate(ApplianceId(1))]);
    assert_eq!(story.appliance_dies(1, 0), [Action::Answer(Ok(done))]);
    assert_eq!(story.supervisor.may_replace(), Ok(ApplianceId(2)));
    assert_eq!(story.supervisor.restarts(), 0);
}

#[test]
fn an_old_appliance_that_does_not_go_is_killed() {
    let mut story = Story::replacing();
    story.active(2, None);
    assert_eq!(story.wait(), [Action::Terminate(ApplianceId(1))], "the bridge does not let go");
    assert_eq!(story.wait(), [Action::Kill(ApplianceId(1))]);
    assert_eq!(story.supervisor.deadline(), None);
    assert!(matches!(story.appliance_dies(1, KILLED)[..], [Action::Answer(Ok(_))]));
}

#[test]
fn a_standby_that_dies_or_hangs_leaves_the_first_in_use() {
    let mut story = Story::replacing();
    let refused = Action::Answer(Err("the appliance VM ended (exit status: 1)".to_owned()));
    assert_eq!(story.appliance_dies(2, EXIT_1), [refused]);
    assert_eq!(story.supervisor.in_use(), Some(ApplianceId(1)));

    let mut story = Story::replacing();
    assert_eq!(story.wait(), [Action::Kill(ApplianceId(2))]);
    let refused = Action::Answer(Err("the device is not ready after 180 s".to_owned()));
    assert_eq!(story.appliance_dies(2, KILLED), [refused]);

    let mut story = Story::replacing();
    assert_eq!(story.dropped(2), [Action::Kill(ApplianceId(2))], "the bridge turned it away");
    assert!(matches!(story.appliance_dies(2, KILLED)[..], [Action::Answer(Err(_))]));
    assert_eq!(story.supervisor.restarts(), 0);
}

#[test]
fn a_standby_takes_over_from_one_that_dies() {
    let mut story = Story::replacing();
    let actions = story.appliance_dies(1, KILLED);
    assert_eq!(losses(&actions), [("appliance", WAS_KILLED.to_owned(), true)]);
    assert_eq!(story.supervisor.booting(), Some(ApplianceId(2)));
    story.dropped(1);
    let actions = story.active(2, Some(9));
    assert!(matches!(actions.last(), Some(Action::Answer(Ok(Replaced { pause_us: Some(9), .. })))), "{actions:?}");

    let mut story = Story::replacing();
    assert_eq!(story.dropped(1), [], "it may be the standby's turn");
    assert_eq!(story.wait(), [Action::Kill(ApplianceId(1))], "it is not");
    story.active(2, Some(9));
    let actions = story.appliance_dies(1, KILLED);
    assert_eq!(losses(&actions).len(), 1);
    assert!(matches!(actions.last(), Some(Action::Answer(Ok(_)))), "{actions:?}");
}

#[test]
fn an_appliance_that_is_dropped_for_the_standby_ends_in_order() {
    let mut story = Story::replacing();
    story.dropped(1);
    let actions = story.active(2, None);
    assert!(actions.contains(&Action::Terminate(ApplianceId(1))), "{actions:?}");
    let actions = story.appliance_dies(1, 0);
    assert!(matches!(actions[..], [Action::Answer(Ok(_))]), "no loss: {actions:?}");
}

#[test]
fn an_appliance_that_is_dropped_for_a_standby_that_dies_is_killed() {
    let mut story = Story::replacing();
    story.dropped(1);
    let actions = story.appliance_dies(2, EXIT_1);
    assert!(actions.contains(&Action::Kill(ApplianceId(1))), "{actions:?}");
    let mut story = Story::replacing();
    story.dropped(1);
    assert_eq!(story.handle(Input::ReplaceAbandoned), [Action::Kill(ApplianceId(1)), Action::Kill(ApplianceId(2))]);
}

#[test]
fn both_die_one_after_the_other() {
    let mut story = Story::replacing();
    story.appliance_dies(1, KILLED);
    let actions = story.appliance_dies(2, KILLED);
    assert!(matches!(actions.first(), Some(Action::Answer(Err(_)))), "{actions:?}");
    assert_eq!(story.wait(), [Action::StartAppliance(ApplianceId(3))]);
}

#[test]
fn one_appliance_makes_way_for_the_next() {
    let mut story = Story::serving(Some("5/60"));
    assert_eq!(story.handle(Input::Replace(Handover::InTurn)), [Action::Terminate(ApplianceId(1))]);
    assert_eq!((story.supervisor.word(), story.supervisor.in_use()), ("replacing", None));
    assert_eq!(story.dropped(1), []);
    assert_eq!(story.wait(), [Action::Kill(ApplianceId(1))], "it takes too long");
    assert_eq!(story.appliance_dies(1, KILLED), [Action::StartStandby(ApplianceId(2))], "no loss: it was wanted");
    let actions = story.active(2, Some(9));
    assert!(actions.contains(&Action::AdoptImage), "{actions:?}");
    assert!(matches!(actions.last(), Some(Action::Answer(Ok(Replaced { pause_us: Some(9), .. })))), "{actions:?}");
    assert_eq!(story.supervisor.restarts(), 0);
}

#[test]
fn the_first_image_comes_back_if_the_next_one_dies() {
    let mut story = Story::serving(Some("5/60"));
    story.handle(Input::Replace(Handover::InTurn));
    story.appliance_dies(1, 0);
    let actions = story.appliance_dies(2, EXIT_1);
    assert!(matches!(actions.first(), Some(Action::Answer(Err(_)))), "{actions:?}");
    assert_eq!(story.wait(), [Action::StartAppliance(ApplianceId(3))]);
    let mut story = Story::serving(Some("5/60"));
    story.handle(Input::Replace(Handover::InTurn));
    let actions = story.bridge_dies(KILLED);
    assert!(matches!(actions[..], [Action::Kill(_), Action::Answer(Err(_)), ..]), "{actions:?}");
    assert_eq!(story.appliance_dies(1, KILLED), [Action::StartBridge(FIRST)]);
}

#[test]
fn an_abandoned_replacement_kills_the_standby_and_nothing_else() {
    let mut story = Story::replacing();
    assert_eq!(story.handle(Input::ReplaceAbandoned), [Action::Kill(ApplianceId(2))]);
    assert_eq!(story.supervisor.word(), "serving");
    assert!(story.supervisor.may_replace().is_err(), "it is not gone yet");
    assert_eq!(story.appliance_dies(2, KILLED), []);
    assert_eq!(story.supervisor.may_replace(), Ok(ApplianceId(1)));
}

#[test]
fn a_number_that_comes_late_is_not_taken_for_the_next_appliances() {
    let mut story = Story::replacing();
    story.appliance_dies(2, EXIT_1);
    story.handle(Input::Replace(Handover::StandBy));
    assert_eq!(story.dropped(2), [], "that was the one that had died without a number");
    assert_eq!(story.dropped(2), []);
    assert!(!story.active(3, Some(1)).is_empty());
    assert_eq!(story.supervisor.in_use(), Some(ApplianceId(3)));
}

#[test]
fn a_number_of_the_last_bridge_is_not_taken_for_one_of_the_next() {
    let mut story = Story::serving(Some("5/60"));
    story.bridge_dies(KILLED);
    assert_eq!(story.dropped(1), []);
    story.appliance_dies(1, KILLED);
    assert_eq!(story.dropped(2), []);
    story.handle(Input::Listening(FIRST));
    assert!(!story.active(1, None).is_empty());
    assert_eq!(story.supervisor.in_use(), Some(ApplianceId(2)));
}

#[test]
fn a_signal_ends_the_run_in_any_state() {
    let mut story = Story::new(Some("5/60"));
    assert_eq!(ending(&story.handle(Input::Signal("SIGINT"))), "interrupted by SIGINT before the device was ready");
    let mut story = Story::replacing();
    let actions = story.handle(Input::Signal("SIGTERM"));
    assert_eq!(actions[0], Action::Answer(Err("the run ends".to_owned())));
    assert_eq!(ending(&actions), "ended by SIGTERM");
    assert_eq!(story.bridge_dies(KILLED), []);
}
