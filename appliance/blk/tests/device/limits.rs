//! The rate limit as the driver feels it, and the control channel that changes it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::driver::{DATA, FrontEnd, Queue, Req};
use crate::process::{ImageFile, LIMIT, Program, disk_directory};

const MIB: u64 = 1 << 20;

/// Offers `count` reads of `len` bytes.
fn offer_reads(front_end: &FrontEnd, queue: &mut Queue, count: u16, len: u32) {
    for index in 0..count {
        queue.offer_request(&front_end.memory, index * 4, &Req::read(u64::from(index), DATA, len));
    }
    queue.publish(&front_end.memory);
    queue.kick();
}

fn collect(front_end: &FrontEnd, queue: &mut Queue, count: u16) {
    for _ in 0..count {
        let (head, _) = queue.wait_used(&front_end.memory);
        assert_eq!(queue.status(&front_end.memory, head), 0);
    }
}

struct Control(BufReader<UnixStream>);

impl Control {
    fn connect(path: &std::path::Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self(BufReader::new(stream))
    }

    fn ask(&mut self, request: &str) -> serde_json::Value {
        self.0.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

#[test]
fn operations_and_bytes_keep_to_the_limit_of_all_queues() {
    let image = ImageFile::new(16 * MIB);
    for (arguments, len) in [(["--iops", "200"], 512), (["--bandwidth", "819200"], 4096)] {
        let program = Program::start(&image.path(), &[&arguments[..], &["--queues", "2"]].concat());
        let mut front_end = FrontEnd::connect(&program);
        let mut queues = [front_end.queue(0, 1024), front_end.queue(1, 1024)];
        let start = Instant::now();
        for queue in &mut queues {
            offer_reads(&front_end, queue, 120, len);
        }
        for queue in &mut queues {
            collect(&front_end, queue, 120);
        }
        // 240 requests, of which the first 20 are the burst.
        assert!(start.elapsed() >= Duration::from_millis(1050), "{arguments:?}: {:?}", start.elapsed());
        assert!(program.counter("throttled") > 0);
    }
}

#[test]
fn a_ring_that_is_throttled_stops_at_once_and_loses_nothing() {
    let image = ImageFile::new(MIB);
    let program = Program::start(&image.path(), &["--iops", "1"]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    offer_reads(&front_end, &mut queue, 5, 512);
    collect(&front_end, &mut queue, 1);
    // Its debt is a second long.
    let start = Instant::now();
    assert_eq!(queue.stop(&front_end), 1, "the others are in the ring");
    assert!(start.elapsed() < Duration::from_millis(700), "{:?}", start.elapsed());
    queue.start(&mut front_end, 1);
    queue.kick();
    collect(&front_end, &mut queue, 4);
    assert_eq!(program.counter("reads"), 5);
}

#[test]
fn limits_are_changed_and_counters_asked_for_while_the_device_works() {
    let image = ImageFile::new(MIB);
    let directory = disk_directory();
    let path = directory.path().join("control.sock");
    let program = Program::start(&image.path(), &["--bandwidth", "1", "--control", path.to_str().unwrap()]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    // The first leaves a debt that is paid within hours.
    offer_reads(&front_end, &mut queue, 8, 65536);
    collect(&front_end, &mut queue, 1);
    let mut control = Control::connect(&path);
    let answer = control.ask(r#"{"query": {}}"#);
    assert_eq!(answer["return"]["limits"]["bytes_per_second"], 1, "{answer}");
    assert_eq!(answer["return"]["counters"]["total"]["reads"], 1);
    assert_eq!(answer["return"]["capacity_sectors"], 2048);
    let answer = control.ask(r#"{"set-limits": {"port": 1, "operations_per_second": 1, "bytes_per_second": 0}}"#);
    assert!(answer["error"].as_str().unwrap().contains("no port 1"), "{answer}");
    let answer = control.ask(r#"{"set-limits": {"operations_per_second": 1000, "bytes_per_second": 0}}"#);
    assert_eq!(answer["return"]["limits"]["operations_per_second"], 1000, "{answer}");
    collect(&front_end, &mut queue, 7);
}
