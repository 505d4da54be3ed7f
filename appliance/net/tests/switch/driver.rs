//! A front-end and a virtio-net driver, as small as they can be and with every knob that a test needs.

use std::io::{Read, Write};
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

use crate::program::{LIMIT, Program, ask};

pub(crate) const GUEST_CSUM: u64 = 1 << 1;
pub(crate) const GUEST_TSO4: u64 = 1 << 7;
pub(crate) const HOST_TSO4: u64 = 1 << 11;
pub(crate) const MRG_RXBUF: u64 = 1 << 15;
pub(crate) const CTRL_VQ: u64 = 1 << 17;
pub(crate) const MQ: u64 = 1 << 22;
pub(crate) const LOG_ALL: u64 = 1 << 26;
pub(crate) const INDIRECT: u64 = 1 << 28;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
pub(crate) const ACCESS_PLATFORM: u64 = 1 << 33;

/// Everything that the driver can want, without what only an IOMMU or a migration needs.
pub(crate) const ALL: u64 = !(LOG_ALL | ACCESS_PLATFORM);

/// What a front-end negotiates that keeps the control queue to itself, as QEMU does.
pub(crate) const DATA_ONLY: u64 = ALL & !CTRL_VQ;

const PROTOCOL: VhostUserProtocolFeatures =
    VhostUserProtocolFeatures::MQ.union(VhostUserProtocolFeatures::CONFIG).union(VhostUserProtocolFeatures::REPLY_ACK);

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT_FLAG: u16 = 4;

/// Length of each of the two memory regions, which adjoin in guest-physical addresses but come from two files.
pub(crate) const REGION_LEN: u64 = 32 << 20;

/// Where the rings of all queues are.
const RING_SPACE: u64 = 0x1_0000;

/// Where the buffers of the queues are.
const DATA: u64 = 0x80_0000;

/// Memory of one queue for its buffers.
const QUEUE_DATA: u64 = 0x40_0000;

/// Difference of the front-end's addresses to guest-physical ones: far, so that a missed translation fails.
pub(crate) const USER_BASE: u64 = 0x7a00_0000_0000;

/// A connected front-end with memory.
pub(crate) struct Machine {
    pub(crate) frontend: Frontend,
    /// The same connection, for messages that the `vhost` crate does not have.
    pub(crate) stream: UnixStream,
    pub(crate) memory: GuestMemoryMmap<()>,
    pub(crate) features: u64,
    /// Tells how many receive queues are in service.
    receiving: Box<dyn Fn() -> u64>,
    regions: Vec<VhostUserMemoryRegionInfo>,
    files: Vec<std::fs::File>,
}

impl Machine {
    /// Connects to a port, and negotiates what `wanted` has of the offered features.
    pub(crate) fn connect(program: &Program, port: usize, wanted: u64) -> Self {
        Self::connect_for(program, port, wanted, VhostUserProtocolFeatures::empty())
    }

    /// The same with further protocol features.
    pub(crate) fn connect_for(
        program: &Program,
        port: usize,
        wanted: u64,
        protocol: VhostUserProtocolFeatures,
    ) -> Self {
        let mut files = Vec::new();
        let mut regions = Vec::new();
        let mut maps = Vec::new();
        for index in 0..2 {
            let fd = rustix::fs::memfd_create("driver memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            let file = std::fs::File::from(fd);
            file.set_len(REGION_LEN).unwrap();
            let start = index * REGION_LEN;
            let map =
                MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), REGION_LEN as usize).unwrap();
            maps.push(GuestRegionMmap::new(map, GuestAddress(start)).unwrap());
            regions.push(VhostUserMemoryRegionInfo {
                guest_phys_addr: start,
                memory_size: REGION_LEN,
                userspace_addr: USER_BASE + start,
                mmap_offset: 0,
                mmap_handle: file.as_raw_fd(),
            });
            files.push(file);
        }
        let memory = GuestMemoryMmap::from_regions(maps).unwrap();
        let (frontend, stream, features) = negotiate(&program.socket(port), wanted, PROTOCOL | protocol);
        frontend.set_mem_table(&regions).unwrap();
        let receiving = receiving(program, port);
        Self { frontend, stream, memory, features, receiving, regions, files }
    }

    /// Ends the connection.
    pub(crate) fn disconnect(&mut self) {
        let (nowhere, _) = UnixStream::pair().unwrap();
        self.frontend = Frontend::from_stream(nowhere.try_clone().unwrap(), 1);
        self.stream = nowhere;
    }

    /// Connects anew, with the same features and the same memory, as a front-end does whose back-end was lost.
    pub(crate) fn reconnect(&mut self, program: &Program, port: usize, protocol: VhostUserProtocolFeatures) {
        let (frontend, stream, _) = negotiate(&program.socket(port), self.features, PROTOCOL | protocol);
        (self.frontend, self.stream) = (frontend, stream);
        self.receiving = receiving(program, port);
    }

    pub(crate) fn announce_memory(&self) {
        self.frontend.set_mem_table(&self.regions).unwrap();
    }

    /// Takes the memory of one region away under the device. Nothing may look at it afterwards.
    pub(crate) fn cut_memory(&self, region: usize) {
        self.files[region].set_len(0).unwrap();
    }

    pub(crate) fn config(&mut self) -> Vec<u8> {
        self.frontend.get_config(0, 24, VhostUserConfigFlags::empty(), &[0; 24]).unwrap().1
    }

    /// Sends a message with a number that the `vhost` crate does not know; its acknowledgement.
    pub(crate) fn request(&mut self, code: u32, value: u64) -> u64 {
        let header = [code, 0x9, 8].map(u32::to_le_bytes).concat();
        self.stream.write_all(&[&header[..], &value.to_le_bytes()].concat()).unwrap();
        let mut answer = [0; 20];
        self.stream.read_exact(&mut answer).unwrap();
        u64::from_le_bytes(answer[12..].try_into().unwrap())
    }

    /// Length of the header before each packet.
    pub(crate) fn header_len(&self) -> usize {
        if self.features & (VERSION_1 | MRG_RXBUF) != 0 { 12 } else { 10 }
    }

    /// A queue with fresh rings that the device does not know yet.
    pub(crate) fn idle_queue(&self, index: usize, size: u16) -> Queue {
        let mut queue = Queue::new(index, size, self.header_len());
        queue.clear(&self.memory);
        queue
    }

    /// Starts a queue with fresh rings.
    pub(crate) fn queue(&mut self, index: usize, size: u16) -> Queue {
        let mut queue = self.idle_queue(index, size);
        queue.start(self, 0);
        queue
    }

    /// The control queue, started with fresh rings.
    pub(crate) fn control_queue(&mut self, index: usize, size: u16) -> Queue {
        let mut queue = self.idle_control_queue(index, size);
        queue.start(self, 0);
        queue
    }

    /// The control queue with fresh rings, which the device does not know yet.
    pub(crate) fn idle_control_queue(&self, index: usize, size: u16) -> Queue {
        Queue { is_control: true, ..self.idle_queue(index, size) }
    }

    /// A pair of queues in service, with `count` receive buffers of `len` bytes.
    pub(crate) fn pair(&mut self, pair: usize, count: u16, len: u32) -> (Queue, Queue) {
        let mut receive = self.idle_queue(2 * pair, 256);
        for head in 0..count {
            receive.offer_buffer(&self.memory, head, len);
        }
        receive.publish(&self.memory);
        receive.start(self, 0);
        (receive, self.queue(2 * pair + 1, 256))
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

fn receiving(program: &Program, port: usize) -> Box<dyn Fn() -> u64> {
    let control = program.control();
    Box::new(move || {
        ask(&control, &serde_json::json!({ "query": {} })).unwrap()["ports"][port]["receiving"].as_u64().unwrap()
    })
}

fn negotiate(socket: &Path, wanted: u64, protocol: VhostUserProtocolFeatures) -> (Frontend, UnixStream, u64) {
    let stream = UnixStream::connect(socket).unwrap();
    let mut frontend = Frontend::from_stream(stream.try_clone().unwrap(), 64);
    frontend.set_owner().unwrap();
    let offered = frontend.get_features().unwrap();
    assert_ne!(offered & PROTOCOL_FEATURES, 0);
    let offered_protocol = frontend.get_protocol_features().unwrap();
    assert!(offered_protocol.contains(protocol), "{offered_protocol:?}");
    frontend.set_protocol_features(protocol).unwrap();
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    let features = offered & wanted | PROTOCOL_FEATURES;
    frontend.set_features(features).unwrap();
    (frontend, stream, features)
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

/// A packet as the driver gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) header: Vec<u8>,
    pub(crate) frame: Vec<u8>,
    /// Buffers that it came in.
    pub(crate) heads: Vec<u16>,
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
    header_len: usize,
    is_control: bool,
    /// What the front-end adds to ring addresses: its own addresses, or none where an IOMMU translates.
    pub(crate) address_base: u64,
    /// Where writes to the used ring are logged, if they are to be.
    pub(crate) log_address: Option<u64>,
}

impl Queue {
    fn new(index: usize, size: u16, header_len: usize) -> Self {
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
            header_len,
            is_control: false,
            address_base: USER_BASE,
            log_address: None,
        }
    }

    /// Empties the rings, as a driver does that starts anew.
    pub(crate) fn clear(&mut self, memory: &GuestMemoryMmap<()>) {
        memory.write_slice(&vec![0; 0x1_0000], GuestAddress(self.desc)).unwrap();
        self.avail_index = 0;
        self.used_seen = 0;
    }

    /// Announces the ring to the back-end, which goes on at `base`. A receive ring is in service then: what is sent to the
    /// port arrives.
    pub(crate) fn start(&mut self, machine: &mut Machine, base: u16) {
        let before = (machine.receiving)();
        self.announce(machine, base);
        if self.index.is_multiple_of(2) && !self.is_control {
            wait_until("start of a receive queue", || (machine.receiving)() == before + 1);
        }
    }

    /// Announces the ring to the back-end, and does not wait for anything.
    pub(crate) fn announce(&mut self, machine: &mut Machine, base: u16) {
        self.ask_for_call(&machine.memory);
        let frontend = &mut machine.frontend;
        frontend.set_vring_num(self.index, self.size).unwrap();
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
        frontend.set_vring_base(self.index, base).unwrap();
        frontend.set_vring_call(self.index, &self.call).unwrap();
        frontend.set_vring_err(self.index, &self.error).unwrap();
        frontend.set_vring_kick(self.index, &self.kick).unwrap();
        frontend.set_vring_enable(self.index, true).unwrap();
    }

    /// Stops the ring; returns the position that the back-end has reached.
    pub(crate) fn stop(&self, machine: &Machine) -> u16 {
        u16::try_from(machine.frontend.get_vring_base(self.index).unwrap()).unwrap()
    }

    /// First address of the queue's buffers.
    pub(crate) fn data(&self) -> u64 {
        DATA + self.index as u64 * QUEUE_DATA
    }

    fn buffer(&self, head: u16) -> u64 {
        // Odd addresses are as good as others.
        self.data() + u64::from(head) * 0x1_1000 % (QUEUE_DATA - 0x1_1000) + 1
    }

    pub(crate) fn put_desc(&self, memory: &GuestMemoryMmap<()>, index: u16, desc: Desc) {
        memory.write_slice(&desc.bytes(), GuestAddress(self.desc + 16 * u64::from(index))).unwrap();
    }

    /// Puts `head` into the available ring without telling the device.
    pub(crate) fn offer(&mut self, memory: &GuestMemoryMmap<()>, head: u16) {
        let entry = self.avail + 4 + 2 * u64::from(self.avail_index % self.size);
        memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.avail_index = self.avail_index.wrapping_add(1);
    }

    /// Offers a receive buffer, which is one descriptor.
    pub(crate) fn offer_buffer(&mut self, memory: &GuestMemoryMmap<()>, head: u16, len: u32) {
        self.put_desc(memory, head, Desc { address: self.buffer(head), len, flags: WRITE, next: 0 });
        self.offer(memory, head);
    }

    /// Makes visible what was offered.
    pub(crate) fn publish(&self, memory: &GuestMemoryMmap<()>) {
        memory.store(self.avail_index, GuestAddress(self.avail + 2), Ordering::Release).unwrap();
    }

    pub(crate) fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Offers a packet in one buffer.
    pub(crate) fn offer_packet(&mut self, machine: &Machine, head: u16, header: &[u8], frame: &[u8]) {
        let bytes = [&header[..self.header_len], frame].concat();
        let address = self.buffer(head);
        machine.fill(address, &bytes);
        let desc = Desc { address, len: bytes.len() as u32, flags: 0, next: 0 };
        self.put_desc(&machine.memory, head, desc);
        self.offer(&machine.memory, head);
    }

    /// Sends a packet and waits until it was taken.
    pub(crate) fn send(&mut self, machine: &Machine, header: &[u8], frame: &[u8]) {
        self.offer_packet(machine, 0, header, frame);
        self.publish(&machine.memory);
        self.kick();
        assert_eq!(self.wait_used(&machine.memory), (0, 0));
    }

    /// Waits for a packet.
    pub(crate) fn receive(&mut self, machine: &Machine) -> Received {
        let first = self.wait_used(&machine.memory);
        self.gather(machine, first)
    }

    /// Takes a packet, if there is one.
    pub(crate) fn try_receive(&mut self, machine: &Machine) -> Option<Received> {
        let first = self.take_used(&machine.memory)?;
        Some(self.gather(machine, first))
    }

    fn gather(&mut self, machine: &Machine, first: (u16, u32)) -> Received {
        let mut bytes = machine.bytes(self.buffer(first.0), first.1 as usize);
        let mut heads = vec![first.0];
        let buffers = if self.header_len == 12 { u16::from_le_bytes([bytes[10], bytes[11]]) } else { 1 };
        for _ in 1..buffers {
            // All of them become visible at once.
            let (head, len) = self.take_used(&machine.memory).unwrap();
            bytes.extend(machine.bytes(self.buffer(head), len as usize));
            heads.push(head);
        }
        let frame = bytes.split_off(self.header_len);
        Received { header: bytes, frame, heads }
    }

    /// Gives the buffers of a packet to the device again.
    pub(crate) fn recycle(&mut self, machine: &Machine, received: &Received) {
        for head in &received.heads {
            self.offer(&machine.memory, *head);
        }
        self.publish(&machine.memory);
        self.kick();
    }

    /// Carries out a command of the control queue; the device's answer.
    pub(crate) fn command(&mut self, machine: &Machine, command: &[u8]) -> u8 {
        let (memory, address) = (&machine.memory, self.buffer(0));
        machine.fill(address, command);
        machine.fill(address + 0x8000, &[0xff]);
        self.put_desc(memory, 0, Desc { address, len: command.len() as u32, flags: NEXT, next: 1 });
        self.put_desc(memory, 1, Desc { address: address + 0x8000, len: 1, flags: WRITE, next: 0 });
        self.offer(memory, 0);
        self.publish(memory);
        self.kick();
        assert_eq!(self.wait_used(memory), (0, 1));
        machine.bytes(address + 0x8000, 1)[0]
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
        self.ask_for_call(memory);
        Some((u16::try_from(head).unwrap(), len))
    }

    /// Asks for an interrupt for the next entry of the used ring, should EVENT_IDX be in force.
    fn ask_for_call(&self, memory: &GuestMemoryMmap<()>) {
        let event = GuestAddress(self.avail + 4 + 2 * u64::from(self.size));
        memory.store(self.used_seen, event, Ordering::SeqCst).unwrap();
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
    let fd = descriptor(event);
    let timeout = Timespec { tv_sec: LIMIT.as_secs().cast_signed(), tv_nsec: 0 };
    let count = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap();
    assert_eq!(count, 1, "no {what} within {LIMIT:?}");
    event.read().unwrap()
}

#[expect(unsafe_code, reason = "vmm_sys_util's EventFd lends its descriptor as a number only")]
fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: open as long as the event is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
