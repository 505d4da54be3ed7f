//! Golden bytes of the 44 requests of the front-end.
//!
//! Written from the structures of the vhost-user specification (QEMU 11, "Message Specification" and "Front-end message
//! types"), little-endian. The values have digits that all differ, so that a swapped field or byte shows.

use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{
    ConfigSpace, DeviceStatePhase, DeviceStateTransfer, FrontEndRequest as Request, Inflight, Iotlb, LogArea,
    StateDirection, VringAddresses, VringFile, VringState,
};

use crate::golden::{Golden, golden, raw};

type Row = Golden<Request<u32>>;

/// All rows; every request has at least one.
pub(crate) fn rows() -> Vec<Row> {
    [session(), memory(), dirty_log(), vring_setup(), vring_events(), device(), device_class(), migration()]
        .into_iter()
        .flatten()
        .collect()
}

fn session() -> Vec<Row> {
    let features = Features::PROTOCOL_FEATURES | Features::VERSION_1 | Features::from_bits_retain(1 << 6);
    let protocol_features = ProtocolFeatures::MQ | ProtocolFeatures::CONFIG | ProtocolFeatures::SHMEM;
    vec![
        golden(Request::GetFeatures, "01000000 01000000 00000000", "", &[]),
        golden(Request::SetFeatures(features), "02000000 01000000 08000000", "4000004001000000", &[]),
        golden(Request::SetOwner, "03000000 01000000 00000000", "", &[]),
        golden(Request::ResetOwner, "04000000 01000000 00000000", "", &[]),
        golden(Request::GetProtocolFeatures, "0f000000 01000000 00000000", "", &[]),
        golden(Request::SetProtocolFeatures(protocol_features), "10000000 01000000 08000000", "0102400000000000", &[]),
        golden(Request::GetQueueNum, "11000000 01000000 00000000", "", &[]),
        golden(Request::ResetDevice, "22000000 01000000 00000000", "", &[]),
        golden(Request::SetStatus(0x0f), "27000000 01000000 08000000", "0f00000000000000", &[]),
        golden(Request::GetStatus, "28000000 01000000 00000000", "", &[]),
    ]
}

const LOW: MemoryRegion = MemoryRegion {
    guest_address: GuestAddress(0x0c_0000),
    size: 0x7ff4_0000,
    user_address: UserAddress(0x7f12_3456_7000),
    mmap_offset: FileOffset(0x0c_0000),
};

const HIGH: MemoryRegion = MemoryRegion {
    guest_address: GuestAddress(0x1_0000_0000),
    size: 0x8000_0000,
    user_address: UserAddress(0x7f92_3456_7000),
    mmap_offset: FileOffset(0x8000_0000),
};

/// Memory region description: u64 guest address, size, user address, mmap offset.
const LOW_BYTES: &str = "00000c0000000000 0000f47f00000000 00705634127f0000 00000c0000000000";
const HIGH_BYTES: &str = "0000000001000000 0000008000000000 00705634927f0000 0000008000000000";

fn memory() -> Vec<Row> {
    let iotlb =
        Iotlb { iova: 0x1122_3344_5566_7000, size: 0x1000, user_address: 0x7f12_3456_7000, permission: 3, kind: 2 };
    vec![
        // u32 num regions, u32 padding, the regions.
        golden(
            Request::SetMemTable(vec![(LOW, 7), (HIGH, 9)]),
            "05000000 01000000 48000000",
            &format!("02000000 00000000 {LOW_BYTES} {HIGH_BYTES}"),
            &[7, 9],
        ),
        golden(Request::SetMemTable(vec![]), "05000000 01000000 08000000", "00000000 00000000", &[]),
        // struct vhost_iotlb_msg: u64 iova, size, uaddr, u8 perm, type, and padding up to the next 8 bytes.
        golden(
            Request::Iotlb(iotlb),
            "16000000 01000000 20000000",
            "0070665544332211 0010000000000000 00705634127f0000 03 02 000000000000",
            &[],
        ),
        golden(Request::GetMaxMemSlots, "24000000 01000000 00000000", "", &[]),
        // u64 padding, one region.
        golden(
            Request::AddMemReg(LOW, 7),
            "25000000 01000000 28000000",
            &format!("0000000000000000 {LOW_BYTES}"),
            &[7],
        ),
        golden(Request::RemMemReg(HIGH), "26000000 01000000 28000000", &format!("0000000000000000 {HIGH_BYTES}"), &[]),
    ]
}

fn dirty_log() -> Vec<Row> {
    // u64 log size, u64 log offset.
    let log = LogArea { size: 0x0012_3400, mmap_offset: FileOffset(0x5000) };
    vec![
        golden(Request::SetLogBase(log, 7), "06000000 01000000 10000000", "0034120000000000 0050000000000000", &[7]),
        golden(Request::SetLogFd(7), "07000000 01000000 00000000", "", &[7]),
    ]
}

/// Vring state description: u32 index, u32 num.
fn vring_setup() -> Vec<Row> {
    let state = |num| VringState { index: 0x0102_0304, num };
    let addresses = VringAddresses {
        index: 3,
        flags: 1,
        descriptors: 0x7f11_1213_1410,
        used: 0x7f21_2223_2424,
        available: 0x7f31_3233_3432,
        log: 0x4142_4344_4540,
    };
    vec![
        golden(Request::SetVringNum(state(256)), "08000000 01000000 08000000", "04030201 00010000", &[]),
        // u32 index, u32 flags, u64 descriptor, used, available, log.
        golden(
            Request::SetVringAddr(addresses),
            "09000000 01000000 28000000",
            "03000000 01000000 10141312117f0000 24242322217f0000 32343332317f0000 4045444342410000",
            &[],
        ),
        golden(Request::SetVringBase(state(0x8001_7fff)), "0a000000 01000000 08000000", "04030201 ff7f0180", &[]),
        golden(Request::GetVringBase(state(0)), "0b000000 01000000 08000000", "04030201 00000000", &[]),
        golden(Request::SetVringEnable(state(1)), "12000000 01000000 08000000", "04030201 01000000", &[]),
        golden(Request::SetVringEndian(state(1)), "17000000 01000000 08000000", "04030201 01000000", &[]),
        golden(Request::VringKick(state(0)), "23000000 01000000 08000000", "04030201 00000000", &[]),
    ]
}

/// A u64: bits 0–7 index, bit 8 "no descriptor".
fn vring_events() -> Vec<Row> {
    let with = |index, descriptor| VringFile { index, descriptor: Some(descriptor) };
    let without = |index| VringFile { index, descriptor: None };
    vec![
        golden(Request::SetVringKick(with(3, 7)), "0c000000 01000000 08000000", "0300000000000000", &[7]),
        golden(Request::SetVringKick(without(255)), "0c000000 01000000 08000000", "ff01000000000000", &[]),
        golden(Request::SetVringCall(with(3, 7)), "0d000000 01000000 08000000", "0300000000000000", &[7]),
        golden(Request::SetVringCall(without(3)), "0d000000 01000000 08000000", "0301000000000000", &[]),
        golden(Request::SetVringErr(with(0, 7)), "0e000000 01000000 08000000", "0000000000000000", &[7]),
        golden(Request::SetVringErr(without(0)), "0e000000 01000000 08000000", "0001000000000000", &[]),
    ]
}

pub(crate) const UUID: [u8; 16] = *b"\x10\x21\x32\x43\x54\x65\x76\x87\x98\xa9\xba\xcb\xdc\xed\xfe\x0f";
pub(crate) const UUID_BYTES: &str = "10213243 5465 7687 98a9bacbdcedfe0f";

fn device() -> Vec<Row> {
    let config = |flags, bytes: &[u8]| ConfigSpace { offset: 0x20, flags, bytes: bytes.to_vec() };
    let inflight =
        Inflight { mmap_size: 0x0003_2100, mmap_offset: FileOffset(0x6000), queue_count: 0x0102, queue_size: 0x0304 };
    let inflight_bytes = "0021030000000000 0060000000000000 0201 0403 00000000";
    vec![
        golden(Request::SetBackendReqFd(7), "15000000 01000000 00000000", "", &[7]),
        // u32 offset, u32 size, u32 flags, `size` bytes.
        golden(
            Request::GetConfig(config(0, &[0; 4])),
            "18000000 01000000 10000000",
            "20000000 04000000 00000000 00000000",
            &[],
        ),
        golden(
            Request::SetConfig(config(1, b"vvu")),
            "19000000 01000000 0f000000",
            "20000000 03000000 01000000 767675",
            &[],
        ),
        // u64 mmap size, u64 mmap offset, u16 num queues, u16 queue size, and the C structure's padding.
        golden(Request::GetInflightFd(inflight), "1f000000 01000000 18000000", inflight_bytes, &[]),
        golden(Request::SetInflightFd(inflight, 7), "20000000 01000000 18000000", inflight_bytes, &[7]),
        golden(Request::GetSharedObject(UUID), "29000000 01000000 10000000", UUID_BYTES, &[]),
        golden(Request::GetShmemConfig, "2c000000 01000000 00000000", "", &[]),
    ]
}

fn device_class() -> Vec<Row> {
    vec![
        // The MAC address 52:54:00:12:34:56 in the first 6 bytes.
        golden(Request::SendRarp(0x5634_1200_5452), "13000000 01000000 08000000", "525400123456 0000", &[]),
        golden(Request::NetSetMtu(9000), "14000000 01000000 08000000", "2823000000000000", &[]),
        // Not understood here, so any bytes will do.
        golden(Request::CreateCryptoSession(b"session".to_vec()), "1a000000 01000000 07000000", "73657373696f6e", &[]),
        golden(Request::CloseCryptoSession(0x0102), "1b000000 01000000 08000000", "0201000000000000", &[]),
        golden(Request::GpuSetSocket(7), "21000000 01000000 00000000", "", &[7]),
    ]
}

fn migration() -> Vec<Row> {
    let transfer = |direction| DeviceStateTransfer { direction, phase: DeviceStatePhase::Stopped };
    vec![
        golden(Request::PostcopyAdvise, "1c000000 01000000 00000000", "", &[]),
        golden(Request::PostcopyListen, "1d000000 01000000 00000000", "", &[]),
        golden(Request::PostcopyEnd, "1e000000 01000000 00000000", "", &[]),
        // u32 transfer direction, u32 migration phase.
        golden(
            Request::SetDeviceStateFd(transfer(StateDirection::Save), 7),
            "2a000000 01000000 08000000",
            "00000000 00000000",
            &[7],
        ),
        golden(
            Request::SetDeviceStateFd(transfer(StateDirection::Load), 7),
            "2a000000 01000000 08000000",
            "01000000 00000000",
            &[7],
        ),
        golden(Request::CheckDeviceState, "2b000000 01000000 00000000", "", &[]),
    ]
}

#[test]
fn every_request_is_in_the_tables() {
    let mut codes = rows().iter().map(|row| row.message.code()).collect::<Vec<_>>();
    codes.sort_unstable();
    codes.dedup();
    assert_eq!(codes, (1..=44).collect::<Vec<_>>());
}

#[test]
fn requests_are_encoded_to_their_golden_bytes() {
    for row in rows() {
        let name = row.message.name();
        let message = row.message.clone().encode(false);
        assert_eq!(message.to_bytes(), row.bytes, "{name}");
        assert_eq!(message.descriptors, row.descriptors, "{name}");

        let mut asks_for_reply = row.bytes.clone();
        asks_for_reply[4] |= 1 << 3;
        assert_eq!(row.message.encode(true).to_bytes(), asks_for_reply, "{name}");
    }
}

#[test]
fn golden_bytes_are_decoded_to_their_requests() {
    for row in rows() {
        assert_eq!(Request::decode(row.raw()), Ok(row.message));
    }
}

/// Forms that are never written, but accepted because front-ends send them.
#[test]
fn other_forms_that_front_ends_send_are_read() {
    let inflight = Inflight { mmap_size: 0x1000, mmap_offset: FileOffset(0), queue_count: 1, queue_size: 128 };
    let rows = [
        // "For compatibility with existing incorrect implementations, the back-end MAY accept messages with one file
        // descriptor."
        golden(Request::RemMemReg(LOW), "26000000 01000000 28000000", &format!("0000000000000000 {LOW_BYTES}"), &[7]),
        // The fields of the inflight description without the C structure's padding.
        golden(
            Request::GetInflightFd(inflight),
            "1f000000 01000000 14000000",
            "0010000000000000 0000000000000000 0100 8000",
            &[],
        ),
        // Padding with something in it.
        golden(
            Request::SetMemTable(vec![(LOW, 7)]),
            "05000000 01000000 28000000",
            &format!("01000000 ffffffff {LOW_BYTES}"),
            &[7],
        ),
        golden(
            Request::AddMemReg(LOW, 7),
            "25000000 01000000 28000000",
            &format!("ffffffffffffffff {LOW_BYTES}"),
            &[7],
        ),
    ];
    for row in rows {
        assert_eq!(Request::decode(row.raw()), Ok(row.message));
    }
}

#[test]
fn a_request_that_asks_for_a_reply_is_the_same_request() {
    for row in rows() {
        let mut bytes = row.bytes.clone();
        bytes[4] |= 1 << 3;
        assert_eq!(Request::decode(raw(&bytes, &row.descriptors)), Ok(row.message));
    }
}
