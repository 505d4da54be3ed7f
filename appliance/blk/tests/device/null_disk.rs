//! The disk that keeps nothing, and the CPUs that its queues' threads run on.

use crate::driver::{DATA, FrontEnd, Req};
use crate::process::Program;

#[test]
fn a_null_disk_takes_everything_inside_of_it_and_touches_no_data() {
    let program = Program::start_null(&[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    front_end.fill(DATA, &[7; 4096]);
    let last = (1 << 30) / 512 - 8;
    for request in [Req::write(0, DATA, 4096), Req::read(0, DATA, 4096), Req::read(last, DATA, 4096), Req::flush()] {
        queue.run_ok(&front_end.memory, &request);
    }
    assert_eq!(front_end.bytes(DATA, 4096), [7; 4096]);
    assert_eq!(queue.run(&front_end.memory, &Req::read(last + 1, DATA, 4096)).0, 1, "beyond the end");
}

#[test]
fn queues_run_where_they_are_told_to() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
    let cpu = allowed.split([',', '-']).next().unwrap();
    let program = Program::start_null(&["--cpus", cpu, "--queues", "2"]);
    let mut front_end = FrontEnd::connect(&program);
    for index in 0..2 {
        // A thread goes to its CPU before it serves its queue.
        front_end.queue(index, 64).run_ok(&front_end.memory, &Req::read(0, DATA, 512));
    }
    let tasks = std::fs::read_dir(format!("/proc/{}/task", program.id())).unwrap();
    let statuses = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let queues: Vec<_> = statuses.filter(|status| status.starts_with("Name:\tqueue ")).collect();
    assert_eq!(queues.len(), 2);
    assert!(queues.iter().all(|status| status.contains(&format!("Cpus_allowed_list:\t{cpu}\n"))), "{queues:?}");
}
