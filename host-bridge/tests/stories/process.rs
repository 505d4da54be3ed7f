//! The bridge as a process: command line, sockets, notifications, end.

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::Signal;
use tokio::process::Command;

use crate::scripted::agent::Agent;
use crate::scripted::front_end::FrontEnd;
use crate::scripted::process::Bridge;
use crate::scripted::vmm::Vmm;
use crate::scripted::{Journal, Scene};

/// What QEMU's conventions for back-end programs ask for: JSON on standard output with type and features.
#[tokio::test]
async fn capabilities_are_printed() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vvu-bridge"));
    let output = command.arg("--print-capabilities").output().await.unwrap();
    assert!(output.status.success());
    let printed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed, serde_json::json!({ "type": "block", "features": [] }));
}

/// A mistake of the user is one line, and exit code 1 or, for the command line, 2.
#[tokio::test]
async fn mistakes_are_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s.sock");
    let (path, present) = (path.to_str().unwrap(), directory.path().to_str().unwrap());
    for (arguments, code, expected) in [
        (vec![], 2, "--socket-path"),
        (vec!["--socket-path", path], 2, "--appliance-dir"),
        (vec!["--socket-path", path, "--appliance-dir", present, "--queues", "0"], 2, "--queues"),
        (vec!["--socket-path", path, "--appliance-dir", present, "--window", "4096"], 2, "--window"),
        (vec!["--socket-path", path, "--fd", "3", "--appliance-dir", present], 2, "--fd"),
        (vec!["--socket-path", path, "--appliance-dir", "/nonexistent"], 1, "create the directory of --appliance-dir"),
        (vec!["--fd", "1000000", "--appliance-dir", present], 1, "pass the number of a socket"),
        (vec!["--fd", "2", "--appliance-dir", present], 1, "pass the number of a socket"),
        (vec!["--socket-path", present, "--appliance-dir", present], 1, "choose another path"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_vvu-bridge")).args(&arguments).output().await.unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(expected), "{arguments:?}: \"{text}\" does not say \"{expected}\"");
        assert!(code == 2 || text.lines().count() == 1, "{arguments:?}: {text}");
    }
    assert_eq!(Bridge::files(directory.path()).len(), 0, "a bridge that fails leaves no socket behind");
}

/// SIGTERM ends the bridge in order at any time: exit code 0, and no socket stays behind.
#[tokio::test]
async fn sigterm_ends_it_in_order() {
    for signal in [Signal::TERM, Signal::INT] {
        let bridge = Bridge::start().await;
        assert_eq!(
            Bridge::files(bridge.directory()),
            ["control.sock", "doorbell.sock", "front-end.sock", "notify.sock", "window.sock"]
        );
        ends_in_order(bridge, signal).await;

        let (scene, mut front_end) = Scene::connected().await;
        assert!(Bridge::files(scene.bridge.directory()).contains(&"front-end.sock".into()));
        ends_in_order(scene.bridge, signal).await;
        front_end.sees_end().await;
    }
}

async fn ends_in_order(bridge: Bridge, signal: Signal) {
    bridge.signal(signal);
    let (ended, directory) = bridge.ended_with_directory().await;
    assert_eq!(ended.code, Some(0), "{}", ended.log);
    assert_eq!(Bridge::files(directory.path()), ["notify.sock"]);
}

/// Notifications come in the order of the life cycle: listening, the appliance boots, ready, connected, ready again.
#[tokio::test]
async fn its_parent_is_notified() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("front-end.sock");
    let mut bridge = Bridge::start_with(directory, &["--socket-path".as_ref(), path.as_os_str()]);
    let journal = Journal::default();
    assert_eq!(bridge.notification().await, "X_VVU_LISTENING=1\nSTATUS=waiting for the appliance's VMM\n");
    let vmm = Vmm::connect(bridge.directory(), journal.clone()).await;
    assert_eq!(bridge.notification().await, "STATUS=waiting for the appliance\n");
    let agent = Agent::boot(&vmm).await;
    agent.set_status(vvu_protocol::control::Status::BACK_END_UP).await;
    assert_eq!(bridge.notification().await, "X_VVU_APPLIANCE_ACTIVE=1\n");
    assert_eq!(bridge.notification().await, "READY=1\n");
    assert_eq!(bridge.notification().await, "STATUS=ready for a front-end\n");
    let front_end = FrontEnd::connect(&bridge.front_end_path(), journal);
    assert_eq!(bridge.notification().await, "STATUS=front-end connected\n");
    drop(front_end);
    agent.sees_end().await;
    assert_eq!(bridge.notification().await, "STATUS=waiting for the appliance\n");
    agent.set_status(vvu_protocol::control::Status::BACK_END_UP).await;
    assert_eq!(bridge.notification().await, "STATUS=ready for a front-end\n");
    agent.set_status(vvu_protocol::control::Status::empty()).await;
    assert_eq!(bridge.notification().await, "STATUS=waiting for the appliance\n");
}

/// A socket file that nobody listens at is replaced; one that somebody listens at is not, nor is anything else.
#[tokio::test]
async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["front-end.sock", "control.sock", "window.sock", "doorbell.sock"] {
        drop(UnixListener::bind(directory.path().join(name)).unwrap());
    }
    let path = directory.path().join("front-end.sock");
    let appliance_dir = directory.path().to_owned();
    let arguments = ["--socket-path".as_ref(), path.as_os_str()];
    let mut bridge = Bridge::start_with(directory, &arguments);
    bridge.notified("X_VVU_LISTENING=1").await;

    // The bridge that was there notices nothing of the others: neither while it waits for its appliance, nor later.
    let another = || Bridge::start_with(tempfile::tempdir().unwrap(), &arguments).ended();
    let mut same_appliance = Command::new(env!("CARGO_BIN_EXE_vvu-bridge"));
    let elsewhere = appliance_dir.join("another.sock");
    same_appliance.arg("--socket-path").arg(elsewhere).arg("--appliance-dir").arg(&appliance_dir);
    let same_appliance = Bridge::spawn(tempfile::tempdir().unwrap(), same_appliance).ended();
    for refused in [another().await, same_appliance.await] {
        refused.failed_with("end it or choose another path");
    }
    let mut scene = Scene::around(bridge).await;
    another().await.failed_with("end it or choose another path");
    let front_end = scene.connect_front_end().await;
    assert_eq!(scene.agent.session, 1);
    another().await.failed_with("end it or choose another path");
    scene.end_session(front_end).await;
    scene.proves_alive().await;
    assert_eq!(scene.agent.session, 2);
}

/// `--fd` with a listening socket: any number of front-ends.
#[tokio::test]
async fn it_takes_over_a_listening_socket() {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("front-end.sock")).unwrap();
    let mut bridge = start_with_descriptor(directory, listener.into());
    bridge.notified("X_VVU_LISTENING=1").await;
    let mut scene = Scene::around(bridge).await;
    scene.proves_alive().await;
    scene.proves_alive().await;
    scene.bridge.signal(Signal::TERM);
    let (ended, directory) = scene.bridge.ended_with_directory().await;
    assert_eq!(ended.code, Some(0), "{}", ended.log);
    assert!(Bridge::files(directory.path()).contains(&"front-end.sock".into()), "it is the parent's");
}

/// `--fd` with a connected socket: one front-end, and the end with it.
#[tokio::test]
async fn it_takes_over_a_connected_socket() {
    let (theirs, ours) = UnixStream::pair().unwrap();
    let mut bridge = start_with_descriptor(tempfile::tempdir().unwrap(), theirs.into());
    bridge.notified("X_VVU_LISTENING=1").await;
    let journal = Journal::default();
    let mut front_end = FrontEnd::new(ours, journal.clone());
    let vmm = Vmm::connect(bridge.directory(), journal.clone()).await;
    let agent = Agent::boot(&vmm).await;
    agent.set_status(vvu_protocol::control::Status::BACK_END_UP).await;
    let mut scene = Scene { bridge, vmm, agent, number: 1, journal };
    scene.agent.sees_front_end().await;
    scene.negotiate(&mut front_end).await;
    drop(front_end);
    scene.agent.sees_end().await;
    scene.agent.set_status(vvu_protocol::control::Status::BACK_END_UP).await;
    let ended = scene.bridge.ended().await;
    assert_eq!(ended.code, Some(0), "{}", ended.log);
}

/// `--exit-with-parent`: the bridge ends in order when its parent is killed.
#[tokio::test]
async fn it_ends_with_its_parent() {
    let directory = tempfile::tempdir().unwrap();
    let mut parent = Command::new("/bin/sh");
    parent.args(["-c", "\"$@\" & wait", "sh", env!("CARGO_BIN_EXE_vvu-bridge"), "--exit-with-parent"]);
    parent.arg("--socket-path").arg(directory.path().join("front-end.sock"));
    parent.arg("--appliance-dir").arg(directory.path());
    let mut bridge = Bridge::spawn(directory, parent);
    bridge.notified("X_VVU_LISTENING=1").await;
    // The end of the log, which is awaited too, is the bridge's own.
    bridge.signal(Signal::KILL);
    let (ended, directory) = bridge.ended_with_directory().await;
    assert!(ended.log.contains("ends: SIGTERM"), "{}", ended.log);
    assert_eq!(Bridge::files(directory.path()), ["notify.sock"]);
}

/// A bridge that inherits `descriptor` and takes its front-ends from there.
fn start_with_descriptor(directory: tempfile::TempDir, descriptor: OwnedFd) -> Bridge {
    // Only until the bridge is started: the other tests start programs too, which then inherit it for nothing.
    fcntl_setfd(&descriptor, FdFlags::empty()).unwrap();
    let number = descriptor.as_raw_fd().to_string();
    Bridge::start_with(directory, &["--fd".as_ref(), OsStr::new(&number)])
}
