//! Runs that end: by a signal, by a death that is not repaired, with `vvu` itself.

use rustix::process::Signal;

use crate::stage::{FOR_EVER, Run, Stage, UNTIL_SIGTERM, Watched};

const NEVER: [&str; 2] = ["--restart", "never"];

#[test]
fn a_signal_ends_qemu_before_the_bridge() {
    let mut run = Stage::set("listen,ready,wait", UNTIL_SIGTERM).start(&[]);
    let ready = run.event("ready");
    assert_eq!(ready["pids"]["vvu"], run.process.id());
    let timings = &ready["timings_ms"];
    let at = |step: &str| timings[step].as_u64().unwrap();
    assert!(at("bridge_listening") <= at("qemu_started") && at("qemu_started") <= at("ready"), "{timings}");
    assert_eq!(ready["vmms"].as_array().unwrap().len(), 4);
    run.event("appliance-log");
    run.signal(Signal::TERM);
    let (ended, order) = run.finish(0);
    assert_eq!((&ended["reason"], &ended["message"]), (&"signal".into(), &"ended by SIGTERM".into()));
    assert_eq!(order, "qemu bridge");
    let log = std::fs::read_to_string(run.path("logs/appliance.log")).unwrap();
    assert!(log.ends_with("] console is up\n"), "{log}");
}

/// Also by default: mostly it is a mistake that a second start would repeat.
#[test]
fn a_death_before_the_device_is_ready_ends_the_run() {
    let mut run = Stage::set("listen,wait", "echo '\u{1b}[31mlast words'; exit 3").start(&[]);
    run.event("appliance-log");
    let (ended, order) = run.finish(1);
    assert_eq!(ended["reason"], "appliance-ended");
    assert_eq!(ended["message"], "the appliance VM ended (exit status: 3)");
    assert_eq!(ended["last_lines"][0], "last words");
    assert_eq!(order, "bridge");
}

#[test]
fn a_dead_appliance_is_reported_and_ends_the_bridge() {
    let (mut run, pids) = Run::ready(FOR_EVER, &NEVER);
    run.console_is_up(1);
    Watched::open(&pids["qemu"]).kill();
    let lost = run.event("appliance-lost");
    assert_eq!((&lost["restart"], &lost["last_lines"][0]), (&false.into(), &"console is up".into()));
    let (ended, order) = run.finish(1);
    assert_eq!(ended["message"], "the appliance VM ended (signal: 9 (SIGKILL))");
    assert_eq!(order, "bridge");
}

#[test]
fn a_dead_bridge_takes_the_appliance_with_it() {
    let (mut run, pids) = Run::ready(FOR_EVER, &NEVER);
    run.event("appliance-log");
    let qemu = Watched::open(&pids["qemu"]);
    Watched::open(&pids["bridge"]).kill();
    let (ended, _) = run.finish(1);
    assert_eq!(ended["reason"], "bridge-ended");
    assert_eq!(ended["message"], "the bridge ended (signal: 9 (SIGKILL)), its appliance VM was killed");
    assert!(qemu.has_ended(), "the appliance VM outlives its bridge");
}

/// QEMU aborts when its bridge is gone, and its end may be seen first.
#[test]
fn a_killed_bridge_is_named_even_if_the_appliance_is_seen_to_end_first() {
    let (mut run, pids) = Run::ready("exec sleep 60", &NEVER);
    let (qemu, bridge) = (Watched::open(&pids["qemu"]), Watched::open(&pids["bridge"]));
    qemu.signal(Signal::ABORT);
    bridge.kill();
    let (ended, _) = run.finish(1);
    assert_eq!(ended["reason"], "bridge-ended", "{ended}");
}

#[test]
fn an_interrupted_start_is_a_failure() {
    let mut run = Stage::set("listen,wait", UNTIL_SIGTERM).start(&[]);
    run.event("appliance-log");
    run.signal(Signal::INT);
    let (ended, order) = run.finish(1);
    assert_eq!(ended["message"], "interrupted by SIGINT before the device was ready");
    assert_eq!(order, "qemu bridge");
}

#[test]
fn a_second_signal_does_not_wait_for_children_that_ignore_the_first() {
    let (mut run, _) = Run::ready(FOR_EVER, &[]);
    run.event("appliance-log");
    run.signal(Signal::TERM);
    assert_eq!(run.event("appliance-log")["line"], "asked");
    run.signal(Signal::TERM);
    let (ended, order) = run.finish(0);
    assert_eq!(ended["message"], "ended by SIGTERM");
    assert_eq!(order, "", "killed, not asked");
}

#[test]
fn children_do_not_outlive_a_killed_vvu() {
    let (mut run, pids) = Run::ready(FOR_EVER, &[]);
    let watched = ["bridge", "qemu"].map(|name| Watched::open(&pids[name]));
    run.signal(Signal::KILL);
    for process in &watched {
        process.await_end();
    }
    run.process.wait().unwrap();
}
