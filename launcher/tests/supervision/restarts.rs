//! Deaths that are repaired, and when that has an end.

use std::os::unix::net::UnixStream;

use rustix::process::Signal;
use serde_json::Value;

use crate::stage::{FOR_EVER, Run, UNTIL_SIGTERM, Watched};

/// Waits until appliance `number` boots and lets the bridge announce it; returns who runs then.
fn recover(run: &mut Run, number: u32) -> Value {
    run.console_is_up(number);
    run.announce(&format!("X_VVU_APPLIANCE_LOST={}", number - 1));
    run.announce(&format!("X_VVU_APPLIANCE_ACTIVE={number}\nX_VVU_PAUSE_US=2500"));
    let restarted = run.event("restarted");
    assert_eq!(restarted["what"], "appliance");
    let active = run.event("active");
    assert_eq!((&active["appliance"], &active["pause_us"]), (&number.into(), &2500.into()));
    restarted["pids"].clone()
}

#[test]
fn a_killed_appliance_is_started_again_until_the_limit() {
    let (mut run, first) = Run::ready(FOR_EVER, &["--restart-limit", "3/3600"]);
    run.console_is_up(1);
    let before = run.holdings();
    let mut pids = first.clone();
    for number in 2..=4 {
        let qemu = Watched::open(&pids["qemu"]);
        qemu.kill();
        let lost = run.event("appliance-lost");
        assert_eq!((&lost["appliance"], &lost["restart"]), (&(number - 1).into(), &true.into()));
        assert_eq!(lost["reason"], "the appliance VM ended (signal: 9 (SIGKILL))");
        assert_eq!(lost["last_lines"][0], "console is up");
        pids = recover(&mut run, number);
        assert!(qemu.has_ended());
        assert_eq!((&pids["bridge"], &pids["vvu"]), (&first["bridge"], &first["vvu"]), "only QEMU is new");
    }
    run.await_holdings(&before);
    let status = run.status();
    assert_eq!((&status["restarts"], &status["appliance"]["number"]), (&3.into(), &4.into()));
    Watched::open(&pids["qemu"]).kill();
    assert_eq!(run.event("appliance-lost")["restart"], false);
    let (ended, order) = run.finish(1);
    assert_eq!(ended["reason"], "appliance-ended");
    let message = ended["message"].as_str().unwrap();
    assert!(message.contains("SIGKILL") && message.contains("after 3 restarts within 3600 s"), "{message}");
    assert_eq!(order, "bridge");
}

#[test]
fn a_panic_of_the_guest_is_told_in_its_own_words() {
    let panic = "trap 'echo Kernel panic - not syncing: crashed; exit 0' USR1\necho console is up\nread line <&3";
    let (mut run, pids) = Run::ready(panic, &[]);
    run.console_is_up(1);
    Watched::open(&pids["qemu"]).signal(Signal::USR1);
    let lost = run.event("appliance-lost");
    assert_eq!(lost["reason"], "the appliance VM ended (exit status: 0): Kernel panic - not syncing: crashed");
    recover(&mut run, 2);
    run.signal(Signal::TERM);
    run.finish(0);
}

#[test]
fn a_killed_bridge_comes_back_with_a_new_appliance() {
    let (mut run, first) = Run::ready(UNTIL_SIGTERM, &[]);
    run.console_is_up(1);
    let before = run.holdings();
    let qemu = Watched::open(&first["qemu"]);
    Watched::open(&first["bridge"]).kill();
    let lost = run.event("bridge-lost");
    assert_eq!(lost["restart"], true);
    assert_eq!(lost["reason"], "the bridge ended (signal: 9 (SIGKILL)), its appliance VM was killed");
    let restarted = run.event("restarted");
    assert_eq!(restarted["what"], "bridge");
    assert!(qemu.has_ended(), "the old appliance VM still maps the driver VM's memory");
    assert!(restarted["pids"]["bridge"] != first["bridge"] && restarted["pids"]["qemu"] != first["qemu"]);
    UnixStream::connect(run.path("disk.sock")).unwrap();
    run.console_is_up(2);
    run.await_holdings(&before);
    run.signal(Signal::TERM);
    let (_, order) = run.finish(0);
    assert_eq!(order, "qemu bridge", "the first pair was killed");
}

/// The bridge drops an appliance that breaks the rules; its QEMU would go on for ever.
#[test]
fn an_appliance_that_the_bridge_has_dropped_is_killed_and_replaced() {
    let (mut run, first) = Run::ready(FOR_EVER, &[]);
    run.console_is_up(1);
    let qemu = Watched::open(&first["qemu"]);
    run.announce("X_VVU_APPLIANCE_LOST=1");
    let lost = run.event("appliance-lost");
    assert_eq!(lost["reason"], "the bridge gave the appliance VM up, which was killed");
    assert!(qemu.has_ended());
    recover(&mut run, 2);
    run.signal(Signal::TERM);
    run.signal(Signal::TERM);
    run.finish(0);
}

#[test]
fn a_device_that_dies_with_every_start_is_tried_at_intervals_and_given_up() {
    let once = "case \"$*\" in *qmp-1.sock*) ;; *) echo gone again; exit 7;; esac\necho console is up\nread line <&3";
    let (mut run, pids) = Run::ready(once, &["--restart-limit", "3/3600"]);
    run.console_is_up(1);
    Watched::open(&pids["qemu"]).kill();
    for number in 1..=3 {
        let lost = run.event("appliance-lost");
        assert_eq!((&lost["appliance"], &lost["restart"]), (&number.into(), &true.into()));
    }
    let (ended, _) = run.finish(1);
    assert!(ended["message"].as_str().unwrap().contains("(exit status: 7); after 3 restarts"), "{ended}");
    assert_eq!(ended["last_lines"][0], "gone again");
}

#[test]
fn a_signal_during_a_restart_ends_the_run_well() {
    let (mut run, pids) = Run::ready(UNTIL_SIGTERM, &[]);
    Watched::open(&pids["qemu"]).kill();
    run.console_is_up(2);
    assert_eq!(run.status()["state"], "restarting");
    run.signal(Signal::TERM);
    let (ended, order) = run.finish(0);
    assert_eq!(ended["message"], "ended by SIGTERM");
    assert_eq!(order, "qemu bridge");
}
