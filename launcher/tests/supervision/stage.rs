//! The stage on which `vvu run` is watched: a directory of its own, stand-ins for its children, and the test in the role of
//! the bridge's voice.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;
use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};
use vvu_setup::Setup;

/// Longest wait for a death that must come at once.
const DEATH_LIMIT: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// Longest time for a run to let go of what it no longer needs.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

/// What a script that stands for QEMU does to run until it is told to end: it reads from a pipe that nobody writes.
pub(crate) const UNTIL_SIGTERM: &str = "trap 'echo qemu >> $ORDER; exit 0' TERM
echo console is up
read line <&3";

/// The same for one that does not listen.
pub(crate) const FOR_EVER: &str = "trap 'echo asked' TERM
echo console is up
while :; do read line <&3; done";

/// A file that becomes an executable script.
fn script(path: &Path, text: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).unwrap();
}

/// A process that can be watched whatever becomes of its number.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) pid: Pid,
    pidfd: std::os::fd::OwnedFd,
}

impl Watched {
    /// The process whose id an event or answer has.
    pub(crate) fn open(value: &Value) -> Self {
        let pid = Pid::from_raw(i32::try_from(value.as_i64().unwrap()).unwrap()).unwrap();
        Self { pid, pidfd: pidfd_open(pid, PidfdFlags::empty()).unwrap() }
    }

    pub(crate) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).unwrap();
    }

    pub(crate) fn has_ended(&self) -> bool {
        let mut polled = [PollFd::new(&self.pidfd, PollFlags::IN)];
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    pub(crate) fn await_end(&self) {
        let mut polled = [PollFd::new(&self.pidfd, PollFlags::IN)];
        assert_eq!(poll(&mut polled, Some(&DEATH_LIMIT)).unwrap(), 1, "process {:?} still lives", self.pid);
    }
}

/// What a run is started with.
pub(crate) struct Stage {
    directory: TempDir,
}

impl Stage {
    /// `bridge` is a comma-separated list of what [`bridge_role`] does, `qemu` the body of a shell script.
    pub(crate) fn set(bridge: &str, qemu: &str) -> Self {
        let stage = Self { directory: tempfile::tempdir().unwrap() };
        let path = |name: &str| stage.path(name);
        std::fs::write(path("disk.img"), vec![0; 1 << 20]).unwrap();
        for image in ["appliance", "other"] {
            std::fs::create_dir(path(image)).unwrap();
            for name in ["vmlinux", "initrd"] {
                std::fs::write(path(image).join(name), "never booted").unwrap();
            }
        }
        let (own, log) = (std::env::current_exe().unwrap(), path("order"));
        let (own, log) = (own.display(), log.display());
        let role = "stage::bridge_role --ignored --test-threads 1 -q";
        script(&path("bridge"), &format!("SCRIPT={bridge} ORDER={log} SOCKET=\"$2\" exec {own} --exact {role}"));
        let real = Setup::load().unwrap().qemu;
        let real = real.display();
        let qemu = format!(
            "case \"$*\" in *'-qmp stdio'*) exec {real} \"$@\";; esac\nREAL={real}\nORDER={log}\n\
             [ -p $ORDER.gate ] || mkfifo $ORDER.gate\nexec 3<>$ORDER.gate\n{qemu}"
        );
        script(&path("qemu"), &qemu);
        stage
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `vvu` in the surroundings of this stage.
    pub(crate) fn vvu(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vvu"));
        command.env("XDG_RUNTIME_DIR", self.directory.path()).env_remove("VVU_APPLIANCE");
        command
    }

    /// `vvu run blk` with the image, the socket and the QEMU of these names.
    pub(crate) fn command(&self, [image, socket, qemu]: [&str; 3], more: &[&str]) -> Command {
        let mut command = self.class("blk", qemu);
        command.arg("--image").arg(self.path(image)).arg("--socket").arg(self.path(socket)).args(more);
        command
    }

    fn class(&self, class: &str, qemu: &str) -> Command {
        let mut command = self.vvu();
        command.args(["run", class, "--json"]).stdout(Stdio::piped());
        for (option, name) in
            [("--appliance", "appliance"), ("--bridge", "bridge"), ("--qemu", qemu), ("--log-dir", "logs")]
        {
            command.arg(option).arg(self.path(name));
        }
        command
    }

    /// Starts a run; `more` are further options.
    pub(crate) fn start(self, more: &[&str]) -> Run {
        let process = self.command(["disk.img", "disk.sock", "qemu"], more).spawn().unwrap();
        Run::of(self, process)
    }

    /// Starts a run of another class with the options that `options` makes of this stage's paths.
    pub(crate) fn start_class(self, class: &str, options: impl FnOnce(&Self) -> Vec<String>) -> Run {
        let mut command = self.class(class, "qemu");
        let process = command.args(options(&self)).spawn().unwrap();
        Run::of(self, process)
    }
}

/// One run of `vvu` with stand-ins for its children.
pub(crate) struct Run {
    pub(crate) stage: Stage,
    pub(crate) process: Child,
    events: std::io::Lines<BufReader<ChildStdout>>,
    runtime_dir: PathBuf,
}

impl Run {
    fn of(stage: Stage, mut process: Child) -> Self {
        let events = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut run = Self { stage, process, events, runtime_dir: PathBuf::new() };
        run.runtime_dir = run.event("starting")["runtime_dir"].as_str().unwrap().into();
        run
    }

    /// Stand-ins that work until they are told to end, and a device that is ready.
    pub(crate) fn ready(qemu: &str, more: &[&str]) -> (Self, Value) {
        let mut run = Stage::set("listen,ready,wait", qemu).start(more);
        let ready = run.event("ready");
        (run, ready["pids"].clone())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.stage.path(name)
    }

    /// Reads events up to the first one of this name.
    pub(crate) fn event(&mut self, name: &str) -> Value {
        self.event_where(name, |_| true)
    }

    /// Reads events up to the first one of this name that fulfils a condition.
    pub(crate) fn event_where(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            let line = self.events.next().unwrap_or_else(|| panic!("no event {name}")).unwrap();
            let event: Value = serde_json::from_str(&line).unwrap();
            if event["event"] == name && wanted(&event) {
                return event;
            }
            assert_ne!(event["event"], "ended", "instead of {name}: {event}");
        }
    }

    /// Waits until the stand-in for this appliance's QEMU runs.
    pub(crate) fn console_is_up(&mut self, appliance: u32) {
        self.event_where("appliance-log", |event| event["appliance"] == appliance && event["line"] == "console is up");
    }

    /// Announces something, as the bridge of the first port does.
    pub(crate) fn announce(&self, text: &str) {
        self.announce_at(0, text);
    }

    /// Announces something, as the bridge of a port does.
    pub(crate) fn announce_at(&self, port: usize, text: &str) {
        let notify = UnixDatagram::unbound().unwrap();
        notify.send_to(text.as_bytes(), self.runtime_dir.join(format!("port-{port}/notify.sock"))).unwrap();
    }

    /// A file in the private directory of the run.
    pub(crate) fn private(&self, name: &str) -> PathBuf {
        self.runtime_dir.join(name)
    }

    /// Waits for the end; returns the last event and in which order the children ended. Nothing may be left behind.
    pub(crate) fn finish(&mut self, exit_code: i32) -> (Value, String) {
        let ended = self.event("ended");
        assert_eq!(self.process.wait().unwrap().code(), Some(exit_code), "{ended}");
        for entry in std::fs::read_dir(self.path("")).unwrap().flatten() {
            let name = entry.file_name().display().to_string();
            assert!(!name.contains(".sock"), "{name} is left behind");
        }
        assert_eq!(std::fs::read_dir(self.path("vvu")).unwrap().count(), 0, "the runtime directory is left behind");
        let order = std::fs::read_to_string(self.path("order")).unwrap_or_default();
        (ended, order.replace('\n', " ").trim().to_owned())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    /// What the run holds: its open files by kind, its children, the files in its runtime directory (but for the numbers
    /// of appliance VMs in their names).
    pub(crate) fn holdings(&self) -> (Vec<String>, usize, Vec<String>) {
        let process = PathBuf::from(format!("/proc/{0}/task/{0}", self.process.id()));
        let links = std::fs::read_dir(process.join("fd")).unwrap().flatten();
        let kind = |link: PathBuf| link.display().to_string().split(':').next().unwrap_or_default().to_owned();
        let mut files: Vec<_> = links.filter_map(|link| std::fs::read_link(link.path()).ok()).map(kind).collect();
        files.sort();
        let children = std::fs::read_to_string(process.join("children")).unwrap().split_whitespace().count();
        let names = std::fs::read_dir(&self.runtime_dir).unwrap().flatten();
        let plain = |name: String| name.chars().filter(|character| !character.is_ascii_digit()).collect::<String>();
        let mut names: Vec<_> = names.map(|entry| plain(entry.file_name().display().to_string())).collect();
        names.sort();
        (files, children, names)
    }

    /// Waits until the run holds just this; peers of the control socket are let go a moment after they have gone.
    pub(crate) fn await_holdings(&self, expected: &(Vec<String>, usize, Vec<String>)) {
        let start = Instant::now();
        while self.holdings() != *expected {
            assert!(start.elapsed() < SETTLE_LIMIT, "now {:?}, before {expected:?}", self.holdings());
            std::thread::yield_now();
        }
    }

    /// A command about this run: `verb`, the socket, `more`.
    pub(crate) fn operator(&self, verb: &str, more: &[&str]) -> Command {
        let mut command = self.stage.vvu();
        command.arg(verb).arg(self.path("disk.sock")).args(more);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// The answer to `vvu status --json`.
    pub(crate) fn status(&self) -> Value {
        last_reply(&self.operator("status", &["--json"]).output().unwrap(), 0)
    }
}

/// The last object that a command of the operator has printed.
pub(crate) fn last_reply(output: &Output, exit_code: i32) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(exit_code), "{text}{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

/// Not a test: plays the bridge when `vvu` starts this program through a script. `SCRIPT` says what to do.
#[tokio::test]
#[ignore = "plays the bridge for the tests of this program"]
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
            "ready" => drop(notify.send(b"X_VVU_APPLIANCE_ACTIVE=1\nREADY=1").unwrap()),
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
