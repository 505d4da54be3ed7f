//! A driver VM with an IOMMU: nothing is reached without a mapping that was asked for.

use vm_memory::{Bytes, GuestAddress};
use vvu_protocol::features::Features;
use vvu_protocol::message::{BackEndRequest, Iotlb, VringAddresses, VringState};

use crate::driver::{DATA, DriverMemory, PAGE, Queue, USER_BASE, wait_until};
use crate::front_end::{BackChannel, FEATURES, FrontEnd, Request, wait_for};

/// Difference of I/O addresses to guest-physical ones for the rings.
const RING_IOVA: u64 = 0x9_0000_0000;

/// I/O address of the data.
const DATA_IOVA: u64 = 0xf_0000_0000;

const READ: u8 = 1;
const WRITE: u8 = 2;

struct Machine {
    front_end: FrontEnd,
    channel: BackChannel,
    memory: DriverMemory,
    queue: Queue,
}

impl Machine {
    fn new() -> Self {
        let mut front_end = FrontEnd::connect();
        front_end.negotiate(FEATURES | Features::ACCESS_PLATFORM);
        let memory = DriverMemory::new();
        memory.announce(&mut front_end);
        let channel = front_end.open_back_channel();
        let queue = Queue::new(0);
        let addresses = VringAddresses {
            descriptors: RING_IOVA + queue.desc,
            available: RING_IOVA + queue.avail,
            used: RING_IOVA + queue.used,
            ..queue.addresses(None)
        };
        queue.set_up(&mut front_end, 0, addresses);
        front_end.start(0, &queue.events);
        Self { front_end, channel, memory, queue }
    }

    /// With all parts of the ring mapped as soon as they are asked for.
    fn with_ring() -> Self {
        let mut machine = Self::new();
        for part in [machine.queue.desc, machine.queue.avail, machine.queue.used] {
            let miss = machine.miss();
            assert_eq!(miss.iova, RING_IOVA + part);
            machine.map(miss.iova, part, READ | WRITE);
            machine.answer(0);
        }
        machine
    }

    fn miss(&mut self) -> Iotlb {
        let message = self.channel.receive();
        assert!(message.header.needs_reply);
        match BackEndRequest::decode(message).unwrap() {
            BackEndRequest::Iotlb(miss) if miss.kind == 1 => miss,
            other => panic!("{other:?}"),
        }
    }

    fn answer(&self, value: u64) {
        self.channel.reply(1, value);
    }

    fn tell(&mut self, kind: u8, iova: u64, guest: u64, size: u64, permission: u8) {
        let user_address = USER_BASE + guest;
        self.front_end.done(Request::Iotlb(Iotlb { iova, size, user_address, permission, kind }));
    }

    /// One page.
    fn map(&mut self, iova: u64, guest: u64, permission: u8) {
        self.tell(2, iova, guest, PAGE, permission);
    }

    fn unmap(&mut self, iova: u64, size: u64) {
        self.tell(3, iova, 0, size, 0);
    }
}

#[test]
fn each_part_of_the_ring_and_each_page_of_a_request_is_asked_for() {
    let mut machine = Machine::with_ring();
    // Two pages in each direction, which lie in driver memory in reverse order.
    let (from, to) = (DATA_IOVA, DATA_IOVA + 0x10_0000);
    let text = vec![b'x'; 6000];
    machine.memory.map.write_slice(&text[..4096], GuestAddress(DATA + PAGE)).unwrap();
    machine.memory.map.write_slice(&text[4096..], GuestAddress(DATA)).unwrap();
    machine.queue.offer(&machine.memory, 0, from, to, 6000);
    machine.queue.kick();
    for (iova, guest, permission) in [
        (from, DATA + PAGE, READ),
        (from + PAGE, DATA, READ),
        (to, DATA + 0x9000, WRITE),
        (to + PAGE, DATA + 0x5000, WRITE),
    ] {
        let miss = machine.miss();
        assert_eq!((miss.iova, miss.permission), (iova, permission));
        assert_eq!(machine.queue.used_index(&machine.memory), 0);
        machine.map(iova, guest, permission);
        machine.answer(0);
    }
    assert_eq!(machine.queue.wait_used(&machine.memory), (0, 6000));
    assert_eq!(machine.memory.bytes(DATA + 0x9000, 4096), text[..4096]);
    assert_eq!(machine.memory.bytes(DATA + 0x5000, 6000 - 4096), text[4096..]);
    // Known by now.
    machine.queue.offer(&machine.memory, 2, from, to, 6000);
    machine.queue.kick();
    assert_eq!(machine.queue.wait_used(&machine.memory).0, 2);
    assert!(!machine.channel.hears_something());
}

#[test]
fn what_waits_for_a_mapping_delays_nobody() {
    // Not even a start does.
    let mut machine = Machine::new();
    machine.miss();
    machine.front_end.done(Request::SetOwner);
    assert_eq!(machine.front_end.stop(0), 0);

    let mut machine = Machine::with_ring();
    machine.queue.offer(&machine.memory, 0, DATA_IOVA, DATA_IOVA, 8);
    machine.queue.kick();
    machine.miss();
    // The request was not taken, so the ring stops before it and takes it after the next start.
    assert_eq!(machine.front_end.stop(0), 0);
    machine.map(DATA_IOVA, DATA, READ | WRITE);
    machine.answer(0);
    machine.front_end.start(0, &machine.queue.events);
    assert_eq!(machine.queue.wait_used(&machine.memory).0, 0);
    // An end does not wait either.
    machine.queue.offer(&machine.memory, 2, DATA_IOVA + 0x10_0000, DATA_IOVA, 8);
    machine.queue.kick();
    machine.miss();
    machine.front_end.close();
    machine.front_end.outcome().unwrap();
}

#[test]
fn an_address_without_a_mapping_breaks_the_ring_after_two_answers() {
    let mut machine = Machine::with_ring();
    machine.queue.offer(&machine.memory, 0, DATA_IOVA, DATA_IOVA, 8);
    machine.queue.kick();
    for _ in 0..2 {
        assert_eq!(machine.miss().iova, DATA_IOVA);
        machine.answer(1);
    }
    wait_for(&machine.queue.events.error, "err");
    assert!(machine.front_end.device.faults.lock().unwrap()[0].contains("has no mapping"));
    assert_eq!(machine.front_end.stop(0), 0);
}

#[test]
fn a_mapping_to_read_is_none_to_write_and_one_outside_of_memory_is_none() {
    let mut machine = Machine::with_ring();
    machine.map(DATA_IOVA, DATA, READ);
    machine.queue.offer(&machine.memory, 0, DATA_IOVA, DATA_IOVA, 8);
    machine.queue.kick();
    let miss = machine.miss();
    assert_eq!((miss.iova, miss.permission), (DATA_IOVA, WRITE));
    // What the front-end maps it to now is no memory of the table.
    machine.map(DATA_IOVA, 1 << 40, READ | WRITE);
    wait_for(&machine.queue.events.error, "err");
    assert!(machine.front_end.device.faults.lock().unwrap()[0].contains("is not driver memory"));
}

#[test]
fn what_was_taken_back_is_asked_for_again() {
    let mut machine = Machine::with_ring();
    machine.map(DATA_IOVA, DATA, READ | WRITE);
    machine.front_end.device.hold();
    machine.queue.offer(&machine.memory, 0, DATA_IOVA, DATA_IOVA + 64, 8);
    machine.queue.kick();
    wait_until("take", || machine.front_end.device.taken.lock().unwrap().len() == 1);
    // A request in flight keeps what it has.
    machine.unmap(DATA_IOVA, PAGE);
    machine.front_end.device.release();
    assert_eq!(machine.queue.wait_used(&machine.memory).0, 0);
    // The next one asks anew, and the page may be another one now.
    machine.memory.map.write_slice(b"elsewhere", GuestAddress(DATA + 7 * PAGE)).unwrap();
    machine.queue.offer(&machine.memory, 2, DATA_IOVA, DATA_IOVA + 64, 9);
    machine.queue.kick();
    assert_eq!(machine.miss().iova, DATA_IOVA);
    machine.map(DATA_IOVA, DATA + 7 * PAGE, READ | WRITE);
    machine.answer(0);
    assert_eq!(machine.queue.wait_used(&machine.memory).0, 2);
    assert_eq!(machine.memory.bytes(DATA + 7 * PAGE + 64, 9), b"elsewhere");
}

#[test]
fn a_ring_lets_go_of_its_own_place_when_that_is_taken_back() {
    for whole in [false, true] {
        let mut machine = Machine::with_ring();
        machine.map(DATA_IOVA, DATA, READ | WRITE);
        machine.front_end.device.hold();
        machine.queue.offer(&machine.memory, 0, DATA_IOVA, DATA_IOVA + 64, 8);
        machine.queue.kick();
        wait_until("take", || machine.front_end.device.taken.lock().unwrap().len() == 1);
        if whole {
            // All addresses, as front-ends write it.
            machine.unmap(0, 0);
        } else {
            machine.unmap(RING_IOVA + machine.queue.used, PAGE);
        }
        machine.front_end.device.release();
        // It is done, and there is no place to say so.
        let parts = if whole { vec![machine.queue.desc, machine.queue.avail] } else { vec![] };
        for part in parts {
            assert_eq!(machine.miss().iova, RING_IOVA + part);
            machine.map(RING_IOVA + part, part, READ | WRITE);
            machine.answer(0);
        }
        assert_eq!(machine.miss().iova, RING_IOVA + machine.queue.used);
        assert_eq!(machine.queue.used_index(&machine.memory), 0, "written through a mapping that was taken back");
        // It comes back elsewhere in memory.
        let moved = machine.queue.used + 0x3000;
        machine.map(RING_IOVA + machine.queue.used, moved, READ | WRITE);
        machine.answer(0);
        machine.queue.used = moved;
        assert_eq!(machine.queue.wait_used(&machine.memory).0, 0);
    }
}

#[test]
fn taking_back_a_rings_place_is_answered_when_the_ring_knows() {
    let mut machine = Machine::with_ring();
    machine.map(DATA_IOVA, DATA, READ | WRITE);
    let device = std::sync::Arc::clone(&machine.front_end.device);
    for (iova, is_ring) in [(DATA_IOVA, false), (RING_IOVA + machine.queue.avail + 32, true)] {
        let gate = device.gate.lock().unwrap();
        let gone = Iotlb { iova, size: 1, user_address: 0, permission: 0, kind: 3 };
        machine.front_end.send(Request::Iotlb(gone), true);
        assert_eq!(machine.front_end.hears_something(), !is_ring, "{iova:#x}");
        drop(gate);
        if is_ring {
            assert!(machine.front_end.receive().is_some());
        }
    }
}

#[test]
fn a_reset_forgets_all_mappings() {
    let mut machine = Machine::with_ring();
    machine.front_end.done(Request::ResetDevice);
    machine.front_end.done(Request::SetVringEnable(VringState { index: 0, num: 1 }));
    assert_eq!(machine.miss().iova, RING_IOVA + machine.queue.desc);
}

#[test]
fn a_new_channel_is_asked_what_the_old_one_was() {
    let mut machine = Machine::new();
    let iova = machine.miss().iova;
    machine.channel = machine.front_end.open_back_channel();
    assert_eq!(machine.miss().iova, iova);
}

#[test]
fn messages_that_are_none_of_a_front_end_are_refused() {
    let mut machine = Machine::with_ring();
    let message = Iotlb { iova: DATA_IOVA, size: PAGE, user_address: USER_BASE, permission: 3, kind: 2 };
    for wrong in [
        Iotlb { kind: 1, ..message },
        Iotlb { kind: 9, ..message },
        Iotlb { size: 0, ..message },
        Iotlb { iova: u64::MAX, ..message },
        Iotlb { user_address: u64::MAX, ..message },
        Iotlb { permission: 4, ..message },
    ] {
        machine.front_end.refused(Request::Iotlb(wrong));
    }
    machine.front_end.done(Request::SetVringEnable(VringState { index: 0, num: 0 }));
    // Without the feature there is nothing to tell.
    FrontEnd::negotiated().refused(Request::Iotlb(message));
}
