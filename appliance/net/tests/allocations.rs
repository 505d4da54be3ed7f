//! No packet allocates anything, once as many as the queues hold have passed.

#![expect(clippy::unwrap_used, reason = "a test that meets the unexpected is to fail right there")]

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vm_memory::{Bytes, GuestAddress};
use vvu_back_end::listener::Endpoint;
use vvu_back_end::polling::PollMode;
use vvu_back_end::rate_limit::Limits;
use vvu_back_end::threads::Threads;
use vvu_net::daemon::{Options, PortOptions, run};
use vvu_net::{MacAddress, PortFilter, PortSettings};
use vvu_test_driver::allocations::{CountingAllocator, allocations_in};
use vvu_test_driver::event::{wait_event, wait_until};
use vvu_test_driver::front_end::{FrontEnd, ORDINARY};
use vvu_test_driver::queue::Queue;
use vvu_test_driver::ring::{Desc, WRITE};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const REGION_LEN: u64 = 16 << 20;
const DEPTH: u16 = 32;
const ROUNDS: u32 = 100;
const DATA: u64 = 0x20_0000;

/// Device feature CTRL_VQ: a front-end that has it would have to serve the control queue.
const CTRL_VQ: u64 = 1 << 17;

/// Header and frame, of 60 bytes, from one port's station to the other's.
fn packet(from: u8, to: u8) -> [u8; 72] {
    let mut packet = [0; 72];
    for (place, station) in [(12, to), (18, from)] {
        for (byte, value) in packet.iter_mut().skip(place).zip([0x52, 0x54, 0, 0, 0, station]) {
            *byte = value;
        }
    }
    packet
}

fn connect(directory: &tempfile::TempDir, port: u8) -> FrontEnd {
    let choose = |offered| offered & ORDINARY & !CTRL_VQ;
    let socket = directory.path().join(port.to_string());
    wait_until("listening", || socket.exists());
    FrontEnd::connect(&socket, choose, VhostUserProtocolFeatures::empty(), REGION_LEN)
}

/// Offers all heads again, each with a buffer of its own.
fn offer(front_end: &FrontEnd, queue: &mut Queue, len: u32, flags: u16) {
    for head in 0..DEPTH {
        let address = DATA + u64::from(head) * 4096;
        queue.put_desc(&front_end.memory, head, Desc { address, len, flags, next: 0 });
        queue.offer(&front_end.memory, head);
    }
    queue.publish(&front_end.memory);
    queue.kick();
}

fn wait_for_all(front_end: &FrontEnd, queue: &mut Queue) {
    for _ in 0..DEPTH {
        queue.wait_used(&front_end.memory);
    }
}

/// Allocations of the program in [`ROUNDS`] rounds of packets from one port to the other, and the front-ends: a program whose
/// front-end leaves says so, which would be counted with the next one's.
fn count(mode: PollMode) -> (u64, [FrontEnd; 2]) {
    let directory = tempfile::tempdir().unwrap();
    let port = |index: u8| PortOptions {
        endpoint: Endpoint::Path(directory.path().join(index.to_string())),
        settings: PortSettings {
            mac: MacAddress([0x52, 0x54, 0, 0, 0, index]),
            pairs: 1,
            link_up: true,
            filter: PortFilter::default(),
            limits: Limits::default(),
        },
    };
    let threads = Threads { poll: mode, ..Threads::default() };
    let options = Options { ports: vec![port(0), port(1)], tap: None, mtu: 1500, control: None, threads };
    // Ends with the test's process.
    std::thread::spawn(move || run(options));
    let (mut left, mut right) = (connect(&directory, 0), connect(&directory, 1));
    let (mut tx, mut rx) = (Queue::new(&left.memory, 1, 64), Queue::new(&right.memory, 0, 64));
    for head in 0..u64::from(DEPTH) {
        left.memory.write_slice(&packet(0, 1), GuestAddress(DATA + head * 4096)).unwrap();
    }
    offer(&right, &mut rx, 2000, WRITE);
    rx.announce(&mut right, 0);
    tx.announce(&mut left, 0);
    // Until the receive queue is in service, packets are dropped.
    wait_until("the first packet", || {
        offer(&left, &mut tx, 72, 0);
        wait_for_all(&left, &mut tx);
        rx.used_index(&right.memory) > 0
    });
    while rx.take_used(&right.memory).is_some() {}
    let allocations = allocations_in(ROUNDS, || {
        // What is left from the time before is offered once more with the rest: buffers are enough in any case.
        offer(&right, &mut rx, 2000, WRITE);
        offer(&left, &mut tx, 72, 0);
        wait_for_all(&left, &mut tx);
        for _ in 0..DEPTH {
            while rx.take_used(&right.memory).is_none() {
                wait_event(&rx.call, "packet");
            }
        }
    });
    (allocations, [left, right])
}

#[test]
fn packets_allocate_nothing() {
    let mut front_ends = Vec::new();
    for mode in [PollMode::Off, PollMode::Auto] {
        let packets = u64::from(ROUNDS) * u64::from(DEPTH);
        let (allocations, both) = count(mode);
        front_ends.push(both);
        assert_eq!(allocations, 0, "in {packets} packets with {mode:?}");
    }
}
