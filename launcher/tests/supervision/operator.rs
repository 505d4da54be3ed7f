//! What an operator can do with a run: ask for its state, replace its appliance VM, change the size of its disk.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdout};

use rustix::process::Signal;
use serde_json::Value;

use crate::stage::{FOR_EVER, Run, UNTIL_SIGTERM, Watched, last_reply};

/// A stand-in whose standby dies of itself.
const NO_SECOND: &str = "trap 'exit 0' TERM
case \"$*\" in *qmp-2.sock*) echo 'qemu: no second one' >&2; exit 1;; esac
echo console is up
read line <&3";

/// A QEMU without a machine: the real one, with the disk and the QMP socket that it would have.
const QEMU_WITHOUT_A_MACHINE: &str = "echo console is up
shift 3
number=$#
while [ $number -gt 0 ]; do
  option=$1 value=$2
  shift 2
  number=$((number - 2))
  case \"$option $value\" in
    '-blockdev '*|'-qmp '*) set -- \"$@\" \"$option\" \"$value\";;
  esac
done
exec $REAL -nodefaults -display none -machine none -sandbox on,spawn=deny \"$@\"";

/// An upgrade that is under way, and what it has said so far.
struct Upgrade {
    process: Child,
    replies: std::io::Lines<BufReader<ChildStdout>>,
}

impl Upgrade {
    /// Starts one to the image `other` and waits until the standby runs.
    fn start(run: &mut Run, standby: u32) -> Self {
        let other = run.path("other").display().to_string();
        let mut process = run.operator("upgrade", &["--json", "--appliance", &other]).spawn().unwrap();
        let mut replies = BufReader::new(process.stdout.take().unwrap()).lines();
        let booting: Value = serde_json::from_str(&replies.next().unwrap().unwrap()).unwrap();
        assert_eq!(booting["step"], "booting", "{booting}");
        run.console_is_up(standby);
        Self { process, replies }
    }

    fn finish(mut self, exit_code: i32) -> Value {
        let last = self.replies.map(Result::unwrap).last().unwrap();
        assert_eq!(self.process.wait().unwrap().code(), Some(exit_code), "{last}");
        serde_json::from_str(&last).unwrap()
    }
}

#[test]
fn the_state_is_told_in_text_and_json() {
    let (mut run, pids) = Run::ready(UNTIL_SIGTERM, &[]);
    run.console_is_up(1);
    let mode = std::fs::metadata(run.path("disk.sock.ctl")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let status = run.status();
    assert_eq!((&status["reply"], &status["state"]), (&"status".into(), &"serving".into()));
    assert_eq!(status["pids"], pids);
    assert_eq!(
        (&status["restarts"], &status["last_pause_us"], &status["standby"]),
        (&0.into(), &Value::Null, &Value::Null)
    );
    assert_eq!(status["image"]["size_bytes"], 1 << 20);
    assert_eq!(status["appliance"]["number"], 1);
    let qmp = status["appliance"]["qmp"].as_str().unwrap();
    assert!(qmp.starts_with(status["runtime_dir"].as_str().unwrap()) && qmp.ends_with("qmp-1.sock"), "{qmp}");
    let text = String::from_utf8(run.operator("status", &[]).output().unwrap().stdout).unwrap();
    assert!(text.starts_with("state      serving (listening)\n"), "{text}");
    assert!(text.contains(&format!("number 1, pid {}", pids["qemu"])), "{text}");
    run.signal(Signal::TERM);
    run.finish(0);
    let gone = run.operator("status", &[]).output().unwrap();
    let line = String::from_utf8(gone.stderr).unwrap();
    assert_eq!((gone.status.code(), line.lines().count()), (Some(1), 1));
    assert!(line.contains("no vvu run listens at") && line.contains("--control"), "{line}");
}

/// The console's chardev takes what is written to the FIFO.
#[test]
fn the_console_can_be_written() {
    let echo = "trap 'exit 0' TERM\necho console is up\nread word\necho \"heard $word\"\nread line <&3";
    let (mut run, _) = Run::ready(echo, &[]);
    run.console_is_up(1);
    let console = run.status()["appliance"]["console"].as_str().unwrap().to_owned();
    std::fs::write(console, "this\n").unwrap();
    assert_eq!(run.event("appliance-log")["line"], "heard this");
    run.signal(Signal::TERM);
    run.finish(0);
}

#[test]
fn an_upgrade_replaces_the_appliance_and_reports_the_pause() {
    let (mut run, pids) = Run::ready(UNTIL_SIGTERM, &["--restart-limit", "1/60"]);
    run.console_is_up(1);
    let before = run.holdings();
    let upgrade = Upgrade::start(&mut run, 2);
    let status = run.status();
    assert_eq!((&status["state"], &status["appliance"]["number"]), (&"replacing".into(), &1.into()));
    assert_eq!(status["standby"]["number"], 2);
    assert_ne!(status["standby"]["qmp"], status["appliance"]["qmp"]);
    let second = last_reply(&run.operator("upgrade", &["--json"]).output().unwrap(), 1);
    assert!(second["message"].as_str().unwrap().contains("is under way"), "{second}");
    let old = Watched::open(&pids["qemu"]);
    run.announce("X_VVU_APPLIANCE_ACTIVE=2\nX_VVU_PAUSE_US=1500");
    run.announce("X_VVU_APPLIANCE_LOST=1");
    let replaced = upgrade.finish(0);
    assert_eq!((&replaced["reply"], &replaced["appliance"]), (&"replaced".into(), &2.into()));
    assert_eq!(replaced["pause_us"], 1500);
    assert!(old.has_ended(), "the answer comes when nothing of the old one is left");
    run.await_holdings(&before);
    let status = run.status();
    assert_eq!(
        (&status["state"], &status["restarts"], &status["last_pause_us"]),
        (&"serving".into(), &0.into(), &1500.into())
    );
    assert_eq!(status["appliance_dir"], run.path("other").display().to_string(), "restarts use the new image too");
    Watched::open(&status["pids"]["qemu"]).kill();
    run.console_is_up(3);
    let command_line = run.status()["standby"]["pid"].to_string();
    let command_line = std::fs::read(format!("/proc/{command_line}/cmdline")).unwrap();
    assert!(String::from_utf8_lossy(&command_line).contains("other/vmlinux"));
    run.signal(Signal::TERM);
    let (_, order) = run.finish(0);
    assert_eq!(order, "qemu qemu bridge");
}

#[test]
fn a_restart_uses_the_same_image() {
    let (mut run, _) = Run::ready(UNTIL_SIGTERM, &[]);
    let process = run.operator("restart", &[]).spawn().unwrap();
    run.console_is_up(2);
    run.announce("X_VVU_APPLIANCE_ACTIVE=2\nX_VVU_PAUSE_US=1500");
    let output = process.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.starts_with("appliance 2 is in use after ") && text.ends_with("the driver VM paused 1.5 ms\n"),
        "{text}"
    );
    assert_eq!(run.status()["appliance_dir"], run.path("appliance").display().to_string());
    run.signal(Signal::TERM);
    run.finish(0);
}

#[test]
fn a_standby_that_dies_leaves_everything_as_it_was() {
    let (mut run, pids) = Run::ready(NO_SECOND, &[]);
    run.console_is_up(1);
    let before = run.holdings();
    let output = run.operator("upgrade", &[]).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let last = text.lines().last().unwrap();
    assert_eq!(last, "vvu: the appliance VM was not replaced: the appliance VM ended (exit status: 1)");
    let status = run.status();
    assert_eq!((&status["pids"], &status["state"], &status["restarts"]), (&pids, &"serving".into(), &0.into()));
    run.await_holdings(&before);
    run.signal(Signal::TERM);
    run.finish(0);
}

#[test]
fn a_standby_that_the_bridge_turns_away_is_killed() {
    let (mut run, pids) = Run::ready(FOR_EVER, &[]);
    let upgrade = Upgrade::start(&mut run, 2);
    let standby = Watched::open(&run.status()["standby"]["pid"]);
    run.announce("X_VVU_APPLIANCE_LOST=2");
    let failed = upgrade.finish(1);
    assert!(failed["message"].as_str().unwrap().contains("the bridge gave the appliance VM up"), "{failed}");
    assert!(standby.has_ended());
    assert_eq!(run.status()["pids"], pids);
}

#[test]
fn an_upgrade_that_nobody_waits_for_is_abandoned() {
    let (mut run, pids) = Run::ready(FOR_EVER, &[]);
    run.console_is_up(1);
    let before = run.holdings();
    let mut upgrade = Upgrade::start(&mut run, 2);
    let standby = Watched::open(&run.status()["standby"]["pid"]);
    upgrade.process.kill().unwrap();
    upgrade.process.wait().unwrap();
    standby.await_end();
    // It is gone for the system; the run has noticed when the next upgrade is no longer refused.
    let next = Upgrade::start(&mut run, 3);
    run.announce("X_VVU_APPLIANCE_ACTIVE=3");
    run.announce("X_VVU_APPLIANCE_LOST=1");
    Watched::open(&pids["qemu"]).kill();
    assert_eq!(next.finish(0)["pause_us"], Value::Null);
    run.await_holdings(&before);
}

#[test]
fn the_bridge_dies_during_an_upgrade() {
    let (mut run, pids) = Run::ready(UNTIL_SIGTERM, &[]);
    let upgrade = Upgrade::start(&mut run, 2);
    let both = [&run.status()["standby"]["pid"], &pids["qemu"]].map(Watched::open);
    Watched::open(&pids["bridge"]).kill();
    let failed = upgrade.finish(1);
    assert!(failed["message"].as_str().unwrap().contains("the bridge ended"), "{failed}");
    run.event("restarted");
    assert!(both.iter().all(Watched::has_ended));
    assert_eq!(run.status()["appliance_dir"], run.path("appliance").display().to_string());
    run.signal(Signal::TERM);
    run.finish(0);
}

#[test]
fn what_cannot_be_upgraded_is_refused_in_one_line() {
    let (mut run, _) = Run::ready(UNTIL_SIGTERM, &[]);
    let refusal = run.operator("upgrade", &["--appliance", "/no/image"]).output().unwrap();
    let line = String::from_utf8(refusal.stderr).unwrap();
    assert!(line.starts_with("vvu: appliance image /no/image has no vmlinux") && line.lines().count() == 1, "{line}");
    run.signal(Signal::TERM);
    run.finish(0);
}

#[test]
fn a_broken_peer_of_the_control_socket_does_no_harm() {
    let (mut run, _) = Run::ready(UNTIL_SIGTERM, &[]);
    run.console_is_up(1);
    let before = run.holdings();
    for nonsense in [b"\n".as_slice(), b"\xff\0\n", b"{\"command\":\"stop\"}\n", &[b'{'; 100_000], b"{\"command\":"] {
        let mut peer = UnixStream::connect(run.path("disk.sock.ctl")).unwrap();
        // The run may hang up before all is sent.
        let _ = peer.write_all(nonsense);
        let _ = peer.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = peer.read_to_end(&mut answer);
        assert!(answer.len() < 1000);
    }
    let impatient: Vec<_> = (0..5).map(|_| UnixStream::connect(run.path("disk.sock.ctl")).unwrap()).collect();
    assert_eq!(run.status()["state"], "serving");
    drop(impatient);
    assert_eq!(run.status()["state"], "serving");
    run.await_holdings(&before);
    run.signal(Signal::TERM);
    run.finish(0);
}

#[test]
fn a_disk_changes_its_size_by_qemus_hand() {
    let (mut run, _) = Run::ready(QEMU_WITHOUT_A_MACHINE, &[]);
    run.console_is_up(1);
    let qmp = run.status()["appliance"]["qmp"].as_str().unwrap().to_owned();
    while !std::path::Path::new(&qmp).exists() {
        std::thread::yield_now();
    }
    let len = |run: &Run| std::fs::metadata(run.path("disk.img")).unwrap().len();
    let resized = last_reply(&run.operator("resize", &["4M", "--json"]).output().unwrap(), 0);
    assert_eq!((&resized["old_bytes"], &resized["new_bytes"]), (&(1 << 20).into(), &(4 << 20).into()));
    assert_eq!((len(&run), &run.status()["image"]["size_bytes"]), (4 << 20, &(4 << 20).into()));
    let refusal = run.operator("resize", &["1M"]).output().unwrap();
    let line = String::from_utf8(refusal.stderr).unwrap();
    assert!(line.contains("add --shrink"), "{line}");
    assert_eq!((refusal.status.code(), len(&run)), (Some(1), 4 << 20));
    let output = run.operator("resize", &["1M", "--shrink"]).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "resized from 4M to 1M\n");
    assert_eq!(len(&run), 1 << 20);
    run.signal(Signal::TERM);
    run.finish(0);
}
