//! Several queue pairs, and the control queue.

use crate::driver::{ALL, CTRL_VQ, DATA_ONLY, GUEST_CSUM, MQ, Machine, Queue};
use crate::frames::{BROADCAST, NO_OFFLOAD, between, header, is_right, plain, tagged, udp};
use crate::program::{Program, mac};

#[test]
fn connections_are_spread_over_the_queues_in_service() {
    let program = Program::start(&["queues=2", "queues=4"], &[]);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let mut right = Machine::connect(&program, 1, DATA_ONLY);
    let (_, mut tx) = left.pair(1, 0, 0);
    // As QEMU does it: three of four pairs are enabled, and no control queue is seen.
    let mut pairs: Vec<_> = (0..3).map(|pair| right.pair(pair, 32, 2000)).collect();
    let mut hits = [0; 3];
    for port in 0..60 {
        let frame = udp(mac(1), mac(0), port, &[1]);
        let mut chosen = Vec::new();
        for _ in 0..2 {
            tx.send(&left, &header(0, 0, 34, 6), &frame);
            let received: Vec<_> = pairs.iter_mut().map(|(rx, _)| rx.try_receive(&right)).collect();
            let queue = received.iter().position(Option::is_some).unwrap();
            assert_eq!(received.iter().flatten().count(), 1);
            pairs[queue].0.recycle(&right, received[queue].as_ref().unwrap());
            chosen.push(queue);
        }
        assert_eq!(chosen[0], chosen[1], "a connection stays with its queue");
        hits[chosen[0]] += 1;
    }
    assert!(hits.iter().all(|hits| *hits > 5), "{hits:?}");
}

#[test]
fn queues_without_buffers_are_left_alone_until_they_have_some() {
    let program = Program::start(&["", "queues=4"], &[]);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let mut right = Machine::connect(&program, 1, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let mut queues: Vec<_> = (0..4).map(|pair| right.pair(pair, if pair < 2 { 32 } else { 0 }, 2000).0).collect();
    let mut used = |right: &Machine, queues: &mut Vec<Queue>| {
        let mut hits = [0; 4];
        for port in 0..60 {
            tx.send(&left, &header(0, 0, 34, 6), &udp(mac(1), mac(0), port, &[1]));
            for (hits, queue) in hits.iter_mut().zip(queues.iter_mut()) {
                if let Some(received) = queue.try_receive(right) {
                    queue.recycle(right, &received);
                    *hits += 1;
                }
            }
        }
        assert_eq!(hits.iter().sum::<u32>(), 60);
        hits.map(|hits| hits > 0)
    };
    assert_eq!(used(&right, &mut queues), [true, true, false, false]);
    // Rings have to be found again when memory is another.
    right.announce_memory();
    for (pair, expected) in [(3, [true, true, false, true]), (2, [true; 4])] {
        for head in 0..32 {
            queues[pair].offer_buffer(&right.memory, head, 2000);
        }
        queues[pair].publish(&right.memory);
        queues[pair].kick();
        crate::driver::wait_until("use of a queue", || used(&right, &mut queues) == expected);
    }
    // They are left out while they are stopped, and stay known.
    let base = queues[3].stop(&right);
    assert_eq!(used(&right, &mut queues), [true, true, true, false]);
    queues[3].start(&mut right, base);
    crate::driver::wait_until("use of a queue", || used(&right, &mut queues) == [true; 4]);
}

/// A machine with all queues of a port of four pairs, and its control queue.
fn with_control(program: &Program, port: usize, features: u64) -> (Machine, Vec<(Queue, Queue)>, Queue) {
    let mut machine = Machine::connect(program, port, features);
    let index = if machine.features & MQ != 0 { 8 } else { 2 };
    let pairs = (0..index / 2).map(|pair| machine.pair(pair, 32, 2000)).collect();
    let mut control = machine.control_queue(index, 64);
    // Says nothing new; when it is answered, the queue is in service.
    assert_eq!(control.command(&machine, &[0, 0, 1]), 0);
    (machine, pairs, control)
}

#[test]
fn the_control_queue_says_how_many_pairs_there_are() {
    let program = Program::start(&["", "queues=4"], &[]);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let (right, mut pairs, mut control) = with_control(&program, 1, ALL);
    let mut spread = |pairs: &mut Vec<(Queue, Queue)>| {
        let mut hits = [0; 4];
        for port in 0..40 {
            tx.send(&left, &header(0, 0, 34, 6), &udp(mac(1), mac(0), port, &[1]));
            for (index, (rx, _)) in pairs.iter_mut().enumerate() {
                if let Some(received) = rx.try_receive(&right) {
                    rx.recycle(&right, &received);
                    hits[index] += 1;
                }
            }
        }
        assert_eq!(hits.iter().sum::<u32>(), 40);
        hits.map(|hits| hits > 0)
    };
    assert_eq!(spread(&mut pairs), [true, false, false, false]);
    assert_eq!(control.command(&right, &[4, 0, 2, 0]), 0);
    assert_eq!(spread(&mut pairs), [true, true, false, false]);
    assert_eq!(control.command(&right, &[4, 0, 5, 0]), 1);
    assert_eq!(control.command(&right, &[4, 0, 4, 0]), 0);
    assert_eq!(spread(&mut pairs), [true; 4]);
}

#[test]
fn without_multiple_queues_the_control_queue_is_the_third() {
    let program = Program::start(&["queues=4"], &[]);
    let (machine, _pairs, mut control) = with_control(&program, 0, ALL & !MQ);
    assert_eq!(control.index, 2);
    assert_eq!(control.command(&machine, &[0, 0, 0]), 0);
    assert_eq!(control.command(&machine, &[4, 0, 1, 0]), 1, "without MQ there is no such command");
    assert_eq!(program.counter(0, "commands"), 3);
}

#[test]
fn the_driver_gets_what_it_asks_for() {
    let program = Program::start(&["", "queues=4"], &[]);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let (mut right, mut pairs, mut control) = with_control(&program, 1, ALL);
    let group = [0x33, 0x33, 0, 0, 0, 1];
    let other = [0x52, 0x54, 0, 0, 7, 7];
    let mut gets = |frame: &[u8]| {
        tx.send(&left, &NO_OFFLOAD, frame);
        let received = pairs[0].0.try_receive(&right);
        if let Some(received) = &received {
            pairs[0].0.recycle(&right, received);
            assert_eq!(received.frame, frame);
        }
        received.is_some()
    };
    let to = |mac: [u8; 6]| plain(mac, crate::program::mac(0), 60);
    // All, until it says otherwise; but no VLANs.
    assert!(gets(&to(other)) && gets(&to(group)) && !gets(&tagged(7, &to(mac(1)))));
    assert_eq!(control.command(&right, &[0, 0, 0]), 0);
    assert!(!gets(&to(other)) && !gets(&to(group)) && gets(&to(BROADCAST)) && gets(&to(mac(1))));
    let list = |macs: &[[u8; 6]]| [&(macs.len() as u32).to_le_bytes()[..], &macs.concat()].concat();
    assert_eq!(control.command(&right, &[&[1, 0][..], &list(&[other]), &list(&[group])].concat()), 0);
    assert!(gets(&to(other)) && gets(&to(group)));
    assert_eq!(control.command(&right, &[2, 0, 7, 0]), 0);
    assert!(gets(&tagged(7, &to(mac(1)))) && !gets(&tagged(8, &to(mac(1)))));
    // Another address: it is in the configuration space, and frames for it come here and nowhere else.
    let moved = [0x52, 0x54, 0, 0, 8, 8];
    assert_eq!(control.command(&right, &[&[1, 1][..], &moved].concat()), 0);
    assert!(gets(&to(moved)));
    assert_eq!(right.config()[..6], moved);
    // What a hostile driver may say.
    for command in [&[][..], &[1, 0, 255, 255, 255, 255], &[9, 9, 9], &[0; 5000]] {
        assert_eq!(if command.is_empty() { 1 } else { control.command(&right, command) }, 1);
    }
    assert_eq!(program.counter(1, "rx_filtered"), 4);
}

#[test]
fn the_driver_may_give_an_offload_back() {
    let program = Program::start(&["", "queues=4"], &[]);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let (right, mut pairs, mut control) = with_control(&program, 1, ALL);
    let frame = udp(mac(1), mac(0), 9, &[1, 2, 3]);
    for (offloads, is_complete) in [(GUEST_CSUM, false), (0, true), (GUEST_CSUM, false)] {
        assert_eq!(control.command(&right, &[&[5, 0][..], &offloads.to_le_bytes()].concat()), 0);
        tx.send(&left, &header(0, 0, 34, 6), &frame);
        let received = pairs[0].0.receive(&right);
        assert_eq!(is_right(&received.frame), is_complete);
    }
    assert_eq!(control.command(&right, &[&[5, 0][..], &CTRL_VQ.to_le_bytes()].concat()), 1);
}

#[test]
fn a_machine_of_one_pair_works_beside_one_of_many() {
    let program = Program::start(&["queues=4", ""], &[]);
    let (left, mut pairs, _control) = with_control(&program, 0, ALL);
    let mut right = Machine::connect(&program, 1, 0);
    let (mut rx, mut tx) = right.pair(0, 4, 2000);
    pairs[3].1.send(&left, &NO_OFFLOAD, &between(0, 1, 100));
    assert_eq!(rx.receive(&right).frame, between(0, 1, 100));
    tx.send(&right, &NO_OFFLOAD, &between(1, 0, 100));
    assert_eq!(pairs[0].0.receive(&left).frame, between(1, 0, 100));
}
