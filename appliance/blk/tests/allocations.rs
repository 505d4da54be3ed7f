//! No request allocates anything, once as many as the queue holds have been done.

#![expect(clippy::unwrap_used, reason = "a test that meets the unexpected is to fail right there")]

use std::path::PathBuf;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vm_memory::{Bytes, GuestAddress};
use vvu_back_end::listener::Endpoint;
use vvu_back_end::polling::PollMode;
use vvu_back_end::rate_limit::Limits;
use vvu_back_end::threads::Threads;
use vvu_blk::Format;
use vvu_blk::daemon::{Options, Storage, run};
use vvu_test_driver::allocations::{CountingAllocator, allocations_in};
use vvu_test_driver::event::wait_until;
use vvu_test_driver::front_end::{FrontEnd, ORDINARY};
use vvu_test_driver::queue::Queue;
use vvu_test_driver::ring::{Desc, NEXT, WRITE};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const REGION_LEN: u64 = 64 << 20;
const DEPTH: u16 = 32;
const BLOCK: u32 = 4096;
const ROUNDS: u32 = 100;

/// Where requests are: header, status and data of each.
const HEADERS: u64 = 0x20_0000;
const DATA: u64 = 0x40_0000;

/// Offers a request with each of the queue's slots, half of them writes, and waits until all are done.
fn do_a_round(front_end: &FrontEnd, queue: &mut Queue) {
    for slot in 0..DEPTH {
        let header = HEADERS + u64::from(slot) * 64;
        let data_flags = if slot % 2 == 0 { WRITE } else { 0 };
        front_end.memory.write_obj(u32::from(slot % 2), GuestAddress(header)).unwrap();
        front_end.memory.write_obj(u64::from(slot) * 8, GuestAddress(header + 8)).unwrap();
        let data = DATA + u64::from(slot) * u64::from(BLOCK);
        let parts = [(header, 16, NEXT), (data, BLOCK, NEXT | data_flags), (header + 16, 1, WRITE)];
        for (index, (address, len, flags)) in (slot * 3..).zip(parts) {
            queue.put_desc(&front_end.memory, index, Desc { address, len, flags, next: index + 1 });
        }
        queue.offer(&front_end.memory, slot * 3);
    }
    queue.publish(&front_end.memory);
    queue.kick();
    for _ in 0..DEPTH {
        let (head, _) = queue.wait_used(&front_end.memory);
        let status = HEADERS + u64::from(head / 3) * 64 + 16;
        assert_eq!(front_end.memory.read_obj::<u8>(GuestAddress(status)).unwrap(), 0);
    }
}

/// Allocations of the program in [`ROUNDS`] rounds of requests, and the front-end: a program whose front-end leaves says so,
/// which would be counted with the next one's.
fn count(storage: Storage, mode: PollMode) -> (u64, FrontEnd) {
    let directory = tempfile::tempdir().unwrap();
    let socket: PathBuf = directory.path().join("socket");
    let options = Options {
        endpoint: Endpoint::Path(socket.clone()),
        storage,
        format: Format::Raw,
        backing: Vec::new(),
        read_only: false,
        queues: 1,
        serial: "serial".to_owned(),
        io_alignment: None,
        limits: Limits::default(),
        control: None,
        threads: Threads { poll: mode, ..Threads::default() },
    };
    // Ends with the test's process.
    std::thread::spawn(move || run(&options));
    wait_until("listening", || socket.exists());
    let mut front_end =
        FrontEnd::connect(&socket, |offered| offered & ORDINARY, VhostUserProtocolFeatures::empty(), REGION_LEN);
    let mut queue = Queue::new(&front_end.memory, 0, 128);
    queue.announce(&mut front_end, 0);
    (allocations_in(ROUNDS, || do_a_round(&front_end, &mut queue)), front_end)
}

#[test]
fn requests_allocate_nothing() {
    let mut front_ends = Vec::new();
    for mode in [PollMode::Off, PollMode::Auto] {
        // The programs do not end before the test, and each locks its image.
        let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        image.as_file().set_len(u64::from(DEPTH) * u64::from(BLOCK)).unwrap();
        for storage in [Storage::Null(1 << 30), Storage::Image(image.path().to_owned())] {
            let requests = u64::from(ROUNDS) * u64::from(DEPTH);
            let (allocations, front_end) = count(storage.clone(), mode);
            front_ends.push(front_end);
            assert_eq!(allocations, 0, "in {requests} requests to {storage:?} with {mode:?}");
        }
    }
}
