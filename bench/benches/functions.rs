//! What single functions take, by criterion: messages as the bridge and the agent read and write them, a memory table's places in
//! the window, and a round of the back-end's ring.
//!
//! `cargo xtask bench functions` runs it.

#![expect(clippy::unwrap_used, reason = "a benchmark that meets the unexpected is to fail right there")]

use std::hint::black_box;
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use criterion::Criterion;
use rustix::event::{PollFd, PollFlags, poll};
use vvu_back_end::{Chain, Device, Ring as DeviceRing, Service};
use vvu_bench::connection::{Connection, EVENT_IDX, Signals};
use vvu_bench::memory::{Layout, Memory};
use vvu_bench::ring::{Descriptor, NEXT, Place, Ring, WRITE};
use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress};
use vvu_protocol::features::Features;
use vvu_protocol::memory::{MAX_TABLE_REGIONS, MemoryRegion};
use vvu_protocol::message::{FrontEndRequest, VringState};
use vvu_protocol::window::{self, FileId, RegionOfFile};

/// Requests in a round of the ring, of three descriptors each.
const BATCH: u16 = 32;

/// Entries of the ring.
const SIZE: u16 = 128;

const GIB: u64 = 1 << 30;

/// A memory table with as many regions as it can have, from one file.
fn table() -> Vec<MemoryRegion> {
    let region = |index: u64| MemoryRegion {
        guest_address: GuestAddress(index * GIB),
        size: GIB / 2,
        user_address: UserAddress(0x7f00_0000_0000 + index * GIB),
        mmap_offset: FileOffset(index * GIB / 2),
    };
    (0..MAX_TABLE_REGIONS as u64).map(region).collect()
}

fn messages(criterion: &mut Criterion) {
    let enable = FrontEndRequest::<()>::SetVringEnable(VringState { index: 3, num: 1 }).encode(true);
    let table: Vec<_> = table().into_iter().map(|region| (region, ())).collect();
    let table = FrontEndRequest::SetMemTable(table).encode(true);
    for (name, message) in [("SET_VRING_ENABLE", enable), ("SET_MEM_TABLE, 8 regions", table)] {
        criterion.bench_function(&format!("decode {name}"), |bencher| {
            bencher.iter(|| FrontEndRequest::decode(black_box(message.clone())).unwrap());
        });
        let request = FrontEndRequest::decode(message).unwrap();
        criterion.bench_function(&format!("encode {name}"), |bencher| {
            bencher.iter(|| black_box(request.clone()).encode(true).to_bytes());
        });
    }
}

fn memory_table(criterion: &mut Criterion) {
    let file = FileId { device: 1, inode: 7 };
    let file_len = MAX_TABLE_REGIONS as u64 * GIB / 2;
    let table: Vec<_> = table().into_iter().map(|region| RegionOfFile { region, file, file_len }).collect();
    let mut layout = window::Layout::new(4 * GIB).unwrap();
    criterion.bench_function("window: a new table of 8 regions", |bencher| {
        bencher.iter(|| layout.plan(black_box(&table)).unwrap());
    });
    let plan = layout.plan(&table).unwrap();
    layout.commit(&plan);
    criterion.bench_function("window: the same table again", |bencher| {
        bencher.iter(|| layout.plan(black_box(&table)).unwrap());
    });
}

/// A device that gives its ring away, and does nothing else.
struct Giver(Mutex<Sender<DeviceRing>>);

impl Device for Giver {
    fn queue_count(&self) -> u16 {
        1
    }

    fn max_queue_size(&self) -> u16 {
        SIZE
    }

    fn features(&self) -> Features {
        Features::VERSION_1 | Features::EVENT_IDX
    }

    fn reset(&self) {}

    fn serve(&self, service: Service<'_>) {
        self.0.lock().unwrap().send(service.open_ring().unwrap()).unwrap();
        while !service.should_stop() {
            poll(&mut [PollFd::new(&**service.wakeup(), PollFlags::IN)], None).unwrap();
            service.wakeup().consume();
            service.update(None);
        }
    }
}

/// The back-end's side of a ring, as its session has opened it, and the driver's.
fn ring(criterion: &mut Criterion) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("ring.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let (sender, rings): (_, Receiver<DeviceRing>) = channel();
    let session = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        vvu_back_end::Connection::new(stream, Arc::new(Giver(Mutex::new(sender)))).serve().unwrap();
    });

    let mut layout = Layout::default();
    let place = Place::take(&mut layout, SIZE);
    let data = layout.take(4096, 4096);
    let memory = Memory::new(layout.len()).unwrap();
    let signals = Signals::new().unwrap();
    let mut connection = Connection::open(&socket, EVENT_IDX).unwrap();
    connection.announce_memory(&memory).unwrap();
    for head in (0..3 * BATCH).step_by(3) {
        for (part, flags) in [(0, NEXT), (1, NEXT | WRITE), (2, WRITE)] {
            let descriptor = Descriptor { address: data, len: 16, flags, next: head + part + 1 };
            descriptor.write(&memory, place.descriptor(head + part)).unwrap();
        }
    }
    connection.start_queue(0, place, &signals).unwrap();
    let mut device = rings.recv().unwrap();
    device.place().unwrap();
    let mut driver = Ring::new(&memory, place, true);
    let mut chain = Chain::new(0);
    criterion.bench_function("ring: 32 chains of 3 descriptors", |bencher| {
        bencher.iter(|| round(&mut driver, &mut device, &mut chain));
    });
    drop(device);
    connection.stop_queue(0).unwrap();
    drop(connection);
    session.join().unwrap();
}

/// The driver offers chains; the device walks them and gives them back.
fn round(driver: &mut Ring<'_>, device: &mut DeviceRing, chain: &mut Chain) {
    for head in (0..3 * BATCH).step_by(3) {
        driver.offer(head).unwrap();
    }
    driver.publish().unwrap();
    for _ in 0..device.available().unwrap() {
        let head = device.peek().unwrap();
        device.walk(head, chain).unwrap();
        device.take(head);
        device.put_used(head, 17).unwrap();
    }
    device.publish().unwrap();
    for _ in 0..BATCH {
        driver.take().unwrap().unwrap();
    }
    driver.ask_for_calls(true).unwrap();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    messages(&mut criterion);
    memory_table(&mut criterion);
    ring(&mut criterion);
    criterion.final_summary();
}
