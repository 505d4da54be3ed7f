//! The driver VM has an IOMMU: the device knows I/O addresses only, asks for each that it has not seen, and forgets when it is
//! told to.
//!
//! Pages that adjoin in I/O addresses lie apart in memory, in both regions, so that nothing works by chance.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vvu_protocol::message::{BackEndRequest, Iotlb};

use crate::back_channel::{BackChannel, send_iotlb};
use crate::driver::{ACCESS_PLATFORM, DATA, FrontEnd, LOG_ALL, Queue, REGION_LEN, Req, USER_BASE, noise, wait_event};
use crate::process::{ImageFile, Program};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Start of the I/O addresses; I/O address less this is the driver's idea of an address.
const IO_BASE: u64 = 0x5a00_0000_0000;

/// Data that the tests use: its pages are scattered.
const DATA_END: u64 = DATA + 16 * MIB;

const READ: u8 = 1;
const BOTH: u8 = 3;

const MISS: u8 = 1;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;

/// Where a page of the driver's addresses lies in memory, before any change.
fn place(page: u64) -> u64 {
    let data = (DATA / PAGE..DATA_END / PAGE).contains(&page);
    // Neighbours change places, and every other pair lies in the other region.
    if data { (page ^ 1) + (page >> 1 & 1) * (REGION_LEN / PAGE) } else { page }
}

/// What the IOMMU says.
#[derive(Default)]
struct Table {
    /// Pages that differ from [`place`] and [`BOTH`]: place and permissions.
    changed: BTreeMap<u64, (u64, u8)>,
    /// Misses of each page.
    misses: BTreeMap<u64, u64>,
    /// No answer until this is taken back.
    silent: bool,
}

struct Shared {
    table: Mutex<Table>,
    changed: Condvar,
    /// The main channel: one exchange at a time.
    stream: Mutex<UnixStream>,
}

/// A front-end that answers misses on a thread of its own.
struct Iommu {
    front_end: FrontEnd,
    shared: Arc<Shared>,
    channel: BackChannel,
    thread: Option<JoinHandle<()>>,
}

impl Iommu {
    fn connect(program: &Program) -> Self {
        let choose = |offered| {
            assert_ne!(offered & ACCESS_PLATFORM, 0);
            offered & !LOG_ALL
        };
        let mut front_end = FrontEnd::connect_for(&program.socket(), choose, VhostUserProtocolFeatures::BACKEND_REQ);
        let channel = BackChannel::open(&mut front_end);
        let stream = Mutex::new(front_end.stream.try_clone().unwrap());
        let shared = Arc::new(Shared { table: Mutex::default(), changed: Condvar::new(), stream });
        let (answering, answers) = (channel.try_clone(), Arc::clone(&shared));
        let thread = Some(std::thread::spawn(move || answer_misses(answering, &answers)));
        Self { front_end, shared, channel, thread }
    }

    fn queue(&mut self, size: u16) -> Queue {
        let mut queue = self.front_end.idle_queue(0, size);
        (queue.address_base, queue.io_base) = (IO_BASE, IO_BASE);
        self.start(&mut queue, 0);
        queue
    }

    fn start(&mut self, queue: &mut Queue, base: u16) {
        // Misses are answered between the messages only, so none may wait for a miss.
        let _exchange = self.shared.stream.lock().unwrap();
        queue.start(&mut self.front_end, base);
    }

    fn stop(&mut self, queue: &Queue) -> u16 {
        let _exchange = self.shared.stream.lock().unwrap();
        queue.stop(&self.front_end)
    }

    fn table(&self, change: impl FnOnce(&mut Table)) {
        change(&mut self.shared.table.lock().unwrap());
        self.shared.changed.notify_all();
    }

    fn misses(&self, address: u64) -> u64 {
        self.shared.table.lock().unwrap().misses.get(&(address / PAGE)).copied().unwrap_or(0)
    }

    fn send(&self, kind: u8, address: u64, size: u64, user_address: u64, permission: u8) -> bool {
        let message = Iotlb { iova: IO_BASE + address, size, user_address, permission, kind };
        send_iotlb(&mut self.shared.stream.lock().unwrap(), message)
    }

    /// Moves pages and takes the former mapping back.
    fn remap(&self, address: u64, len: u64, change: impl Fn(u64) -> (u64, u8)) {
        self.table(|table| {
            table.changed.extend((address / PAGE..(address + len).div_ceil(PAGE)).map(|page| (page, change(page))));
        });
        assert!(self.send(INVALIDATE, address, len, 0, 0));
    }

    /// The pieces of a range of the driver's addresses, by pages.
    fn pieces(&self, address: u64, len: u64) -> Vec<(u64, u64)> {
        let table = self.shared.table.lock().unwrap();
        let mut pieces = Vec::new();
        let mut at = address;
        while at < address + len {
            let end = ((at / PAGE + 1) * PAGE).min(address + len);
            let page = table.changed.get(&(at / PAGE)).map_or_else(|| place(at / PAGE), |(page, _)| *page);
            pieces.push((page * PAGE + at % PAGE, end - at));
            at = end;
        }
        pieces
    }

    fn fill(&self, address: u64, bytes: &[u8]) {
        let mut rest = bytes;
        for (at, len) in self.pieces(address, bytes.len() as u64) {
            let (now, later) = rest.split_at(len as usize);
            self.front_end.fill(at, now);
            rest = later;
        }
    }

    fn bytes(&self, address: u64, len: u64) -> Vec<u8> {
        self.pieces(address, len).into_iter().flat_map(|(at, len)| self.front_end.bytes(at, len as usize)).collect()
    }
}

impl Drop for Iommu {
    fn drop(&mut self) {
        self.table(|table| table.silent = false);
        self.channel.close();
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

fn answer_misses(mut channel: BackChannel, shared: &Shared) {
    while let Some((request, needs_reply)) = channel.next() {
        let BackEndRequest::Iotlb(Iotlb { iova, permission, kind: MISS, .. }) = request else { panic!("{request:?}") };
        let page = iova.checked_sub(IO_BASE).unwrap() / PAGE;
        let (place, allowed) = {
            let mut table = shared.table.lock().unwrap();
            *table.misses.entry(page).or_default() += 1;
            let table = shared.changed.wait_while(table, |table| table.silent).unwrap();
            table.changed.get(&page).copied().unwrap_or((place(page), BOTH))
        };
        if allowed & permission == permission {
            let message = Iotlb {
                iova: IO_BASE + page * PAGE,
                size: PAGE,
                user_address: USER_BASE + place * PAGE,
                permission: allowed,
                kind: UPDATE,
            };
            assert!(send_iotlb(&mut shared.stream.lock().unwrap(), message));
        }
        if needs_reply {
            channel.answer(1, u64::from(allowed & permission != permission));
        }
    }
}

#[test]
fn requests_go_where_the_iommu_says_and_known_pages_are_not_asked_for() {
    let image = ImageFile::new(4 * MIB);
    let program = Program::start(&image.path(), &[]);
    let mut iommu = Iommu::connect(&program);
    let mut queue = iommu.queue(64);
    let mut misses = Vec::new();
    for round in 0..2 {
        // Within a page, over many, in place and by a bounce buffer.
        for (offset, len) in [(0, 512), (PAGE - 512, 1024), (6 * PAGE, MIB), (300 * PAGE + 100, 300 * 512)] {
            queue.use_indirect = round == 1;
            let data = noise(len as usize, offset + round);
            iommu.fill(DATA + offset, &data);
            queue.run_ok(&iommu.front_end.memory, &Req::write(512, DATA + offset, len as u32));
            assert!(image.content()[512 * 512..][..len as usize] == data, "written {offset} {len}");
            let other = DATA + 8 * MIB + offset;
            queue.run_ok(&iommu.front_end.memory, &Req::read(512, other, len as u32));
            assert!(iommu.bytes(other, len) == data, "read {offset} {len}");
        }
        misses.push(iommu.shared.table.lock().unwrap().misses.clone());
    }
    assert!(misses[0].len() > 2 * 256, "{} pages", misses[0].len());
    assert_eq!(misses[0], misses[1], "the second time everything is known");
}

#[test]
fn what_was_invalidated_is_not_used_any_more() {
    let image = ImageFile::new(4 * MIB);
    let program = Program::start(&image.path(), &[]);
    let mut iommu = Iommu::connect(&program);
    let mut queue = iommu.queue(64);
    let data = noise(65536, 1);
    iommu.fill(DATA, &data);
    queue.run_ok(&iommu.front_end.memory, &Req::write(0, DATA, 65536));
    for round in 0..10_u64 {
        let target = DATA + MIB;
        queue.run_ok(&iommu.front_end.memory, &Req::read(0, target, 65536));
        assert!(iommu.bytes(target, 65536) == data);
        // The pages become somebody else's.
        let before = iommu.pieces(target, 65536);
        iommu.remap(target, 65536, |page| (page + 2048 + round * 16, BOTH));
        for (at, len) in &before {
            iommu.front_end.fill(*at, &vec![0x55; *len as usize]);
        }
        queue.run_ok(&iommu.front_end.memory, &Req::read(0, target, 65536));
        assert!(iommu.bytes(target, 65536) == data, "round {round}");
        for (at, len) in before {
            assert!(iommu.front_end.bytes(at, len as usize).iter().all(|byte| *byte == 0x55), "round {round}");
        }
        assert_eq!(iommu.misses(target), round + 2);
    }
}

/// The rings themselves move while they are in use.
#[test]
fn rings_that_are_invalidated_are_asked_for_again() {
    let image = ImageFile::new(4 * MIB);
    let program = Program::start(&image.path(), &[]);
    let mut iommu = Iommu::connect(&program);
    let mut queue = iommu.queue(64);
    for _ in 0..10 {
        queue.run_ok(&iommu.front_end.memory, &Req::read(0, DATA, 4096));
        let misses = [queue.desc, queue.avail, queue.used].map(|address| iommu.misses(address));
        assert!(iommu.send(INVALIDATE, 0, DATA, 0, 0));
        queue.run_ok(&iommu.front_end.memory, &Req::read(0, DATA, 4096));
        for (address, before) in [queue.desc, queue.avail, queue.used].into_iter().zip(misses) {
            assert_eq!(iommu.misses(address), before + 1, "{address:#x}");
        }
    }
}

#[test]
fn what_the_iommu_forbids_breaks_the_ring_and_not_the_process() {
    let image = ImageFile::new(4 * MIB);
    let mut program = Program::start(&image.path(), &[]);
    for permission in [0, READ] {
        let mut iommu = Iommu::connect(&program);
        let mut queue = iommu.queue(64);
        let target = DATA + 2 * MIB;
        iommu.front_end.fill(place(target / PAGE) * PAGE, &[7; 4096]);
        iommu.remap(target, PAGE, |page| (place(page), permission));
        if permission == READ {
            queue.run_ok(&iommu.front_end.memory, &Req::write(0, target, 4096));
            assert_eq!(image.content()[..4096], [7; 4096]);
        }
        let before = iommu.misses(target);
        queue.offer_request(&iommu.front_end.memory, 0, &Req::read(8, target, 4096));
        queue.publish(&iommu.front_end.memory);
        queue.kick();
        wait_event(&queue.error, "err");
        assert_eq!(iommu.front_end.bytes(place(target / PAGE) * PAGE, 4096), [7; 4096]);
        assert!((1..=2).contains(&(iommu.misses(target) - before)), "asked {} times", iommu.misses(target) - before);
        iommu.stop(&queue);
        assert!(program.is_alive());
    }
}

/// A front-end that does not answer may stop the ring, and nothing is lost.
#[test]
fn a_ring_that_waits_for_a_mapping_can_be_stopped() {
    let image = ImageFile::new(4 * MIB);
    let program = Program::start(&image.path(), &[]);
    let mut iommu = Iommu::connect(&program);
    let mut queue = iommu.queue(64);
    queue.run_ok(&iommu.front_end.memory, &Req::read(0, DATA, 4096));
    iommu.table(|table| table.silent = true);
    let target = DATA + 3 * MIB;
    queue.offer_request(&iommu.front_end.memory, 0, &Req::read(0, target, 4096));
    queue.publish(&iommu.front_end.memory);
    queue.kick();
    crate::driver::wait_until("a miss", || iommu.misses(target) == 1);
    assert_eq!(iommu.stop(&queue), 1, "the request was not taken");
    iommu.table(|table| table.silent = false);
    iommu.start(&mut queue, 1);
    assert_eq!(queue.wait_used(&iommu.front_end.memory).0, 0);
    assert_eq!(queue.status(&iommu.front_end.memory, 0), 0);
}

#[test]
fn messages_that_are_wrong_are_refused_and_mappings_outside_of_memory_lead_nowhere() {
    let image = ImageFile::new(MIB);
    let mut program = Program::start(&image.path(), &[]);
    let mut iommu = Iommu::connect(&program);
    let mut queue = iommu.queue(64);
    let target = DATA + 5 * MIB;
    for (kind, size, user_address, permission) in [
        (UPDATE, 0, USER_BASE, BOTH),
        (UPDATE, u64::MAX, USER_BASE, BOTH),
        (UPDATE, PAGE, u64::MAX - 10, BOTH),
        (UPDATE, PAGE, USER_BASE, 0x13),
        (MISS, PAGE, USER_BASE, BOTH),
        (4, PAGE, USER_BASE, BOTH),
        (77, PAGE, USER_BASE, BOTH),
    ] {
        assert!(!iommu.send(kind, target, size, user_address, permission), "{kind} {size:#x} {user_address:#x}");
    }
    queue.run_ok(&iommu.front_end.memory, &Req::read(0, target, 4096));
    assert_eq!(iommu.misses(target), 1, "none of them has left a mapping");
    // Refused, or taken and of no use.
    iommu.send(UPDATE, target, PAGE, USER_BASE + 4 * REGION_LEN, BOTH);
    if iommu.send(UPDATE, target, 2 * PAGE, USER_BASE + 2 * REGION_LEN - PAGE, BOTH) {
        queue.offer_request(&iommu.front_end.memory, 0, &Req::read(0, target, 8192));
        queue.publish(&iommu.front_end.memory);
        queue.kick();
        wait_event(&queue.error, "err");
    }
    assert!(program.is_alive());
}
