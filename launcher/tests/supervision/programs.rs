//! Programs of an overlay: what they are started with, and their channels.

use rustix::process::Signal;
use serde_json::Value;

use crate::stage::{Run, Stage, UNTIL_SIGTERM, Watched, last_reply};

/// A run with a disk and a channel, and the event that tells that it is ready.
fn program() -> (Run, Value) {
    let mut run = Stage::set("listen,ready,wait", UNTIL_SIGTERM).start_class("exec", |stage| {
        std::fs::create_dir(stage.path("overlay")).unwrap();
        std::fs::write(stage.path("overlay/daemon"), "a program").unwrap();
        let (socket, overlay, disk) = (stage.path("disk.sock"), stage.path("overlay"), stage.path("disk.img"));
        let [socket, overlay] = [socket, overlay].map(|path| path.display().to_string());
        let disk = format!("--disk=data={},size=2M", disk.display());
        let options = [
            &["--socket", &socket, "--overlay", &overlay, &disk, "--channel", "qmp", "--"][..],
            &["/daemon", "{socket}", "{disk:data}", "{channel:qmp}"],
        ];
        options.concat().into_iter().map(str::to_owned).collect()
    });
    let ready = run.event("ready");
    run.console_is_up(1);
    (run, ready)
}

/// The command line of a QEMU.
fn command_line(pid: &Value) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

#[test]
fn a_program_boots_with_its_overlay_its_disk_and_its_channel() {
    let (mut run, ready) = program();
    let link = run.path("disk.sock.qmp");
    assert_eq!(ready["channels"][0]["path"], link.display().to_string());
    assert_eq!(std::fs::read_link(&link).unwrap(), run.private("ch0-1.sock"));
    let initrd = std::fs::read(run.private("initrd-1")).unwrap();
    assert!(initrd.starts_with(b"never booted070701"), "the image's archive comes first");
    assert!(initrd.windows(9).any(|bytes| bytes == b"a program"));
    let arguments = command_line(&ready["pids"]["qemu"]);
    for part in [&run.private("initrd-1").display().to_string(), "\"serial\":\"data\"", "\"name\":\"org.vvu.qmp\""] {
        assert!(arguments.contains(part), "{part} is not in {arguments}");
    }
    assert_eq!(std::fs::metadata(run.path("disk.img")).unwrap().len(), 2 << 20);
    let config: Value = serde_json::from_slice(&std::fs::read(run.private("appliance.json")).unwrap()).unwrap();
    assert_eq!(config["back_ends"][0]["device"]["command"][0], "/daemon");
    let refusal = run.operator("limit", &["--iops", "5"]).output().unwrap();
    assert!(String::from_utf8(refusal.stderr).unwrap().contains("the settings of a program are its own"));
    run.signal(Signal::TERM);
    run.finish(0);
}

/// Two programs that write to one disk would not know of each other.
#[test]
fn appliances_with_a_disk_that_is_written_follow_each_other() {
    let (mut run, ready) = program();
    let first = Watched::open(&ready["pids"]["qemu"]);
    let before = run.holdings();
    std::fs::write(run.path("overlay/daemon"), "another program").unwrap();
    let restart = run.operator("restart", &["--json"]).spawn().unwrap();
    run.console_is_up(2);
    assert!(first.has_ended(), "both have the disk open");
    run.announce("X_VVU_APPLIANCE_LOST=1");
    run.announce("X_VVU_APPLIANCE_ACTIVE=2\nX_VVU_PAUSE_US=1500");
    let replaced = last_reply(&restart.wait_with_output().unwrap(), 0);
    assert_eq!((&replaced["appliance"], &replaced["pause_us"]), (&2.into(), &1500.into()));
    assert_eq!(std::fs::read_link(run.path("disk.sock.qmp")).unwrap(), run.private("ch0-2.sock"));
    let initrd = std::fs::read(run.private("initrd-2")).unwrap();
    assert!(initrd.windows(9).any(|bytes| bytes == b"a program"), "a run keeps the overlay that it was started with");
    run.await_holdings(&before);
    run.signal(Signal::TERM);
    let (_, order) = run.finish(0);
    assert_eq!(order, "qemu qemu bridge");
}
