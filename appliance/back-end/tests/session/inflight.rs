//! Inflight tracking, from message to ring. What a crash between any two stores leaves is tested where the buffer is.

use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};
use vvu_protocol::address::FileOffset;
use vvu_protocol::message::Inflight;

use crate::driver::{DATA, DriverMemory, PAGE, Queue, SIZE, running, wait_until};
use crate::echo::{MAX_QUEUE_SIZE, QUEUES};
use crate::front_end::{FrontEnd, NamedMemory, Reply, Request};

/// Bytes of one queue's part: 16 for the region, 16 for each entry, to the next multiple of 64.
const PART: u64 = (16 + 16 * SIZE as u64).next_multiple_of(64);

struct Buffer {
    file: NamedMemory,
    description: Inflight,
}

impl Buffer {
    fn new(queue_count: u16) -> Self {
        let mmap_size = (u64::from(queue_count) * PART).next_multiple_of(PAGE);
        let description = Inflight { mmap_size, mmap_offset: FileOffset(PAGE), queue_count, queue_size: SIZE };
        Self { file: NamedMemory::new(PAGE + mmap_size), description }
    }

    fn announce(&self, front_end: &mut FrontEnd) {
        front_end.done(Request::SetInflightFd(self.description, self.file.fd()));
    }

    fn write(&self, queue: u64, offset: u64, bytes: &[u8]) {
        self.file.file.write_all_at(bytes, PAGE + queue * PART + offset).unwrap();
    }

    /// As a back-end leaves it that was killed with these heads in flight, taken in this order.
    fn leave(&self, queue: u64, used_idx: u16, heads: &[u16]) {
        self.write(queue, 8, &1u16.to_le_bytes());
        self.write(queue, 10, &SIZE.to_le_bytes());
        self.write(queue, 14, &used_idx.to_le_bytes());
        for (counter, head) in (100u64..).zip(heads) {
            let entry = 16 + 16 * u64::from(*head);
            self.write(queue, entry, &[1]);
            self.write(queue, entry + 8, &counter.to_le_bytes());
        }
    }

    /// Heads that are in flight according to the buffer.
    fn in_flight(&self, queue: u64) -> Vec<u16> {
        let is_in_flight = |head: &u16| {
            let mut byte = [0];
            self.file.file.read_exact_at(&mut byte, PAGE + queue * PART + 16 + 16 * u64::from(*head)).unwrap();
            byte == [1]
        };
        (0..SIZE).filter(is_in_flight).collect()
    }
}

/// Front-end with memory and a buffer, no ring started.
fn prepared(buffer: &Buffer) -> (FrontEnd, DriverMemory) {
    let mut front_end = FrontEnd::negotiated();
    let memory = DriverMemory::new();
    memory.announce(&mut front_end);
    buffer.announce(&mut front_end);
    (front_end, memory)
}

#[test]
fn what_is_taken_is_in_the_buffer_until_it_is_returned() {
    let buffer = Buffer::new(QUEUES);
    let (mut front_end, memory) = prepared(&buffer);
    let mut queues = [Queue::new(0), Queue::new(1), Queue::new(2)];
    for queue in &mut queues {
        queue.start(&mut front_end, 0);
        queue.echo(&memory, "first");
    }
    front_end.device.hold();
    for (queue, heads) in queues.iter_mut().zip([vec![2, 6, 4], vec![8], vec![]]) {
        for head in heads {
            queue.offer(&memory, head, DATA, DATA + PAGE, 8);
        }
        queue.kick();
    }
    wait_until("take", || front_end.device.taken.lock().unwrap().len() == 7);
    assert_eq!([0, 1, 2].map(|queue| buffer.in_flight(queue)), [vec![2, 4, 6], vec![8], vec![]]);
    front_end.device.release();
    for index in 0..3 {
        front_end.stop(index);
        assert!(buffer.in_flight(u64::from(index)).is_empty());
    }
}

#[test]
fn requests_of_a_dead_back_end_come_first_and_in_their_order() {
    let buffer = Buffer::new(QUEUES);
    let (mut front_end, memory) = prepared(&buffer);
    let mut queue = Queue::new(1);
    // Two were done; three were taken and are not done; one was not taken.
    queue.set_indices(&memory, 2);
    for head in [6, 2, 10, 12] {
        queue.offer(&memory, head, DATA, DATA + PAGE, 8);
    }
    buffer.leave(1, 2, &[6, 2, 10]);
    // The front-end cannot know where to go on; the buffer does.
    queue.start(&mut front_end, 2);
    let mut used = (0..4).map(|_| queue.wait_used(&memory).0).collect::<Vec<_>>();
    assert_eq!(*front_end.device.taken.lock().unwrap(), [(1, 6), (1, 2), (1, 10), (1, 12)]);
    used.sort_unstable();
    assert_eq!(used, [2, 6, 10, 12]);
    // The driver sees a request before the buffer is cleared of it.
    assert_eq!(front_end.stop(1), 6);
    assert!(buffer.in_flight(1).is_empty());
    // And not again.
    queue.start(&mut front_end, 6);
    queue.echo(&memory, "next");
    assert_eq!(front_end.device.taken.lock().unwrap().len(), 5);
}

#[test]
fn a_batch_that_was_returned_before_the_death_is_not_done_again() {
    let buffer = Buffer::new(1);
    let (mut front_end, memory) = prepared(&buffer);
    let mut queue = Queue::new(0);
    queue.set_indices(&memory, 7);
    for head in [2, 4, 6] {
        queue.offer(&memory, head, DATA, DATA + PAGE, 8);
    }
    // Two of three were returned: `idx` was stored, and the buffer still has them in flight.
    buffer.leave(0, 7, &[2, 4, 6]);
    buffer.write(0, 16 + 16 * 2 + 6, &4u16.to_le_bytes());
    buffer.write(0, 12, &2u16.to_le_bytes());
    memory.map.write_obj(9u16, GuestAddress(queue.used + 2)).unwrap();
    queue.start(&mut front_end, 9);
    wait_until("completion", || queue.used_index(&memory) == 10);
    assert_eq!(*front_end.device.taken.lock().unwrap(), [(0, 6)]);
    assert_eq!(front_end.stop(0), 10);
}

#[test]
fn a_signal_that_died_with_the_back_end_is_given() {
    let buffer = Buffer::new(1);
    let (mut front_end, memory) = prepared(&buffer);
    let mut queue = Queue::new(0);
    // All is returned; nobody knows whether the driver was told.
    queue.set_indices(&memory, 5);
    buffer.leave(0, 5, &[]);
    queue.start(&mut front_end, 5);
    crate::front_end::wait_for(&queue.events.call, "call");
}

#[test]
fn a_buffer_of_another_ring_is_forgotten() {
    let buffer = Buffer::new(1);
    let (mut front_end, memory) = prepared(&buffer);
    let mut queue = Queue::new(0);
    buffer.leave(0, 900, &[2, 4, 6]);
    // The driver has set up its ring anew; one request is there.
    queue.offer(&memory, 8, DATA, DATA + PAGE, 8);
    queue.start(&mut front_end, 0);
    assert_eq!(queue.wait_used(&memory).0, 8);
    assert_eq!(*front_end.device.taken.lock().unwrap(), [(0, 8)]);
    front_end.stop(0);
    assert!(buffer.in_flight(0).is_empty());
}

#[test]
fn a_ring_without_room_in_the_buffer_breaks_alone() {
    let buffer = Buffer::new(1);
    let (mut front_end, memory) = prepared(&buffer);
    let mut queues = [Queue::new(0), Queue::new(1)];
    queues[1].start(&mut front_end, 0);
    crate::front_end::wait_for(&queues[1].events.error, "err");
    assert!(front_end.device.faults.lock().unwrap()[0].contains("no part for queue 1"));
    queues[0].start(&mut front_end, 0);
    queues[0].echo(&memory, "has one");
}

#[test]
fn a_buffer_is_made_on_request_and_works() {
    let (mut front_end, memory, mut queue) = running();
    front_end.stop(0);
    let wanted = |queue_count, queue_size| {
        Request::GetInflightFd(Inflight { mmap_size: 0, mmap_offset: FileOffset(0), queue_count, queue_size })
    };
    let Reply::Inflight(description, file) = front_end.ask(wanted(QUEUES, SIZE)) else { panic!() };
    assert!(description.mmap_size >= u64::from(QUEUES) * PART);
    assert_eq!((description.queue_count, description.queue_size), (QUEUES, SIZE));
    let kept = std::fs::File::from(file.try_clone().unwrap());
    front_end.done(Request::SetInflightFd(description, file));
    queue.events = crate::front_end::Events::new();
    queue.start(&mut front_end, 0);
    queue.echo(&memory, "tracked");
    let mut head = [0; 16];
    kept.read_exact_at(&mut head, description.mmap_offset.0).unwrap();
    assert_eq!((head[8], head[14]), (1, 1), "version, used_idx");
    // CVE-2021-3839: the numbers are the front-end's.
    for (queue_count, queue_size) in [(0, 16), (QUEUES + 1, 16), (1, 0), (1, MAX_QUEUE_SIZE + 1), (65535, 65535)] {
        let mut front_end = FrontEnd::negotiated();
        front_end.send(wanted(queue_count, queue_size), true);
        assert!(front_end.receive().is_none(), "{queue_count} {queue_size}");
    }
}

#[test]
fn cve_2021_3839_wrong_numbers_of_a_buffer_are_refused() {
    let mut front_end = FrontEnd::negotiated();
    let good = Buffer::new(2);
    let fields = |mmap_size, offset, queue_count, queue_size| Inflight {
        mmap_size,
        mmap_offset: FileOffset(offset),
        queue_count,
        queue_size,
    };
    for wrong in [
        fields(PAGE, PAGE, 0, SIZE),
        fields(PAGE, PAGE, 2, 0),
        fields(PAGE, PAGE, 65535, SIZE),
        fields(PAGE, PAGE, 2, 32768),
        fields(PAGE, PAGE, 2, 65535),
        fields(1 << 40, PAGE, 65535, 32768),
        fields(PAGE, 2 * PAGE, 2, SIZE),
        fields(PAGE, PAGE + 8, 2, SIZE),
        fields(u64::MAX, PAGE, 2, SIZE),
        fields(PAGE, u64::MAX - PAGE + 1, 2, SIZE),
        fields(0, PAGE, 2, SIZE),
    ] {
        front_end.refused(Request::SetInflightFd(wrong, good.file.fd()));
        assert_eq!((good.file.mappings(), good.file.descriptors()), (0, 1), "{wrong:?}");
    }
    front_end.done(Request::SetInflightFd(good.description, good.file.fd()));
}

#[test]
fn cve_2020_10726_and_2022_0669_repeated_buffers_leak_nothing() {
    let first = Buffer::new(QUEUES);
    let (mut front_end, memory) = prepared(&first);
    for _ in 0..20 {
        first.announce(&mut front_end);
    }
    assert_eq!((first.file.mappings(), first.file.descriptors()), (1, 1));
    let second = Buffer::new(QUEUES);
    second.announce(&mut front_end);
    assert_eq!((first.file.mappings(), second.file.mappings()), (0, 1));
    let mut queue = Queue::new(0);
    queue.start(&mut front_end, 0);
    queue.echo(&memory, "tracked");
    front_end.refused(Request::SetInflightFd(first.description, first.file.fd()));
    front_end.close();
    front_end.outcome().unwrap();
    assert_eq!((first.file.mappings(), second.file.mappings()), (0, 0));
    assert_eq!((first.file.descriptors(), second.file.descriptors()), (1, 1));
}
