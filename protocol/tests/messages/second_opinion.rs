//! A second opinion: payloads, flags and feature bits as the vhost crate (0.18) lays them out in its own structures.
//!
//! The crate has no structure for IOTLB_MSG, VRING_HOST_NOTIFIER_MSG and the crypto sessions. Known differences, on purpose:
//!
//! | what | here | the crate | why |
//! | --- | --- | --- | --- |
//! | descriptors in one message | 8 | 32 | the specification's "8 regions" |
//! | longest payload | 3,840 bytes | 4,096 bytes | one frame of the control device holds every message |
//! | configuration space | 256 bytes | 4,096 bytes | QEMU's `VHOST_USER_MAX_CONFIG_SIZE` |
//! | refused GET_CONFIG | no payload | a space of 0 bytes | the specification; both are read |
//! | SHARED_OBJECT_LOOKUP | descriptor in the reply | descriptor in the request | the specification |
//! | requests that are not known | refused | end the connection | front-ends may be newer |
//!
//! Up to 0.16 the crate had other numbers for SHMEM and its messages; those here are the ones of QEMU 11.

use vhost::vhost_user::message::{
    MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VHOST_USER_CONFIG_SIZE, VhostTransferStateDirection,
    VhostTransferStatePhase, VhostUserConfig, VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight,
    VhostUserLog, VhostUserMMap, VhostUserMMapFlags, VhostUserMemory, VhostUserMemoryRegion, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserTransferDeviceState, VhostUserU64, VhostUserVringAddr,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vm_memory::ByteValued;
use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{
    BackEndReply, BackEndRequest, ConfigSpace, DeviceStatePhase, DeviceStateTransfer, FrontEndReply,
    FrontEndRequest as Request, Header, Inflight, LogArea, MAX_CONFIG_LEN, MAX_DESCRIPTORS, MAX_PAYLOAD_LEN,
    ShmemConfig, ShmemMap, StateDirection, VringAddresses, VringFile, VringState,
};

/// The bytes of one of the crate's structures.
fn bytes(structure: &impl ByteValued) -> Vec<u8> {
    structure.as_slice().to_vec()
}

const GUEST: u64 = 0x1_0000_0000;
const SIZE: u64 = 0x8000_0000;
const USER: u64 = 0x7f92_3456_7000;
const OFFSET: u64 = 0x7ff0_0000;

const REGION: MemoryRegion = MemoryRegion {
    guest_address: GuestAddress(GUEST),
    size: SIZE,
    user_address: UserAddress(USER),
    mmap_offset: FileOffset(OFFSET),
};

/// Compares both ways: our bytes are theirs, and theirs are read to our value.
fn compare(request: &Request<u32>, theirs: &[u8]) {
    let message = request.clone().encode(false);
    assert_eq!(message.payload, theirs, "{}", request.name());
    assert_eq!(Request::decode(message), Ok(request.clone()));
}

#[test]
fn numbers_and_vring_states() {
    let number = VhostUserU64::new(0x0102_0304_0506_0708);
    let theirs = bytes(&number);
    compare(&Request::SetFeatures(Features::from_bits_retain(number.value)), &theirs);
    compare(&Request::SetProtocolFeatures(ProtocolFeatures::from_bits_retain(number.value)), &theirs);
    let numbers: [fn(u64) -> Request<u32>; 4] =
        [Request::SendRarp, Request::NetSetMtu, Request::CloseCryptoSession, Request::SetStatus];
    for request in numbers {
        compare(&request(number.value), &theirs);
    }

    let (state, theirs) = (VringState { index: 3, num: 0x0102_0304 }, bytes(&VhostUserVringState::new(3, 0x0102_0304)));
    let states: [fn(VringState) -> Request<u32>; 6] = [
        Request::SetVringNum,
        Request::SetVringBase,
        Request::GetVringBase,
        Request::SetVringEnable,
        Request::SetVringEndian,
        Request::VringKick,
    ];
    for request in states {
        compare(&request(state), &theirs);
    }
    assert_eq!(BackEndRequest::<u32>::VringCall(state).encode(false).payload, theirs);
    assert_eq!(BackEndRequest::<u32>::VringErr(state).encode(false).payload, theirs);
    assert_eq!(FrontEndReply::<u32>::VringState(state).encode(11).payload, theirs);
}

#[test]
fn vring_events() {
    let events: [fn(VringFile<u32>) -> Request<u32>; 3] =
        [Request::SetVringKick, Request::SetVringCall, Request::SetVringErr];
    for request in events {
        compare(&request(VringFile { index: 3, descriptor: Some(7) }), &bytes(&VhostUserU64::new(3)));
        compare(&request(VringFile { index: 3, descriptor: None }), &bytes(&VhostUserU64::new(0x103)));
    }
}

#[test]
fn vring_addresses() {
    let ours = VringAddresses {
        index: 3,
        flags: 1,
        descriptors: 0x1000_0010,
        used: 0x2000_0004,
        available: 0x3000_0002,
        log: 9,
    };
    let flags = VhostUserVringAddrFlags::VHOST_VRING_F_LOG;
    let theirs = VhostUserVringAddr::new(3, flags, ours.descriptors, ours.used, ours.available, ours.log);
    compare(&Request::SetVringAddr(ours), &bytes(&theirs));
}

#[test]
fn memory_regions() {
    let region = bytes(&VhostUserMemoryRegion::new(GUEST, SIZE, USER, OFFSET));
    assert_eq!(region.len(), MemoryRegion::LEN);
    for count in 0..=8_u32 {
        let mut theirs = bytes(&VhostUserMemory::new(count));
        theirs.extend((0..count).flat_map(|_| region.clone()));
        compare(&Request::SetMemTable((0..count).map(|descriptor| (REGION, descriptor)).collect()), &theirs);
    }
    let single = bytes(&VhostUserSingleMemoryRegion::new(GUEST, SIZE, USER, OFFSET));
    compare(&Request::AddMemReg(REGION, 7), &single);
    compare(&Request::RemMemReg(REGION), &single);
}

#[test]
fn dirty_log() {
    let ours = LogArea { size: 0x1234, mmap_offset: FileOffset(0x5000) };
    compare(&Request::SetLogBase(ours, 7), &bytes(&VhostUserLog::new(0x1234, 0x5000)));
}

#[test]
fn configuration_space() {
    let content = b"0123456789";
    for (flags, theirs) in [(0, VhostUserConfigFlags::empty()), (1, VhostUserConfigFlags::WRITABLE)] {
        let ours = ConfigSpace { offset: 0x20, flags, bytes: content.to_vec() };
        let theirs = [bytes(&VhostUserConfig::new(0x20, 10, theirs)), content.to_vec()].concat();
        compare(&Request::GetConfig(ours.clone()), &theirs);
        compare(&Request::SetConfig(ours.clone()), &theirs);
        assert_eq!(FrontEndReply::<u32>::Config(Some(ours)).encode(24).payload, theirs);
    }
}

#[test]
fn inflight_buffer() {
    let ours = Inflight { mmap_size: 0x2100, mmap_offset: FileOffset(0x6000), queue_count: 4, queue_size: 256 };
    let theirs = VhostUserInflight::new(0x2100, 0x6000, 4, 256);
    let fields = [&bytes(&theirs.mmap_size)[..], &bytes(&theirs.mmap_offset)].concat();
    let fields = [fields, bytes(&theirs.num_queues), bytes(&theirs.queue_size)].concat();
    let written = [
        Request::<u32>::GetInflightFd(ours).encode(false).payload,
        Request::SetInflightFd(ours, 7).encode(false).payload,
        FrontEndReply::Inflight(ours, 7).encode(31).payload,
    ];
    for payload in written {
        assert_eq!(payload.len(), size_of::<VhostUserInflight>());
        assert_eq!(payload.split_at(20), (&fields[..], &[0; 4][..]));
    }
}

#[test]
fn shared_objects() {
    let uuid = std::array::from_fn(|index| u8::try_from(index).unwrap() + 0x10);
    let theirs = bytes(VhostUserSharedMsg::from_slice(&uuid).expect("16 bytes"));
    compare(&Request::GetSharedObject(uuid), &theirs);
    let of_the_back_end: [fn([u8; 16]) -> BackEndRequest<u32>; 3] =
        [BackEndRequest::SharedObjectAdd, BackEndRequest::SharedObjectRemove, BackEndRequest::SharedObjectLookup];
    for request in of_the_back_end {
        assert_eq!(request(uuid).encode(false).payload, theirs);
    }
}

#[test]
fn device_state() {
    let directions = [
        (StateDirection::Save, VhostTransferStateDirection::SAVE),
        (StateDirection::Load, VhostTransferStateDirection::LOAD),
    ];
    for (direction, theirs) in directions {
        let theirs = VhostUserTransferDeviceState::new(theirs, VhostTransferStatePhase::STOPPED);
        let ours = DeviceStateTransfer { direction, phase: DeviceStatePhase::Stopped };
        compare(&Request::SetDeviceStateFd(ours, 7), &bytes(&theirs));
    }
}

#[test]
fn shared_memory() {
    let ours = ShmemConfig { regions: vec![(0, 0x20_0000), (2, 0x1000)] };
    let theirs = bytes(&VhostUserShMemConfig::new(2, &[0x20_0000, 0, 0x1000]));
    assert_eq!(FrontEndReply::<u32>::ShmemConfig(ours).encode(44).payload, theirs);

    for (writable, flags) in [(false, VhostUserMMapFlags::empty()), (true, VhostUserMMapFlags::WRITABLE)] {
        let (fd_offset, shm_offset, len) = (0x0012_3000, 0x4560_0000, 0x0078_9000);
        let ours = ShmemMap { region: 1, file_offset: FileOffset(fd_offset), region_offset: shm_offset, len, writable };
        let theirs = VhostUserMMap { shmid: 1, padding: [0; 7], fd_offset, shm_offset, len, flags: flags.bits() };
        assert_eq!(BackEndRequest::ShmemMap(ours, 7).encode(false).payload, bytes(&theirs));
        assert_eq!(BackEndRequest::<u32>::ShmemUnmap(ours).encode(false).payload, bytes(&theirs));
    }
}

#[test]
fn acknowledgements() {
    let theirs = bytes(&VhostUserU64::new(5));
    assert_eq!(FrontEndReply::<u32>::Acknowledgement(5).encode(3).payload, theirs);
    assert_eq!(FrontEndReply::<u32>::Number(5).encode(1).payload, theirs);
    assert_eq!(BackEndReply::<u32>::Acknowledgement(5).encode(2).payload, theirs);
}

#[test]
fn header_flags() {
    let flags = |is_reply, needs_reply| {
        let bytes = Header { request: 1, is_reply, needs_reply, payload_len: 0 }.encode();
        u32::from_le_bytes(bytes[4..8].try_into().unwrap())
    };
    assert_eq!(flags(false, false), 1);
    assert_eq!(flags(true, false), VhostUserHeaderFlag::REPLY.bits() | 1);
    assert_eq!(flags(false, true), VhostUserHeaderFlag::NEED_REPLY.bits() | 1);
}

#[test]
fn protocol_features_have_the_same_names_and_bits() {
    let theirs = VhostUserProtocolFeatures::all().iter_names().map(|(name, bit)| (name, bit.bits()));
    let ours = ProtocolFeatures::all().iter_names().map(|(name, bit)| (name, bit.bits()));
    assert_eq!(ours.collect::<Vec<_>>(), theirs.collect::<Vec<_>>());
    assert_eq!(ProtocolFeatures::SHMEM.bits(), 1 << 22);
}

#[test]
fn features_of_the_transport_have_the_same_bits() {
    assert_eq!(Features::LOG_ALL.bits(), VhostUserVirtioFeatures::LOG_ALL.bits());
    assert_eq!(Features::PROTOCOL_FEATURES.bits(), VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits());
}

/// The differences in limits, so that one that disappears is noticed.
#[test]
fn known_differences_in_limits() {
    assert_eq!((MAX_DESCRIPTORS, MAX_ATTACHED_FD_ENTRIES), (8, 32));
    assert_eq!((MAX_PAYLOAD_LEN, MAX_MSG_SIZE), (3840, 4096));
    assert_eq!((MAX_CONFIG_LEN, VHOST_USER_CONFIG_SIZE), (256, 4096));
}
