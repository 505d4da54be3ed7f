//! The command as a user meets it: what it refuses, in which words, and what `vvu check` tells.
//!
//! Needs the set-up (`cargo xtask setup`) for the cases in which a real QEMU is asked.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test program; the lint's own exception covers test functions only"
)]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use vvu_setup::Setup;

/// A directory in which a run would succeed up to the start of the children.
struct Place {
    directory: TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = Self { directory };
        std::fs::write(place.path("disk.img"), vec![0; 1 << 20]).unwrap();
        std::fs::create_dir(place.path("appliance")).unwrap();
        for name in ["vmlinux", "initrd"] {
            std::fs::write(place.path("appliance").join(name), "never booted").unwrap();
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn shown(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// `vvu run blk` with arguments that are all right, except for what `changes` replaces.
    fn run_blk(&self, changes: &[(&str, &str)]) -> Output {
        let mut options = vec![
            ("--image", self.shown("disk.img")),
            ("--socket", self.shown("disk.sock")),
            ("--appliance", self.shown("appliance")),
            ("--bridge", "/bin/false".to_owned()),
            ("--qemu", "/bin/false".to_owned()),
        ];
        for &(name, value) in changes {
            options.retain(|(option, _)| *option != name);
            options.push((name, value.to_owned()));
        }
        let mut command = vvu(self.directory.path());
        command.args(["run", "blk"]);
        for (name, value) in options {
            command.arg(name).args((!value.is_empty()).then_some(value));
        }
        command.output().unwrap()
    }

    /// The one line that a refused run writes.
    fn refusal(&self, changes: &[(&str, &str)]) -> String {
        let output = self.run_blk(changes);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "", "a refusal belongs on standard error");
        assert_eq!(stderr.lines().count(), 1, "more than one line:\n{stderr}");
        stderr.trim_end().to_owned()
    }
}

/// The command with an environment of its own and a runtime directory that cannot collide.
fn vvu(runtime_dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vvu"));
    command.env("XDG_RUNTIME_DIR", runtime_dir).env_remove("VVU_QEMU").env_remove("VVU_APPLIANCE");
    command
}

fn setup() -> Setup {
    Setup::load().unwrap()
}

#[test]
fn each_mistake_with_the_image_has_its_line() {
    let place = Place::new();
    let qcow2 = [b"QFI\xfb".as_slice(), &[0; 508]].concat();
    std::fs::write(place.path("disk.qcow2"), qcow2).unwrap();
    std::fs::write(place.path("empty.img"), "").unwrap();
    std::fs::write(place.path("odd.img"), [0; 513]).unwrap();
    let (missing, directory) = (place.shown("no.img"), place.shown("appliance"));
    let (container, empty, odd) = (place.shown("disk.qcow2"), place.shown("empty.img"), place.shown("odd.img"));
    let cases = [
        (&missing, format!("image {missing} does not exist; create one with: truncate -s 10G {missing}")),
        (&directory, format!("image {directory} is a directory; name the image file inside it")),
        (&empty, format!("image {empty} is empty; give it a size with: truncate -s 10G {empty}")),
        (
            &odd,
            format!("image {odd} has 513 bytes, which is no multiple of 512; round it up with: truncate -s %512 {odd}"),
        ),
        (
            &container,
            format!(
                "image {container} looks like qcow2; add --format qcow2 to serve the disk in it, or --format raw to serve \
                 its bytes as they are"
            ),
        ),
    ];
    for (image, line) in cases {
        assert_eq!(place.refusal(&[("--image", image)]), format!("vvu: {line}"));
    }
    let raw = place.refusal(&[("--image", &container), ("--format", "raw")]);
    assert!(raw.contains("QEMU"), "an explicit format passes the image's check: {raw}");
}

#[test]
fn each_mistake_with_the_socket_has_its_line() {
    let place = Place::new();
    let live = place.shown("live.sock");
    let _listener = UnixListener::bind(&live).unwrap();
    let file = place.shown("disk.img");
    let nowhere = place.path("nowhere").display().to_string();
    let cases = [
        (live.clone(), format!("socket {live} is in use by a live process; end that one or choose another --socket")),
        (file.clone(), format!("socket path {file} exists and is no socket; remove it or choose another --socket")),
        (
            format!("{nowhere}/disk.sock"),
            format!("socket directory {nowhere} does not exist; create it with: mkdir -p {nowhere}"),
        ),
    ];
    for (socket, line) in cases {
        assert_eq!(place.refusal(&[("--socket", &socket)]), format!("vvu: {line}"));
        // The control socket's path is held to the same.
        let line = line.replace("--socket", "--control");
        assert_eq!(place.refusal(&[("--control", &socket)]), format!("vvu: {line}"));
    }
}

#[test]
fn each_missing_part_is_named_with_its_remedy() {
    let place = Place::new();
    let (plain, nothing) = (place.shown("disk.img"), place.shown("nothing"));
    std::fs::set_permissions(&plain, std::fs::Permissions::from_mode(0o600)).unwrap();
    let bridge = "install it beside vvu, or name it with --bridge";
    let qemu = "install QEMU 11 or newer, or name it with --qemu or $VVU_QEMU";
    let cases = [
        ("--bridge", nothing.as_str(), format!("bridge {nothing} does not exist; {bridge}")),
        ("--bridge", plain.as_str(), format!("bridge {plain} may not be executed by this user; {bridge}")),
        ("--qemu", nothing.as_str(), format!("QEMU {nothing} does not exist; {qemu}")),
        (
            "--appliance",
            nothing.as_str(),
            format!(
                "appliance image {nothing} has no vmlinux; build it with: cargo xtask image (it writes \
                 target/appliance) and name it with --appliance or $VVU_APPLIANCE"
            ),
        ),
        (
            "--log-dir",
            plain.as_str(),
            format!("cannot write logs to {plain}; name another --log-dir: File exists (os error 17)"),
        ),
        ("--qemu", "/bin/false", "QEMU /bin/false does not start: it says nothing on standard error".to_owned()),
        (
            "--qemu",
            "/bin/echo",
            "/bin/echo is not QEMU: it does not speak QMP; name QEMU with --qemu or $VVU_QEMU".to_owned(),
        ),
    ];
    for (option, value, line) in cases {
        assert_eq!(place.refusal(&[(option, value)]), format!("vvu: {line}"));
    }
}

#[test]
fn an_old_qemu_is_refused_by_its_version() {
    let place = Place::new();
    let old = setup().qemu_distribution.display().to_string();
    let line = place.refusal(&[("--qemu", &old)]);
    assert!(
        line.starts_with("vvu: QEMU is version ") && line.contains("too old for the appliance VM; install"),
        "{line}"
    );
}

#[test]
fn a_bridge_that_ends_at_once_is_reported() {
    let place = Place::new();
    let qemu = setup().qemu.display().to_string();
    let output = place.run_blk(&[("--qemu", &qemu), ("--accel", "tcg"), ("--json", "")]);
    assert_eq!(output.status.code(), Some(1));
    let events: Vec<Value> = events(&output.stdout);
    assert_eq!((&events[0]["event"], &events[0]["accel"]), (&"starting".into(), &"tcg".into()));
    assert_eq!(events[0]["memory_bytes"], 145 * 1024 * 1024);
    let end = events.last().unwrap();
    assert_eq!((&end["event"], &end["reason"]), (&"ended".into(), &"bridge-ended".into()));
    assert_eq!(end["message"], "the bridge ended (exit status: 1), no appliance VM was started");
    assert!(!Path::new(events[0]["runtime_dir"].as_str().unwrap()).exists(), "the runtime directory is left behind");
}

#[test]
fn a_refusal_is_an_event_with_json() {
    let place = Place::new();
    let output = place.run_blk(&[("--image", "/no/disk.img"), ("--json", "")]);
    let events = events(&output.stdout);
    assert_eq!((events.len(), &events[0]["reason"], &events[0]["exit_code"]), (1, &"refused".into(), &1.into()));
    assert!(events[0]["message"].as_str().unwrap().starts_with("image /no/disk.img does not exist"));
}

#[test]
fn check_names_every_shortcoming_and_its_remedy() {
    let place = Place::new();
    let (qemu, appliance) = (setup().qemu, place.shown("appliance"));
    let mut command = vvu(place.directory.path());
    command.args(["check", "--json", "--bridge", "/no/bridge", "--appliance", &appliance]).arg("--qemu").arg(qemu);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["usable"], false);
    let status = |id: &str| {
        let checks = report["checks"].as_array().unwrap();
        let check = checks.iter().find(|check| check["id"] == id).unwrap_or_else(|| panic!("no check {id}"));
        if check["status"] != "ok" {
            assert!(check["remedy"].is_string(), "{check}");
        }
        check["status"].as_str().unwrap().to_owned()
    };
    for id in
        ["qemu", "qemu-devices", "qemu-exit-with-parent", "qemu-sandbox", "memory", "shared-memory", "runtime-dir"]
    {
        assert_eq!(status(id), "ok", "{id}");
    }
    assert_eq!((status("bridge"), status("appliance")), ("failed".to_owned(), "failed".to_owned()));
    assert_ne!(status("kvm"), "failed", "TCG serves as well");
    assert_ne!(status("disk-io"), "failed");
}

#[test]
fn check_prints_one_line_for_each_check() {
    let place = Place::new();
    let output = vvu(place.directory.path()).args(["check", "--qemu", "/bin/false"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("failed   qemu                   QEMU /bin/false does not start"), "{text}");
    assert!(text.ends_with("This host cannot serve devices yet.\n"), "{text}");
    assert!(text.lines().count() >= 6, "{text}");
}

#[test]
fn arguments_that_do_not_parse_exit_with_two() {
    let place = Place::new();
    for change in
        [("--window", "3"), ("--queues", "65"), ("--memory", "lots"), ("--serial", "too long for a serial number")]
    {
        assert_eq!(place.run_blk(&[change]).status.code(), Some(2), "{change:?}");
    }
}

fn events(stdout: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}
