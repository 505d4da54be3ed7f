//! Front-ends, back-ends and appliances come and go; the driver sees its data and nothing else.

use vvu_test_driver::process::Process;

use crate::disk::{Action, BLOCK, DEPTH, Disk};
use crate::stage::{DISK_LEN, Stage};

/// Slow enough that of requests of every head some are under way when a program is killed right after they were started.
const SLOW: &[&str] = &["--iops", "40"];

/// Enough of them for every start of a device.
const HAND_OVER: &[&str] = &["--vectors", "16"];

/// As many as the queues: nothing is handed over.
const NO_VECTORS: &[&str] = &[];

const RELAY: &[&str] = &["--relay"];

fn written_and_read(disk: &mut Disk, fill: u8) {
    disk.offer_all(Action::Write, fill);
    disk.all_done();
    disk.offer_all(Action::Read, 0);
    disk.all_done();
}

fn is_on_disk(stage: &Stage, disk: &Disk) {
    let content = disk.content();
    assert!(stage.disk()[..content.len()] == content, "the disk does not hold what was written");
}

#[test]
fn front_ends_come_one_after_the_other() {
    for bridge in [HAND_OVER, NO_VECTORS, RELAY] {
        let stage = Stage::start(bridge, &[]);
        for fill in [1, 100, 200] {
            let mut disk = Disk::connect(&stage.socket());
            written_and_read(&mut disk, fill);
            is_on_disk(&stage, &disk);
            disk.leave();
        }
        // One that leaves without a word, in the middle of it.
        let mut disk = Disk::connect(&stage.socket());
        disk.offer_all(Action::Write, 50);
        drop(disk);
        written_and_read(&mut Disk::connect(&stage.socket()), 7);
    }
}

#[test]
fn a_back_end_that_is_killed_loses_nothing() {
    for bridge in [HAND_OVER, RELAY] {
        let mut stage = Stage::start(bridge, SLOW);
        let mut disk = Disk::connect(&stage.socket());
        disk.offer_all(Action::Write, 30);
        stage.replace_back_end();
        disk.all_done();
        is_on_disk(&stage, &disk);
        written_and_read(&mut disk, 90);
    }
}

#[test]
fn an_appliance_that_is_killed_loses_nothing() {
    for bridge in [HAND_OVER, RELAY] {
        let mut stage = Stage::start(bridge, SLOW);
        let mut disk = Disk::connect(&stage.socket());
        disk.offer_all(Action::Write, 30);
        stage.replace_appliance();
        disk.all_done();
        is_on_disk(&stage, &disk);
    }
}

/// The device moves to a second appliance while it is read; the first one is told to go.
#[test]
fn an_appliance_is_replaced_by_another_one() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk"), vec![0; DISK_LEN]).unwrap();
    // Two that may be written to would not share an image.
    let read_only: &[&str] = &["--read-only"];
    let mut stage = Stage::start_in(directory, HAND_OVER, read_only);
    let mut disk = Disk::connect(&stage.socket());
    disk.read_on(1000);
    let (mut back_end, mut appliance) = stage.start_second(read_only);
    while stage.appliance.count_lines("ends: bridge has closed") == 0 {
        disk.read_on(100);
    }
    assert!(stage.appliance.wait().success(), "the first appliance ends in order");
    stage.back_end.kill();
    disk.read_on(1000);
    assert!([&mut back_end, &mut appliance].into_iter().all(Process::is_alive));
}

/// An appliance goes with its bridge.
#[test]
fn without_its_bridge_an_appliance_ends() {
    let mut stage = Stage::start(HAND_OVER, &[]);
    written_and_read(&mut Disk::connect(&stage.socket()), 3);
    stage.bridge.kill();
    assert!(stage.appliance.wait().success());
}

const _: () = assert!(DEPTH as usize * BLOCK <= DISK_LEN);
