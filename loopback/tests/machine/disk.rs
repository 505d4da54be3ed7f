//! A disk's driver: requests of one block each, and what each block must hold.

use std::path::Path;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vm_memory::{Bytes, GuestAddress};
use vvu_test_driver::front_end::{FrontEnd, ORDINARY};
use vvu_test_driver::queue::Queue;
use vvu_test_driver::ring::{Desc, NEXT, WRITE};

/// Requests that can be under way.
pub(crate) const DEPTH: u16 = 16;

/// Bytes of a request's data.
pub(crate) const BLOCK: usize = 4096;

const SECTORS: u64 = BLOCK as u64 / 512;

/// Driver memory: two files of this length.
const REGION_LEN: u64 = 8 << 20;

/// Where requests' headers and status bytes are, in the first file; where their data is, in the second one.
const SCRATCH: u64 = 0x40_0000;
const DATA: u64 = REGION_LEN + 0x10_0000;

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Read,
    Write,
}

/// A front-end with a driver, and one queue.
pub(crate) struct Disk {
    front_end: FrontEnd,
    queue: Queue,
    /// What was last written to the block of each head.
    written: [u8; DEPTH as usize],
}

impl Disk {
    pub(crate) fn connect(socket: &Path) -> Self {
        let choose = |offered| offered & ORDINARY;
        let mut front_end = FrontEnd::connect(socket, choose, VhostUserProtocolFeatures::empty(), REGION_LEN);
        let queue = Queue::new(&front_end.memory, 0, DEPTH * 4);
        queue.announce(&mut front_end, 0);
        Self { front_end, queue, written: [0; DEPTH as usize] }
    }

    /// The device stops, and its front-end leaves.
    pub(crate) fn leave(mut self) {
        self.queue.stop(&self.front_end);
        self.front_end.disconnect();
    }

    /// Starts a request for the block that belongs to `head`: a write of what `fill` says, or a read.
    pub(crate) fn offer(&mut self, head: u16, action: Action, fill: u8) {
        let memory = &self.front_end.memory;
        let (scratch, data) = (SCRATCH + u64::from(head) * 4096, DATA + u64::from(head) * BLOCK as u64);
        let mut header = [0; 16];
        header[0] = u8::from(action == Action::Write);
        header[8..].copy_from_slice(&(u64::from(head) * SECTORS).to_le_bytes());
        memory.write_slice(&header, GuestAddress(scratch)).unwrap();
        memory.write_obj(0xff_u8, GuestAddress(scratch + 16)).unwrap();
        let bytes = if action == Action::Write { fill } else { !self.written[usize::from(head)] };
        memory.write_slice(&[bytes; BLOCK], GuestAddress(data)).unwrap();
        if action == Action::Write {
            self.written[usize::from(head)] = fill;
        }
        let device_writes = if action == Action::Read { WRITE } else { 0 };
        let pieces = [(scratch, 16, 0), (data, BLOCK, device_writes), (scratch + 16, 1, WRITE)];
        for (index, (address, len, flags)) in (0..).zip(pieces) {
            let (flags, next) = if index < 2 { (flags | NEXT, head * 4 + index + 1) } else { (flags, 0) };
            let len = u32::try_from(len).unwrap();
            self.queue.put_desc(memory, head * 4 + index, Desc { address, len, flags, next });
        }
        self.queue.offer(memory, head * 4);
    }

    /// Makes what was offered visible, and tells the device.
    pub(crate) fn kick(&self) {
        self.queue.publish(&self.front_end.memory);
        self.queue.kick();
    }

    /// Waits for the next request that is done, and looks at what it has done; its head.
    pub(crate) fn done(&mut self) -> u16 {
        let memory = &self.front_end.memory;
        let (descriptor, _) = self.queue.wait_used(memory);
        let head = descriptor / 4;
        let status: u8 = memory.read_obj(GuestAddress(SCRATCH + u64::from(head) * 4096 + 16)).unwrap();
        assert_eq!(status, 0, "status of the request of head {head}");
        let data = self.front_end.bytes(DATA + u64::from(head) * BLOCK as u64, BLOCK);
        assert!(data.iter().all(|byte| *byte == self.written[usize::from(head)]), "data of head {head}");
        head
    }

    /// Starts a request of every head.
    pub(crate) fn offer_all(&mut self, action: Action, fill: u8) {
        for head in 0..DEPTH {
            self.offer(head, action, fill.wrapping_add(u8::try_from(head).unwrap()));
        }
        self.kick();
    }

    /// Waits for as many requests as were started by [`Self::offer_all`].
    pub(crate) fn all_done(&mut self) {
        let mut heads = (0..DEPTH).map(|_| self.done()).collect::<Vec<_>>();
        heads.sort_unstable();
        assert_eq!(heads, (0..DEPTH).collect::<Vec<_>>(), "each request is done once");
    }

    /// Does this many reads, as many at a time as can be.
    pub(crate) fn read_on(&mut self, count: usize) {
        self.offer_all(Action::Read, 0);
        for _ in 0..count {
            let head = self.done();
            self.offer(head, Action::Read, 0);
            self.kick();
        }
        self.all_done();
    }

    /// What the blocks of all heads hold.
    pub(crate) fn content(&self) -> Vec<u8> {
        self.written.iter().flat_map(|byte| [*byte; BLOCK]).collect()
    }
}
