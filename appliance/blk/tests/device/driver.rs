//! A front-end and a virtio-blk driver, as small as they can be and with every knob that a test needs.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::process::{LIMIT, Program};

pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const INDIRECT: u64 = 1 << 28;
pub(crate) const FLUSH: u64 = 1 << 9;
pub(crate) const CONFIG_WCE: u64 = 1 << 11;
pub(crate) const READ_ONLY: u64 = 1 << 5;
pub(crate) const LOG_ALL: u64 = 1 << 26;
pub(crate) const ACCESS_PLATFORM: u64 = 1 << 33;
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// What migration and IOMMU need; the tests of these ask for it by name.
pub(crate) const SPECIAL_FEATURES: u64 = LOG_ALL | ACCESS_PLATFORM;

/// Protocol features of every front-end here.
const PROTOCOL: VhostUserProtocolFeatures =
    VhostUserProtocolFeatures::MQ.union(VhostUserProtocolFeatures::CONFIG).union(VhostUserProtocolFeatures::REPLY_ACK);

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT_FLAG: u16 = 4;

/// Length of each of the two memory regions, which adjoin in guest-physical addresses but come from two files.
pub(crate) const REGION_LEN: u64 = 64 << 20;

/// Where the rings of all queues are; far below the data.
const RING_SPACE: u64 = 0x1_0000;

/// Where requests' headers, status bytes and indirect tables are, one page per head and queue.
const SCRATCH: u64 = 0x40_0000;

/// First address that tests use for data.
pub(crate) const DATA: u64 = 0x100_0000;

/// Difference of the front-end's addresses to guest-physical ones: far, so that a missed translation fails.
pub(crate) const USER_BASE: u64 = 0x7a00_0000_0000;

/// A connected front-end with memory.
pub(crate) struct FrontEnd {
    pub(crate) frontend: Frontend,
    /// The same connection, for messages that the `vhost` crate does not have.
    pub(crate) stream: UnixStream,
    pub(crate) memory: GuestMemoryMmap<()>,
    pub(crate) features: u64,
    pub(crate) protocol: VhostUserProtocolFeatures,
    pub(crate) regions: Vec<VhostUserMemoryRegionInfo>,
    files: Vec<std::fs::File>,
}

impl FrontEnd {
    /// Connects and negotiates everything that is offered.
    pub(crate) fn connect(program: &Program) -> Self {
        Self::connect_with(&program.socket(), |offered| offered)
    }

    /// Connects and negotiates what `choose` leaves of the offered features.
    pub(crate) fn connect_with(socket: &Path, choose: impl Fn(u64) -> u64) -> Self {
        let choose = |offered| choose(offered & !SPECIAL_FEATURES);
        Self::connect_for(socket, choose, VhostUserProtocolFeatures::empty())
    }

    /// The same with further protocol features, which have to be offered.
    pub(crate) fn connect_for(socket: &Path, choose: impl Fn(u64) -> u64, protocol: VhostUserProtocolFeatures) -> Self {
        let mut files = Vec::new();
        let mut regions = Vec::new();
        let mut maps = Vec::new();
        for index in 0..2 {
            let file = memfd(REGION_LEN);
            let region = region_of(&file, index * REGION_LEN, REGION_LEN, 0);
            maps.push(map_region(&file, &region));
            regions.push(region);
            files.push(file);
        }
        let memory = GuestMemoryMmap::from_regions(maps).unwrap();
        let protocol = PROTOCOL | protocol;
        let (frontend, stream, features) = negotiate(socket, choose, protocol);
        frontend.set_mem_table(&regions).unwrap();
        Self { frontend, stream, memory, features, protocol, regions, files }
    }

    /// Connects anew, with the same features and the same memory. Memory is not announced yet.
    pub(crate) fn reconnect(&mut self, socket: &Path) {
        // The former connection ends first: one front-end is served at a time.
        let (nowhere, _) = UnixStream::pair().unwrap();
        self.frontend = Frontend::from_stream(nowhere.try_clone().unwrap(), 1);
        self.stream = nowhere;
        let features = self.features;
        (self.frontend, self.stream, self.features) = negotiate(socket, |_| features, self.protocol);
    }

    /// The file of one region.
    pub(crate) fn file(&self, region: usize) -> &std::fs::File {
        &self.files[region]
    }

    /// Announces the same memory once more.
    pub(crate) fn repeat_mem_table(&self) {
        self.frontend.set_mem_table(&self.regions).unwrap();
    }

    /// Takes the memory of one region away under the device. Nothing may look at it afterwards.
    pub(crate) fn cut_memory(&self, region: usize) {
        self.files[region].set_len(0).unwrap();
    }

    pub(crate) fn config(&mut self) -> Vec<u8> {
        let flags = VhostUserConfigFlags::empty();
        self.frontend.get_config(0, 96, flags, &[0; 96]).unwrap().1
    }

    /// Starts a queue of `size` entries with fresh rings.
    pub(crate) fn queue(&mut self, index: usize, size: u16) -> Queue {
        let mut queue = self.idle_queue(index, size);
        queue.start(self, 0);
        queue
    }

    /// A queue with fresh rings that the device does not know yet.
    pub(crate) fn idle_queue(&self, index: usize, size: u16) -> Queue {
        let mut queue = Queue::new(index, size, self.features);
        queue.clear(&self.memory);
        queue
    }

    pub(crate) fn fill(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

fn negotiate(
    socket: &Path,
    choose: impl Fn(u64) -> u64,
    protocol: VhostUserProtocolFeatures,
) -> (Frontend, UnixStream, u64) {
    let stream = UnixStream::connect(socket).unwrap();
    let mut frontend = Frontend::from_stream(stream.try_clone().unwrap(), 64);
    frontend.set_owner().unwrap();
    let offered = frontend.get_features().unwrap();
    assert_ne!(offered & PROTOCOL_FEATURES, 0);
    let offered_protocol = frontend.get_protocol_features().unwrap();
    assert!(offered_protocol.contains(protocol), "{offered_protocol:?}");
    frontend.set_protocol_features(protocol).unwrap();
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    let features = choose(offered) | PROTOCOL_FEATURES;
    frontend.set_features(features).unwrap();
    (frontend, stream, features)
}

/// A region of driver memory at a guest-physical address.
pub(crate) fn region_of(file: &std::fs::File, start: u64, len: u64, offset: u64) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: start,
        memory_size: len,
        userspace_addr: USER_BASE + start,
        mmap_offset: offset,
        mmap_handle: file.as_raw_fd(),
    }
}

/// The driver's own mapping of a region.
pub(crate) fn map_region(file: &std::fs::File, region: &VhostUserMemoryRegionInfo) -> GuestRegionMmap<()> {
    let place = FileOffset::new(file.try_clone().unwrap(), region.mmap_offset);
    let map = MmapRegion::from_file(place, region.memory_size as usize).unwrap();
    GuestRegionMmap::new(map, GuestAddress(region.guest_phys_addr)).unwrap()
}

pub(crate) fn memfd(len: u64) -> std::fs::File {
    let fd = rustix::fs::memfd_create("driver memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = std::fs::File::from(fd);
    file.set_len(len).unwrap();
    file
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

/// One descriptor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Desc {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Desc {
    pub(crate) fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
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
    pub(crate) index: usize,
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    pub(crate) avail_index: u16,
    pub(crate) used_seen: u16,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) error: EventFd,
    indirect: bool,
    /// Requests go into indirect tables.
    pub(crate) use_indirect: bool,
    /// What the front-end adds to ring addresses: its own addresses, or none where an IOMMU translates.
    pub(crate) address_base: u64,
    /// What the driver adds to the addresses in descriptors: 0, or the start of its I/O addresses.
    pub(crate) io_base: u64,
    /// Where writes to the used ring are logged, if they are to be.
    pub(crate) log_address: Option<u64>,
}

impl Queue {
    fn new(index: usize, size: u16, features: u64) -> Self {
        let base = RING_SPACE + index as u64 * 0x1_0000;
        Self {
            index,
            size,
            desc: base,
            avail: base + 0x5000,
            used: base + 0x8000,
            avail_index: 0,
            used_seen: 0,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            error: EventFd::new(EFD_NONBLOCK).unwrap(),
            indirect: features & INDIRECT != 0,
            use_indirect: false,
            address_base: USER_BASE,
            io_base: 0,
            log_address: None,
        }
    }

    /// Empties the rings, as a driver does that starts anew.
    pub(crate) fn clear(&mut self, memory: &GuestMemoryMmap<()>) {
        memory.write_slice(&vec![0; 0x1_0000], GuestAddress(self.desc)).unwrap();
        self.avail_index = 0;
        self.used_seen = 0;
    }

    /// Announces the ring to the back-end, which goes on at `base`.
    pub(crate) fn start(&mut self, front_end: &mut FrontEnd, base: u16) {
        let frontend = &mut front_end.frontend;
        frontend.set_vring_num(self.index, self.size).unwrap();
        self.announce_addresses(frontend);
        frontend.set_vring_base(self.index, base).unwrap();
        frontend.set_vring_call(self.index, &self.call).unwrap();
        frontend.set_vring_err(self.index, &self.error).unwrap();
        frontend.set_vring_kick(self.index, &self.kick).unwrap();
        frontend.set_vring_enable(self.index, true).unwrap();
    }

    /// Tells where the ring is, and whether writes to its used ring are logged. Also while it runs.
    pub(crate) fn announce_addresses(&self, frontend: &Frontend) {
        let config = VringConfigData {
            queue_max_size: 1024,
            queue_size: self.size,
            flags: u32::from(self.log_address.is_some()),
            desc_table_addr: self.address_base + self.desc,
            used_ring_addr: self.address_base + self.used,
            avail_ring_addr: self.address_base + self.avail,
            log_addr: self.log_address,
        };
        frontend.set_vring_addr(self.index, &config).unwrap();
    }

    /// Stops the ring; returns the position that the back-end has reached.
    pub(crate) fn stop(&self, front_end: &FrontEnd) -> u16 {
        u16::try_from(front_end.frontend.get_vring_base(self.index).unwrap()).unwrap()
    }

    pub(crate) fn put_desc(&self, memory: &GuestMemoryMmap<()>, index: u16, desc: Desc) {
        let desc = Desc { address: desc.address + self.io_base, ..desc };
        memory.write_slice(&desc.bytes(), GuestAddress(self.desc + 16 * u64::from(index))).unwrap();
    }

    /// Puts `head` into the available ring without telling the device.
    pub(crate) fn offer(&mut self, memory: &GuestMemoryMmap<()>, head: u16) {
        let entry = self.avail + 4 + 2 * u64::from(self.avail_index % self.size);
        memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.avail_index = self.avail_index.wrapping_add(1);
    }

    /// Makes visible what was offered.
    pub(crate) fn publish(&self, memory: &GuestMemoryMmap<()>) {
        memory.store(self.avail_index, GuestAddress(self.avail + 2), Ordering::Release).unwrap();
    }

    pub(crate) fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    fn scratch(&self, head: u16) -> u64 {
        SCRATCH + (self.index as u64 * 1024 + u64::from(head)) * 4096
    }

    /// Address of the status byte of `head`.
    pub(crate) fn status_address(&self, head: u16) -> u64 {
        self.scratch(head) + 16
    }

    /// Builds the chain of a request that begins at descriptor `head`, and offers it.
    pub(crate) fn offer_request(&mut self, memory: &GuestMemoryMmap<()>, head: u16, request: &Req) {
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
    pub(crate) fn data_address(&self, memory: &GuestMemoryMmap<()>, head: u16) -> u64 {
        memory.read_obj::<u64>(GuestAddress(self.desc + 16 * (u64::from(head) + 1))).unwrap() - self.io_base
    }

    /// Does one request and returns its status and the length in the used ring.
    pub(crate) fn run(&mut self, memory: &GuestMemoryMmap<()>, request: &Req) -> (u8, u32) {
        self.offer_request(memory, 0, request);
        self.publish(memory);
        self.kick();
        let (head, len) = self.wait_used(memory);
        assert_eq!(head, 0);
        (self.status(memory, 0), len)
    }

    /// Does one request that must succeed.
    pub(crate) fn run_ok(&mut self, memory: &GuestMemoryMmap<()>, request: &Req) {
        assert_eq!(self.run(memory, request).0, 0, "{request:?}");
    }

    pub(crate) fn status(&self, memory: &GuestMemoryMmap<()>, head: u16) -> u8 {
        memory.read_obj(GuestAddress(self.status_address(head))).unwrap()
    }

    pub(crate) fn used_index(&self, memory: &GuestMemoryMmap<()>) -> u16 {
        memory.load(GuestAddress(self.used + 2), Ordering::Acquire).unwrap()
    }

    /// Takes one entry of the used ring, if there is one.
    pub(crate) fn take_used(&mut self, memory: &GuestMemoryMmap<()>) -> Option<(u16, u32)> {
        if self.used_index(memory) == self.used_seen {
            return None;
        }
        let entry = self.used + 4 + 8 * u64::from(self.used_seen % self.size);
        let head: u32 = memory.read_obj(GuestAddress(entry)).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(entry + 4)).unwrap();
        self.used_seen = self.used_seen.wrapping_add(1);
        // Ask for an interrupt for the next one, should EVENT_IDX be in force.
        memory
            .store(self.used_seen, GuestAddress(self.avail + 4 + 2 * u64::from(self.size)), Ordering::SeqCst)
            .unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }

    /// Waits for an entry of the used ring by the call event.
    pub(crate) fn wait_used(&mut self, memory: &GuestMemoryMmap<()>) -> (u16, u32) {
        loop {
            if let Some(used) = self.take_used(memory) {
                return used;
            }
            wait_event(&self.call, "call");
        }
    }
}

/// Waits for what no event tells of.
pub(crate) fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !happened() {
        assert!(Instant::now() < deadline, "{what} did not happen within {LIMIT:?}");
        std::thread::yield_now();
    }
}

/// Waits for an eventfd and takes its events.
pub(crate) fn wait_event(event: &EventFd, what: &str) -> u64 {
    assert!(is_signalled(event, LIMIT.as_secs()), "no {what} within {LIMIT:?}");
    event.read().unwrap()
}

/// Whether an eventfd is signalled within the limit.
pub(crate) fn is_signalled(event: &EventFd, limit_s: u64) -> bool {
    let fd = descriptor(event);
    let timeout = Timespec { tv_sec: i64::try_from(limit_s).unwrap(), tv_nsec: 0 };
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() == 1
}

#[expect(unsafe_code, reason = "vmm_sys_util's EventFd lends its descriptor as a number only")]
fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: open as long as the event is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
