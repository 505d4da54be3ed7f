//! The queue against the device's side of the crate `virtio-queue`, on the same memory, and against a device that lies.

use std::fs::File;

use virtio_queue::{Queue as DeviceQueue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, MmapRegion};

use super::*;
use crate::dma::DmaPages;

/// Where the first page lies for the device: far from any address that the driver has for it.
const GUEST: u64 = 0x4000_0000;

const PAGES: usize = 1 + QUEUE_SIZE as usize;

struct Device {
    memory: GuestMemoryMmap,
    queue: DeviceQueue,
}

/// Both sides of a queue. Pages lie in reverse order, so that nothing rests on their being neighbours.
fn both(direction: Direction) -> (Queue, Device) {
    let file = tempfile::tempfile().unwrap();
    file.set_len((PAGES * PAGE_LEN) as u64).unwrap();
    let at = |file: &File| FileOffset::new(file.try_clone().unwrap(), 0);
    let region = MmapRegion::from_file(at(&file), PAGES * PAGE_LEN).unwrap();
    let addresses = (0..PAGES).map(|page| GUEST + (page * PAGE_LEN) as u64).collect();
    let mut pages = DmaPages::with_addresses(region, addresses).split().collect::<Vec<_>>();
    pages.reverse();
    let mut pages = pages.into_iter();
    let driver = Queue::new(pages.next().unwrap(), &mut pages, direction).unwrap();
    let ranges = [(GuestAddress(GUEST), PAGES * PAGE_LEN, Some(at(&file)))];
    let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
    let mut queue = DeviceQueue::new(QUEUE_SIZE).unwrap();
    let RingAddresses { descriptors, available, used } = driver.addresses();
    // All of it lies below 4 GiB.
    let low = |address: u64| Some(u32::try_from(address).unwrap());
    queue.set_desc_table_address(low(descriptors), Some(0));
    queue.set_avail_ring_address(low(available), Some(0));
    queue.set_used_ring_address(low(used), Some(0));
    queue.set_ready(true);
    assert!(queue.is_valid(&memory));
    (driver, Device { memory, queue })
}

impl Device {
    /// Takes the next buffer: head and what it holds or has room for.
    fn take(&mut self) -> Option<(u16, Vec<u8>, bool)> {
        let chain = self.queue.pop_descriptor_chain(&self.memory)?;
        let head = chain.head_index();
        let [descriptor] = *chain.collect::<Vec<_>>() else { panic!("one descriptor") };
        let mut bytes = vec![0; descriptor.len() as usize];
        self.memory.read_slice(&mut bytes, descriptor.addr()).unwrap();
        Some((head, bytes, descriptor.is_write_only()))
    }

    /// Writes into the next buffer and gives it back.
    fn put(&mut self, bytes: &[u8]) {
        let chain = self.queue.pop_descriptor_chain(&self.memory).unwrap();
        let head = chain.head_index();
        let descriptor = chain.into_iter().next().unwrap();
        assert!(descriptor.is_write_only());
        self.memory.write_slice(bytes, descriptor.addr()).unwrap();
        self.queue.add_used(&self.memory, head, u32::try_from(bytes.len()).unwrap()).unwrap();
    }

    /// Writes an entry of the used ring, and its index, without asking anybody.
    fn lie(&self, slot: u16, id: u32, len: u32, index: u16) {
        let used = self.queue.used_ring();
        let entry = used + 4 + u64::from(slot) * 8;
        self.memory.write_obj(id, GuestAddress(entry)).unwrap();
        self.memory.write_obj(len, GuestAddress(entry + 4)).unwrap();
        self.memory.write_obj(index, GuestAddress(used + 2)).unwrap();
    }
}

#[test]
fn frames_go_out_in_order_for_longer_than_the_indices_last() {
    let (mut driver, mut device) = both(Direction::ToDevice);
    // More than 2^16, so that the ring's indices start again.
    for round in 0..70_000_u32 {
        let message = round.to_le_bytes().repeat(1 + (round % 64) as usize);
        let buffer = driver.free_buffer().unwrap();
        driver.fill(buffer, &message).unwrap();
        driver.offer(buffer).unwrap();
        let (head, bytes, write_only) = device.take().unwrap();
        assert_eq!((bytes, write_only), (message, false));
        device.queue.add_used(&device.memory, head, 0).unwrap();
        assert_eq!(driver.take_used().unwrap().map(|used| used.buffer), Some(head));
        assert_eq!(driver.take_used().unwrap(), None);
    }
}

#[test]
fn frames_come_in_order_and_buffers_go_back() {
    let (mut driver, mut device) = both(Direction::FromDevice);
    while let Some(buffer) = driver.free_buffer() {
        driver.offer(buffer).unwrap();
    }
    for round in 0..100_u8 {
        let burst = usize::from(round % 16 + 1);
        for number in 0..burst {
            device.put(&vec![round; number * 200 + 1]);
        }
        for number in 0..burst {
            let used = driver.take_used().unwrap().unwrap();
            assert_eq!(driver.contents(used).unwrap(), vec![round; number * 200 + 1]);
            driver.offer(used.buffer).unwrap();
        }
        assert_eq!(driver.take_used().unwrap(), None);
    }
}

#[test]
fn the_device_can_ask_not_to_be_notified() {
    let (driver, mut device) = both(Direction::ToDevice);
    assert!(driver.wants_notification().unwrap());
    device.queue.disable_notification(&device.memory).unwrap();
    assert!(!driver.wants_notification().unwrap());
    device.queue.enable_notification(&device.memory).unwrap();
    assert!(driver.wants_notification().unwrap());
}

#[test]
fn buffers_in_flight_are_left_alone() {
    let (mut driver, _device) = both(Direction::ToDevice);
    for buffer in 0..QUEUE_SIZE {
        assert_eq!(driver.free_buffer(), Some(buffer));
        driver.offer(buffer).unwrap();
    }
    assert_eq!(driver.free_buffer(), None);
    assert!(matches!(driver.offer(3), Err(RingError::UsedId { found: 3 })));
    assert!(matches!(driver.fill(3, b"x"), Err(RingError::UsedId { found: 3 })));
    assert!(matches!(driver.offer(QUEUE_SIZE), Err(RingError::UsedId { .. })));
    let (mut driver, _device) = both(Direction::ToDevice);
    assert!(matches!(driver.fill(0, &[0; PAGE_LEN + 1]), Err(RingError::TooLong { .. })));
}

#[test]
fn a_device_that_lies_is_found_out() {
    let id = |found| matches!(found, Err(RingError::UsedId { .. }));
    let index = |found| matches!(found, Err(RingError::UsedIndex { .. }));
    let length = |found| matches!(found, Err(RingError::UsedLength { .. }));
    type Check = fn(Result<Option<UsedBuffer>, RingError>) -> bool;
    // Entry's id and length, ring's index, and what is said of it. Buffers 0 to 3 are in flight.
    let lies: [(u32, u32, u16, Check); 7] = [
        (4, 0, 1, id),
        (16, 0, 1, id),
        (0x1_0000, 0, 1, id),
        (u32::MAX, 0, 1, id),
        (0, 0, 5, index),
        (0, 0, 0xffff, index),
        (0, BUFFER_LEN + 1, 1, length),
    ];
    for (entry_id, len, ring_index, check) in lies {
        let (mut driver, device) = both(Direction::FromDevice);
        (0..4).for_each(|buffer| driver.offer(buffer).unwrap());
        device.lie(0, entry_id, len, ring_index);
        assert!(check(driver.take_used()), "id {entry_id:#x}, length {len}, index {ring_index}");
    }
}

#[test]
fn a_buffer_is_given_back_once() {
    let (mut driver, device) = both(Direction::FromDevice);
    (0..4).for_each(|buffer| driver.offer(buffer).unwrap());
    device.lie(0, 2, BUFFER_LEN, 1);
    let used = driver.take_used().unwrap().unwrap();
    assert_eq!((used, driver.contents(used).unwrap().len()), (UsedBuffer { buffer: 2, len: BUFFER_LEN }, PAGE_LEN));
    device.lie(1, 2, 0, 2);
    assert!(matches!(driver.take_used(), Err(RingError::UsedId { found: 2 })));
}
