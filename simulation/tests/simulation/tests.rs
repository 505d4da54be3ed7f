//! The tests.

use std::env;
use std::panic::catch_unwind;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vvu_simulation::coverage::Coverage;

use super::log;
use super::schedule::{Action, Played, play};

/// Schedules that are played if nobody says how many, and for how long at the most.
const SCHEDULES: u64 = 100_000;
const TIME: Duration = Duration::from_secs(50);

/// Most actions of a schedule.
const ACTIONS: u64 = 60;

/// One schedule at a time: the descriptors of the process are counted.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    // A test that has failed leaves nothing behind that another one would see.
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The runtime opens some descriptors for good.
fn warm_up() {
    let _ = catch_unwind(|| play(0, 0, &[]));
}

/// Plays a schedule, and fails with all that is known of it.
fn check(seed: u64, actions: u64, script: &[Action]) -> Played {
    let before = descriptors();
    // What fails in the schedule itself ends it; what fails in one of its tasks is seen by it.
    let played = catch_unwind(|| play(seed, actions, script))
        .unwrap_or_else(|_| Played { failure: log::failure(), ..Played::default() });
    if let Some(failure) = &played.failure {
        eprintln!("{}", log::lines().join("\n"));
        eprintln!("schedule {seed}: {failure}\nagain: cargo xtask simulate --seed {seed} --schedules 1");
        panic!("schedule {seed} has failed");
    }
    let after = descriptors();
    assert_eq!(after, before, "schedule {seed}: open descriptors, and before");
    played
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|value| value.parse().expect("a number"))
}

#[test]
fn a_front_end_comes_uses_the_device_and_goes() {
    let _alone = alone();
    warm_up();
    let script = [Action::Connect, Action::Seconds, Action::Moment, Action::Seconds];
    let requests: u64 = (0..20).map(|seed| check(seed, 8, &script).requests).sum();
    assert!(requests > 100, "the drivers have submitted {requests} requests");
}

#[test]
#[cfg(tokio_unstable)]
fn a_seed_says_it_all() {
    let _alone = alone();
    warm_up();
    let told = |seed| {
        play(seed, 40, &[]);
        let mut lines = log::lines();
        // Its name is not by the seed.
        lines.retain(|line| !line.contains("directory="));
        lines
    };
    for seed in [3, 14, 159] {
        assert!(told(seed) == told(seed), "schedule {seed} is not the same twice");
    }
}

#[test]
fn random_schedules() {
    let _alone = alone();
    warm_up();
    let first = number("VVU_SIMULATION_SEED").unwrap_or(1);
    let given = number("VVU_SIMULATION_SCHEDULES");
    let (start, mut count, mut actions, mut requests) = (Instant::now(), 0, 0, 0);
    let mut coverage = Coverage::default();
    while count < given.unwrap_or(SCHEDULES) && (given.is_some() || start.elapsed() < TIME) {
        let seed = first + count;
        if given.is_some() && count % 100 == 99 {
            println!("{} schedules", count + 1);
        }
        let played = check(seed, 5 + seed % ACTIONS, &[]);
        (count, actions, requests) = (count + 1, actions + played.actions, requests + played.requests);
        coverage.add(played.coverage);
    }
    let rate = count as f64 / start.elapsed().as_secs_f64();
    println!("{count} schedules, {rate:.1} each second; {actions} actions, {requests} requests; {coverage}");
    for life in coverage.lives() {
        println!("  {life}");
    }
}
