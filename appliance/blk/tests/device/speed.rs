//! Figures, not verdicts: run with `cargo test --release -p vvu-blk --test device -- --ignored --nocapture speed`.

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::driver::{DATA, EVENT_IDX, FLUSH, FrontEnd, Req};
use crate::process::{ImageFile, Program, disk_directory};
use crate::qcow2::Qcow2Image;

const IMAGE_LEN: u64 = 1 << 28;

/// What both back-ends have.
const FEATURES: u64 = 1 << 32 | EVENT_IDX | FLUSH;

/// Random 4 KiB requests, `depth` at a time, for one second; returns requests per second.
fn measure(socket: &Path, depth: u16, write: bool) -> u64 {
    let mut front_end = FrontEnd::connect_with(socket, |offered| offered & FEATURES);
    let mut queue = front_end.queue(0, 128);
    let mut state = 1u64;
    let mut offer = |queue: &mut crate::driver::Queue, slot: u16| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let sector = (state >> 33) % (IMAGE_LEN / 4096) * 8;
        let address = DATA + u64::from(slot) * 4096;
        let request = if write { Req::write(sector, address, 4096) } else { Req::read(sector, address, 4096) };
        queue.offer_request(&front_end.memory, slot * 3, &request);
    };
    for slot in 0..depth {
        offer(&mut queue, slot);
    }
    let mut done = 0;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        queue.publish(&front_end.memory);
        queue.kick();
        let mut used = Some(queue.wait_used(&front_end.memory));
        while let Some((head, _)) = used {
            assert_eq!(queue.status(&front_end.memory, head), 0);
            done += 1;
            offer(&mut queue, head / 3);
            used = queue.take_used(&front_end.memory);
        }
    }
    done
}

/// qemu-storage-daemon on the same image, if it is installed; ended with the value.
struct StorageDaemon(Child);

impl StorageDaemon {
    fn start(image: &Path, format: &str, socket: &Path) -> Option<Self> {
        let blockdev = format!("driver=file,node-name=f,filename={},cache.direct=on,aio=io_uring", image.display());
        let format = format!("driver={format},node-name=d,file=f");
        let (path, id) = (socket.display(), "type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix");
        let export = format!("{id},addr.path={path}");
        let mut command = Command::new("qemu-storage-daemon");
        let child = command.args(["--blockdev", &blockdev, "--blockdev", &format, "--export", &export]).spawn().ok()?;
        while !socket.exists() {
            std::thread::yield_now();
        }
        Some(Self(child))
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
#[ignore = "measures; says nothing about right or wrong"]
fn random_requests() {
    for (name, directory) in [("tmpfs", tempfile::tempdir_in("/dev/shm").unwrap()), ("disk", disk_directory())] {
        let image = ImageFile::in_directory(directory, IMAGE_LEN);
        std::fs::write(image.path(), vec![1; IMAGE_LEN as usize]).unwrap();
        for (depth, write) in [(1, false), (32, false), (1, true), (32, true)] {
            let kind = if write { "randwrite" } else { "randread" };
            let ours = {
                let program = Program::start(&image.path(), &[]);
                measure(&program.socket(), depth, write)
            };
            let directory = tempfile::tempdir().unwrap();
            let socket = directory.path().join("socket");
            let theirs =
                StorageDaemon::start(&image.path(), "raw", &socket).map(|_daemon| measure(&socket, depth, write));
            println!("{name}: {kind} 4k depth {depth}: {ours} IOPS, qemu-storage-daemon {theirs:?}");
        }
    }
}

/// First an image where each write finds a new place, then one where all is in its place.
#[test]
#[ignore = "measures; says nothing about right or wrong"]
fn random_requests_of_a_qcow2_image() {
    for allocation in ["preallocation=off", "preallocation=full"] {
        for (depth, write) in [(1, false), (32, false), (1, true), (32, true)] {
            let image = || Qcow2Image::create(IMAGE_LEN, &["-o", allocation]);
            let kind = if write { "randwrite" } else { "randread" };
            let ours = {
                let image = image();
                let program = Program::start(&image.path(), &["--format", "qcow2"]);
                measure(&program.socket(), depth, write)
            };
            let (image, directory) = (image(), tempfile::tempdir().unwrap());
            let socket = directory.path().join("socket");
            let daemon = StorageDaemon::start(&image.path(), "qcow2", &socket);
            let theirs = daemon.map(|_daemon| measure(&socket, depth, write));
            println!("qcow2 {allocation}: {kind} 4k depth {depth}: {ours} IOPS, qemu-storage-daemon {theirs:?}");
        }
    }
}
