//! Golden bytes of the 10 requests of the back-end.
//!
//! Written from the structures of the vhost-user specification (QEMU 11, "Message Specification" and "Back-end message
//! types"), little-endian.

use vvu_protocol::address::FileOffset;
use vvu_protocol::message::{BackEndRequest as Request, Iotlb, ShmemMap, VringArea, VringState};

use crate::front_end_requests::{UUID, UUID_BYTES};
use crate::golden::{Golden, golden};

/// All rows; every request has at least one.
pub(crate) fn rows() -> Vec<Golden<Request<u32>>> {
    let iotlb = Iotlb { iova: 0x1122_3344_5566_7000, size: 0x1000, user_address: 0, permission: 1, kind: 1 };
    let area = |vring| VringArea { vring, size: 0x1000, offset: FileOffset(0x0001_2345_6000) };
    let state = VringState { index: 0x0102_0304, num: 0 };
    let map = |writable| ShmemMap {
        region: 1,
        file_offset: FileOffset(0x0012_3000),
        region_offset: 0x4560_0000,
        len: 0x0078_9000,
        writable,
    };
    vec![
        // struct vhost_iotlb_msg: u64 iova, size, uaddr, u8 perm, type, and padding up to the next 8 bytes.
        golden(
            Request::Iotlb(iotlb),
            "01000000 01000000 20000000",
            "0070665544332211 0010000000000000 0000000000000000 01 01 000000000000",
            &[],
        ),
        golden(Request::ConfigChange, "02000000 01000000 00000000", "", &[]),
        // u64 vring index and flags (bit 8: no descriptor), u64 size, u64 offset.
        golden(
            Request::VringHostNotifier(area(2), Some(7)),
            "03000000 01000000 18000000",
            "0200000000000000 0010000000000000 0060452301000000",
            &[7],
        ),
        golden(
            Request::VringHostNotifier(area(0x102), None),
            "03000000 01000000 18000000",
            "0201000000000000 0010000000000000 0060452301000000",
            &[],
        ),
        golden(Request::VringCall(state), "04000000 01000000 08000000", "04030201 00000000", &[]),
        golden(Request::VringErr(state), "05000000 01000000 08000000", "04030201 00000000", &[]),
        golden(Request::SharedObjectAdd(UUID), "06000000 01000000 10000000", UUID_BYTES, &[]),
        golden(Request::SharedObjectRemove(UUID), "07000000 01000000 10000000", UUID_BYTES, &[]),
        golden(Request::SharedObjectLookup(UUID), "08000000 01000000 10000000", UUID_BYTES, &[]),
        // u8 shmid, 7 bytes of padding, u64 fd_offset, shm_offset, len, flags.
        golden(
            Request::ShmemMap(map(true), 7),
            "09000000 01000000 28000000",
            "01 00000000000000 0030120000000000 0000604500000000 0090780000000000 0100000000000000",
            &[7],
        ),
        golden(
            Request::ShmemMap(map(false), 7),
            "09000000 01000000 28000000",
            "01 00000000000000 0030120000000000 0000604500000000 0090780000000000 0000000000000000",
            &[7],
        ),
        golden(
            Request::ShmemUnmap(map(false)),
            "0a000000 01000000 28000000",
            "01 00000000000000 0030120000000000 0000604500000000 0090780000000000 0000000000000000",
            &[],
        ),
    ]
}

#[test]
fn every_request_is_in_the_table() {
    let mut codes = rows().iter().map(|row| row.message.code()).collect::<Vec<_>>();
    codes.dedup();
    assert_eq!(codes, (1..=10).collect::<Vec<_>>());
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
