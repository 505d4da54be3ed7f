//! What a hostile driver or front-end can do: the ring breaks, the process lives, and a restart of the ring helps.

use std::os::unix::net::UnixStream;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::driver::{
    DATA, Desc, FrontEnd, INDIRECT, INDIRECT_FLAG, NEXT, Queue, REGION_LEN, Req, WRITE, wait_event, wait_until,
};
use crate::process::{ImageFile, Program};

const SIZE: u16 = 16;

/// Address right behind the driver's memory.
const OUTSIDE: u64 = 2 * REGION_LEN;

/// One way to break a ring.
struct Attack {
    name: &'static str,
    /// What the log says of it.
    reason: &'static str,
    descriptors: Vec<Desc>,
    /// Available ring: heads, and how far the index runs ahead of them.
    heads: Vec<u16>,
    index_surplus: u16,
}

fn desc(address: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { address, len, flags, next }
}

fn attack(name: &'static str, reason: &'static str, descriptors: Vec<Desc>) -> Attack {
    Attack { name, reason, descriptors, heads: vec![0], index_surplus: 0 }
}

/// Where the attacks' indirect tables lie: filled by [`prepare`].
const TABLE: u64 = DATA + 0x10_0000;

/// Addresses of a header, data and a status byte.
const HEADER: u64 = DATA;
const PAYLOAD: u64 = DATA + 0x1000;
const STATUS: u64 = DATA + 0x3000;

fn chain_attacks() -> Vec<Attack> {
    let header = |next| desc(HEADER, 16, NEXT, next);
    let status = desc(STATUS, 1, WRITE, 0);
    vec![
        attack("next beyond the table", "outside of a table of 16", vec![header(16)]),
        attack("next far beyond the table", "outside of a table of 16", vec![header(0xffff)]),
        attack("circular chain", "circular or too long", vec![header(1), desc(PAYLOAD, 512, NEXT | WRITE, 1)]),
        attack("chain that points at its head", "circular or too long", vec![header(0)]),
        attack("short header", "header has 16", vec![desc(HEADER, 15, NEXT, 1), status]),
        attack("no header", "header has 16", vec![status]),
        attack("no status", "no device-writable byte", vec![desc(HEADER, 16, 0, 0)]),
        attack("empty descriptor", "zero bytes", vec![header(1), desc(PAYLOAD, 0, NEXT | WRITE, 2), status]),
        attack(
            "readable after writable",
            "after a device-writable",
            vec![header(1), desc(PAYLOAD, 512, NEXT | WRITE, 2), desc(PAYLOAD, 512, NEXT, 3), status],
        ),
        attack("read into readable memory", "wrong direction", vec![header(1), desc(PAYLOAD, 512, NEXT, 2), status]),
        attack(
            "data outside of memory",
            "is not driver memory",
            vec![header(1), desc(OUTSIDE, 512, NEXT | WRITE, 2), status],
        ),
        attack(
            "data that ends outside of memory",
            "is not driver memory",
            vec![header(1), desc(OUTSIDE - 511, 512, NEXT | WRITE, 2), status],
        ),
        attack(
            "data that wraps around",
            "is not driver memory",
            vec![header(1), desc(u64::MAX - 100, 512, NEXT | WRITE, 2), status],
        ),
        attack("header outside of memory", "is not driver memory", vec![desc(OUTSIDE, 16, NEXT, 1), status]),
        attack("status outside of memory", "is not driver memory", vec![header(1), desc(OUTSIDE, 1, WRITE, 0)]),
    ]
}

fn indirect_attacks() -> Vec<Attack> {
    vec![
        attack("nested indirect table", "inside an indirect table", vec![desc(TABLE, 16, INDIRECT_FLAG, 0)]),
        attack("empty indirect table", "table of 0 bytes", vec![desc(TABLE, 0, INDIRECT_FLAG, 0)]),
        attack("ragged indirect table", "table of 24 bytes", vec![desc(TABLE, 24, INDIRECT_FLAG, 0)]),
        attack("huge indirect table", "table of 1048576 bytes", vec![desc(TABLE, 1 << 20, INDIRECT_FLAG, 0)]),
        attack("indirect table outside of memory", "is not driver memory", vec![desc(OUTSIDE, 64, INDIRECT_FLAG, 0)]),
        attack(
            "indirect with successor",
            "with a successor",
            vec![desc(TABLE, 64, INDIRECT_FLAG | NEXT, 1), desc(STATUS, 1, WRITE, 0)],
        ),
        attack("circular indirect table", "circular or too long", vec![desc(TABLE + 0x100, 65520, INDIRECT_FLAG, 0)]),
    ]
}

fn ring_attacks() -> Vec<Attack> {
    let good = vec![desc(HEADER, 16, NEXT, 1), desc(STATUS, 1, WRITE, 0)];
    let one = |name, reason, heads: Vec<u16>, index_surplus| {
        let descriptors = good.clone();
        Attack { name, reason, descriptors, heads, index_surplus }
    };
    vec![
        one("head outside of the ring", "outside of a ring of 16", vec![16], 0),
        one("head far outside of the ring", "outside of a ring of 16", vec![0xffff], 0),
        one("index that jumps", "more than 16 beyond", vec![0], 16),
        one("index that runs backwards", "more than 16 beyond", vec![], 0xffff),
    ]
}

fn prepare(memory: &GuestMemoryMmap<()>) {
    // A header of a READ of sector 0.
    memory.write_slice(&[0; 16], GuestAddress(HEADER)).unwrap();
    memory.write_slice(&desc(TABLE, 16, INDIRECT_FLAG, 0).bytes(), GuestAddress(TABLE)).unwrap();
    let circular = [desc(HEADER, 16, NEXT, 1).bytes(), desc(PAYLOAD, 512, NEXT | WRITE, 1).bytes()].concat();
    memory.write_slice(&circular, GuestAddress(TABLE + 0x100)).unwrap();
}

fn commit(attack: &Attack, queue: &mut Queue, memory: &GuestMemoryMmap<()>) {
    for (index, descriptor) in (0..).zip(&attack.descriptors) {
        queue.put_desc(memory, index, *descriptor);
    }
    for head in &attack.heads {
        queue.offer(memory, *head);
    }
    queue.avail_index = queue.avail_index.wrapping_add(attack.index_surplus);
    queue.publish(memory);
    queue.kick();
}

/// The ring must answer again after GET_VRING_BASE and a new start.
fn assert_restart_helps(queue: &mut Queue, front_end: &mut FrontEnd) {
    queue.stop(front_end);
    queue.clear(&front_end.memory);
    queue.start(front_end, 0);
    queue.run_ok(&front_end.memory, &Req::read(0, DATA, 512));
}

#[test]
fn each_malformed_ring_breaks_alone_and_comes_back() {
    let image = ImageFile::new(1 << 20);
    let mut program = Program::start(&image.path(), &["--queues", "2"]);
    let attacks: Vec<_> = chain_attacks().into_iter().chain(indirect_attacks()).chain(ring_attacks()).collect();
    let count = attacks.len() as u64;
    for attack in attacks {
        // A connection each, so that the limit of log lines per time does not hide a reason: it is the ring that counts.
        let mut front_end = FrontEnd::connect(&program);
        let mut victim = front_end.queue(0, SIZE);
        let mut bystander = front_end.queue(1, SIZE);
        prepare(&front_end.memory);
        commit(&attack, &mut victim, &front_end.memory);
        wait_event(&victim.error, attack.name);
        assert_eq!(victim.used_index(&front_end.memory), 0, "{}: nothing is returned", attack.name);

        // What is offered later is not looked at; another queue does not notice.
        victim.kick();
        bystander.run_ok(&front_end.memory, &Req::read(0, DATA, 512));
        assert_restart_helps(&mut victim, &mut front_end);
        assert!(program.is_alive(), "{}", attack.name);
    }
    assert_eq!(program.counter("broken"), count);
}

#[test]
fn each_malformed_chain_is_named_in_the_log() {
    let image = ImageFile::new(1 << 20);
    for attack in chain_attacks().into_iter().chain(indirect_attacks()).chain(ring_attacks()) {
        let program = Program::start(&image.path(), &[]);
        let mut front_end = FrontEnd::connect(&program);
        let mut queue = front_end.queue(0, SIZE);
        prepare(&front_end.memory);
        commit(&attack, &mut queue, &front_end.memory);
        wait_event(&queue.error, attack.name);
        let line = program.wait_for_line(|line| line.contains("ring is broken"));
        assert!(line.contains(attack.reason), "{}: {line}", attack.name);
    }
}

#[test]
fn indirect_descriptors_need_their_feature() {
    let image = ImageFile::new(1 << 20);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect_with(&program.socket(), |offered| offered & !INDIRECT);
    let mut queue = front_end.queue(0, SIZE);
    queue.put_desc(&front_end.memory, 0, desc(TABLE, 64, INDIRECT_FLAG, 0));
    queue.offer(&front_end.memory, 0);
    queue.publish(&front_end.memory);
    queue.kick();
    wait_event(&queue.error, "err");
    program.wait_for_line(|line| line.contains("feature was not negotiated"));
}

#[test]
fn a_head_in_flight_cannot_be_used_twice() {
    let image = ImageFile::new(64 << 20);
    let mut program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    // One large read, offered twice in one go: it cannot be finished when the second one is looked at.
    let pieces = (0..30).map(|index| (DATA + index * (1 << 20), 1 << 20)).collect();
    queue.offer_request(&front_end.memory, 0, &Req { data: pieces, ..Req::read(0, 0, 0) });
    queue.offer(&front_end.memory, 0);
    queue.publish(&front_end.memory);
    queue.kick();
    wait_event(&queue.error, "err");
    program.wait_for_line(|line| line.contains("while in flight"));
    // The first one is completed all the same.
    assert_eq!(queue.wait_used(&front_end.memory).0, 0);
    assert_eq!(queue.status(&front_end.memory, 0), 0);
    assert_restart_helps(&mut queue, &mut front_end);
    assert!(program.is_alive());
}

#[test]
fn requests_that_are_too_large_are_refused_one_by_one() {
    let image = ImageFile::new(1 << 20);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 128);
    // More bytes than seg_max segments of size_max hold: the same memory several times.
    let too_much = (0..3).map(|_| (DATA, 44 << 20)).collect();
    assert_eq!(queue.run(&front_end.memory, &Req { data: too_much, ..Req::read(0, 0, 0) }).0, 1);
    queue.run_ok(&front_end.memory, &Req::read(0, DATA, 512));
}

#[test]
fn a_ring_that_cannot_be_is_broken_from_its_start() {
    let image = ImageFile::new(1 << 20);
    let mut program = Program::start(&image.path(), &[]);
    // Three is no power of two; and a ring whose end lies outside of memory.
    let mut front_end = FrontEnd::connect(&program);
    let queue = front_end.queue(0, 3);
    wait_event(&queue.error, "err");
    program.wait_for_line(|line| line.contains("power of two"));
    queue.stop(&front_end);
    let mut queue = front_end.queue(0, 16);
    queue.stop(&front_end);
    queue.desc = OUTSIDE - 16;
    queue.start(&mut front_end, 0);
    wait_event(&queue.error, "err");
    queue.stop(&front_end);
    assert!(program.is_alive());
}

#[test]
fn events_that_are_no_eventfds_are_left_alone() {
    let image = ImageFile::new(1 << 20);
    let mut program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 16);
    queue.run_ok(&front_end.memory, &Req::read(0, DATA, 512));
    queue.stop(&front_end);
    // A pipe that nobody empties, a socket, and a file in place of the eventfds.
    let (reader, writer) = std::io::pipe().unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    for (kick, call) in
        [(event(reader), event(writer)), (event(socket), event(std::fs::File::open("/dev/zero").unwrap()))]
    {
        front_end.frontend.set_vring_call(0, &call).unwrap();
        front_end.frontend.set_vring_kick(0, &kick).unwrap();
        front_end.frontend.set_vring_enable(0, true).unwrap();
    }
    program.wait_for_line(|line| line.contains("no eventfd"));
    // Stopped is what the ring still is; with real events it works again.
    front_end.frontend.set_vring_enable(0, false).unwrap();
    queue.clear(&front_end.memory);
    queue.start(&mut front_end, 0);
    queue.run_ok(&front_end.memory, &Req::read(0, DATA, 512));
    assert!(program.is_alive());
}

#[expect(unsafe_code, reason = "an EventFd is the only thing that the vhost crate takes as an event")]
fn event(descriptor: impl Into<std::os::fd::OwnedFd>) -> EventFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: owned by nobody else from here on.
    unsafe { EventFd::from_raw_fd(descriptor.into().into_raw_fd()) }
}

#[test]
fn a_call_event_that_blocks_does_not_block_the_device() {
    let image = ImageFile::new(1 << 20);
    let program = Program::start(&image.path(), &["--queues", "2"]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 16);
    // Blocking and full: the next write to it waits for a reader that never comes.
    let full = EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    front_end.frontend.set_vring_call(0, &full).unwrap();
    for _ in 0..3 {
        queue.offer_request(&front_end.memory, 0, &Req::read(0, DATA, 512));
        queue.publish(&front_end.memory);
        queue.kick();
        wait_until("completion", || queue.take_used(&front_end.memory).is_some());
    }
    // Neither stopping the ring nor ending the connection waits for it.
    assert_eq!(queue.stop(&front_end), 3);
    drop((queue, front_end));
    program.wait_for_line(|line| line.contains("front-end disconnected"));
    let mut front_end = FrontEnd::connect(&program);
    front_end.queue(0, 16).run_ok(&front_end.memory, &Req::read(0, DATA, 512));
}

#[test]
fn memory_that_is_cut_under_the_device_breaks_its_rings_only() {
    let image = ImageFile::new(1 << 20);
    let mut program = Program::start(&image.path(), &["--queues", "2"]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queues = [front_end.queue(0, 16), front_end.queue(1, 16)];
    front_end.fill(DATA, &[5; 4096]);
    queues[0].run_ok(&front_end.memory, &Req::write(0, DATA, 4096));
    // One request is offered with all of its memory, and then there is none.
    queues[0].offer_request(&front_end.memory, 0, &Req::write(0, DATA + 1, 4096));
    queues[0].publish(&front_end.memory);
    front_end.cut_memory(0);
    for queue in &queues {
        queue.kick();
        wait_event(&queue.error, "err");
        queue.stop(&front_end);
    }
    program.wait_for_line(|line| line.contains("taken away"));
    drop((queues, front_end));
    assert!(program.is_alive());
    assert_eq!(image.content()[..4096], [5; 4096], "nothing made up is written");
    let mut front_end = FrontEnd::connect(&program);
    front_end.queue(0, 16).run_ok(&front_end.memory, &Req::read(0, DATA, 512));
}

#[test]
fn data_that_is_cut_under_a_request_is_an_error_and_nothing_made_up_is_written() {
    let image = ImageFile::new(1 << 20);
    std::fs::write(image.path(), vec![5; 1 << 20]).unwrap();
    let mut program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 16);
    // The rings stay; what is to be written in place lies in the region that goes away.
    queue.offer_request(&front_end.memory, 0, &Req::write(0, REGION_LEN + 4096, 4096));
    queue.publish(&front_end.memory);
    front_end.cut_memory(1);
    queue.kick();
    assert_eq!(queue.wait_used(&front_end.memory).0, 0);
    assert_eq!(queue.status(&front_end.memory, 0), 1);
    wait_event(&queue.error, "err");
    assert!(image.content().iter().all(|byte| *byte == 5));
    assert!(program.is_alive());
}

#[test]
fn garbage_on_the_socket_ends_the_connection_only() {
    use std::io::{Read, Write};
    let image = ImageFile::new(1 << 20);
    let mut program = Program::start(&image.path(), &[]);
    let request = |code: u32, flags: u32, size: u32| [code, flags, size].map(u32::to_le_bytes).concat();
    for bytes in [vec![0xff; 4096], request(1, 1, 0xffff_ffff), request(9999, 1, 0), request(8, 1, 8), vec![1]] {
        let mut stream = UnixStream::connect(program.socket()).unwrap();
        stream.write_all(&bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        // The back-end closes; a reset is as good as an end.
        let _closed = stream.read_to_end(&mut Vec::new());
    }
    assert!(program.is_alive());
    let mut front_end = FrontEnd::connect(&program);
    front_end.queue(0, 16).run_ok(&front_end.memory, &Req::read(0, DATA, 512));
}
