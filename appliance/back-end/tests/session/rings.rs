//! Start, stop, and what lies between.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vvu_protocol::address::FileOffset;
use vvu_protocol::features::Features;
use vvu_protocol::message::{LogArea, VringFile, VringState};

use crate::driver::{DATA, DriverMemory, PAGE, Queue, running, wait_until};
use crate::front_end::{Events, FEATURES, FrontEnd, Request, wait_for};

#[test]
fn a_stop_waits_for_what_is_in_flight_and_tells_the_position() {
    for by in ["GET_VRING_BASE", "SET_VRING_ENABLE", "RESET_DEVICE", "end"] {
        let (mut front_end, memory, mut queue) = running();
        queue.echo(&memory, "before");
        front_end.device.hold();
        for head in [2, 4, 6] {
            queue.offer(&memory, head, DATA, DATA + PAGE, 8);
        }
        queue.kick();
        wait_until("take", || front_end.device.taken.lock().unwrap().len() == 4);
        match by {
            "GET_VRING_BASE" => front_end.send(Request::GetVringBase(VringState { index: 0, num: 0 }), false),
            "SET_VRING_ENABLE" => front_end.send(Request::SetVringEnable(VringState { index: 0, num: 0 }), true),
            "RESET_DEVICE" => front_end.send(Request::ResetDevice, true),
            _ => front_end.handle.end(),
        }
        assert!(!front_end.hears_something(), "{by} was answered with requests in flight");
        assert_eq!(queue.used_index(&memory), 1);
        front_end.device.release();
        assert_eq!(front_end.receive().is_some(), by != "end", "{by}");
        assert_eq!(queue.used_index(&memory), 4, "{by}");
        if by != "end" {
            assert_eq!(front_end.stop(0), 4, "{by}");
        }
    }
}

#[test]
fn a_ring_goes_on_where_it_was_stopped_and_misses_no_request() {
    let (mut front_end, memory, mut queue) = running();
    for round in 0..40u16 {
        queue.echo(&memory, &format!("round {round}"));
        let base = u16::try_from(front_end.stop(0)).unwrap();
        assert_eq!(base, round * 2 + 1);
        // Offered while it is stopped; the kick is lost with the old event.
        queue.offer(&memory, 4, DATA, DATA + PAGE, 4);
        queue.kick();
        queue.events = Events::new();
        queue.start(&mut front_end, base);
        assert_eq!(queue.wait_used(&memory).0, 4);
    }
}

#[test]
fn what_a_running_ring_sees_has_changed_when_the_change_is_answered() {
    let (mut front_end, memory, mut queue) = running();
    queue.echo(&memory, "before");
    let log = crate::front_end::NamedMemory::new(PAGE);
    let area = LogArea { size: PAGE, mmap_offset: FileOffset(0) };
    front_end.done(Request::SetLogBase(area, log.fd()));
    let device = Arc::clone(&front_end.device);
    let changes: [(&str, Request); 4] = [
        ("log", Request::SetFeatures(FEATURES | Features::LOG_ALL)),
        ("log of the used ring", Request::SetVringAddr(queue.addresses(Some(queue.used)))),
        ("another log", Request::SetLogBase(area, log.fd())),
        ("memory", Request::SetMemTable(vec![memory.region()])),
    ];
    for (name, request) in changes {
        let gate = device.gate.lock().unwrap();
        front_end.send(request, true);
        assert!(!front_end.hears_something(), "{name} was answered before the ring knew of it");
        drop(gate);
        assert!(front_end.receive().is_some());
        queue.echo(&memory, name);
    }
}

#[test]
fn parameters_are_latched_when_the_ring_starts() {
    let (mut front_end, memory, mut queue) = running();
    queue.echo(&memory, "before");
    // CVE-2026-5747: size and place are changed under a running ring.
    front_end.done(Request::SetVringNum(VringState { index: 0, num: 256 }));
    front_end.done(Request::SetVringAddr(Queue::new(1).addresses(None)));
    front_end.done(Request::SetVringAddr(vvu_protocol::message::VringAddresses {
        index: 0,
        ..Queue::new(1).addresses(None)
    }));
    front_end.done(Request::SetVringBase(VringState { index: 0, num: 77 }));
    queue.echo(&memory, "after");
    assert_eq!(front_end.stop(0), 2);
}

#[test]
fn a_ring_may_be_enabled_before_it_has_a_kick() {
    let mut front_end = FrontEnd::negotiated();
    let memory = DriverMemory::new();
    memory.announce(&mut front_end);
    let mut queue = Queue::new(0);
    queue.set_up(&mut front_end, 0, queue.addresses(None));
    front_end.done(Request::SetVringEnable(VringState { index: 0, num: 1 }));
    let file = |event: &std::os::fd::OwnedFd| VringFile { index: 0, descriptor: Some(event.try_clone().unwrap()) };
    front_end.done(Request::SetVringCall(file(&queue.events.call)));
    for round in 0..3 {
        front_end.done(Request::SetVringKick(file(&queue.events.kick)));
        front_end.done(Request::SetVringCall(file(&queue.events.call)));
        queue.echo(&memory, "started by its kick");
        assert_eq!(front_end.stop(0), round + 1);
    }
}

#[test]
fn without_protocol_features_a_ring_is_enabled_from_the_start() {
    let mut front_end = FrontEnd::connect();
    front_end.negotiate(FEATURES & !Features::PROTOCOL_FEATURES);
    let memory = DriverMemory::new();
    memory.announce(&mut front_end);
    let mut queue = Queue::new(0);
    queue.set_up(&mut front_end, 0, queue.addresses(None));
    let file = |event: &std::os::fd::OwnedFd| VringFile { index: 0, descriptor: Some(event.try_clone().unwrap()) };
    front_end.done(Request::SetVringCall(file(&queue.events.call)));
    front_end.done(Request::SetVringKick(file(&queue.events.kick)));
    queue.echo(&memory, "never enabled");
}

#[test]
fn a_kick_before_the_ring_is_ready_breaks_it_only() {
    let mut front_end = FrontEnd::negotiated();
    let memory = DriverMemory::new();
    let mut queue = Queue::new(0);
    // No memory, no addresses.
    front_end.start(0, &queue.events);
    queue.kick();
    wait_for(&queue.events.error, "err");
    assert_eq!(front_end.stop(0), 0);
    // Addresses, but no memory there.
    queue.start(&mut front_end, 0);
    wait_for(&queue.events.error, "err");
    front_end.stop(0);
    memory.announce(&mut front_end);
    // A place that no ring may have.
    for wrong in [8, 1] {
        let mut addresses = queue.addresses(None);
        addresses.descriptors += wrong;
        queue.set_up(&mut front_end, 0, addresses);
        front_end.start(0, &queue.events);
        wait_for(&queue.events.error, "err");
        front_end.stop(0);
    }
    queue.start(&mut front_end, 0);
    queue.echo(&memory, "a start in order helps");
}

#[test]
fn cve_2026_45782_a_head_in_flight_comes_no_second_time() {
    let (front_end, memory, mut queue) = running();
    front_end.device.hold();
    queue.offer(&memory, 0, DATA, DATA + PAGE, 8);
    queue.offer(&memory, 0, DATA, DATA + PAGE, 8);
    queue.kick();
    wait_for(&queue.events.error, "err");
    assert_eq!(front_end.device.taken.lock().unwrap().len(), 1);
    assert!(front_end.device.faults.lock().unwrap()[0].contains("while in flight"));
}

#[test]
fn cve_2016_5403_no_more_requests_than_entries() {
    let (front_end, memory, queue) = running();
    memory.map.write_obj(17u16, GuestAddress(queue.avail + 2)).unwrap();
    queue.kick();
    wait_for(&queue.events.error, "err");
    assert!(front_end.device.faults.lock().unwrap()[0].contains("more than 16 beyond"));
}

#[test]
fn events_may_be_exchanged_under_a_running_ring() {
    let (mut front_end, memory, mut queue) = running();
    for round in 0..20 {
        queue.echo(&memory, &format!("round {round}"));
        let events = Events::new();
        let file = |event: &std::os::fd::OwnedFd| VringFile { index: 0, descriptor: Some(event.try_clone().unwrap()) };
        front_end.done(Request::SetVringCall(file(&events.call)));
        front_end.done(Request::SetVringKick(file(&events.kick)));
        queue.events = Events { error: queue.events.error, ..events };
    }
}
