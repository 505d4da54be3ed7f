//! Who may have the image open: one run, its QEMUs, and nobody else unless the operator says so.

use std::process::{Command, Output};

use rustix::process::Signal;
use vvu_setup::Setup;

use crate::stage::{FOR_EVER, Run, UNTIL_SIGTERM, Watched};

/// Reads from the image with one of QEMU's programs, as a reader or as somebody who might write.
fn qemu_io(run: &Run, options: &[&str]) -> Output {
    let mut command = Command::new(Setup::load().unwrap().qemu_io);
    command.args(["-f", "raw", "-c", "read 0 512"]).args(options).arg(run.path("disk.img")).output().unwrap()
}

/// The line with which a second run on the same image ends at once: it has no QEMU, if it comes that far.
fn second(run: &Run, more: &[&str]) -> String {
    let output = run.stage.command(["disk.img", "second.sock", "/bin/false"], more).output().unwrap();
    let line = String::from_utf8(output.stdout).unwrap();
    assert_eq!((output.status.code(), line.lines().count()), (Some(1), 1), "{line}");
    line
}

#[test]
fn a_second_run_is_refused_with_the_remedy() {
    let (mut run, _) = Run::ready(UNTIL_SIGTERM, &[]);
    for access in [&[][..], &["--read-only"]] {
        let refusal = second(&run, access);
        assert!(refusal.contains("by another process; end that one") && refusal.contains("--share-image"), "{refusal}");
    }
    run.signal(Signal::TERM);
    run.finish(0);
}

#[test]
fn qemus_programs_respect_the_lock_as_long_as_an_appliance_lives() {
    let (mut run, pids) = Run::ready(FOR_EVER, &[]);
    let qemu = Watched::open(&pids["qemu"]);
    for options in [&[][..], &["-r"]] {
        let refusal = qemu_io(&run, options);
        let line = String::from_utf8(refusal.stderr).unwrap();
        assert!(!refusal.status.success() && line.contains("lock"), "{line}");
    }
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", qemu.pid.as_raw_nonzero())).unwrap();
    let image = run.path("disk.img");
    let holds = descriptors.flatten().any(|link| std::fs::read_link(link.path()).is_ok_and(|file| file == image));
    assert!(holds, "QEMU does not inherit the lock");
    run.signal(Signal::KILL);
    run.process.wait().unwrap();
    qemu.await_end();
    let free = qemu_io(&run, &[]);
    assert!(free.status.success(), "{}", String::from_utf8_lossy(&free.stderr));
}

#[test]
fn readers_share_an_image_with_each_other_and_with_no_writer() {
    let (mut run, _) = Run::ready(UNTIL_SIGTERM, &["--read-only"]);
    assert!(qemu_io(&run, &["-r"]).status.success(), "another reader is refused");
    assert!(!qemu_io(&run, &[]).status.success(), "a writer is let in");
    assert!(second(&run, &["--read-only"]).contains("does not start"), "another reader is refused");
    assert!(second(&run, &[]).contains("in use by another process"));
    run.signal(Signal::TERM);
    run.finish(0);
}

#[test]
fn a_shared_image_is_not_locked() {
    let (mut run, _) = Run::ready(UNTIL_SIGTERM, &["--share-image"]);
    assert_eq!(run.status()["image"]["shared"], true);
    assert!(qemu_io(&run, &[]).status.success());
    assert!(second(&run, &["--share-image"]).contains("does not start"), "the lock is not what ends it");
    run.signal(Signal::TERM);
    run.finish(0);
}
