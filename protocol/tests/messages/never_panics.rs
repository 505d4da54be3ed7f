//! No bytes and no number of descriptors make a decoder panic, whatever it answers. With overflow checks on, as in tests, a
//! careless addition would panic too.

use std::sync::LazyLock;

use proptest::prelude::*;
use vvu_protocol::control::{self, CONFIG_LEN};
use vvu_protocol::message::{BackEndReply, BackEndRequest, FrontEndReply, FrontEndRequest, Header, RawMessage};

use crate::values::{descriptors, payload};
use crate::{back_end_requests, front_end_requests, replies};

fn decode_as_everything(message: &RawMessage<u32>, awaited: u32) {
    let _ = FrontEndRequest::decode(message.clone());
    let _ = BackEndRequest::decode(message.clone());
    for code in [awaited, message.header.request] {
        let _ = FrontEndReply::decode(code, message.clone());
        let _ = BackEndReply::decode(code, message.clone());
    }
}

/// Mostly codes that are known on one of the channels.
fn code() -> impl Strategy<Value = u32> {
    prop_oneof![8 => 0..=46_u32, 1 => any::<u32>()]
}

fn many_cases() -> ProptestConfig {
    ProptestConfig { cases: 4096, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(many_cases())]

    #[test]
    fn header(bytes: [u8; Header::LEN], flags in 0..16_u8) {
        let _ = Header::decode(&bytes);
        let mut likely = bytes;
        likely[4..8].copy_from_slice(&[flags, 0, 0, 0]);
        let _ = Header::decode(&likely);
    }

    #[test]
    fn messages_of_arbitrary_content(
        code in code(), awaited in code(), is_reply: bool, payload in payload(), descriptors in descriptors(),
    ) {
        let message = match is_reply {
            true => RawMessage::reply(code, payload, descriptors),
            false => RawMessage::request(code, false, payload, descriptors),
        };
        decode_as_everything(&message, awaited);
    }

    /// The right length and number of descriptors, so that the payload's fields are reached.
    #[test]
    fn messages_of_the_right_form(which: prop::sample::Index, content: [u8; 64], keep in 0..64_usize) {
        let mut message = which.get(&GOLDEN).clone();
        for (place, value) in message.payload.iter_mut().zip(content).skip(keep) {
            *place = value;
        }
        decode_as_everything(&message, message.header.request);
    }

    #[test]
    fn configuration_space(bytes: [u8; CONFIG_LEN]) {
        let _ = control::ConfigSpace::decode(&bytes);
        let mut likely = bytes;
        likely[24..36].copy_from_slice(b"vvu1\x01\0\0\0\0\x10\0\0");
        prop_assert!(control::ConfigSpace::decode(&likely).is_ok());
    }
}

/// Fields lie within these first bytes of every payload, but for the sizes of GET_SHMEM_CONFIG, which are all alike.
const FIELDS_LEN: usize = 80;

#[test]
fn every_byte_of_every_message_with_every_value() {
    for golden in GOLDEN.iter() {
        for place in 0..golden.payload.len().min(FIELDS_LEN) {
            for value in 0..=u8::MAX {
                let mut message = golden.clone();
                message.payload[place] = value;
                let code = message.header.request;
                if message.header.is_reply {
                    let _ = FrontEndReply::decode(code, message.clone());
                    let _ = BackEndReply::decode(code, message);
                } else {
                    let _ = FrontEndRequest::decode(message.clone());
                    let _ = BackEndRequest::decode(message);
                }
            }
        }
    }
}

static GOLDEN: LazyLock<Vec<RawMessage<u32>>> = LazyLock::new(|| {
    let front_end = front_end_requests::rows().iter().map(crate::golden::Golden::raw).collect::<Vec<_>>();
    let back_end = back_end_requests::rows().iter().map(crate::golden::Golden::raw).collect::<Vec<_>>();
    let replies = replies::front_end_rows().iter().map(crate::golden::Golden::raw).collect::<Vec<_>>();
    [front_end, back_end, replies].concat()
});
