//! The table, whole.

use super::*;

const EVENTS: [Event; 14] = [
    Event::ApplianceCame,
    Event::ApplianceReady(Role::Active),
    Event::ApplianceReady(Role::Standby),
    Event::ApplianceDown(Role::Active),
    Event::ApplianceDown(Role::Standby),
    Event::ApplianceLost(Role::Active),
    Event::ApplianceLost(Role::Standby),
    Event::FrontEndCame,
    Event::FrontEndEnded,
    Event::Attached,
    Event::BackEndLost,
    Event::Drained,
    Event::Moved,
    Event::Cleared,
];

/// Front-end (`F` or `-`), active appliance, standby.
fn name(life: Life) -> String {
    let front_end = if life.has_front_end() { "F" } else { "-" };
    format!("{front_end} {:?} {:?}", life.active, life.standby).to_lowercase()
}

/// Every state that can be reached, in the order in which it is.
fn reachable() -> Vec<Life> {
    let mut states = vec![Life::new()];
    let mut next = 0;
    while let Some(&state) = states.get(next) {
        next += 1;
        for event in EVENTS {
            let mut life = state;
            life.handle(event);
            if !states.contains(&life) {
                states.push(life);
            }
        }
    }
    states
}

fn row(state: Life, event: Event) -> Option<String> {
    let mut life = state;
    let effects = life.handle(event);
    let changed = life != state || !effects.is_empty();
    changed.then(|| format!("{} | {event:?} | {} | {effects:?}", name(state), name(life)))
}

/// `table.txt` has every state, every event that means something in it, and what follows. What is not in it changes nothing.
#[test]
fn the_table_is_complete() {
    let table = include_str!("table.txt");
    let mut expected = table.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    for state in reachable() {
        for row in EVENTS.into_iter().filter_map(|event| row(state, event)) {
            assert_eq!(Some(row.as_str()), expected.next());
        }
    }
    assert_eq!(expected.next(), None);
}

/// What holds in every state, whatever has happened.
#[test]
fn states_make_sense() {
    for life in reachable() {
        let Life { front_end, active, standby } = life;
        let connected = front_end == FrontEnd::Connected;
        assert!(standby == Standby::None || active != Active::None, "{life}: a standby stands by for nobody");
        assert!(connected || !matches!(active, Active::Attached | Active::Drained), "{life}: attached to nobody");
        assert!(active != Active::Drained || standby == Standby::Ready, "{life}: drained for nobody");
        let replaceable = matches!(active, Active::Down | Active::Ready);
        assert!(!replaceable || standby != Standby::Ready, "{life}: a standby waits for nothing");
        assert_eq!(
            life.is_settled(),
            matches!(life.activity(), Activity::AwaitFrontEnd | Activity::Serve | Activity::Drain)
        );
    }
}

/// What holds for the effects of every event: appliances and front-ends are neither lost nor made up.
#[test]
fn effects_fit_their_states() {
    for state in reachable() {
        for event in EVENTS {
            let mut life = state;
            let effects = life.handle(event);
            let count = |wanted: &[Effect]| effects.iter().filter(|effect| wanted.contains(effect)).count();
            let people =
                |life: Life| usize::from(life.active != Active::None) + usize::from(life.standby != Standby::None);
            let came = count(&[Effect::Seat(Role::Active), Effect::Seat(Role::Standby)]);
            let went = count(&[Effect::Drop(Role::Active), Effect::Drop(Role::Standby), Effect::Retire]);
            assert_eq!(people(state) + came, people(life) + went, "{state}: {event:?}");
            assert_eq!(
                usize::from(event == Event::ApplianceCame),
                came + count(&[Effect::TurnAway]),
                "{state}: {event:?}"
            );
            assert_eq!(
                state.has_front_end() && !life.has_front_end(),
                effects.contains(&Effect::EndSession),
                "{state}: {event:?}"
            );
            let clears = state.active != Active::Clearing && life.active == Active::Clearing;
            assert_eq!(clears, effects.contains(&Effect::Clear), "{state}: {event:?}");
        }
    }
}
