//! Starting, stopping, disconnecting, ending: nothing is in flight when it must not be, and nothing leaks.

use std::os::unix::fs::FileExt;
use std::process::Command;

use rustix::process::Signal;
use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::driver::{DATA, EVENT_IDX, FrontEnd, Queue, Req, is_signalled, noise};
use crate::process::{ImageFile, Program};

const MIB: u64 = 1 << 20;

/// Requests of [`flood`].
const FLOOD: u16 = 32;

/// Bytes of each.
const FLOOD_LEN: u64 = 24 * MIB;

/// Offers so much at once that it takes long: all writes of the same memory, 768 MiB together.
fn flood(front_end: &FrontEnd, queue: &mut Queue) {
    let data: Vec<_> = (0..FLOOD_LEN / MIB).map(|index| (DATA + index * MIB, MIB as u32)).collect();
    for index in 0..FLOOD {
        let request = Req { data: data.clone(), ..Req::write(u64::from(index) * FLOOD_LEN / 512, 0, 0) };
        queue.offer_request(&front_end.memory, index * 26, &request);
    }
    queue.publish(&front_end.memory);
    queue.kick();
}

fn flood_image() -> ImageFile {
    ImageFile::new(u64::from(FLOOD) * FLOOD_LEN)
}

#[test]
fn stopping_a_ring_waits_for_the_requests_in_flight() {
    let image = flood_image();
    let program = Program::start(&image.path(), &[]);
    // Each completion is to be notified.
    let mut front_end = FrontEnd::connect_with(&program.socket(), |offered| offered & !EVENT_IDX);
    for disable_first in [false, true] {
        let mut queue = front_end.queue(0, 1024);
        front_end.fill(DATA, &noise(FLOOD_LEN as usize, 5));
        flood(&front_end, &mut queue);
        // Wait for the first, so that the device has taken them all; the rest is in flight.
        let first = queue.wait_used(&front_end.memory);
        assert_eq!(queue.status(&front_end.memory, first.0), 0);
        let done_before = queue.used_index(&front_end.memory);
        if disable_first {
            front_end.frontend.set_vring_enable(0, false).unwrap();
            let used = queue.used_index(&front_end.memory);
            assert_eq!(used, FLOOD, "SET_VRING_ENABLE 0 was answered with requests in flight");
        }
        let base = queue.stop(&front_end);
        let done_after = queue.used_index(&front_end.memory);
        assert!(done_before < FLOOD, "the requests were too quick to prove anything");
        assert_eq!((base, done_after), (FLOOD, FLOOD), "GET_VRING_BASE was answered with requests in flight");
        assert!(is_signalled(&queue.call, 0), "the last completions are notified before the ring stops");
        // And nothing happens to the memory afterwards.
        front_end.fill(DATA, &[0; 4096]);
    }
    let content = std::fs::File::open(image.path()).unwrap();
    let mut last = vec![0; FLOOD_LEN as usize];
    content.read_exact_at(&mut last, u64::from(FLOOD - 1) * FLOOD_LEN).unwrap();
    assert!(last == noise(FLOOD_LEN as usize, 5));
}

#[test]
fn a_disconnect_with_requests_in_flight_ends_in_order_and_the_next_front_end_is_served() {
    let image = flood_image();
    let mut program = Program::start(&image.path(), &[]);
    for round in 0..3 {
        let mut front_end = FrontEnd::connect(&program);
        let mut queue = front_end.queue(0, 1024);
        flood(&front_end, &mut queue);
        queue.wait_used(&front_end.memory);
        let memory = front_end.memory.clone();
        drop(front_end);
        // The next one connects at once, and is served when the I/O of the former has ended.
        let mut front_end = FrontEnd::connect(&program);
        assert_eq!(queue.used_index(&memory), FLOOD, "a front-end is served while the former one's I/O is in flight");
        let mut queue = front_end.queue(0, 16);
        queue.run_ok(&front_end.memory, &Req::read(0, DATA, 4096));
        assert!(program.is_alive(), "round {round}");
    }
}

#[test]
fn requests_that_were_offered_before_the_start_need_no_kick() {
    let image = ImageFile::new(MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 16);
    queue.run_ok(&front_end.memory, &Req::read(0, DATA, 512));
    // Disabled: offered and kicked, and the kick is lost.
    front_end.frontend.set_vring_enable(0, false).unwrap();
    queue.offer_request(&front_end.memory, 3, &Req::read(0, DATA, 512));
    queue.publish(&front_end.memory);
    assert_eq!(queue.used_index(&front_end.memory), 1);
    front_end.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(queue.wait_used(&front_end.memory).0, 3);
    // The same over a stop and a start at the position that was reached.
    let base = queue.stop(&front_end);
    assert_eq!(base, 2);
    queue.offer_request(&front_end.memory, 6, &Req::read(0, DATA, 512));
    queue.publish(&front_end.memory);
    queue.start(&mut front_end, base);
    assert_eq!(queue.wait_used(&front_end.memory).0, 6);
}

#[test]
fn kick_call_and_memory_may_change_while_the_ring_runs() {
    let image = ImageFile::new(MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 16);
    for round in 0..20 {
        front_end.fill(DATA, &[round; 4096]);
        queue.run_ok(&front_end.memory, &Req::write(u64::from(round) * 8, DATA, 4096));
        match round % 3 {
            0 => {
                queue.call = EventFd::new(EFD_NONBLOCK).unwrap();
                front_end.frontend.set_vring_call(0, &queue.call).unwrap();
            }
            1 => {
                // Blocking ones are as good.
                queue.kick = EventFd::new(0).unwrap();
                front_end.frontend.set_vring_kick(0, &queue.kick).unwrap();
            }
            _ => front_end.announce_memory(),
        }
    }
    for round in 0..20 {
        assert_eq!(image.content()[usize::from(round) * 4096..][..4096], [round; 4096]);
    }
}

#[test]
fn memory_that_goes_away_breaks_the_ring_and_not_the_process() {
    let image = ImageFile::new(MIB);
    let mut program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 16);
    queue.run_ok(&front_end.memory, &Req::read(0, DATA, 512));
    let elsewhere = crate::driver::memfd(MIB);
    let region = vhost::VhostUserMemoryRegionInfo {
        guest_phys_addr: 1 << 40,
        memory_size: MIB,
        userspace_addr: 1 << 45,
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&elsewhere),
    };
    front_end.frontend.set_mem_table(&[region]).unwrap();
    queue.kick();
    crate::driver::wait_event(&queue.error, "err");
    queue.stop(&front_end);
    front_end.announce_memory();
    queue.clear(&front_end.memory);
    queue.start(&mut front_end, 0);
    queue.run_ok(&front_end.memory, &Req::read(0, DATA, 512));
    assert!(program.is_alive());
}

#[test]
fn connections_leave_nothing_behind() {
    let image = ImageFile::new(MIB);
    let program = Program::start(&image.path(), &["--queues", "3"]);
    let mut before = 0;
    for round in 0..12 {
        let mut front_end = FrontEnd::connect(&program);
        let mut queues: Vec<_> = (0..3).map(|index| front_end.queue(index, 64)).collect();
        for queue in &mut queues {
            queue.run_ok(&front_end.memory, &Req::read(0, DATA, 512));
            // A restart within the connection.
            let base = queue.stop(&front_end);
            queue.start(&mut front_end, base);
            queue.run_ok(&front_end.memory, &Req::read(0, DATA, 512));
        }
        // Counted at the same point of each round.
        let now = program.open_descriptors();
        if round == 1 {
            before = now;
        }
        assert!(round < 2 || now == before, "{before} descriptors, then {now} in round {round}");
    }
}

#[test]
fn a_signal_ends_the_program_in_order() {
    for connected in [false, true] {
        let image = ImageFile::new(MIB);
        let mut program = Program::start(&image.path(), &[]);
        let mut held = None;
        if connected {
            let mut front_end = FrontEnd::connect(&program);
            let mut queue = front_end.queue(0, 16);
            queue.run_ok(&front_end.memory, &Req::read(0, DATA, 512));
            held = Some((queue, front_end));
        }
        program.signal(Signal::TERM);
        assert!(program.wait().success());
        assert!(!program.socket().exists(), "the socket is removed");
        drop(held);
    }
}

#[test]
fn a_listening_descriptor_is_served_and_so_is_a_connected_one_once() {
    let image = ImageFile::new(MIB);
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    // The shell hands the descriptors on; python or systemd would do so in the same way.
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" --fd 5 --image \"$1\" 5<&0", env!("CARGO_BIN_EXE_vvu-blk")]).arg(image.path());
    let mut program = spawn_with_stdin(command, listener.into(), directory);
    program.wait_for_line(|line| line.contains("listening"));
    let mut front_end = FrontEnd::connect(&program);
    front_end.queue(0, 16).run_ok(&front_end.memory, &Req::read(0, DATA, 512));
    program.signal(Signal::TERM);
    assert!(program.wait().success());

    let inherit = |socket: std::os::fd::OwnedFd| {
        let mut command = Command::new("sh");
        let script = "exec \"$0\" --fd 5 --image \"$1\" 5<&0";
        command.args(["-c", script, env!("CARGO_BIN_EXE_vvu-blk")]).arg(image.path());
        spawn_with_stdin(command, socket, tempfile::tempdir().unwrap())
    };
    let (theirs, ours) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut program = inherit(theirs.into());
    let frontend = Frontend::from_stream(ours, 64);
    frontend.set_owner().unwrap();
    assert_ne!(frontend.get_features().unwrap(), 0);
    drop(frontend);
    assert!(program.wait().success(), "it ends with its only front-end");

    // A socket that is neither, and one of the wrong kind.
    let alone = rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
    let (datagrams, _peer) = std::os::unix::net::UnixDatagram::pair().unwrap();
    for socket in [alone, datagrams.into()] {
        let mut program = inherit(socket);
        program.wait_for_line(|line| line.contains("neither a listening nor a connected unix socket"));
        assert_eq!(program.wait().code(), Some(1));
    }
}

fn spawn_with_stdin(mut command: Command, stdin: std::os::fd::OwnedFd, directory: tempfile::TempDir) -> Program {
    command.stdin(stdin);
    Program::spawn(command, directory)
}

#[test]
fn mistakes_are_one_line_with_the_remedy() {
    let image = ImageFile::new(MIB);
    let running = Program::start(&image.path(), &[]);
    let socket = running.socket().display().to_string();
    let other = tempfile::tempdir().unwrap();
    let free = other.path().join("socket").display().to_string();
    let image = image.path().display().to_string();
    for (arguments, expected) in [
        (vec!["--socket-path", &socket, "--image", &image], "in use by a running program"),
        (vec!["--socket-path", &free, "--image", &image], "in use by another back-end"),
        (vec!["--socket-path", &free, "--image", "/dev/null"], "neither a regular file nor a block device"),
        (vec!["--socket-path", &free, "--image", "/nowhere"], "cannot find image"),
        (vec!["--fd", "77", "--image", &image], "descriptor 77"),
    ] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_vvu-blk")).args(&arguments).env("RUST_LOG", "off").output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && text.lines().count() == 1 && text.contains(expected),
            "{arguments:?}: {text}"
        );
    }
    let output = Command::new(env!("CARGO_BIN_EXE_vvu-blk")).arg("--print-capabilities").output().unwrap();
    let capabilities: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(capabilities, serde_json::json!({ "type": "block", "features": ["read-only", "blk-file"] }));
}

#[test]
fn the_device_can_be_reset_between_drivers() {
    let image = ImageFile::new(MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    // Firmware, then Linux: each with rings of its own, the indices at zero again.
    for round in 0..3u8 {
        let mut queue = front_end.queue(0, if round == 0 { 16 } else { 128 });
        front_end.fill(DATA, &[round; 512]);
        for _ in 0..5 {
            queue.run_ok(&front_end.memory, &Req::write(u64::from(round), DATA, 512));
        }
        assert_eq!(queue.stop(&front_end), 5);
        front_end.memory.write_obj(0u64, GuestAddress(queue.used)).unwrap();
    }
    assert_eq!(image.content()[..1536], [[0u8; 512], [1; 512], [2; 512]].concat());
}
