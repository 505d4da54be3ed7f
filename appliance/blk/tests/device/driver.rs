//! A front-end and a virtio-blk driver, as small as they can be and with every knob that a test needs.

use std::ops::{Deref, DerefMut};
use std::path::Path;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vm_memory::{Bytes, GuestAddress};
pub(crate) use vvu_test_driver::event::{is_signalled, wait_event, wait_until};
pub(crate) use vvu_test_driver::front_end::{
    ACCESS_PLATFORM, EVENT_IDX, INDIRECT, LOG_ALL, USER_BASE, map_region, memfd, region_of,
};
use vvu_test_driver::front_end::{FrontEnd as AnyFrontEnd, ORDINARY};
use vvu_test_driver::queue::Queue as AnyQueue;
use vvu_test_driver::ring::Memory;
pub(crate) use vvu_test_driver::ring::{Desc, INDIRECT_FLAG, NEXT, WRITE};

use crate::process::Program;

pub(crate) const FLUSH: u64 = 1 << 9;
pub(crate) const CONFIG_WCE: u64 = 1 << 11;
pub(crate) const READ_ONLY: u64 = 1 << 5;

/// What migration and IOMMU need; the tests of these ask for it by name.
pub(crate) const SPECIAL_FEATURES: u64 = !ORDINARY;

/// Length of each of the two memory regions.
pub(crate) const REGION_LEN: u64 = 64 << 20;

/// Where requests' headers, status bytes and indirect tables are, one page per head and queue; up to [`DATA`], so for 4 queues.
const SCRATCH: u64 = 0x40_0000;

/// First address that tests use for data.
pub(crate) const DATA: u64 = 0x140_0000;

/// A connected front-end with memory.
pub(crate) struct FrontEnd {
    front_end: AnyFrontEnd,
}

impl Deref for FrontEnd {
    type Target = AnyFrontEnd;

    fn deref(&self) -> &AnyFrontEnd {
        &self.front_end
    }
}

impl DerefMut for FrontEnd {
    fn deref_mut(&mut self) -> &mut AnyFrontEnd {
        &mut self.front_end
    }
}

impl FrontEnd {
    /// Connects and negotiates everything that is offered.
    pub(crate) fn connect(program: &Program) -> Self {
        Self::connect_with(&program.socket(), |offered| offered)
    }

    /// Connects and negotiates what `choose` leaves of the offered features.
    pub(crate) fn connect_with(socket: &Path, choose: impl Fn(u64) -> u64) -> Self {
        let choose = |offered| choose(offered & ORDINARY);
        Self::connect_for(socket, choose, VhostUserProtocolFeatures::empty())
    }

    /// The same with further protocol features, which have to be offered.
    pub(crate) fn connect_for(socket: &Path, choose: impl Fn(u64) -> u64, protocol: VhostUserProtocolFeatures) -> Self {
        Self { front_end: AnyFrontEnd::connect(socket, choose, protocol, REGION_LEN) }
    }

    pub(crate) fn config(&mut self) -> Vec<u8> {
        self.front_end.config(96)
    }

    /// Starts a queue of `size` entries with fresh rings.
    pub(crate) fn queue(&mut self, index: usize, size: u16) -> Queue {
        let queue = self.idle_queue(index, size);
        queue.start(self, 0);
        queue
    }

    /// A queue with fresh rings that the device does not know yet.
    pub(crate) fn idle_queue(&self, index: usize, size: u16) -> Queue {
        Queue {
            queue: AnyQueue::new(&self.memory, index, size),
            indirect: self.features & INDIRECT != 0,
            use_indirect: false,
        }
    }
}

/// Bytes without a pattern, different for each seed.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A request as the driver thinks of it: type, sector and the pieces of its data.
#[derive(Debug, Clone)]
pub(crate) struct Req {
    pub(crate) kind: u32,
    pub(crate) sector: u64,
    pub(crate) data: Vec<(u64, u32)>,
    /// The device writes the data.
    pub(crate) to_driver: bool,
}

impl Req {
    pub(crate) fn read(sector: u64, address: u64, len: u32) -> Self {
        Self { kind: 0, sector, data: vec![(address, len)], to_driver: true }
    }

    pub(crate) fn write(sector: u64, address: u64, len: u32) -> Self {
        Self { kind: 1, sector, data: vec![(address, len)], to_driver: false }
    }

    pub(crate) fn flush() -> Self {
        Self { kind: 4, sector: 0, data: Vec::new(), to_driver: false }
    }

    pub(crate) fn get_id(address: u64) -> Self {
        Self { kind: 8, sector: 0, data: vec![(address, 20)], to_driver: true }
    }

    /// DISCARD (11) or WRITE_ZEROES (13) with a payload that lies at `address`.
    pub(crate) fn ranges(kind: u32, address: u64, len: u32) -> Self {
        Self { kind, sector: 0, data: vec![(address, len)], to_driver: false }
    }
}

/// One queue, driver's side.
pub(crate) struct Queue {
    queue: AnyQueue,
    indirect: bool,
    /// Requests go into indirect tables.
    pub(crate) use_indirect: bool,
}

impl Deref for Queue {
    type Target = AnyQueue;

    fn deref(&self) -> &AnyQueue {
        &self.queue
    }
}

impl DerefMut for Queue {
    fn deref_mut(&mut self) -> &mut AnyQueue {
        &mut self.queue
    }
}

impl Queue {
    /// Announces the ring to the back-end, which goes on at `base`.
    pub(crate) fn start(&self, front_end: &mut FrontEnd, base: u16) {
        self.announce(front_end, base);
    }

    fn scratch(&self, head: u16) -> u64 {
        let page = SCRATCH + (self.index as u64 * 1024 + u64::from(head)) * 4096;
        assert!(page < DATA, "queue {}", self.index);
        page
    }

    /// Address of the status byte of `head`.
    pub(crate) fn status_address(&self, head: u16) -> u64 {
        self.scratch(head) + 16
    }

    /// Builds the chain of a request that begins at descriptor `head`, and offers it.
    pub(crate) fn offer_request(&mut self, memory: &Memory, head: u16, request: &Req) {
        let scratch = self.scratch(head);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&request.kind.to_le_bytes());
        header[8..].copy_from_slice(&request.sector.to_le_bytes());
        memory.write_slice(&header, GuestAddress(scratch)).unwrap();
        memory.write_obj(0xffu8, GuestAddress(self.status_address(head))).unwrap();

        let data_flags = if request.to_driver { WRITE } else { 0 };
        let mut pieces = vec![(scratch, 16, 0)];
        pieces.extend(request.data.iter().map(|(address, len)| (*address, *len, data_flags)));
        pieces.push((self.status_address(head), 1, WRITE));

        let table = self.use_indirect.then_some(scratch + 64);
        assert!(table.is_none() || self.indirect);
        let first = if table.is_some() { 0 } else { head };
        for (index, (address, len, flags)) in (first..).zip(&pieces) {
            let last = usize::from(index - first) + 1 == pieces.len();
            let desc = Desc {
                address: *address,
                len: *len,
                flags: flags | if last { 0 } else { NEXT },
                next: if last { 0 } else { index + 1 },
            };
            match table {
                Some(table) => {
                    let desc = Desc { address: desc.address + self.io_base, ..desc };
                    memory.write_slice(&desc.bytes(), GuestAddress(table + 16 * u64::from(index))).unwrap();
                }
                None => self.put_desc(memory, index, desc),
            }
        }
        if let Some(address) = table {
            let len = u32::try_from(16 * pieces.len()).unwrap();
            self.put_desc(memory, head, Desc { address, len, flags: INDIRECT_FLAG, next: 0 });
        }
        self.offer(memory, head);
    }

    /// Where the data of a request is, by the second descriptor of its chain.
    pub(crate) fn data_address(&self, memory: &Memory, head: u16) -> u64 {
        memory.read_obj::<u64>(GuestAddress(self.desc + 16 * (u64::from(head) + 1))).unwrap() - self.io_base
    }

    /// Does one request and returns its status and the length in the used ring.
    pub(crate) fn run(&mut self, memory: &Memory, request: &Req) -> (u8, u32) {
        self.offer_request(memory, 0, request);
        self.publish(memory);
        self.kick();
        let (head, len) = self.wait_used(memory);
        assert_eq!(head, 0);
        (self.status(memory, 0), len)
    }

    /// Does one request that must succeed.
    pub(crate) fn run_ok(&mut self, memory: &Memory, request: &Req) {
        assert_eq!(self.run(memory, request).0, 0, "{request:?}");
    }

    pub(crate) fn status(&self, memory: &Memory, head: u16) -> u8 {
        memory.read_obj(GuestAddress(self.status_address(head))).unwrap()
    }
}
