//! The values of a session, and the front-end on our end of the socket.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{
    FrontEndReply, FrontEndRequest, Inflight, LogArea, RawMessage, ShmemConfig, ShmemMap, VringAddresses,
};
use vvu_socket::MessageSocket;

use crate::descriptor::{Identity, identified};

/// Device features that the back-end offers; bit 9 is VIRTIO_BLK_F_FLUSH, which passes without a name.
pub(crate) const FEATURES: Features = Features::PROTOCOL_FEATURES
    .union(Features::VERSION_1)
    .union(Features::LOG_ALL)
    .union(Features::from_bits_retain(1 << 9));

/// Every protocol feature that the crate's back-end checks before it takes a request.
pub(crate) const PROTOCOL_FEATURES: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::LOG_SHMFD)
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::BACKEND_SEND_FD)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::SHARED_OBJECT)
    .union(ProtocolFeatures::DEVICE_STATE)
    .union(ProtocolFeatures::SHMEM);

pub(crate) const QUEUE_COUNT: u64 = 5;
pub(crate) const SLOT_COUNT: u64 = 509;
pub(crate) const VRING_BASE: u32 = 0x1234;

pub(crate) const fn region(guest: u64, size: u64, user: u64, offset: u64) -> MemoryRegion {
    MemoryRegion {
        guest_address: GuestAddress(guest),
        size,
        user_address: UserAddress(user),
        mmap_offset: FileOffset(offset),
    }
}

pub(crate) const LOW: MemoryRegion = region(0, 0xa_0000, 0x7f12_3456_7000, 0x1000);
pub(crate) const HIGH: MemoryRegion = region(0x1_0000_0000, 0x8000_0000, 0x7f92_3456_7000, 0x8000_0000);
pub(crate) const PLUGGED: MemoryRegion = region(0x2_0000_0000, 0x4000_0000, 0x7fa2_3456_7000, 0);

pub(crate) const ADDRESSES: VringAddresses = VringAddresses {
    index: 2,
    flags: 1,
    descriptors: 0x7f12_3456_7010,
    used: 0x7f12_3457_0004,
    available: 0x7f12_3458_0002,
    log: 0x1_2345_6789,
};

pub(crate) const LOG: LogArea = LogArea { size: 0x1_2000, mmap_offset: FileOffset(0x3000) };

/// What the front-end asks for, and what the back-end makes of it.
pub(crate) const INFLIGHT_WANTED: Inflight =
    Inflight { mmap_size: 0, mmap_offset: FileOffset(0), queue_count: 4, queue_size: 256 };
pub(crate) const INFLIGHT: Inflight =
    Inflight { mmap_size: 0x4000, mmap_offset: FileOffset(0x1000), ..INFLIGHT_WANTED };

pub(crate) const UUID: [u8; 16] = *b"\x10\x21\x32\x43\x54\x65\x76\x87\x98\xa9\xba\xcb\xdc\xed\xfe\x0f";
pub(crate) const CONFIG: &[u8] = b"configuration";
pub(crate) const CONFIG_OFFSET: u32 = 0x20;

pub(crate) const MAP: ShmemMap =
    ShmemMap { region: 1, file_offset: FileOffset(0x3000), region_offset: 0x20_0000, len: 0x5000, writable: true };

pub(crate) fn shmem_config() -> ShmemConfig {
    ShmemConfig { regions: vec![(0, 0x20_0000), (2, 0x1000)] }
}

/// Runs a test; one that waits for what never comes fails after a while.
pub(crate) async fn in_time<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), test).await.expect("the session stands still")
}

/// A descriptor that stays open on our side while a copy of it is passed.
pub(crate) type Shared = Arc<OwnedFd>;

/// Our front-end: sends requests and keeps what it sent.
pub(crate) struct FrontEnd {
    socket: MessageSocket,
    sent: Vec<FrontEndRequest<Identity>>,
}

impl FrontEnd {
    pub(crate) fn new(socket: MessageSocket) -> Self {
        Self { socket, sent: Vec::new() }
    }

    /// Sends a request that gets no answer.
    pub(crate) async fn tell(&mut self, request: FrontEndRequest<Shared>) {
        self.send(&request.encode(false)).await;
    }

    /// Sends a request, waits for its answer.
    pub(crate) async fn ask(&mut self, request: FrontEndRequest<Shared>) -> FrontEndReply<OwnedFd> {
        let code = request.code();
        self.send(&request.encode(true)).await;
        let reply = self.socket.recv().await.unwrap().expect("an answer, not the end");
        FrontEndReply::decode(code, reply).unwrap()
    }

    /// Sends a request, waits until it is acknowledged.
    pub(crate) async fn order(&mut self, request: FrontEndRequest<Shared>) {
        let name = request.name();
        let reply = self.ask(request).await;
        assert!(matches!(reply, FrontEndReply::Acknowledgement(0)), "{name}: {reply:?}");
    }

    /// A session up to and with the protocol features: from here on requests are acknowledged.
    pub(crate) async fn negotiate(&mut self) {
        self.tell(FrontEndRequest::SetOwner).await;
        let features = self.ask(FrontEndRequest::GetFeatures).await;
        assert!(matches!(features, FrontEndReply::Number(bits) if bits == FEATURES.bits()), "{features:?}");
        let offered = self.ask(FrontEndRequest::GetProtocolFeatures).await;
        assert!(matches!(offered, FrontEndReply::Number(bits) if bits == PROTOCOL_FEATURES.bits()), "{offered:?}");
        self.tell(FrontEndRequest::SetProtocolFeatures(PROTOCOL_FEATURES)).await;
        self.order(FrontEndRequest::SetFeatures(FEATURES)).await;
    }

    /// Ends the session and returns every request that was sent.
    pub(crate) fn end(self) -> Vec<FrontEndRequest<Identity>> {
        self.sent
    }

    async fn send(&mut self, message: &RawMessage<Shared>) {
        self.sent.push(FrontEndRequest::decode(identified(message)).unwrap());
        self.socket.send(message).await.unwrap();
    }
}
