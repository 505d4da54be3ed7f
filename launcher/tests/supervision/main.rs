//! How `vvu run` watches its children: who dies with whom, in which order, and what is left behind.
//!
//! The children are played by scripts, since only they can be made to die at a wanted moment: [`bridge_role`] speaks the
//! notification protocol as the bridge does, a shell script stands for the appliance VM's QEMU. The questions before the
//! start go to the real QEMU of the set-up (`cargo xtask setup`). Whole machines are tested in the crate `vvu-tests`.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test program; the lint's own exception covers test functions only"
)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;
use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};
use vvu_setup::Setup;

/// Longest wait for a death that must come at once.
const DEATH_LIMIT: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// A file that becomes an executable script.
fn script(path: &Path, text: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).unwrap();
}

/// A process id in an event.
fn pid_of(value: &Value) -> Pid {
    Pid::from_raw(i32::try_from(value.as_i64().unwrap()).unwrap()).unwrap()
}

/// One run of `vvu` with scripted children.
struct Run {
    directory: TempDir,
    process: Child,
    events: std::io::Lines<BufReader<ChildStdout>>,
}

impl Run {
    /// `bridge` is a comma-separated list of what [`bridge_role`] does, `qemu` the body of a shell script.
    fn start(bridge: &str, qemu: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("disk.img"), vec![0; 1 << 20]).unwrap();
        std::fs::create_dir(path("appliance")).unwrap();
        for name in ["vmlinuz", "initrd"] {
            std::fs::write(path("appliance").join(name), "never booted").unwrap();
        }
        let (own, log) = (std::env::current_exe().unwrap(), path("order"));
        let (own, log) = (own.display(), log.display());
        script(
            &path("bridge"),
            &format!(
                "SCRIPT={bridge} ORDER={log} SOCKET=\"$2\" exec {own} --exact bridge_role --ignored --test-threads 1 -q"
            ),
        );
        let real = Setup::load().unwrap().qemu;
        let qemu = format!(
            "case \"$*\" in *-qmp*) exec {} \"$@\";; esac\nORDER={log}\nmkfifo $ORDER.gate\nexec 3<>$ORDER.gate\n{qemu}",
            real.display()
        );
        script(&path("qemu"), &qemu);
        let mut command = Command::new(env!("CARGO_BIN_EXE_vvu"));
        command.args(["run", "blk", "--json"]).env("XDG_RUNTIME_DIR", directory.path()).stdout(Stdio::piped());
        for (option, name) in [
            ("--image", "disk.img"),
            ("--socket", "disk.sock"),
            ("--appliance", "appliance"),
            ("--bridge", "bridge"),
            ("--qemu", "qemu"),
            ("--log-dir", "logs"),
        ] {
            command.arg(option).arg(path(name));
        }
        let mut process = command.spawn().unwrap();
        let events = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { directory, process, events }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Reads events up to the first one of this name.
    fn event(&mut self, name: &str) -> Value {
        loop {
            let line = self.events.next().unwrap_or_else(|| panic!("no event {name}")).unwrap();
            let event: Value = serde_json::from_str(&line).unwrap();
            if event["event"] == name {
                return event;
            }
            assert_ne!(event["event"], "ended", "instead of {name}: {event}");
        }
    }

    /// Waits for the end; returns the last event. Nothing may be left behind.
    fn finish(&mut self, exit_code: i32) -> (Value, String) {
        let ended = self.event("ended");
        assert_eq!(self.process.wait().unwrap().code(), Some(exit_code), "{ended}");
        assert!(!self.path("disk.sock").exists(), "the socket is left behind");
        assert_eq!(std::fs::read_dir(self.path("vvu")).unwrap().count(), 0, "the runtime directory is left behind");
        let order = std::fs::read_to_string(self.path("order")).unwrap_or_default();
        (ended, order.replace('\n', " ").trim().to_owned())
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }
}

/// What a script that stands for QEMU does to run until it is told to end: it reads from a pipe that nobody writes.
const UNTIL_SIGTERM: &str = "trap 'echo qemu >> $ORDER; exit 0' TERM
echo console is up
read line <&3";

/// The same for one that does not listen.
const FOR_EVER: &str = "trap 'echo asked' TERM
echo console is up
while :; do read line <&3; done";

#[test]
fn a_signal_ends_qemu_before_the_bridge() {
    let mut run = Run::start("listen,ready,wait", UNTIL_SIGTERM);
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

#[test]
fn a_dead_appliance_is_reported_and_ends_the_bridge() {
    let mut run = Run::start("listen,ready,wait", "echo '\u{1b}[31mlast words'; exit 3");
    run.event("appliance-log");
    let (ended, order) = run.finish(1);
    assert_eq!(ended["reason"], "appliance-ended");
    assert_eq!(ended["message"], "the appliance VM ended (exit status: 3)");
    assert_eq!(ended["last_lines"][0], "last words");
    assert_eq!(order, "bridge");
}

#[test]
fn a_dead_bridge_takes_the_appliance_with_it() {
    let mut run = Run::start("listen,ready,wait", FOR_EVER);
    let pids = run.event("ready")["pids"].clone();
    run.event("appliance-log");
    kill_process(pid_of(&pids["bridge"]), Signal::KILL).unwrap();
    let (ended, _) = run.finish(1);
    assert_eq!(ended["reason"], "bridge-ended");
    assert_eq!(ended["message"], "the bridge ended (signal: 9 (SIGKILL)), its appliance VM was killed");
    assert!(pidfd_open(pid_of(&pids["qemu"]), PidfdFlags::empty()).is_err(), "the appliance VM outlives its bridge");
}

/// QEMU aborts when its bridge is gone, and its end may be seen first.
#[test]
fn a_killed_bridge_is_named_even_if_the_appliance_is_seen_to_end_first() {
    let mut run = Run::start("listen,ready,wait", "exec sleep 60");
    let pids = run.event("ready")["pids"].clone();
    kill_process(pid_of(&pids["qemu"]), Signal::ABORT).unwrap();
    kill_process(pid_of(&pids["bridge"]), Signal::KILL).unwrap();
    let (ended, _) = run.finish(1);
    assert_eq!(ended["reason"], "bridge-ended", "{ended}");
}

#[test]
fn an_interrupted_start_is_a_failure() {
    let mut run = Run::start("listen,wait", UNTIL_SIGTERM);
    run.event("appliance-log");
    run.signal(Signal::INT);
    let (ended, order) = run.finish(1);
    assert_eq!(ended["message"], "interrupted by SIGINT before the device was ready");
    assert_eq!(order, "qemu bridge");
}

#[test]
fn a_second_signal_does_not_wait_for_children_that_ignore_the_first() {
    let mut run = Run::start("listen,ready,wait", FOR_EVER);
    run.event("ready");
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
    let mut run = Run::start("listen,ready,wait", FOR_EVER);
    let pids = run.event("ready")["pids"].clone();
    let watched: Vec<_> =
        ["bridge", "qemu"].map(|name| pidfd_open(pid_of(&pids[name]), PidfdFlags::empty()).unwrap()).into();
    run.signal(Signal::KILL);
    for pidfd in &watched {
        let mut polled = [PollFd::new(pidfd, PollFlags::IN)];
        assert_eq!(poll(&mut polled, Some(&DEATH_LIMIT)).unwrap(), 1, "a child is still alive");
    }
    run.process.wait().unwrap();
}

/// Not a test: plays the bridge when `vvu` starts this program through a script. `SCRIPT` says what to do.
#[tokio::test]
#[ignore = "plays the bridge for the tests of this file"]
async fn bridge_role() {
    let Ok(steps) = std::env::var("SCRIPT") else { return };
    let notify = UnixDatagram::unbound().unwrap();
    notify.connect(std::env::var_os("NOTIFY_SOCKET").unwrap()).unwrap();
    let mut terminate = signal(SignalKind::terminate()).unwrap();
    let mut listener = None;
    for step in steps.split(',') {
        match step {
            "listen" => {
                listener = Some(UnixListener::bind(std::env::var_os("SOCKET").unwrap()).unwrap());
                notify.send(b"X_VVU_LISTENING=1\nSTATUS=listening").unwrap();
            }
            "ready" => drop(notify.send(b"READY=1").unwrap()),
            "wait" => {
                tokio::time::timeout(Duration::from_secs(60), terminate.recv()).await.unwrap();
                let order = std::env::var_os("ORDER").unwrap();
                let mut file = std::fs::OpenOptions::new().create(true).append(true).open(order).unwrap();
                file.write_all(b"bridge\n").unwrap();
            }
            other => panic!("no step {other}"),
        }
    }
    drop(listener);
}
