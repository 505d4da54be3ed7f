//! Live migration of a machine: what the switch writes is marked in the log, and the network learns where the machine is.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

use crate::driver::{ALL, DATA_ONLY, EVENT_IDX, LOG_ALL, Machine, REGION_LEN};
use crate::frames::{BROADCAST, NO_OFFLOAD, between};
use crate::program::{Program, mac};

const PAGE: u64 = 4096;
const LOG_LEN: u64 = 2 * REGION_LEN / PAGE / 8;

/// Pages that are marked in a log.
fn marked(log: &File) -> Vec<u64> {
    let mut bytes = vec![0; LOG_LEN as usize];
    log.read_exact_at(&mut bytes, 0).unwrap();
    log.write_all_at(&vec![0; LOG_LEN as usize], 0).unwrap();
    let bits =
        bytes.iter().enumerate().flat_map(|(byte, bits)| (0..8).map(move |bit| (byte as u64 * 8 + bit, bits >> bit)));
    bits.filter(|(_, bits)| bits & 1 == 1).map(|(page, _)| page).collect()
}

#[test]
fn what_is_received_while_the_log_is_on_is_marked() {
    let program = Program::with_ports(2);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let mut right = Machine::connect_for(&program, 1, DATA_ONLY & !EVENT_IDX, VhostUserProtocolFeatures::LOG_SHMFD);
    let (mut rx, _) = right.pair(0, 8, 1000);
    let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let log = File::from(fd);
    log.set_len(LOG_LEN).unwrap();
    let region = VhostUserDirtyLogRegion { mmap_size: LOG_LEN, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
    right.frontend.set_log_base(0, Some(region)).unwrap();
    right.frontend.set_features(right.features | LOG_ALL).unwrap();
    assert!(marked(&log).is_empty());

    tx.send(&left, &NO_OFFLOAD, &between(0, 1, 1514));
    let received = rx.receive(&right);
    assert_eq!(received.heads, [0, 1]);
    // 1526 bytes: all of the first buffer, the beginning of the second.
    let written = [(rx.data() + 1, 1000), (rx.data() + 0x1_1001, 526)];
    let mut expected: Vec<_> =
        written.iter().flat_map(|(start, len)| start / PAGE..=(start + len - 1) / PAGE).collect();
    expected.dedup();
    assert_eq!(marked(&log), expected, "the used ring is not to be logged here");

    right.frontend.set_features(right.features).unwrap();
    tx.send(&left, &NO_OFFLOAD, &between(0, 1, 100));
    rx.receive(&right);
    assert!(marked(&log).is_empty());
}

#[test]
fn a_machine_that_has_arrived_is_announced_to_all_others() {
    let program = Program::with_ports(3);
    let mut machines =
        [0, 1, 2].map(|port| Machine::connect_for(&program, port, DATA_ONLY, VhostUserProtocolFeatures::RARP));
    let mut pairs: Vec<_> = machines.iter_mut().map(|machine| machine.pair(0, 8, 2000)).collect();
    let station = [0x52, 0x54, 0, 0, 5, 5];
    let value = u64::from_le_bytes([station[0], station[1], station[2], station[3], station[4], station[5], 0, 0]);
    assert_eq!(machines[1].request(19, value), 0);
    for port in [0, 2] {
        let received = pairs[port].0.receive(&machines[port]);
        assert_eq!((&received.frame[..6], &received.frame[6..12]), (&BROADCAST[..], &station[..]));
        assert_eq!(received.frame[12..14], [0x80, 0x35]);
    }
    assert_eq!(pairs[1].0.try_receive(&machines[1]), None);
    // It is known now.
    pairs[0].1.send(&machines[0], &NO_OFFLOAD, &crate::frames::plain(station, mac(0), 60));
    assert!(pairs[1].0.try_receive(&machines[1]).is_some() && pairs[2].0.try_receive(&machines[2]).is_none());
    // No card has a group's address, or none.
    assert_ne!(machines[1].request(19, 1), 0);
    assert_ne!(machines[1].request(19, 0), 0);
}

#[test]
fn the_front_end_may_ask_for_an_mtu_that_the_network_carries() {
    let program = Program::start(&[""], &["--mtu", "9000"]);
    let mut machine = Machine::connect_for(&program, 0, DATA_ONLY, VhostUserProtocolFeatures::MTU);
    assert_eq!(machine.config()[10..12], 9000u16.to_le_bytes());
    for (mtu, taken) in [(1500, true), (9000, true), (9001, false), (67, false), (u64::MAX, false)] {
        assert_eq!(machine.request(20, mtu) == 0, taken, "{mtu}");
    }
}

#[test]
fn a_driver_whose_control_queue_goes_on_is_asked_to_announce_itself() {
    let program = Program::with_ports(2);
    let mut machine = Machine::connect(&program, 0, ALL);
    let mut control = machine.control_queue(2, 64);
    assert_eq!(machine.config()[6], 1, "a driver that begins is not");
    assert_eq!(control.command(&machine, &[0, 0, 0]), 0);
    let base = control.stop(&machine);
    machine.disconnect();
    let mut machine = Machine::connect(&program, 0, ALL);
    let mut control = machine.idle_control_queue(2, 64);
    control.avail_index = base;
    control.used_seen = base;
    let memory = &machine.memory;
    control.publish(memory);
    vm_memory::Bytes::write_obj(memory, base, vm_memory::GuestAddress(control.used + 2)).unwrap();
    control.start(&mut machine, base);
    crate::driver::wait_until("announcement", || machine.config()[6] == 3);
    // What it has set before is not known any more: it gets everything.
    let mut other = Machine::connect(&program, 1, DATA_ONLY);
    let (_, mut tx) = other.pair(0, 0, 0);
    let (mut rx, _) = machine.pair(0, 4, 2000);
    let frame = crate::frames::plain([0x52, 0x54, 0, 0, 3, 3], mac(1), 60);
    tx.send(&other, &NO_OFFLOAD, &frame);
    assert_eq!(rx.receive(&machine).frame, frame);
    assert_eq!(control.command(&machine, &[3, 0]), 0);
    assert_eq!(machine.config()[6], 1);
}
