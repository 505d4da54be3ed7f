//! A front-end with the `vhost` crate's messages, and the memory that it announces.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::ring::Memory;

/// Device feature LOG_ALL.
pub const LOG_ALL: u64 = 1 << 26;
/// Device feature INDIRECT_DESC.
pub const INDIRECT: u64 = 1 << 28;
/// Device feature EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;
/// Device feature VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// Device feature ACCESS_PLATFORM.
pub const ACCESS_PLATFORM: u64 = 1 << 33;

const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Everything that is offered, without what only an IOMMU or a migration needs: the tests of these ask for it by name.
pub const ORDINARY: u64 = !(LOG_ALL | ACCESS_PLATFORM);

/// Protocol features of every front-end here.
const PROTOCOL: VhostUserProtocolFeatures =
    VhostUserProtocolFeatures::MQ.union(VhostUserProtocolFeatures::CONFIG).union(VhostUserProtocolFeatures::REPLY_ACK);

/// Difference of the front-end's addresses to guest-physical ones: far, so that a missed translation fails.
pub const USER_BASE: u64 = 0x7a00_0000_0000;

/// A connected front-end with memory: two regions that adjoin in guest-physical addresses but come from two files.
pub struct FrontEnd {
    /// Sends messages, and wants each one to be acknowledged.
    pub frontend: Frontend,
    /// The same connection, for messages that the `vhost` crate does not have.
    pub stream: UnixStream,
    /// All memory.
    pub memory: Memory,
    /// Device features that were negotiated.
    pub features: u64,
    /// Protocol features that were negotiated.
    pub protocol: VhostUserProtocolFeatures,
    /// What is announced of the memory.
    pub regions: Vec<VhostUserMemoryRegionInfo>,
    files: Vec<File>,
}

impl FrontEnd {
    /// Connects to `socket`, negotiates what `choose` makes of the offered features, and further protocol features, which
    /// have to be offered; announces two regions of `region_len` bytes each.
    pub fn connect(
        socket: &Path,
        choose: impl Fn(u64) -> u64,
        protocol: VhostUserProtocolFeatures,
        region_len: u64,
    ) -> Self {
        let mut files = Vec::new();
        let mut regions = Vec::new();
        let mut maps = Vec::new();
        for index in 0..2 {
            let file = memfd(region_len);
            let region = region_of(&file, index * region_len, region_len, 0);
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

    /// Ends the connection.
    pub fn disconnect(&mut self) {
        let (nowhere, _) = UnixStream::pair().unwrap();
        self.frontend = Frontend::from_stream(nowhere.try_clone().unwrap(), 1);
        self.stream = nowhere;
    }

    /// Connects anew, with the same features and the same memory, as a front-end does whose back-end was lost. The former
    /// connection ends first: one front-end is served at a time. Memory is not announced yet.
    pub fn reconnect(&mut self, socket: &Path) {
        self.disconnect();
        let features = self.features;
        (self.frontend, self.stream, self.features) = negotiate(socket, |_| features, self.protocol);
    }

    /// The file of one region.
    #[must_use]
    pub fn file(&self, region: usize) -> &File {
        &self.files[region]
    }

    /// Announces the memory, for the first time over a new connection or once more.
    pub fn announce_memory(&self) {
        self.frontend.set_mem_table(&self.regions).unwrap();
    }

    /// Takes the memory of one region away under the device. Nothing may look at it afterwards.
    pub fn cut_memory(&self, region: usize) {
        self.files[region].set_len(0).unwrap();
    }

    /// The first bytes of the configuration space.
    pub fn config(&mut self, len: u32) -> Vec<u8> {
        let empty = vec![0; len as usize];
        self.frontend.get_config(0, len, VhostUserConfigFlags::empty(), &empty).unwrap().1
    }

    /// Sends a message with a number that the `vhost` crate does not know; its acknowledgement.
    pub fn request(&mut self, code: u32, value: u64) -> u64 {
        let header = [code, 0x9, 8].map(u32::to_le_bytes).concat();
        self.stream.write_all(&[&header[..], &value.to_le_bytes()].concat()).unwrap();
        let mut answer = [0; 20];
        self.stream.read_exact(&mut answer).unwrap();
        u64::from_le_bytes(answer[12..].try_into().unwrap())
    }

    /// Writes to memory.
    pub fn fill(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Reads from memory.
    #[must_use]
    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
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

/// A region of driver memory at a guest-physical address, `len` bytes at `offset` of a file.
#[must_use]
pub fn region_of(file: &File, start: u64, len: u64, offset: u64) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: start,
        memory_size: len,
        userspace_addr: USER_BASE + start,
        mmap_offset: offset,
        mmap_handle: file.as_raw_fd(),
    }
}

/// The driver's own mapping of a region.
#[must_use]
pub fn map_region(file: &File, region: &VhostUserMemoryRegionInfo) -> GuestRegionMmap<()> {
    let place = FileOffset::new(file.try_clone().unwrap(), region.mmap_offset);
    let map = MmapRegion::from_file(place, region.memory_size as usize).unwrap();
    GuestRegionMmap::new(map, GuestAddress(region.guest_phys_addr)).unwrap()
}

/// A file in memory.
#[must_use]
pub fn memfd(len: u64) -> File {
    let fd = rustix::fs::memfd_create("driver memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(len).unwrap();
    file
}
