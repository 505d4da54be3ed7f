//! The appliance's VMM, scripted as QEMU 11 behaves: two generic vhost-user devices and the doorbell device.
//!
//! Like QEMU it answers on the back channels at any time, and it hands out new memory tables to both devices before it
//! answers a mapping: every mapping counts as memory of the appliance.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot, watch};
use vm_memory::{FileOffset as FileAt, GuestAddress as Physical, GuestMemoryMmap};
use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress};
use vvu_protocol::control::CONFIG_LEN;
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{
    BackEndReply, BackEndRequest, ConfigSpace, FrontEndReply, FrontEndRequest, RawMessage, ShmemMap, VringAddresses,
    VringFile, VringState,
};
use vvu_socket::MessageSocket;

use super::doorbell::Doorbell;
use super::ring::{self, DriverRing};
use super::{Journal, PATIENCE, identity, memory_file, unsealed_memory_file, within, within_limit};

/// Guest-physical address of the appliance's memory above 4 GiB. The memory below begins at 0.
pub(crate) const HIGH_MEMORY: u64 = 0x1_0000_0000;

/// Bytes of memory below and above 4 GiB, one behind the other in one file.
const HALF: u64 = 2 << 20;

/// Where the VMM's own process has mapped its memory and the window: far from each other and from the guest's addresses.
const LOW_USER: u64 = 0x7e00_0000_0000;
const HIGH_USER: u64 = 0x7e40_0000_0000;
pub(crate) const WINDOW_USER: u64 = 0x7ec0_0000_0000;

/// Guest-physical address of the window.
pub(crate) const WINDOW_BAR: u64 = 0x38_0000_0000;

const WINDOW_RING: u64 = 0x10_0000;

/// What the VMM does with the next mapping, other than allow it.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Refuses it.
    Refuse,
    /// Waits before it allows it.
    Hold(oneshot::Receiver<()>),
}

/// A mapping in the window.
#[derive(Debug)]
struct Mapping {
    map: ShmemMap,
    file: OwnedFd,
}

/// What the device tasks share.
#[derive(Debug)]
struct Shared {
    ram: OwnedFd,
    mappings: Mutex<Vec<Mapping>>,
    verdicts: Mutex<VecDeque<Verdict>>,
    journal: Journal,
    /// The last request that the bridge has made for the window.
    asked: watch::Sender<&'static str>,
}

impl Shared {
    /// The memory table of every device of this VM.
    fn table(&self) -> Vec<(MemoryRegion, OwnedFd)> {
        let region = |guest, size, user, offset| MemoryRegion {
            guest_address: GuestAddress(guest),
            size,
            user_address: UserAddress(user),
            mmap_offset: FileOffset(offset),
        };
        let mut table = vec![
            (region(0, HALF, LOW_USER, 0), self.ram.try_clone().unwrap()),
            (region(HIGH_MEMORY, HALF, HIGH_USER, HALF), self.ram.try_clone().unwrap()),
        ];
        for Mapping { map, file } in &*self.mappings.lock().unwrap() {
            let (guest, user) = (WINDOW_BAR + map.region_offset, WINDOW_USER + map.region_offset);
            table.push((region(guest, map.len, user, map.file_offset.0), file.try_clone().unwrap()));
        }
        table
    }

    /// Allows a mapping that QEMU would allow.
    fn map(&self, map: ShmemMap, file: OwnedFd) -> u64 {
        let mut mappings = self.mappings.lock().unwrap();
        let file_len = rustix::fs::fstat(&file).unwrap().st_size.unsigned_abs();
        let aligned = [map.len, map.region_offset, map.file_offset.0].iter().all(|value| value.is_multiple_of(4096));
        let overlaps = |other: &Mapping| {
            let (ours, theirs) = (map.region_offset, other.map.region_offset);
            ours < theirs + other.map.len && theirs < ours + map.len
        };
        if !aligned || map.file_offset.0 + map.len > file_len || mappings.iter().any(overlaps) {
            return 1;
        }
        mappings.push(Mapping { map, file });
        0
    }

    fn unmap(&self, map: &ShmemMap) -> u64 {
        let mut mappings = self.mappings.lock().unwrap();
        let place = |mapping: &Mapping| mapping.map.region_offset == map.region_offset && mapping.map.len == map.len;
        match mappings.iter().position(place) {
            Some(index) => {
                mappings.remove(index);
                0
            }
            None => 1,
        }
    }
}

/// The appliance's VMM.
#[derive(Debug)]
pub(crate) struct Vmm {
    pub(crate) control: Arc<Device>,
    pub(crate) window: Arc<Device>,
    pub(crate) doorbell: Doorbell,
    /// One permit for each configuration interrupt of the control device.
    pub(crate) config_interrupts: Arc<Semaphore>,
    shared: Arc<Shared>,
    /// The same sockets as the device tasks have.
    window_back: UnixStream,
}

impl Vmm {
    /// Starts, and connects to the three sockets in `directory`.
    pub(crate) async fn connect(directory: &Path, journal: Journal) -> Self {
        Self::connect_with_ram(directory, journal, memory_file(2 * HALF)).await
    }

    /// The same with `memory-backend-memfd,seal=off`.
    pub(crate) async fn connect_with_unsealed_ram(directory: &Path, journal: Journal) -> Self {
        Self::connect_with_ram(directory, journal, unsealed_memory_file(2 * HALF)).await
    }

    async fn connect_with_ram(directory: &Path, journal: Journal, ram: OwnedFd) -> Self {
        let (mappings, verdicts, asked) = (Mutex::default(), Mutex::default(), watch::Sender::new(""));
        let shared = Arc::new(Shared { ram, mappings, verdicts, journal, asked });
        let config_interrupts = Arc::new(Semaphore::new(0));
        let (control, control_back) = Device::realize(&directory.join("control.sock"), 2).await;
        let (window, window_stream) = Device::realize(&directory.join("window.sock"), 1).await;
        let window_back = window_stream.try_clone().unwrap();
        let doorbell = Doorbell::realize(&directory.join("doorbell.sock")).await;
        let control_back = MessageSocket::new(control_back).unwrap();
        let window_stream = MessageSocket::new(window_stream).unwrap();
        tokio::spawn(count_interrupts(control_back, Arc::clone(&config_interrupts), shared.journal.clone()));
        tokio::spawn(serve_mappings(window_stream, Arc::clone(&shared), [Arc::clone(&control), Arc::clone(&window)]));
        Self { control, window, doorbell, config_interrupts, shared, window_back }
    }

    pub(crate) fn journal(&self) -> Journal {
        self.shared.journal.clone()
    }

    /// The appliance's memory as the appliance sees it.
    pub(crate) fn map_ram(&self) -> GuestMemoryMmap {
        let half = usize::try_from(HALF).unwrap();
        let file = |offset| Some(FileAt::new(self.shared.ram.try_clone().unwrap().into(), offset));
        let ranges = [(Physical(0), half, file(0)), (Physical(HIGH_MEMORY), half, file(HALF))];
        GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()
    }

    /// The driver of the control device has set DRIVER_OK.
    pub(crate) async fn start_control(&self, rings: &[&DriverRing]) {
        self.control.start(self.shared.table(), rings).await;
    }

    /// The driver of the window device has set DRIVER_OK.
    pub(crate) async fn start_window(&self) {
        let ring = DriverRing::new(&self.map_ram(), Physical(WINDOW_RING));
        self.window.start(self.shared.table(), &[&ring]).await;
    }

    /// The window device is reset: its mappings are gone, and nobody says so.
    pub(crate) async fn reset_window(&self) {
        self.window.stop().await;
        self.shared.mappings.lock().unwrap().clear();
    }

    /// Answers on the window's back channel what nobody has asked.
    pub(crate) async fn answers_unasked(&self) {
        let back_channel = MessageSocket::new(self.window_back.try_clone().unwrap()).unwrap();
        back_channel.send(&BackEndReply::<OwnedFd>::Acknowledgement(0).encode(9)).await.unwrap();
    }

    /// Hands out the memory table to the control device, and waits for nothing.
    pub(crate) async fn hands_out_memory(&self) {
        self.control.post(&FrontEndRequest::SetMemTable(self.shared.table()).encode(false)).await;
    }

    /// What the VMM does with the next mappings.
    pub(crate) fn decides(&self, verdict: Verdict) {
        self.shared.verdicts.lock().unwrap().push_back(verdict);
    }

    /// The VMM is killed: all its sockets are closed.
    pub(crate) fn dies(&self) {
        self.control.close();
        self.window.close();
        self.doorbell.close();
        let _ = self.window_back.shutdown(Shutdown::Both);
    }

    /// Waits until the last request of the bridge for the window is this one.
    pub(crate) async fn asked(&self, name: &str) {
        self.asked_within(PATIENCE, name).await;
    }

    /// The same with a limit of its own.
    pub(crate) async fn asked_within(&self, limit: Duration, name: &str) {
        let mut asked = self.shared.asked.subscribe();
        let asked = asked.wait_for(|last| *last == name);
        within_limit(limit, &format!("the bridge to ask for {name}"), asked).await.unwrap();
    }

    pub(crate) fn ram_identity(&self) -> (u64, u64) {
        identity(&self.shared.ram)
    }

    /// All mappings but the header's.
    pub(crate) fn driver_mappings(&self) -> Vec<ShmemMap> {
        let mappings = self.shared.mappings.lock().unwrap();
        mappings.iter().map(|mapping| mapping.map).filter(|map| map.region_offset != 0).collect()
    }

    /// The file that is mapped at the start of the window.
    pub(crate) fn header(&self) -> Option<OwnedFd> {
        let mappings = self.shared.mappings.lock().unwrap();
        let header = mappings.iter().find(|mapping| mapping.map.region_offset == 0)?;
        Some(header.file.try_clone().unwrap())
    }

    /// The file that is mapped at an offset of the window.
    pub(crate) fn file_at(&self, offset: u64) -> OwnedFd {
        let mappings = self.shared.mappings.lock().unwrap();
        let found = mappings.iter().find(|mapping| mapping.map.region_offset == offset);
        found.unwrap_or_else(|| panic!("nothing is mapped at {offset:#x}")).file.try_clone().unwrap()
    }

    /// How many files of this identity are in the memory table of the appliance's devices.
    pub(crate) fn lists(&self, wanted: (u64, u64)) -> usize {
        self.shared.table().iter().filter(|(_, file)| identity(file) == wanted).count()
    }

    /// Returns when both devices have taken two requests more: whatever they had to do before is done.
    pub(crate) async fn fence(&self) {
        for device in [&self.control, &self.window, &self.control, &self.window] {
            device.read_config().await;
        }
    }
}

/// One generic vhost-user device.
#[derive(Debug)]
pub(crate) struct Device {
    main: tokio::sync::Mutex<MessageSocket>,
    stream: UnixStream,
    queue_count: u32,
    /// The configuration space as it was read last.
    config: Mutex<Vec<u8>>,
    running: AtomicBool,
}

impl Device {
    /// Connects and sets up, as QEMU does before the guest runs. Answers the device and its back channel.
    async fn realize(path: &Path, queue_count: u32) -> (Arc<Self>, UnixStream) {
        let stream = UnixStream::connect(path).unwrap();
        let main = tokio::sync::Mutex::new(MessageSocket::new(stream.try_clone().unwrap()).unwrap());
        let config = Mutex::new(vec![0; if queue_count == 2 { CONFIG_LEN } else { 16 }]);
        let device = Self { main, stream, queue_count, config, running: AtomicBool::new(false) };
        let features = Features::from_bits_retain(device.number(FrontEndRequest::GetFeatures).await);
        assert!(features.contains(Features::VERSION_1 | Features::PROTOCOL_FEATURES), "{features:?}");
        let protocol = device.number(FrontEndRequest::GetProtocolFeatures).await;
        let protocol = ProtocolFeatures::from_bits_retain(protocol);
        let needed = ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::CONFIG | ProtocolFeatures::REPLY_ACK;
        assert!(protocol.contains(needed), "{protocol:?}");
        // With it, a reset of the appliance would kill QEMU 11.
        assert!(!protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS), "{protocol:?}");
        device.done(FrontEndRequest::SetProtocolFeatures(protocol)).await;
        assert_eq!(device.number(FrontEndRequest::GetQueueNum).await, u64::from(queue_count));
        let (ours, theirs) = UnixStream::pair().unwrap();
        device.done(FrontEndRequest::SetBackendReqFd(theirs.into())).await;
        device.done(FrontEndRequest::SetOwner).await;
        if protocol.contains(ProtocolFeatures::SHMEM) {
            let FrontEndReply::ShmemConfig(config) = device.request(FrontEndRequest::GetShmemConfig).await else {
                panic!("expected the sizes of the shared memory regions");
            };
            // QEMU asserts it.
            assert!(config.regions.iter().map(|(_, len)| len).sum::<u64>().is_power_of_two(), "{config:?}");
        }
        device.read_config().await;
        (Arc::new(device), ours)
    }

    /// Starts all vrings.
    async fn start(&self, table: Vec<(MemoryRegion, OwnedFd)>, rings: &[&DriverRing]) {
        self.done(FrontEndRequest::SetFeatures(Features::VERSION_1 | Features::PROTOCOL_FEATURES)).await;
        self.done(FrontEndRequest::SetMemTable(table)).await;
        for (index, ring) in (0_u8..).zip(rings) {
            let state = |num| VringState { index: u32::from(index), num };
            self.done(FrontEndRequest::SetVringNum(state(u32::from(ring::SIZE)))).await;
            self.done(FrontEndRequest::SetVringBase(state(0))).await;
            let (descriptors, available, used) = ring.addresses();
            let [descriptors, available, used] = [descriptors, available, used].map(user_address);
            let addresses = VringAddresses { index: u32::from(index), flags: 0, descriptors, used, available, log: 0 };
            self.done(FrontEndRequest::SetVringAddr(addresses)).await;
            let file = |descriptor| VringFile { index, descriptor: Some(descriptor) };
            self.done(FrontEndRequest::SetVringKick(file(ring.kick.try_clone().unwrap()))).await;
            self.done(FrontEndRequest::SetVringCall(file(ring.call()))).await;
        }
        self.running.store(true, Ordering::SeqCst);
        for index in 0..self.queue_count {
            self.done(FrontEndRequest::SetVringEnable(VringState { index, num: 1 })).await;
        }
    }

    /// Stops all vrings, as QEMU does on a reset of the device.
    pub(crate) async fn stop(&self) {
        self.running.store(false, Ordering::SeqCst);
        for index in 0..self.queue_count {
            self.done(FrontEndRequest::SetVringEnable(VringState { index, num: 0 })).await;
        }
        for index in 0..self.queue_count {
            self.request(FrontEndRequest::GetVringBase(VringState { index, num: 0 })).await;
        }
    }

    /// Reads the whole configuration space.
    pub(crate) async fn read_config(&self) -> Vec<u8> {
        let wanted = ConfigSpace { offset: 0, flags: 0, bytes: self.config.lock().unwrap().clone() };
        match self.request(FrontEndRequest::GetConfig(wanted)).await {
            FrontEndReply::Config(Some(config)) => {
                self.config.lock().unwrap().clone_from(&config.bytes);
                config.bytes
            }
            other => panic!("expected the configuration space, {other:?} came"),
        }
    }

    /// The guest writes into the configuration space. QEMU changes what it has read last, and sends all of it.
    pub(crate) async fn write_config(&self, offset: usize, bytes: &[u8]) {
        let whole = {
            let mut config = self.config.lock().unwrap();
            config[offset..offset + bytes.len()].copy_from_slice(bytes);
            config.clone()
        };
        self.write_part_of_config(0, whole).await;
    }

    /// The VMM sends a part of the configuration space, as the specification allows.
    pub(crate) async fn write_part_of_config(&self, offset: u32, bytes: Vec<u8>) {
        self.done(FrontEndRequest::SetConfig(ConfigSpace { offset, flags: 0, bytes })).await;
    }

    /// Sends a message as it is, and waits for nothing.
    pub(crate) async fn post(&self, message: &RawMessage<OwnedFd>) {
        self.main.lock().await.send(message).await.unwrap();
    }

    /// Sends the same message over and over, and reads no answer, until the bridge closes the socket.
    pub(crate) async fn floods(&self, message: &RawMessage<OwnedFd>) {
        let main = self.main.lock().await;
        within("the bridge to close the socket", async { while main.send(message).await.is_ok() {} }).await;
    }

    /// Closes the socket.
    pub(crate) fn close(&self) {
        self.stream.shutdown(Shutdown::Both).unwrap();
    }

    async fn done(&self, request: FrontEndRequest<OwnedFd>) {
        let name = request.name();
        let reply = self.request(request).await;
        assert!(matches!(reply, FrontEndReply::Acknowledgement(0)), "{name} was answered with {reply:?}");
    }

    async fn number(&self, request: FrontEndRequest<OwnedFd>) -> u64 {
        match self.request(request).await {
            FrontEndReply::Number(value) => value,
            other => panic!("expected a number, {other:?} came"),
        }
    }

    async fn request(&self, request: FrontEndRequest<OwnedFd>) -> FrontEndReply<OwnedFd> {
        let (code, name) = (request.code(), request.name());
        let mut main = self.main.lock().await;
        main.send(&request.encode(true)).await.unwrap();
        let message = within(&format!("an answer to {name} of the appliance's VMM"), main.recv()).await.unwrap();
        let message = message.unwrap_or_else(|| panic!("the bridge closed the socket instead of an answer to {name}"));
        FrontEndReply::decode(code, message).unwrap()
    }

    /// Hands out a new memory table, if the device runs. The bridge may have ended meanwhile.
    async fn hand_out(&self, table: Vec<(MemoryRegion, OwnedFd)>) {
        let mut main = self.main.lock().await;
        if self.running.load(Ordering::SeqCst)
            && main.send(&FrontEndRequest::SetMemTable(table).encode(true)).await.is_ok()
        {
            let _ = within("an answer to SET_MEM_TABLE of the appliance's VMM", main.recv()).await;
        }
    }
}

/// Where the VMM's process sees a guest-physical address.
fn user_address(physical: u64) -> u64 {
    if physical < HIGH_MEMORY { LOW_USER + physical } else { HIGH_USER + (physical - HIGH_MEMORY) }
}

async fn count_interrupts(mut back_channel: MessageSocket, interrupts: Arc<Semaphore>, journal: Journal) {
    while let Ok(Some(message)) = back_channel.recv().await {
        match BackEndRequest::decode(message).unwrap() {
            BackEndRequest::ConfigChange => {
                journal.note("config interrupt");
                interrupts.add_permits(1);
            }
            other => journal.note(format!("unexpected {} on the control device", other.name())),
        }
    }
}

async fn serve_mappings(mut back_channel: MessageSocket, shared: Arc<Shared>, devices: [Arc<Device>; 2]) {
    while let Ok(Some(message)) = back_channel.recv().await {
        let request = BackEndRequest::decode(message).unwrap();
        let (code, name) = (request.code(), request.name());
        shared.journal.note(format!("{name} asked"));
        shared.asked.send_replace(name);
        let verdict = shared.verdicts.lock().unwrap().pop_front();
        if let Some(Verdict::Hold(release)) = verdict {
            let _ = release.await;
        } else if verdict.is_some() {
            shared.journal.note(format!("{name} refused"));
            let _ = back_channel.send(&BackEndReply::<OwnedFd>::Acknowledgement(1).encode(code)).await;
            continue;
        }
        let answer = match request {
            BackEndRequest::ShmemMap(map, file) => shared.map(map, file),
            BackEndRequest::ShmemUnmap(map) => shared.unmap(&map),
            other => panic!("the window device does not ask {}", other.name()),
        };
        for device in &devices {
            device.hand_out(shared.table()).await;
        }
        shared.journal.note(format!("{name} answered {answer}"));
        let _ = back_channel.send(&BackEndReply::<OwnedFd>::Acknowledgement(answer).encode(code)).await;
    }
}
