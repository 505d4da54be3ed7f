//! Strategies for messages with arbitrary content.

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::{MAX_TABLE_REGIONS, MemoryRegion};
use vvu_protocol::message::{
    BackEndReply, BackEndRequest, ConfigSpace, DeviceStatePhase, DeviceStateTransfer, FRONT_END_REQUESTS,
    FrontEndReply, FrontEndRequest as Request, Inflight, Iotlb, LogArea, MAX_CONFIG_LEN, MAX_PAYLOAD_LEN, RawMessage,
    ReplyPayload, ShmemConfig, ShmemMap, StateDirection, VringAddresses, VringArea, VringFile, VringState,
};

/// Any request of the front-end with this code.
pub(crate) fn front_end_request(code: u32) -> BoxedStrategy<Request<u32>> {
    let fixed = |request| Just(request).boxed();
    let file = |request: fn(VringFile<u32>) -> Request<u32>| vring_file().prop_map(request).boxed();
    let state = |request: fn(VringState) -> Request<u32>| vring_state().prop_map(request).boxed();
    let number = |request: fn(u64) -> Request<u32>| any::<u64>().prop_map(request).boxed();
    let descriptor = |request: fn(u32) -> Request<u32>| any::<u32>().prop_map(request).boxed();
    let descriptors = any::<u32>();
    match code {
        1 => fixed(Request::GetFeatures),
        2 => number(|bits| Request::SetFeatures(Features::from_bits_retain(bits))),
        3 => fixed(Request::SetOwner),
        4 => fixed(Request::ResetOwner),
        5 => vec((region(), descriptors), 0..=MAX_TABLE_REGIONS).prop_map(Request::SetMemTable).boxed(),
        6 => (log_area(), descriptors).prop_map(|(log, fd)| Request::SetLogBase(log, fd)).boxed(),
        7 => descriptor(Request::SetLogFd),
        8 => state(Request::SetVringNum),
        9 => addresses().prop_map(Request::SetVringAddr).boxed(),
        10 => state(Request::SetVringBase),
        11 => state(Request::GetVringBase),
        12 => file(Request::SetVringKick),
        13 => file(Request::SetVringCall),
        14 => file(Request::SetVringErr),
        15 => fixed(Request::GetProtocolFeatures),
        16 => number(|bits| Request::SetProtocolFeatures(ProtocolFeatures::from_bits_retain(bits))),
        17 => fixed(Request::GetQueueNum),
        18 => state(Request::SetVringEnable),
        19 => number(Request::SendRarp),
        20 => number(Request::NetSetMtu),
        21 => descriptor(Request::SetBackendReqFd),
        22 => iotlb().prop_map(Request::Iotlb).boxed(),
        23 => state(Request::SetVringEndian),
        24 => config_space().prop_map(Request::GetConfig).boxed(),
        25 => config_space().prop_map(Request::SetConfig).boxed(),
        26 => payload().prop_map(Request::CreateCryptoSession).boxed(),
        27 => number(Request::CloseCryptoSession),
        28 => fixed(Request::PostcopyAdvise),
        29 => fixed(Request::PostcopyListen),
        30 => fixed(Request::PostcopyEnd),
        31 => inflight().prop_map(Request::GetInflightFd).boxed(),
        32 => (inflight(), descriptors).prop_map(|(area, fd)| Request::SetInflightFd(area, fd)).boxed(),
        33 => descriptor(Request::GpuSetSocket),
        34 => fixed(Request::ResetDevice),
        35 => state(Request::VringKick),
        36 => fixed(Request::GetMaxMemSlots),
        37 => (region(), descriptors).prop_map(|(region, fd)| Request::AddMemReg(region, fd)).boxed(),
        38 => region().prop_map(Request::RemMemReg).boxed(),
        39 => number(Request::SetStatus),
        40 => fixed(Request::GetStatus),
        41 => any::<[u8; 16]>().prop_map(Request::GetSharedObject).boxed(),
        42 => (transfer(), descriptors).prop_map(|(transfer, fd)| Request::SetDeviceStateFd(transfer, fd)).boxed(),
        43 => fixed(Request::CheckDeviceState),
        44 => fixed(Request::GetShmemConfig),
        unknown => unknown_message(unknown).prop_map(Request::Unknown).boxed(),
    }
}

/// Any request of the back-end with this code.
pub(crate) fn back_end_request(code: u32) -> BoxedStrategy<BackEndRequest<u32>> {
    let state = |request: fn(VringState) -> BackEndRequest<u32>| vring_state().prop_map(request).boxed();
    let uuid = |request: fn([u8; 16]) -> BackEndRequest<u32>| any::<[u8; 16]>().prop_map(request).boxed();
    match code {
        1 => iotlb().prop_map(BackEndRequest::Iotlb).boxed(),
        2 => Just(BackEndRequest::ConfigChange).boxed(),
        3 => vring_area().prop_map(|(area, fd)| BackEndRequest::VringHostNotifier(area, fd)).boxed(),
        4 => state(BackEndRequest::VringCall),
        5 => state(BackEndRequest::VringErr),
        6 => uuid(BackEndRequest::SharedObjectAdd),
        7 => uuid(BackEndRequest::SharedObjectRemove),
        8 => uuid(BackEndRequest::SharedObjectLookup),
        9 => (shmem_map(), any::<u32>()).prop_map(|(map, fd)| BackEndRequest::ShmemMap(map, fd)).boxed(),
        10 => shmem_map().prop_map(BackEndRequest::ShmemUnmap).boxed(),
        unknown => unknown_message(unknown).prop_map(BackEndRequest::Unknown).boxed(),
    }
}

/// Any reply to the request of the front-end with this code.
pub(crate) fn front_end_reply(code: u32) -> BoxedStrategy<FrontEndReply<u32>> {
    let kind = FRONT_END_REQUESTS.iter().find(|row| row.code == code).map_or(ReplyPayload::None, |row| row.reply);
    match kind {
        ReplyPayload::None => any::<u64>().prop_map(FrontEndReply::Acknowledgement).boxed(),
        ReplyPayload::Number => any::<u64>().prop_map(FrontEndReply::Number).boxed(),
        ReplyPayload::VringState => vring_state().prop_map(FrontEndReply::VringState).boxed(),
        ReplyPayload::Config => {
            let config = config_space().prop_filter("no bytes are a refusal", |config| !config.bytes.is_empty());
            prop::option::of(config).prop_map(FrontEndReply::Config).boxed()
        }
        ReplyPayload::Inflight => {
            (inflight(), any::<u32>()).prop_map(|(area, fd)| FrontEndReply::Inflight(area, fd)).boxed()
        }
        ReplyPayload::LogBase => Just(FrontEndReply::LogBase).boxed(),
        ReplyPayload::Descriptor => any::<u32>().prop_map(FrontEndReply::Descriptor).boxed(),
        ReplyPayload::DeviceState => prop_oneof![
            any::<u32>().prop_map(|fd| FrontEndReply::DeviceState(0, Some(fd))),
            (1..=0x1ff_u64).prop_map(|value| FrontEndReply::DeviceState(value, None)),
        ]
        .boxed(),
        ReplyPayload::SharedObject => any::<Option<u32>>().prop_map(FrontEndReply::SharedObject).boxed(),
        ReplyPayload::ShmemConfig => shmem_config().prop_map(FrontEndReply::ShmemConfig).boxed(),
        ReplyPayload::Bytes => payload().prop_map(FrontEndReply::Bytes).boxed(),
    }
}

/// Any reply to the request of the back-end with this code.
pub(crate) fn back_end_reply(code: u32) -> BoxedStrategy<BackEndReply<u32>> {
    match code {
        8 => any::<Option<u32>>().prop_map(BackEndReply::SharedObject).boxed(),
        _ => any::<u64>().prop_map(BackEndReply::Acknowledgement).boxed(),
    }
}

/// Any payload that fits a message; most are short.
pub(crate) fn payload() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![8 => vec(any::<u8>(), 0..80), 1 => vec(any::<u8>(), 0..=MAX_PAYLOAD_LEN)]
}

/// Any number of descriptors, also more than a message may have.
pub(crate) fn descriptors() -> impl Strategy<Value = Vec<u32>> {
    prop_oneof![3 => vec(any::<u32>(), 0..=1), 1 => vec(any::<u32>(), 0..=12)]
}

fn unknown_message(code: u32) -> impl Strategy<Value = RawMessage<u32>> {
    (payload(), descriptors()).prop_map(move |(payload, fds)| RawMessage::request(code, false, payload, fds))
}

fn vring_state() -> impl Strategy<Value = VringState> {
    any::<(u32, u32)>().prop_map(|(index, num)| VringState { index, num })
}

fn vring_file() -> impl Strategy<Value = VringFile<u32>> {
    any::<(u8, Option<u32>)>().prop_map(|(index, descriptor)| VringFile { index, descriptor })
}

fn addresses() -> impl Strategy<Value = VringAddresses> {
    any::<(u32, u32, u64, u64, u64, u64)>().prop_map(|(index, flags, descriptors, used, available, log)| {
        VringAddresses { index, flags, descriptors, used, available, log }
    })
}

fn region() -> impl Strategy<Value = MemoryRegion> {
    any::<(u64, u64, u64, u64)>().prop_map(|(guest, size, user, offset)| MemoryRegion {
        guest_address: GuestAddress(guest),
        size,
        user_address: UserAddress(user),
        mmap_offset: FileOffset(offset),
    })
}

fn log_area() -> impl Strategy<Value = LogArea> {
    any::<(u64, u64)>().prop_map(|(size, offset)| LogArea { size, mmap_offset: FileOffset(offset) })
}

fn iotlb() -> impl Strategy<Value = Iotlb> {
    any::<(u64, u64, u64, u8, u8)>().prop_map(|(iova, size, user_address, permission, kind)| Iotlb {
        iova,
        size,
        user_address,
        permission,
        kind,
    })
}

fn config_space() -> impl Strategy<Value = ConfigSpace> {
    (vec(any::<u8>(), 0..=MAX_CONFIG_LEN), any::<u32>(), any::<prop::sample::Index>()).prop_map(
        |(bytes, flags, start)| {
            let offset = start.index(MAX_CONFIG_LEN - bytes.len() + 1);
            ConfigSpace { offset: u32::try_from(offset).expect("at most 256"), flags, bytes }
        },
    )
}

fn inflight() -> impl Strategy<Value = Inflight> {
    any::<(u64, u64, u16, u16)>().prop_map(|(mmap_size, offset, queue_count, queue_size)| Inflight {
        mmap_size,
        mmap_offset: FileOffset(offset),
        queue_count,
        queue_size,
    })
}

fn transfer() -> impl Strategy<Value = DeviceStateTransfer> {
    prop_oneof![Just(StateDirection::Save), Just(StateDirection::Load)]
        .prop_map(|direction| DeviceStateTransfer { direction, phase: DeviceStatePhase::Stopped })
}

fn vring_area() -> impl Strategy<Value = (VringArea, Option<u32>)> {
    any::<(u8, u64, u64, Option<u32>)>().prop_map(|(index, size, offset, descriptor)| {
        let vring = u64::from(index) | if descriptor.is_some() { 0 } else { 0x100 };
        (VringArea { vring, size, offset: FileOffset(offset) }, descriptor)
    })
}

fn shmem_map() -> impl Strategy<Value = ShmemMap> {
    any::<(u8, u64, u64, u64, bool)>().prop_map(|(region, offset, region_offset, len, writable)| ShmemMap {
        region,
        file_offset: FileOffset(offset),
        region_offset,
        len,
        writable,
    })
}

fn shmem_config() -> impl Strategy<Value = ShmemConfig> {
    btree_map(any::<u8>(), 1..=u64::MAX, 0..20).prop_map(|sizes| ShmemConfig { regions: sizes.into_iter().collect() })
}
