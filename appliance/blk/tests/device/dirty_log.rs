//! Migration of the driver VM: whatever the device writes while the log is on is marked, and nothing else has to be.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory};

use crate::driver::region_of;
use crate::driver::{
    ACCESS_PLATFORM, DATA, EVENT_IDX, FrontEnd, LOG_ALL, Queue, REGION_LEN, Req, map_region, memfd, noise,
};
use crate::process::{ImageFile, Program};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Where the third region begins that is added while the log is on, and where the log ends.
const ADDED: u64 = 2 * REGION_LEN;
const END: u64 = 3 * REGION_LEN;

/// A page that only the used ring's log address speaks of; no memory is there.
const USED_LOG: u64 = END - 16 * PAGE;

/// The front-end's log: mapped as memory of its own, so that bits are taken as a front-end takes them.
struct Log {
    file: File,
    map: GuestMemoryMmap<()>,
}

/// The log begins somewhere in its file.
const LOG_OFFSET: u64 = PAGE;
const LOG_LEN: u64 = END / PAGE / 8;

impl Log {
    fn new() -> Self {
        let file = memfd(LOG_OFFSET + LOG_LEN.next_multiple_of(PAGE));
        let map = map_region(&file, &region_of(&file, 0, LOG_OFFSET + LOG_LEN.next_multiple_of(PAGE), 0));
        Self { file, map: GuestMemoryMmap::from_regions(vec![map]).unwrap() }
    }

    fn announce(&self, front_end: &FrontEnd) {
        let region =
            VhostUserDirtyLogRegion { mmap_size: LOG_LEN, mmap_offset: LOG_OFFSET, mmap_handle: self.file.as_raw_fd() };
        front_end.frontend.set_log_base(0, Some(region)).unwrap();
    }

    /// The pages that are marked. The log is empty afterwards.
    fn take(&self) -> BTreeSet<u64> {
        let slice = self.map.get_slice(GuestAddress(LOG_OFFSET), LOG_LEN as usize).unwrap();
        let mut pages = BTreeSet::new();
        for byte in 0..LOG_LEN {
            let bits = slice.get_atomic_ref::<AtomicU8>(byte as usize).unwrap().swap(0, Ordering::AcqRel);
            pages.extend((0..8).filter(|bit| bits >> bit & 1 == 1).map(|bit| byte * 8 + bit));
        }
        pages
    }
}

fn pages(address: u64, len: u64) -> impl Iterator<Item = u64> {
    address / PAGE..=(address + len - 1) / PAGE
}

fn connect(program: &Program) -> FrontEnd {
    let protocol = VhostUserProtocolFeatures::LOG_SHMFD | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    // Each completion is to be notified, and the log is off at first.
    let choose = |offered| {
        assert_ne!(offered & LOG_ALL, 0);
        offered & !(EVENT_IDX | ACCESS_PLATFORM | LOG_ALL)
    };
    FrontEnd::connect_for(&program.socket(), choose, protocol)
}

/// Switches the log on or off as a front-end does, while the ring runs.
fn switch(front_end: &FrontEnd, queue: &mut Queue, on: bool) {
    let features = front_end.features | if on { LOG_ALL } else { 0 };
    front_end.frontend.set_features(features).unwrap();
    queue.log_address = on.then_some(USED_LOG);
    queue.announce_addresses(&front_end.frontend);
}

/// Does a request and returns what it has written: data if it reads, status, used element and index.
fn run(front_end: &FrontEnd, queue: &mut Queue, request: &Req) -> BTreeSet<u64> {
    let element = 4 + 8 * u64::from(queue.used_seen % queue.size);
    queue.run_ok(&front_end.memory, request);
    let mut written: BTreeSet<u64> = pages(queue.status_address(0), 1).collect();
    written.extend(pages(USED_LOG + element, 8).chain(pages(USED_LOG + 2, 2)));
    if request.to_driver {
        written.extend(request.data.iter().flat_map(|(address, len)| pages(*address, u64::from(*len))));
    }
    written
}

/// Bytes that lie on few and many pages, in place and by a bounce buffer, in both regions and over their border.
fn reads() -> Vec<Req> {
    let one = |address, len| Req::read(8, address, len);
    vec![
        one(DATA, 512),
        one(DATA + PAGE - 512, 1024),
        one(DATA + 10 * PAGE + 1, 4096),
        one(DATA + 20 * PAGE + 3, 300 * 512),
        one(REGION_LEN - PAGE, 8192),
        one(REGION_LEN - 5, 512 * 9),
        one(REGION_LEN + MIB, MIB as u32),
        Req { data: vec![(DATA, 512), (DATA + 7 * PAGE, 512), (REGION_LEN + 9 * PAGE + 100, 1024)], ..one(0, 0) },
        Req::get_id(DATA + 5 * PAGE - 10),
    ]
}

#[test]
fn what_the_device_writes_is_marked_as_long_as_the_log_is_on() {
    let image = ImageFile::new(4 * MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = connect(&program);
    let mut queue = front_end.queue(0, 64);
    let log = Log::new();
    log.announce(&front_end);
    for round in 0..3 {
        for request in reads() {
            run(&front_end, &mut queue, &request);
        }
        assert_eq!(log.take(), BTreeSet::new(), "marked while the log is off, round {round}");
        switch(&front_end, &mut queue, true);
        log.take();
        for request in reads() {
            for use_indirect in [false, true] {
                queue.use_indirect = use_indirect;
                let written = run(&front_end, &mut queue, &request);
                let marked = log.take();
                let missing: Vec<_> = written.difference(&marked).collect();
                assert!(missing.is_empty(), "pages {missing:x?} were written and not marked: {request:x?}");
                // A little more costs only time, but no page of the disk's content may go along for nothing.
                let surplus = marked.difference(&written).filter(|page| **page * PAGE >= DATA).count();
                assert_eq!(surplus, 0, "marked {marked:x?}, written {written:x?}");
            }
        }
        // The other direction writes no data.
        let written = run(&front_end, &mut queue, &Req::write(0, DATA, MIB as u32));
        let marked = log.take();
        assert!(written.is_subset(&marked) && !marked.contains(&(DATA / PAGE)), "{marked:x?}");
        switch(&front_end, &mut queue, false);
        log.take();
    }
}

#[test]
fn a_region_that_is_added_while_the_log_is_on_is_covered() {
    let image = ImageFile::new(4 * MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = connect(&program);
    let mut queue = front_end.queue(0, 64);
    let log = Log::new();
    log.announce(&front_end);
    switch(&front_end, &mut queue, true);
    let file = memfd(REGION_LEN);
    let region = region_of(&file, ADDED, REGION_LEN, 0);
    front_end.frontend.add_mem_region(&region).unwrap();
    front_end.memory = front_end.memory.insert_region(map_region(&file, &region).into()).unwrap();
    log.take();
    for request in
        [Req::read(0, ADDED, 4096), Req::read(0, ADDED + 5 * MIB + 7, 65536), Req::read(0, ADDED - 512, 1024)]
    {
        let written = run(&front_end, &mut queue, &request);
        let marked = log.take();
        assert!(written.is_subset(&marked), "{written:x?} {marked:x?}");
    }
    // The other way round: a log that comes after the region, in place of the former one.
    let second = Log::new();
    second.announce(&front_end);
    let written = run(&front_end, &mut queue, &Req::read(0, ADDED + MIB, 4096));
    assert!(written.is_subset(&second.take()));
    assert_eq!(log.take(), BTreeSet::new(), "the former log is written to");
}

/// The switch is answered when it holds for requests in flight too.
#[test]
fn requests_in_flight_when_the_log_goes_on_are_marked() {
    let image = ImageFile::new(0);
    // Holes would be read in no time.
    std::fs::write(image.path(), noise((u64::from(FLOOD) * FLOOD_LEN) as usize, 1)).unwrap();
    let program = Program::start(&image.path(), &[]);
    // On a busy machine all may be done before the log is on, and prove nothing.
    assert!((0..20).any(|_| switch_on_under_load(&program)), "the requests were too quick each time");
}

const FLOOD: u16 = 24;
const FLOOD_LEN: u64 = 8 * MIB;

/// True if some requests were in flight when the log went on.
fn switch_on_under_load(program: &Program) -> bool {
    let mut front_end = connect(program);
    let mut queue = front_end.queue(0, 1024);
    let log = Log::new();
    log.announce(&front_end);
    let data: Vec<_> = (0..FLOOD_LEN / MIB).map(|index| (DATA + index * MIB, MIB as u32)).collect();
    for index in 0..FLOOD {
        let request = Req { data: data.clone(), ..Req::read(u64::from(index) * FLOOD_LEN / 512, 0, 0) };
        queue.offer_request(&front_end.memory, index * 10, &request);
    }
    queue.publish(&front_end.memory);
    queue.kick();
    queue.wait_used(&front_end.memory);
    switch(&front_end, &mut queue, true);
    let before = queue.used_index(&front_end.memory);
    while queue.used_seen < FLOOD {
        queue.wait_used(&front_end.memory);
    }
    if before == FLOOD {
        return false;
    }
    let marked = log.take();
    let missing = pages(DATA, FLOOD_LEN).filter(|page| !marked.contains(page)).count();
    assert_eq!(missing, 0, "pages of requests that were in flight when the log went on");
    assert!(marked.contains(&(USED_LOG / PAGE)));
    true
}

/// Memory is compared byte by byte: pages that differ are marked, whatever the device thinks that it wrote.
#[test]
fn no_page_changes_without_a_mark() {
    const SPAN: u64 = 2 * MIB;
    let image = ImageFile::new(8 * MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = connect(&program);
    let mut queue = front_end.queue(0, 64);
    front_end.fill(DATA, &noise(8 * MIB as usize, 3));
    for index in 0..8 {
        queue.run_ok(&front_end.memory, &Req::write(index * 2048, DATA + index * MIB, MIB as u32));
    }
    let log = Log::new();
    log.announce(&front_end);
    switch(&front_end, &mut queue, true);
    log.take();
    let mut state = 7_u64;
    for _ in 0..60 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (offset, sectors, sector) = (state >> 20 & 0x7_ffff, (state >> 40 & 0x1ff) + 1, state >> 50 & 0xfff);
        let before = front_end.bytes(DATA, SPAN as usize);
        let request = Req::read(sector, DATA + offset, (sectors * 512) as u32);
        queue.run_ok(&front_end.memory, &request);
        let after = front_end.bytes(DATA, SPAN as usize);
        let marked = log.take();
        for (index, (before, after)) in before.chunks(PAGE as usize).zip(after.chunks(PAGE as usize)).enumerate() {
            let page = DATA / PAGE + index as u64;
            assert!(
                before == after || marked.contains(&page),
                "page {page:#x} has changed without a mark: {request:?}"
            );
        }
    }
}

#[test]
fn a_log_that_is_too_short_is_refused() {
    let image = ImageFile::new(MIB);
    let mut program = Program::start(&image.path(), &[]);
    let log = Log::new();
    // CVE-2020-10722: offset and size overflow; beyond the file; less than the memory needs.
    for (offset, size) in [(u64::MAX - 4095, 4096), (LOG_OFFSET, 1 << 40), (LOG_OFFSET + 2 * LOG_LEN, LOG_LEN), (0, 1)]
    {
        let front_end = connect(&program);
        let region =
            VhostUserDirtyLogRegion { mmap_size: size, mmap_offset: offset, mmap_handle: log.file.as_raw_fd() };
        let refused = front_end.frontend.set_log_base(0, Some(region)).is_err();
        let switched = front_end.frontend.set_features(front_end.features | LOG_ALL).is_ok();
        assert!(refused || !switched, "{offset:#x} {size:#x}");
        drop(front_end);
        assert!(program.is_alive());
    }
}
