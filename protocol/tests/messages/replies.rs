//! Golden bytes of every kind of reply, in both directions.
//!
//! Written from the vhost-user specification (QEMU 11, "reply payload" of each message). In the header the reply flag, bit
//! 2, stands next to version 1: flags 5.

use vvu_protocol::address::FileOffset;
use vvu_protocol::message::{
    BackEndReply, ConfigSpace, FRONT_END_REQUESTS, FrontEndReply, Inflight, ReplyPayload, ShmemConfig, VringState,
};

use crate::golden::{Golden, golden};

/// Replies of the back-end; every kind of reply has at least one row.
pub(crate) fn front_end_rows() -> Vec<Golden<FrontEndReply<u32>>> {
    let inflight = Inflight { mmap_size: 0x2100, mmap_offset: FileOffset(0x6000), queue_count: 4, queue_size: 256 };
    let config = ConfigSpace { offset: 0x20, flags: 0, bytes: b"vvu".to_vec() };
    vec![
        // SET_OWNER: u64, 0 for success.
        golden(FrontEndReply::Acknowledgement(0), "03000000 05000000 08000000", "0000000000000000", &[]),
        golden(FrontEndReply::Acknowledgement(22), "03000000 05000000 08000000", "1600000000000000", &[]),
        // GET_FEATURES: u64.
        golden(FrontEndReply::Number(0x1_4000_0040), "01000000 05000000 08000000", "4000004001000000", &[]),
        // IOTLB_MSG, POSTCOPY_END and CHECK_DEVICE_STATE: u64, 0 for success.
        golden(FrontEndReply::Number(0), "16000000 05000000 08000000", "0000000000000000", &[]),
        // GET_VRING_BASE: u32 vring index, u32 descriptor index.
        golden(
            FrontEndReply::VringState(VringState { index: 3, num: 0x0102 }),
            "0b000000 05000000 08000000",
            "03000000 02010000",
            &[],
        ),
        // GET_CONFIG: u32 offset, u32 size, u32 flags, `size` bytes; no payload for a failure.
        golden(
            FrontEndReply::Config(Some(config)),
            "18000000 05000000 0f000000",
            "20000000 03000000 00000000 767675",
            &[],
        ),
        golden(FrontEndReply::Config(None), "18000000 05000000 00000000", "", &[]),
        // GET_INFLIGHT_FD: the inflight description, with the C structure's padding.
        golden(
            FrontEndReply::Inflight(inflight, 7),
            "1f000000 05000000 18000000",
            "0021000000000000 0060000000000000 0400 0001 00000000",
            &[7],
        ),
        // SET_LOG_BASE: a reply, of which the specification does not say what is in it.
        golden(FrontEndReply::LogBase, "06000000 05000000 10000000", "0100000000000000 0000000000000000", &[]),
        // POSTCOPY_ADVISE: a userfaultfd.
        golden(FrontEndReply::Descriptor(7), "1c000000 05000000 00000000", "", &[7]),
        // SET_DEVICE_STATE_FD: u64, bits 0–7 are 0 for success, bit 8 is set if there is no descriptor.
        golden(FrontEndReply::DeviceState(0, Some(7)), "2a000000 05000000 08000000", "0000000000000000", &[7]),
        golden(FrontEndReply::DeviceState(0x100, None), "2a000000 05000000 08000000", "0001000000000000", &[]),
        golden(FrontEndReply::DeviceState(0x101, None), "2a000000 05000000 08000000", "0101000000000000", &[]),
        // GET_SHARED_OBJECT: "passing the fd when the operation is successful, or no fd otherwise".
        golden(FrontEndReply::SharedObject(Some(7)), "29000000 05000000 00000000", "", &[7]),
        golden(FrontEndReply::SharedObject(None), "29000000 05000000 00000000", "", &[]),
        golden(
            FrontEndReply::ShmemConfig(ShmemConfig { regions: vec![(1, 0x20_0000), (255, 0x1000)] }),
            "2c000000 05000000 08080000",
            &shmem_config_bytes(),
            &[],
        ),
        // CREATE_CRYPTO_SESSION: carried without being understood.
        golden(FrontEndReply::Bytes(b"session".to_vec()), "1a000000 05000000 07000000", "73657373696f6e", &[]),
    ]
}

/// u32 num regions (those that are not empty), u32 padding, 256 × u64 size, the index being the region's id.
fn shmem_config_bytes() -> String {
    let absent = "0000000000000000 ";
    format!("02000000 00000000 {absent} 0000200000000000 {} 0010000000000000", absent.repeat(253))
}

/// Replies of the front-end to requests of the back-end.
pub(crate) fn back_end_rows() -> Vec<Golden<BackEndReply<u32>>> {
    vec![
        // CONFIG_CHANGE_MSG: u64, 0 for success.
        golden(BackEndReply::Acknowledgement(0), "02000000 05000000 08000000", "0000000000000000", &[]),
        golden(BackEndReply::Acknowledgement(22), "02000000 05000000 08000000", "1600000000000000", &[]),
        // SHARED_OBJECT_LOOKUP: "the fd and a zero when the operation is successful, or non-zero otherwise".
        golden(BackEndReply::SharedObject(Some(7)), "08000000 05000000 08000000", "0000000000000000", &[7]),
        golden(BackEndReply::SharedObject(None), "08000000 05000000 08000000", "0100000000000000", &[]),
    ]
}

#[test]
fn every_kind_of_reply_is_in_the_table() {
    let shown = front_end_rows().iter().map(|row| row.raw().header.request).collect::<Vec<_>>();
    let kind = |code: u32| FRONT_END_REQUESTS.iter().find(|row| row.code == code).expect("a known request").reply;
    for row in &FRONT_END_REQUESTS {
        assert!(shown.iter().any(|code| kind(*code) == row.reply), "{}: {:?}", row.name, row.reply);
    }
    assert!(shown.iter().any(|code| kind(*code) == ReplyPayload::None));
}

#[test]
fn replies_to_the_front_end_match_their_golden_bytes() {
    for row in front_end_rows() {
        let code = row.raw().header.request;
        assert_eq!(FrontEndReply::decode(code, row.raw()), Ok(row.message.clone()));
        let message = row.message.encode(code);
        assert_eq!(message.to_bytes(), row.bytes, "request {code}");
        assert_eq!(message.descriptors, row.descriptors, "request {code}");
    }
}

#[test]
fn replies_to_the_back_end_match_their_golden_bytes() {
    for row in back_end_rows() {
        let code = row.raw().header.request;
        assert_eq!(BackEndReply::decode(code, row.raw()), Ok(row.message.clone()));
        let message = row.message.encode(code);
        assert_eq!(message.to_bytes(), row.bytes, "request {code}");
        assert_eq!(message.descriptors, row.descriptors, "request {code}");
    }
}

/// Forms that are never written, but accepted because back-ends send them.
#[test]
fn other_forms_that_back_ends_send_are_read() {
    let inflight = Inflight { mmap_size: 0x1000, mmap_offset: FileOffset(0), queue_count: 1, queue_size: 128 };
    let rows = [
        // The request's flag "need reply" echoed.
        golden(FrontEndReply::Number(1), "01000000 0d000000 08000000", "0100000000000000", &[]),
        // A refusal as the vhost crate writes it: a configuration space of no bytes.
        golden(FrontEndReply::Config(None), "18000000 05000000 0c000000", "20000000 00000000 00000000", &[]),
        // The inflight description without padding.
        golden(
            FrontEndReply::Inflight(inflight, 7),
            "1f000000 05000000 14000000",
            "0010000000000000 0000000000000000 0100 8000",
            &[7],
        ),
        // SET_LOG_BASE: nothing, a u64.
        golden(FrontEndReply::LogBase, "06000000 05000000 00000000", "", &[]),
        golden(FrontEndReply::LogBase, "06000000 05000000 08000000", "0000000000000000", &[]),
        // GET_SHARED_OBJECT with the request's payload sent back.
        golden(FrontEndReply::SharedObject(Some(7)), "29000000 05000000 08000000", "0000000000000000", &[7]),
    ];
    for row in rows {
        let code = row.raw().header.request;
        assert_eq!(FrontEndReply::decode(code, row.raw()), Ok(row.message));
    }
}
