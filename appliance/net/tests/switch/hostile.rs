//! What a hostile driver or front-end can do: its ring breaks, the process lives, other ports notice nothing, and a restart of
//! the ring helps.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use vhost::VhostBackend;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::driver::{
    ALL, DATA_ONLY, Desc, INDIRECT, INDIRECT_FLAG, MRG_RXBUF, Machine, NEXT, Queue, REGION_LEN, VERSION_1, WRITE,
    wait_event, wait_until,
};
use crate::frames::{NO_OFFLOAD, between};
use crate::program::Program;

/// Address right behind the driver's memory.
const OUTSIDE: u64 = 2 * REGION_LEN;

/// Somewhere in memory.
const HERE: u64 = 0x100_0000;

/// Where an indirect table is.
const TABLE: u64 = 0x180_0000;

fn desc(address: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { address, len, flags, next }
}

/// One way to break a ring: descriptors, those of an indirect table, and heads.
struct Attack {
    reason: &'static str,
    descriptors: Vec<Desc>,
    indirect: Vec<Desc>,
    heads: Vec<u16>,
    index_surplus: u16,
}

fn attack(reason: &'static str, descriptors: Vec<Desc>) -> Attack {
    Attack { reason, descriptors, indirect: Vec::new(), heads: vec![0], index_surplus: 0 }
}

/// Attacks that are the same for every kind of queue; `flags` are those of its buffers.
fn on_any_ring(flags: u16) -> Vec<Attack> {
    let indirect = |len| desc(TABLE, len, INDIRECT_FLAG, 0);
    let with_table = |reason, len, table| Attack { indirect: table, ..attack(reason, vec![indirect(len)]) };
    vec![
        attack("outside of a table", vec![desc(HERE, 500, NEXT | flags, 256)]),
        attack("circular or too long", vec![desc(HERE, 500, NEXT | flags, 0)]),
        attack("zero bytes", vec![desc(HERE, 0, flags, 0)]),
        attack("not driver memory", vec![desc(OUTSIDE, 500, flags, 0)]),
        attack("not driver memory", vec![desc(OUTSIDE - 100, 500, flags, 0)]),
        attack("not driver memory", vec![desc(u64::MAX - 100, 500, flags, 0)]),
        with_table("indirect table of 0", 0, vec![]),
        with_table("indirect table of 17", 17, vec![desc(HERE, 500, flags, 0)]),
        with_table("inside an indirect table", 16, vec![desc(TABLE, 16, INDIRECT_FLAG, 0)]),
        with_table("outside of a table", 32, vec![desc(HERE, 500, NEXT | flags, 2)]),
        Attack { heads: vec![256], ..attack("head 256 is outside", vec![]) },
        Attack { heads: vec![], index_surplus: 257, ..attack("avail index", vec![]) },
    ]
}

fn on_transmit() -> Vec<Attack> {
    let mut attacks = on_any_ring(0);
    attacks.extend([
        attack("less than a header", vec![desc(HERE, 11, 0, 0)]),
        attack("less than a header", vec![desc(HERE, 5, NEXT, 1), desc(HERE, 6, 0, 0)]),
        attack("wrong direction", vec![desc(HERE, 500, WRITE, 0)]),
        attack("wrong direction", vec![desc(HERE, 500, NEXT, 1), desc(HERE, 500, WRITE, 0)]),
        attack("after a device-writable one", vec![desc(HERE, 500, NEXT | WRITE, 1), desc(HERE, 500, 0, 0)]),
    ]);
    attacks
}

fn on_receive() -> Vec<Attack> {
    let mut attacks = on_any_ring(WRITE);
    let small = || vec![desc(HERE, 600, WRITE, 0)];
    attacks.extend([
        attack("less than a header", vec![desc(HERE, 11, WRITE, 0)]),
        attack("wrong direction", vec![desc(HERE, 500, 0, 0)]),
        attack("wrong direction", vec![desc(HERE, 500, NEXT, 1), desc(HERE, 5000, WRITE, 0)]),
        // The frame needs two buffers, and the second is the first.
        Attack { heads: vec![0, 0], ..attack("while in flight", small()) },
    ]);
    attacks
}

fn on_control() -> Vec<Attack> {
    let mut attacks = on_any_ring(0);
    attacks.push(attack("wrong direction", vec![desc(HERE, 100, 0, 0)]));
    attacks
}

fn commit(attack: &Attack, queue: &mut Queue, machine: &Machine) {
    for (index, desc) in attack.descriptors.iter().enumerate() {
        queue.put_desc(&machine.memory, index as u16, *desc);
    }
    for (index, desc) in attack.indirect.iter().enumerate() {
        machine.fill(TABLE + 16 * index as u64, &desc.bytes());
    }
    for head in &attack.heads {
        queue.offer(&machine.memory, *head);
    }
    queue.avail_index = queue.avail_index.wrapping_add(attack.index_surplus);
    queue.publish(&machine.memory);
    queue.kick();
}

#[test]
fn a_malformed_transmit_chain_breaks_its_ring_only() {
    for attack in on_transmit() {
        let mut program = Program::with_ports(3);
        let mut hostile = Machine::connect(&program, 0, DATA_ONLY);
        let (mut rx, mut tx) = hostile.pair(0, 4, 2000);
        let mut others = [1, 2].map(|port| Machine::connect(&program, port, DATA_ONLY));
        let mut pairs: Vec<_> = others.iter_mut().map(|machine| machine.pair(0, 4, 2000)).collect();
        commit(&attack, &mut tx, &hostile);
        wait_event(&tx.error, attack.reason);
        let line = program.wait_for_line(|line| line.contains("ring is broken"));
        assert!(line.contains(attack.reason), "expected '{}': {line}", attack.reason);
        assert_eq!(tx.used_index(&hostile.memory), 0, "nothing is returned");
        // What is offered later is not looked at.
        tx.kick();
        pairs[0].1.send(&others[0], &NO_OFFLOAD, &between(1, 2, 60));
        assert_eq!(pairs[1].0.receive(&others[1]).frame, between(1, 2, 60));
        pairs[0].1.send(&others[0], &NO_OFFLOAD, &between(1, 0, 60));
        assert_eq!(rx.receive(&hostile).frame, between(1, 0, 60));
        // A restart of the ring helps.
        tx.stop(&hostile);
        let mut tx = hostile.queue(1, 256);
        tx.send(&hostile, &NO_OFFLOAD, &between(0, 2, 60));
        assert_eq!(pairs[1].0.receive(&others[1]).frame, between(0, 2, 60));
        assert!(program.is_alive());
    }
}

#[test]
fn a_malformed_receive_chain_breaks_its_ring_only() {
    for attack in on_receive() {
        let mut program = Program::with_ports(2);
        let mut hostile = Machine::connect(&program, 0, DATA_ONLY);
        let (mut rx, mut tx) = hostile.pair(0, 0, 0);
        let mut sender = Machine::connect(&program, 1, DATA_ONLY);
        let (mut sender_rx, mut sender_tx) = sender.pair(0, 4, 2000);
        commit(&attack, &mut rx, &hostile);
        // Nobody looks at a receive ring before there is something for it.
        sender_tx.send(&sender, &NO_OFFLOAD, &between(1, 0, 1000));
        wait_event(&rx.error, attack.reason);
        let line = program.wait_for_line(|line| line.contains("ring is broken"));
        assert!(line.contains(attack.reason), "expected '{}': {line}", attack.reason);
        assert_eq!(rx.used_index(&hostile.memory), 0, "nothing is returned");
        // The sender goes on, and so does the other ring of the port.
        sender_tx.send(&sender, &NO_OFFLOAD, &between(1, 0, 1000));
        tx.send(&hostile, &NO_OFFLOAD, &between(0, 1, 60));
        assert_eq!(sender_rx.receive(&sender).frame, between(0, 1, 60));
        rx.stop(&hostile);
        let mut rx = hostile.queue(0, 256);
        rx.offer_buffer(&hostile.memory, 3, 2000);
        rx.publish(&hostile.memory);
        sender_tx.send(&sender, &NO_OFFLOAD, &between(1, 0, 1000));
        assert_eq!(rx.receive(&hostile).frame, between(1, 0, 1000));
        assert!(program.is_alive());
    }
}

#[test]
fn a_malformed_command_chain_breaks_its_ring_only() {
    for attack in on_control() {
        let mut program = Program::with_ports(1);
        let mut machine = Machine::connect(&program, 0, ALL);
        let mut control = machine.control_queue(2, 256);
        commit(&attack, &mut control, &machine);
        wait_event(&control.error, attack.reason);
        let line = program.wait_for_line(|line| line.contains("ring is broken"));
        assert!(line.contains(attack.reason), "expected '{}': {line}", attack.reason);
        control.stop(&machine);
        let mut control = machine.control_queue(2, 256);
        assert_eq!(control.command(&machine, &[0, 0, 0]), 0);
        assert!(program.is_alive());
    }
}

#[test]
fn indirect_descriptors_need_their_feature() {
    let program = Program::with_ports(1);
    let mut machine = Machine::connect(&program, 0, DATA_ONLY & !INDIRECT);
    let mut tx = machine.queue(1, 16);
    tx.put_desc(&machine.memory, 0, desc(TABLE, 64, INDIRECT_FLAG, 0));
    tx.offer(&machine.memory, 0);
    tx.publish(&machine.memory);
    tx.kick();
    wait_event(&tx.error, "err");
    program.wait_for_line(|line| line.contains("feature was not negotiated"));
}

#[test]
fn a_header_is_as_long_as_the_features_say() {
    // Ten bytes hold the header of a legacy driver, and not that of another.
    for (features, holds) in [(DATA_ONLY & !(VERSION_1 | MRG_RXBUF), true), (DATA_ONLY, false)] {
        let program = Program::with_ports(2);
        let mut machine = Machine::connect(&program, 0, features);
        let mut sender = Machine::connect(&program, 1, DATA_ONLY);
        let (_, mut tx) = sender.pair(0, 0, 0);
        let (mut rx, _) = machine.pair(0, 0, 0);
        let guard = rx.data() + 0x10_0000;
        machine.fill(guard, &[0xaa; 64]);
        rx.put_desc(&machine.memory, 0, desc(guard, 10, WRITE | NEXT, 1));
        rx.put_desc(&machine.memory, 1, desc(guard + 32, if holds { 14 } else { 1 }, WRITE, 0));
        rx.offer(&machine.memory, 0);
        rx.publish(&machine.memory);
        tx.send(&sender, &NO_OFFLOAD, &between(1, 0, 14));
        if holds {
            assert_eq!(rx.wait_used(&machine.memory), (0, 24));
            assert_eq!(machine.bytes(guard + 32, 14), between(1, 0, 14));
        } else {
            wait_event(&rx.error, "err");
        }
        assert_eq!(machine.bytes(guard + 10, 22), [0xaa; 22]);
        assert_eq!(machine.bytes(guard + 46, 18), [0xaa; 18]);
    }
}

#[test]
fn memory_that_is_cut_under_a_port_breaks_its_rings_only() {
    let mut program = Program::with_ports(3);
    let mut machines = [0, 1, 2].map(|port| Machine::connect(&program, port, DATA_ONLY));
    let mut pairs: Vec<_> = machines.iter_mut().map(|machine| machine.pair(0, 8, 2000)).collect();
    // Memory of the sender with everything in it is gone.
    pairs[0].1.offer_packet(&machines[0], 0, &NO_OFFLOAD, &between(0, 1, 1000));
    pairs[0].1.publish(&machines[0].memory);
    machines[0].cut_memory(0);
    pairs[0].1.kick();
    wait_event(&pairs[0].1.error, "err");
    program.wait_for_line(|line| line.contains("taken away"));
    // A receiver that has lost its memory: the sender does not notice.
    for _ in 0..3 {
        pairs[1].1.send(&machines[1], &NO_OFFLOAD, &between(1, 0, 1000));
        pairs[1].1.send(&machines[1], &NO_OFFLOAD, &between(1, 2, 1000));
        assert_eq!(pairs[2].0.receive(&machines[2]).frame, between(1, 2, 1000));
    }
    wait_event(&pairs[0].0.error, "err");
    assert!(program.is_alive());
    assert_eq!((program.counter(1, "broken"), program.counter(2, "broken")), (0, 0));
    // With memory of its own the port works again.
    machines[0].disconnect();
    let mut machine = Machine::connect(&program, 0, DATA_ONLY);
    let (mut rx, _) = machine.pair(0, 8, 2000);
    pairs[1].1.send(&machines[1], &NO_OFFLOAD, &between(1, 0, 1000));
    assert_eq!(rx.receive(&machine).frame, between(1, 0, 1000));
}

#[test]
fn a_driver_that_changes_everything_under_the_device_harms_only_itself() {
    let mut program = Program::with_ports(3);
    let mut machines = [0, 1, 2].map(|port| Machine::connect(&program, port, DATA_ONLY));
    let mut pairs: Vec<_> = machines.iter_mut().map(|machine| machine.pair(0, 32, 4096)).collect();
    let frame = crate::frames::tcp(crate::program::mac(1), crate::program::mac(0), &[5; 3000]);
    let good = crate::frames::header(1, 1000, 34, 16);
    pairs[0].1.offer_packet(&machines[0], 0, &good, &frame);
    let (descriptor, buffer) = (pairs[0].1.desc, pairs[0].1.data() + 1);
    let (memory, end) = (machines[0].memory.clone(), std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)));
    let stop = std::sync::Arc::clone(&end);
    let changer = std::thread::spawn(move || {
        let mut round = 0u64;
        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
            round += 1;
            // Flags, type, size and place of the header; lengths and protocols of the frame; length of the descriptor.
            let bytes = round.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
            let place = [0, 1, 4, 6, 8, 24, 26, 28, 35, 58][(round % 10) as usize];
            let good = memory.read_obj::<u16>(GuestAddress(buffer + place)).unwrap();
            memory.write_slice(&bytes[..2], GuestAddress(buffer + place)).unwrap();
            memory.write_obj(500u32 + u32::from(bytes[3]), GuestAddress(descriptor + 8)).unwrap();
            memory.write_obj(good, GuestAddress(buffer + place)).unwrap();
            memory.write_obj(3066u32, GuestAddress(descriptor + 8)).unwrap();
        }
    });
    for _ in 0..3000 {
        pairs[0].1.offer(&machines[0].memory, 0);
        pairs[0].1.publish(&machines[0].memory);
        pairs[0].1.kick();
        pairs[0].1.wait_used(&machines[0].memory);
        for port in [1, 2] {
            while let Some(received) = pairs[port].0.try_receive(&machines[port]) {
                let header: [u8; 12] = received.header[..].try_into().unwrap();
                let (size, start) =
                    (u16::from_le_bytes([header[4], header[5]]), u16::from_le_bytes([header[6], header[7]]));
                let offset = u16::from_le_bytes([header[8], header[9]]);
                assert!(received.frame.len() <= 3054);
                assert!(usize::from(start) + usize::from(offset) + 2 <= received.frame.len() || header[0] == 0);
                assert!(header[1] == 0 || header[1] == 1 && size > 0 && (start, offset) == (34, 16));
                pairs[port].0.recycle(&machines[port], &received);
            }
        }
    }
    end.store(true, std::sync::atomic::Ordering::Relaxed);
    changer.join().unwrap();
    pairs[1].1.send(&machines[1], &NO_OFFLOAD, &between(1, 2, 60));
    assert_eq!(pairs[2].0.receive(&machines[2]).frame, between(1, 2, 60));
    assert!(program.is_alive());
    assert_eq!(program.counter(0, "broken"), 0);
}

#[test]
fn a_call_event_that_blocks_blocks_nobody() {
    let program = Program::with_ports(3);
    let mut machines = [0, 1, 2].map(|port| Machine::connect(&program, port, DATA_ONLY));
    let mut pairs: Vec<_> = machines.iter_mut().map(|machine| machine.pair(0, 32, 2000)).collect();
    // Blocking and full: the next write to it waits for a reader that never comes.
    let full = EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    machines[0].frontend.set_vring_call(0, &full).unwrap();
    machines[0].frontend.set_vring_call(1, &full).unwrap();
    for _ in 0..10 {
        pairs[1].1.send(&machines[1], &NO_OFFLOAD, &between(1, 0, 1000));
        pairs[1].1.send(&machines[1], &NO_OFFLOAD, &between(1, 2, 1000));
        let received = pairs[2].0.receive(&machines[2]);
        pairs[2].0.recycle(&machines[2], &received);
    }
    let [hostile, ..] = &machines;
    wait_until("delivery", || pairs[0].0.used_index(&hostile.memory) == 10);
    pairs[0].0.stop(hostile);
    pairs[0].1.stop(hostile);
}

#[test]
fn garbage_on_a_socket_ends_the_connection_only() {
    let mut program = Program::with_ports(2);
    let request = |code: u32, flags: u32, size: u32| [code, flags, size].map(u32::to_le_bytes).concat();
    for bytes in [vec![0xff; 4096], request(1, 1, 0xffff_ffff), request(9999, 1, 0), request(8, 1, 8), vec![1]] {
        let mut stream = UnixStream::connect(program.socket(0)).unwrap();
        stream.write_all(&bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        // The back-end closes; a reset is as good as an end.
        let _closed = stream.read_to_end(&mut Vec::new());
    }
    assert!(program.is_alive());
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let mut right = Machine::connect(&program, 1, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let (mut rx, _) = right.pair(0, 4, 2000);
    tx.send(&left, &NO_OFFLOAD, &between(0, 1, 60));
    assert_eq!(rx.receive(&right).frame, between(0, 1, 60));
}
