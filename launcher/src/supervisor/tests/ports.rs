//! Runs with several ports.

use super::*;

const SECOND_KILLED: &str = "the bridge of port 1 ended (signal: 9 (SIGKILL)), its appliance VM was killed";

#[test]
fn the_longest_pause_of_all_ports_is_told_when_all_are_in_use() {
    let mut story = Story::serving_two();
    story.appliance_dies(1, KILLED);
    assert_eq!(story.active_at(SECOND, 2, Some(70)), []);
    assert_eq!((story.supervisor.word(), story.supervisor.in_use()), ("restarting", None));
    let actions = story.active_at(FIRST, 2, Some(30));
    let active = Report::Active { appliance: ApplianceId(2), pause_us: Some(70) };
    assert_eq!(actions.last(), Some(&Action::Tell(active)));
    let again = Report::Active { appliance: ApplianceId(2), pause_us: Some(5) };
    assert_eq!(story.active_at(FIRST, 2, Some(5)), [Action::Tell(again)], "a front-end that came back");
}

#[test]
fn only_the_dead_bridge_is_started_again() {
    let mut story = Story::serving_two();
    let actions = story.handle(Input::BridgeEnded(SECOND, death(KILLED)));
    assert_eq!(actions[0], Action::Kill(ApplianceId(1)));
    assert_eq!(losses(&actions), [("bridge", SECOND_KILLED.to_owned(), true)]);
    assert_eq!(story.dropped_at(FIRST, 1), [], "the other bridge sees it go");
    assert_eq!(story.appliance_dies(1, KILLED), [Action::StartBridge(SECOND)]);
    assert_eq!(story.handle(Input::Listening(SECOND)), [Action::StartAppliance(ApplianceId(2))]);
    // The new bridge counts from 1, the other one goes on.
    assert_eq!(story.active_at(SECOND, 1, None), []);
    assert!(
        story
            .active_at(FIRST, 2, Some(9))
            .contains(&Action::Tell(Report::Restarted { what: Part::Bridge, took: Duration::ZERO }))
    );
    assert_eq!(story.supervisor.in_use(), Some(ApplianceId(2)));
}

#[test]
fn bridges_that_die_one_after_the_other_all_come_back() {
    let mut story = Story::serving_two();
    story.handle(Input::BridgeEnded(SECOND, death(KILLED)));
    assert_eq!(losses(&story.bridge_dies(KILLED)).len(), 1);
    assert_eq!(story.appliance_dies(1, KILLED), [Action::StartBridge(FIRST), Action::StartBridge(SECOND)]);
    assert_eq!(story.supervisor.restarts(), 1, "it was one blow");
    story.handle(Input::Listening(FIRST));
    story.now += Duration::from_secs(1);
    let actions = story.handle(Input::BridgeEnded(SECOND, death(EXIT_1)));
    assert_eq!(losses(&actions).len(), 1);
    assert!(!actions.contains(&Action::StartBridge(SECOND)), "not at once: it was a restart that failed");
    assert_eq!(story.wait(), [Action::StartBridge(SECOND)]);
    assert_eq!(story.handle(Input::Listening(SECOND)), [Action::StartAppliance(ApplianceId(2))]);
}

#[test]
fn only_a_bridge_that_does_not_listen_is_overdue() {
    let mut story = Story::with_ports(2, Some("5/60"));
    story.handle(Input::Listening(FIRST));
    assert_eq!(story.wait(), [Action::KillBridge(SECOND)]);
    let actions = story.handle(Input::BridgeEnded(SECOND, death(KILLED)));
    assert_eq!(ending(&actions), "the bridge does not listen after 30 s");
}

#[test]
fn bridges_move_to_a_standby_one_by_one() {
    let mut story = Story::replacing_two();
    assert_eq!(story.dropped_at(FIRST, 1), [], "it may be the standby's turn");
    assert_eq!(story.active_at(FIRST, 2, Some(40)), []);
    story.now += TAKE_OVER_LIMIT;
    assert_eq!(story.handle(Input::TimePassed), [], "the first one is still in use elsewhere");
    assert_eq!(story.handle(Input::ReplaceAbandoned), [], "too late for that");
    assert_eq!(story.supervisor.word(), "replacing");
    let actions = story.active_at(SECOND, 2, Some(20));
    assert!(actions.contains(&Action::Tell(Report::Active { appliance: ApplianceId(2), pause_us: Some(40) })));
    assert_eq!(story.dropped_at(SECOND, 1), [Action::Terminate(ApplianceId(1))]);
}

#[test]
fn a_bridge_that_drops_the_active_one_for_nothing_has_it_killed() {
    let mut story = Story::replacing_two();
    story.active_at(FIRST, 2, None);
    assert_eq!(story.dropped_at(SECOND, 1), []);
    assert_eq!(story.wait(), [Action::Kill(ApplianceId(1))], "the second bridge does not use the standby");
}

#[test]
fn a_standby_that_dies_half_way_takes_the_first_one_along() {
    let mut story = Story::replacing_two();
    story.dropped_at(FIRST, 1);
    story.active_at(FIRST, 2, None);
    let actions = story.appliance_dies(2, KILLED);
    assert!(actions.contains(&Action::Kill(ApplianceId(1))), "one of the bridges no longer uses it: {actions:?}");
    assert_eq!(story.appliance_dies(1, KILLED).last(), Some(&Action::StartAppliance(ApplianceId(3))));
}
