//! Starting, stopping, disconnecting, ending; and a program that is killed, with another one in its place.

use std::os::fd::AsRawFd;
use std::process::Command;

use rustix::process::Signal;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};

use crate::driver::{ALL, DATA_ONLY, Machine};
use crate::frames::{NO_OFFLOAD, between, header, is_right, plain, tagged, udp};
use crate::program::{Program, mac};

#[test]
fn ports_come_and_go_by_themselves() {
    let program = Program::with_ports(3);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let mut before = 0;
    for round in 0..10 {
        tx.send(&left, &NO_OFFLOAD, &between(0, 1, 60));
        let mut right = Machine::connect(&program, 1, DATA_ONLY);
        let (mut rx, mut right_tx) = right.pair(0, 4, 2000);
        tx.send(&left, &NO_OFFLOAD, &between(0, 1, 60));
        assert_eq!(rx.receive(&right).frame, between(0, 1, 60));
        // Stopped, it gets nothing; started again, it goes on where it was.
        let base = rx.stop(&right);
        assert_eq!(base, 1);
        tx.send(&left, &NO_OFFLOAD, &between(0, 1, 60));
        assert_eq!(rx.try_receive(&right), None);
        rx.start(&mut right, base);
        tx.send(&left, &NO_OFFLOAD, &between(0, 1, 100));
        assert_eq!(rx.receive(&right).frame, between(0, 1, 100));
        right_tx.send(&right, &NO_OFFLOAD, &between(1, 0, 60));
        assert_eq!(right_tx.stop(&right), 1);
        right_tx.start(&mut right, 1);
        right_tx.send(&right, &NO_OFFLOAD, &between(1, 0, 60));
        // Counted at the same point of each round. The last client of the control channel may still be there.
        if round == 1 {
            before = program.open_descriptors();
        }
        let is_as_before = || program.open_descriptors() <= before;
        crate::driver::wait_until("the same number of descriptors", || round < 2 || is_as_before());
        drop(right);
        program.wait_for_counter(1, "rx_no_driver", 2 * round + 2);
        let gone = || program.port(1)["receiving"] == 0;
        crate::driver::wait_until("the end of the connection", gone);
    }
}

#[test]
fn memory_and_events_may_change_while_packets_flow() {
    let program = Program::with_ports(2);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let mut right = Machine::connect(&program, 1, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let (mut rx, _) = right.pair(0, 4, 2000);
    for round in 0..30 {
        tx.send(&left, &NO_OFFLOAD, &between(0, 1, 60 + round));
        let received = rx.receive(&right);
        assert_eq!(received.frame, between(0, 1, 60 + round));
        rx.recycle(&right, &received);
        match round % 3 {
            0 => {
                left.announce_memory();
                right.announce_memory();
            }
            1 => {
                rx.call = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
                right.frontend.set_vring_call(0, &rx.call).unwrap();
            }
            _ => {
                // Blocking ones are as good.
                tx.kick = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
                left.frontend.set_vring_kick(1, &tx.kick).unwrap();
            }
        }
    }
}

#[test]
fn a_program_that_is_killed_loses_what_is_in_flight_and_nothing_else() {
    let mut program = Program::start(&["", ""], &[]);
    let protocol = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    let mut machines = [0, 1].map(|port| Machine::connect_for(&program, port, ALL, protocol));
    let mut buffers = Vec::new();
    for machine in &mut machines {
        let wanted = VhostUserInflight { num_queues: 3, queue_size: 256, ..Default::default() };
        let (description, file) = machine.frontend.get_inflight_fd(&wanted).unwrap();
        machine.frontend.set_inflight_fd(&description, file.as_raw_fd()).unwrap();
        buffers.push((description, file));
    }
    let [mut left, mut right] = machines;
    let mut control = right.control_queue(2, 64);
    let (mut rx, mut right_tx) = right.pair(0, 32, 600);
    let (mut left_rx, mut tx) = left.pair(0, 32, 600);
    assert_eq!(control.command(&right, &[0, 0, 0]), 0);
    for round in 0..5 {
        for _ in 0..10 {
            // Each needs three buffers.
            tx.send(&left, &NO_OFFLOAD, &between(0, 1, 1514));
            let received = rx.receive(&right);
            assert_eq!(received.frame, between(0, 1, 1514));
            rx.recycle(&right, &received);
        }
        // Packets are under way when the end comes, or not yet looked at.
        for head in 0..20 {
            tx.offer_packet(&left, head, &NO_OFFLOAD, &between(0, 1, 1000));
        }
        tx.publish(&left.memory);
        tx.kick();
        program.kill_and_restart();
        for (port, machine) in [&mut left, &mut right].into_iter().enumerate() {
            machine.reconnect(&program, port);
            machine.announce_memory();
            let (description, file) = &buffers[port];
            machine.frontend.set_inflight_fd(description, file.as_raw_fd()).unwrap();
        }
        for (machine, queues) in
            [(&mut right, vec![&mut control, &mut rx, &mut right_tx]), (&mut left, vec![&mut left_rx, &mut tx])]
        {
            for queue in queues {
                // The used ring is all that a front-end knows of a back-end that is gone.
                let base = queue.used_index(&machine.memory);
                queue.start(machine, base);
                queue.kick();
            }
        }
        // Each buffer of the sender comes back once.
        let mut heads: Vec<_> = (0..20).map(|_| tx.wait_used(&left.memory).0).collect();
        heads.sort_unstable();
        assert_eq!(heads, (0..20).collect::<Vec<_>>(), "round {round}");
        assert_eq!(tx.take_used(&left.memory), None);
        // No buffer of the receiver is lost: what has arrived is taken, and then there is room for as many as before.
        while let Some(received) = rx.try_receive(&right) {
            assert_eq!(received.frame, between(0, 1, 1000));
            rx.recycle(&right, &received);
        }
        assert_eq!(rx.avail_index.wrapping_sub(rx.used_seen), 32);
        assert_eq!(control.command(&right, &[4, 0, 1, 0]), 0);
    }
    assert_eq!(program.counter(0, "broken") + program.counter(1, "broken"), 0);
}

#[test]
fn a_signal_ends_the_program_in_order() {
    for connected in [false, true] {
        let mut program = Program::with_ports(2);
        let mut held = None;
        if connected {
            let mut machine = Machine::connect(&program, 0, DATA_ONLY);
            let pair = machine.pair(0, 4, 2000);
            held = Some((pair, machine));
        }
        program.signal(Signal::TERM);
        assert!(program.wait().success());
        assert!(!program.socket(0).exists() && !program.socket(1).exists(), "the sockets are removed");
        drop(held);
    }
}

#[test]
fn mistakes_are_one_line_with_the_remedy() {
    let running = Program::with_ports(1);
    let used = format!("socket={},mac=52:54:00:00:00:01", running.socket(0).display());
    let other = tempfile::tempdir().unwrap();
    let free = format!("socket={},mac=52:54:00:00:00:01", other.path().join("socket").display());
    for (arguments, expected) in [
        (vec!["--port", &used], "in use by a running program"),
        (vec!["--port", &free, "--tap", "vvu-none"], "ip tuntap add vvu-none"),
        (vec!["--port", "fd=77,mac=52:54:00:00:00:01"], "descriptor 77"),
    ] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_vvu-net")).args(&arguments).env("RUST_LOG", "off").output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && text.lines().count() == 1 && text.contains(expected),
            "{arguments:?}: {text}"
        );
    }
    let output = Command::new(env!("CARGO_BIN_EXE_vvu-net")).arg("--print-capabilities").output().unwrap();
    let capabilities: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(capabilities, serde_json::json!({ "type": "net" }));
}

/// What the driver has told the program before is not told to the next one.
#[test]
fn a_driver_gets_everything_from_a_program_that_was_not_told_what_it_wants() {
    let mut program = Program::start(&["", "queues=4"], &[]);
    let mut right = Machine::connect(&program, 1, ALL);
    let mut control = right.control_queue(8, 64);
    // All queues are in service, and the driver uses two of them.
    let mut queues: Vec<_> = (0..4).map(|pair| right.pair(pair, if pair < 2 { 32 } else { 0 }, 2000).0).collect();
    let group = [0x33, 0x33, 0, 0, 0, 1];
    let groups = [&[1, 0][..], &0u32.to_le_bytes(), &1u32.to_le_bytes(), &group].concat();
    let no_offloads = [&[5, 0][..], &0u64.to_le_bytes()].concat();
    let moved = [0x52, 0x54, 0, 0, 8, 8];
    let address = [&[1, 1][..], &moved].concat();
    for command in [&[0, 0, 0][..], &groups, &[2, 0, 7, 0], &no_offloads, &address, &[4, 0, 2, 0]] {
        assert_eq!(control.command(&right, command), 0, "{command:?}");
    }

    program.kill_and_restart();
    right.reconnect(&program, 1);
    right.announce_memory();
    for queue in queues.iter_mut().chain([&mut control]) {
        let base = queue.used_index(&right.memory);
        queue.start(&mut right, base);
    }
    crate::driver::wait_until("announcement", || right.config()[6] == 3);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let mut gets = |right: &Machine, offload: &[u8], frame: &[u8]| {
        tx.send(&left, offload, frame);
        let received = queues.iter_mut().find_map(|queue| {
            let received = queue.try_receive(right)?;
            queue.recycle(right, &received);
            Some(received.frame)
        });
        received.unwrap_or_default()
    };
    let from = mac(0);
    let frames = [plain(group, from, 60), tagged(7, &plain(moved, from, 60)), plain(moved, from, 60)];
    // Once more after it has left promiscuous mode, as drivers do who name no group anew.
    for _ in 0..2 {
        for frame in &frames {
            assert_eq!(gets(&right, &NO_OFFLOAD, frame), *frame);
        }
        for port in 0..20 {
            let frame = gets(&right, &header(0, 0, 34, 6), &udp(moved, from, port, &[1, 2, 3]));
            assert!(is_right(&frame), "connection {port}: {frame:?}");
        }
        assert_eq!(control.command(&right, &[0, 0, 0]), 0);
    }
    // It is known again when it is said again.
    assert_eq!(control.command(&right, &[&[1, 0][..], &[0; 8]].concat()), 0);
    assert!(gets(&right, &NO_OFFLOAD, &frames[0]).is_empty());
}
