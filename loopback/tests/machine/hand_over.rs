//! Who runs while requests do: with the hand-over of doorbells nobody but driver and back-end, else the bridge too.

use std::fs;

use vvu_test_driver::process::Process;

use crate::disk::Disk;
use crate::stage::Stage;

const REQUESTS: usize = 100_000;

/// Context switches of all threads of a process so far, voluntary or not.
fn switches(process: &Process) -> u64 {
    let threads = fs::read_dir(format!("/proc/{}/task", process.id())).unwrap();
    let statuses = threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("status")).unwrap());
    let count = |status: String| -> u64 {
        let lines = status.lines().filter(|line| line.contains("ctxt_switches:"));
        lines.map(|line| line.split_whitespace().next_back().unwrap().parse::<u64>().unwrap()).sum()
    };
    statuses.map(count).sum()
}

/// Switches of bridge and appliance while this many requests are done.
fn switches_during(arguments: &[&str], requests: usize) -> [u64; 2] {
    let stage = Stage::start(arguments, &[]);
    let mut disk = Disk::connect(&stage.socket());
    disk.read_on(1000);
    let count = || [&stage.bridge, &stage.appliance].map(switches);
    let before = count();
    disk.read_on(requests);
    let after = count();
    [after[0] - before[0], after[1] - before[1]]
}

#[test]
fn no_thread_of_bridge_or_appliance_runs_with_hand_over() {
    assert_eq!(switches_during(&["--vectors", "4"], REQUESTS), [0, 0]);
}

/// The same test sees a bridge that does run.
#[test]
fn the_bridge_runs_when_it_relays() {
    let [bridge, appliance] = switches_during(&["--vectors", "4", "--relay"], 1000);
    assert!(bridge > 10, "{bridge} context switches of the bridge");
    assert_eq!(appliance, 0);
}
