//! The memory table.

use vvu_protocol::message::VringState;

use crate::driver::{DATA, DriverMemory, MEMORY_LEN, PAGE, Queue, region, running};
use crate::front_end::{FrontEnd, NamedMemory, Request, wait_for};

/// What [`DriverMemory`] itself has of its file.
const OWN: usize = 1;

#[test]
fn a_disconnect_leaves_no_memory_mapped() {
    let (mut front_end, memory, mut queue) = running();
    queue.echo(&memory, "mapped");
    assert_eq!(memory.named.mappings(), OWN + 1);
    front_end.close();
    front_end.outcome().unwrap();
    assert_eq!(memory.named.mappings(), OWN);
}

#[test]
fn a_second_table_takes_the_place_of_the_first() {
    let (mut front_end, memory, mut queue) = running();
    let other = NamedMemory::new(PAGE);
    front_end.done(Request::SetMemTable(vec![memory.region(), (region(1 << 40, PAGE, 0), other.fd())]));
    assert_eq!((memory.named.mappings(), other.mappings()), (OWN + 1, 1));
    queue.echo(&memory, "in the new table");
    memory.announce(&mut front_end);
    assert_eq!((memory.named.mappings(), other.mappings(), other.descriptors()), (OWN + 1, 0, 1));
    queue.echo(&memory, "and in the next one");
}

#[test]
fn a_region_that_goes_is_answered_for_when_nothing_works_on_it() {
    let (mut front_end, memory, mut queue) = running();
    front_end.device.hold();
    queue.offer(&memory, 0, DATA, DATA + PAGE, 8);
    queue.kick();
    crate::driver::wait_until("take", || front_end.device.taken.lock().unwrap().len() == 1);
    // The same memory is no reason to wait.
    memory.announce(&mut front_end);
    let other = NamedMemory::new(MEMORY_LEN);
    front_end.send(Request::SetMemTable(vec![(region(0, MEMORY_LEN, 0), other.fd())]), true);
    assert!(!front_end.hears_something(), "answered while a request works on the old memory");
    front_end.device.release();
    assert!(front_end.receive().is_some());
    assert_eq!((memory.named.mappings(), other.mappings()), (OWN, 1));
    // It was completed into what the table has at the ring's place now.
    assert_eq!(memory.bytes(DATA + PAGE, 8), [0; 8]);
    assert_eq!(front_end.stop(0), 1);
}

#[test]
fn regions_come_and_go_by_slots() {
    let mut front_end = FrontEnd::negotiated();
    let memory = DriverMemory::new();
    let half = MEMORY_LEN / 2;
    front_end.done(Request::AddMemReg(region(0, half, 0), memory.named.fd()));
    front_end.done(Request::AddMemReg(region(half, half, half), memory.named.fd()));
    let mut queue = Queue::new(0);
    queue.start(&mut front_end, 0);
    queue.echo(&memory, "in the lower half");
    // From one half into the other: what spans them is two pieces.
    queue.offer(&memory, 2, half - 4, half + PAGE, 8);
    queue.kick();
    assert_eq!(queue.wait_used(&memory), (2, 8));
    front_end.refused(Request::RemMemReg(region(half, half + PAGE, half)));
    front_end.done(Request::RemMemReg(region(half, half, 0)));
    front_end.refused(Request::RemMemReg(region(half, half, 0)));
    assert_eq!(memory.named.mappings(), OWN + 1);
    queue.echo(&memory, "still");
    queue.offer(&memory, 4, half - 4, DATA, 8);
    queue.kick();
    wait_for(&queue.events.error, "err");
    assert!(front_end.device.faults.lock().unwrap()[0].contains("is not driver memory"));
}

#[test]
fn a_ring_survives_that_its_region_is_exchanged_for_a_larger_one() {
    let mut front_end = FrontEnd::negotiated();
    let memory = DriverMemory::new();
    let half = MEMORY_LEN / 2;
    front_end.done(Request::AddMemReg(region(0, half, 0), memory.named.fd()));
    let mut queue = Queue::new(0);
    queue.start(&mut front_end, 0);
    queue.echo(&memory, "before");
    // A request is in flight, and the driver kicks while the ring has no place.
    front_end.device.hold();
    queue.offer(&memory, 2, DATA, DATA + PAGE, 8);
    queue.kick();
    crate::driver::wait_until("take", || front_end.device.taken.lock().unwrap().len() == 2);
    front_end.send(Request::RemMemReg(region(0, half, 0)), true);
    front_end.device.release();
    queue.kick();
    // The request is done, lets go of the memory, and is returned when its ring has a place again.
    front_end.send(Request::AddMemReg(region(0, MEMORY_LEN, 0), memory.named.fd()), true);
    assert!(front_end.receive().is_some());
    assert!(front_end.receive().is_some());
    assert_eq!(queue.wait_used(&memory), (2, 8));
    queue.echo(&memory, "after");
    assert!(front_end.device.faults.lock().unwrap().is_empty());
}

#[test]
fn there_are_509_slots() {
    let mut front_end = FrontEnd::negotiated();
    let file = NamedMemory::new(PAGE);
    // Each at a distance, so that none are merged into one mapping.
    let slot = |index: u64| region(index * 2 * PAGE, PAGE, 0);
    for index in 0..509 {
        front_end.done(Request::AddMemReg(slot(index), file.fd()));
    }
    assert_eq!(file.mappings(), 509);
    front_end.refused(Request::AddMemReg(slot(509), file.fd()));
    front_end.done(Request::RemMemReg(slot(7)));
    front_end.done(Request::AddMemReg(slot(509), file.fd()));
    assert_eq!((file.mappings(), file.descriptors()), (509, 509 + 1));
}

#[test]
fn regions_that_cannot_be_are_refused_and_leave_nothing() {
    let (mut front_end, memory, mut queue) = running();
    let file = NamedMemory::new(4 * PAGE);
    let refused = [
        region(1 << 40, 8 * PAGE, 0),
        region(1 << 40, PAGE, 4 * PAGE),
        region(1 << 40, u64::MAX - PAGE + 1, PAGE),
        region(1 << 40, 0, 0),
        region(1 << 40, PAGE, 0x10),
        region(MEMORY_LEN - PAGE, PAGE, 0),
    ];
    for wrong in refused {
        front_end.refused(Request::AddMemReg(wrong, file.fd()));
        front_end.refused(Request::SetMemTable(vec![memory.region(), (wrong, file.fd())]));
    }
    let pipe = std::io::pipe().unwrap().0;
    front_end.refused(Request::AddMemReg(region(1 << 40, PAGE, 0), pipe.into()));
    assert_eq!((file.mappings(), file.descriptors()), (0, 1));
    queue.echo(&memory, "the table is what it was");
}

#[test]
fn cve_2020_10725_an_empty_descriptor_breaks_the_ring_only() {
    let (mut front_end, memory, mut queue) = running();
    queue.offer(&memory, 0, DATA, 1 << 50, 0);
    queue.kick();
    wait_for(&queue.events.error, "err");
    assert_eq!(front_end.stop(0), 0, "it was not taken");
    queue.set_indices(&memory, 0);
    queue.start(&mut front_end, 0);
    queue.echo(&memory, "a restart helps");
}

#[test]
fn a_table_without_the_rings_memory_breaks_the_ring_only() {
    let (mut front_end, memory, mut queue) = running();
    queue.echo(&memory, "before");
    let other = NamedMemory::new(PAGE);
    front_end.done(Request::SetMemTable(vec![(region(1 << 40, PAGE, 0), other.fd())]));
    wait_for(&queue.events.error, "err");
    assert_eq!(memory.named.mappings(), OWN);
    assert_eq!(front_end.stop(0), 1);
    memory.announce(&mut front_end);
    queue.start(&mut front_end, 1);
    queue.echo(&memory, "a restart helps");
    front_end.done(Request::SetVringEnable(VringState { index: 0, num: 0 }));
}
