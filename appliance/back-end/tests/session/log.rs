//! The dirty log, switched on and off under running rings.

use std::os::unix::fs::FileExt;

use vvu_protocol::address::FileOffset;
use vvu_protocol::features::Features;
use vvu_protocol::message::LogArea;

use crate::driver::{DATA, DriverMemory, MEMORY_LEN, PAGE, Queue, region, running, wait_until};
use crate::front_end::{FEATURES, FrontEnd, NamedMemory, Request};

/// Start of the log in its file.
const OFFSET: u64 = PAGE;

struct Log {
    file: NamedMemory,
    area: LogArea,
}

impl Log {
    /// A log for addresses up to `end`.
    fn new(end: u64) -> Self {
        let size = end.div_ceil(PAGE * 8);
        Self { file: NamedMemory::new(OFFSET + size), area: LogArea { size, mmap_offset: FileOffset(OFFSET) } }
    }

    fn announce(&self, front_end: &mut FrontEnd) {
        front_end.done(Request::SetLogBase(self.area, self.file.fd()));
    }

    /// Takes the addresses of all pages that are marked. Nobody may be marking.
    fn take(&self) -> Vec<u64> {
        let marked = self.marked();
        let zeroes = vec![0; usize::try_from(self.area.size).unwrap()];
        self.file.file.write_all_at(&zeroes, OFFSET).unwrap();
        marked
    }

    fn marked(&self) -> Vec<u64> {
        let mut bytes = vec![0; usize::try_from(self.area.size).unwrap()];
        self.file.file.read_exact_at(&mut bytes, OFFSET).unwrap();
        let bits = bytes.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1));
        (0u64..).zip(bits).filter(|(_, set)| *set).map(|(page, _)| page * PAGE).collect()
    }
}

/// Where the front-end wants the used ring of queue 0 logged: beyond all memory, as the specification allows.
const USED_LOG: u64 = MEMORY_LEN + 16 * PAGE;

fn switch(front_end: &mut FrontEnd, on: bool) {
    let features = if on { FEATURES | Features::LOG_ALL } else { FEATURES };
    front_end.done(Request::SetFeatures(features));
    front_end.done(Request::SetVringAddr(Queue::new(0).addresses(on.then_some(USED_LOG))));
}

#[test]
fn what_is_written_while_the_log_is_on_is_marked_and_nothing_else() {
    let (mut front_end, memory, mut queue) = running();
    let log = Log::new(MEMORY_LEN + 32 * PAGE);
    queue.echo(&memory, "before the log");
    log.announce(&mut front_end);
    queue.echo(&memory, "not switched on");
    assert!(log.take().is_empty());

    switch(&mut front_end, true);
    log.take();
    queue.echo(&memory, "logged");
    assert_eq!(log.take(), [DATA + 2 * PAGE, USED_LOG]);
    // A request that spans pages.
    queue.offer(&memory, 4, DATA, DATA + 5 * PAGE - 1, u32::try_from(PAGE).unwrap() + 2);
    queue.kick();
    queue.wait_used(&memory);
    assert_eq!(log.take(), [DATA + 4 * PAGE, DATA + 5 * PAGE, DATA + 6 * PAGE, USED_LOG]);

    switch(&mut front_end, false);
    log.take();
    queue.echo(&memory, "switched off");
    assert!(log.take().is_empty());
    switch(&mut front_end, true);
    log.take();
    queue.echo(&memory, "and on again");
    assert_eq!(log.take(), [DATA + 2 * PAGE, USED_LOG]);
    // The used ring alone can be left out.
    front_end.done(Request::SetVringAddr(queue.addresses(None)));
    log.take();
    queue.echo(&memory, "data only");
    assert_eq!(log.take(), [DATA + 2 * PAGE]);
}

#[test]
fn a_request_in_flight_at_the_switch_is_marked() {
    let (mut front_end, memory, mut queue) = running();
    let log = Log::new(MEMORY_LEN + 32 * PAGE);
    log.announce(&mut front_end);
    front_end.device.hold();
    queue.offer(&memory, 0, DATA, DATA + 3 * PAGE, 8);
    queue.kick();
    wait_until("take", || front_end.device.taken.lock().unwrap().len() == 1);
    switch(&mut front_end, true);
    log.take();
    front_end.device.release();
    queue.wait_used(&memory);
    assert_eq!(log.take(), [DATA + 3 * PAGE, USED_LOG]);
}

#[test]
fn a_ring_that_starts_with_the_log_marks_its_used_ring_once() {
    // What a back-end that was killed has written last may not have been marked.
    let mut front_end = FrontEnd::negotiated();
    let memory = DriverMemory::new();
    memory.announce(&mut front_end);
    let log = Log::new(MEMORY_LEN);
    log.announce(&mut front_end);
    front_end.done(Request::SetFeatures(FEATURES | Features::LOG_ALL));
    let mut queue = Queue::new(0);
    // Its entries have another page of the log than its index, which is written anyway.
    let address = queue.used - 4;
    queue.set_up(&mut front_end, 0, queue.addresses(Some(address)));
    front_end.start(0, &queue.events);
    wait_until("mark", || log.marked().contains(&queue.used));
    queue.echo(&memory, "and goes on");
    assert!(log.marked().contains(&(DATA + 2 * PAGE)));
}

#[test]
fn a_region_that_comes_later_is_logged_and_has_to_be_covered() {
    let (mut front_end, memory, mut queue) = running();
    let log = Log::new(2 * MEMORY_LEN);
    log.announce(&mut front_end);
    switch(&mut front_end, true);
    let late = NamedMemory::new(PAGE);
    front_end.done(Request::AddMemReg(region(MEMORY_LEN, PAGE, 0), late.fd()));
    log.take();
    queue.offer(&memory, 0, DATA, MEMORY_LEN, 8);
    queue.kick();
    queue.wait_used(&memory);
    assert_eq!(log.take(), [MEMORY_LEN, USED_LOG]);
    let file = NamedMemory::new(PAGE);
    front_end.refused(Request::AddMemReg(region(2 * MEMORY_LEN, PAGE, 0), file.fd()));
    front_end.refused(Request::SetMemTable(vec![memory.region(), (region(2 * MEMORY_LEN, PAGE, 0), file.fd())]));
    // A longer one takes its place, and the old one is let go of.
    let longer = Log::new(4 * MEMORY_LEN);
    longer.announce(&mut front_end);
    assert_eq!((log.file.mappings(), log.file.descriptors()), (0, 1));
    front_end.done(Request::AddMemReg(region(2 * MEMORY_LEN, PAGE, 0), file.fd()));
    longer.take();
    queue.echo(&memory, "in the longer one");
    assert_eq!(longer.take(), [DATA + 2 * PAGE, USED_LOG]);
}

#[test]
fn cve_2020_10722_a_log_that_overflows_or_is_too_short_is_refused() {
    for area in [
        LogArea { size: u64::MAX, mmap_offset: FileOffset(PAGE) },
        LogArea { size: PAGE, mmap_offset: FileOffset(u64::MAX - PAGE + 1) },
        LogArea { size: 3 * PAGE, mmap_offset: FileOffset(0) },
        LogArea { size: 0, mmap_offset: FileOffset(0) },
        // Fits the file, but not memory: one bit for each page but the last eight.
        LogArea { size: MEMORY_LEN / PAGE / 8 - 1, mmap_offset: FileOffset(0) },
    ] {
        let (mut front_end, _memory, _queue) = running();
        let file = NamedMemory::new(2 * PAGE);
        front_end.send(Request::SetLogBase(area, file.fd()), true);
        assert!(front_end.receive().is_none(), "{area:?}");
        assert!(front_end.outcome().is_err());
        assert_eq!((file.mappings(), file.descriptors()), (0, 1));
    }
}

#[test]
fn a_used_ring_that_the_log_does_not_cover_breaks_the_ring_only() {
    let (mut front_end, memory, mut queue) = running();
    let log = Log::new(MEMORY_LEN);
    log.announce(&mut front_end);
    front_end.done(Request::SetFeatures(FEATURES | Features::LOG_ALL));
    for address in [MEMORY_LEN, MEMORY_LEN - 8, u64::MAX - 8] {
        front_end.done(Request::SetVringAddr(queue.addresses(Some(address))));
        crate::front_end::wait_for(&queue.events.error, "err");
        let base = u16::try_from(front_end.stop(0)).unwrap();
        queue.start(&mut front_end, base);
        queue.echo(&memory, "a restart helps");
    }
    front_end.done(Request::SetLogFd(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()));
}
