//! What is encoded is decoded to itself, for every message with arbitrary content; and what was decoded once is written in
//! one form only.

use proptest::prelude::*;
use vvu_protocol::message::{BackEndReply, BackEndRequest, FrontEndReply, FrontEndRequest, RawMessage};

use crate::golden::raw;
use crate::{back_end_requests, front_end_requests, replies, values};

/// Known codes of the front-end, and some that nobody knows.
const FRONT_END_CODES: [std::ops::RangeInclusive<u32>; 3] = [0..=46, 1000..=1000, u32::MAX..=u32::MAX];
const BACK_END_CODES: [std::ops::RangeInclusive<u32>; 3] = [0..=12, 1000..=1000, u32::MAX..=u32::MAX];

/// The message as the other side receives it: bytes, cut apart again.
fn over_the_wire(message: &RawMessage<u32>) -> RawMessage<u32> {
    raw(&message.to_bytes(), &message.descriptors)
}

fn few_cases() -> ProptestConfig {
    ProptestConfig { cases: 48, ..ProptestConfig::default() }
}

#[test]
fn every_front_end_request_survives() {
    for code in FRONT_END_CODES.into_iter().flatten() {
        proptest!(few_cases(), |(request in values::front_end_request(code), needs_reply: bool)| {
            prop_assert_eq!(request.code(), code);
            let message = request.clone().encode(needs_reply);
            prop_assert_eq!(message.header.needs_reply, needs_reply);
            let decoded = FrontEndRequest::decode(over_the_wire(&message)).unwrap();
            prop_assert_eq!(decoded.clone().encode(needs_reply), message);
            if decoded.row().is_some() {
                prop_assert_eq!(decoded, request);
            }
        });
    }
}

#[test]
fn every_back_end_request_survives() {
    for code in BACK_END_CODES.into_iter().flatten() {
        proptest!(few_cases(), |(request in values::back_end_request(code), needs_reply: bool)| {
            prop_assert_eq!(request.code(), code);
            let message = request.clone().encode(needs_reply);
            prop_assert_eq!(message.header.needs_reply, needs_reply);
            let decoded = BackEndRequest::decode(over_the_wire(&message)).unwrap();
            prop_assert_eq!(decoded.clone().encode(needs_reply), message);
            if decoded.row().is_some() {
                prop_assert_eq!(decoded, request);
            }
        });
    }
}

#[test]
fn every_reply_of_the_back_end_survives() {
    for code in FRONT_END_CODES.into_iter().flatten() {
        proptest!(few_cases(), |(reply in values::front_end_reply(code))| {
            let message = reply.clone().encode(code);
            prop_assert_eq!(FrontEndReply::decode(code, over_the_wire(&message)).unwrap(), reply);
        });
    }
}

#[test]
fn every_reply_of_the_front_end_survives() {
    for code in BACK_END_CODES.into_iter().flatten() {
        proptest!(few_cases(), |(reply in values::back_end_reply(code))| {
            let message = reply.clone().encode(code);
            prop_assert_eq!(BackEndReply::decode(code, over_the_wire(&message)).unwrap(), reply);
        });
    }
}

/// `message` with some of its payload overwritten: what still decodes has fields, padding and flags that nobody chose.
fn scribbled(message: &RawMessage<u32>, scribble: &[(prop::sample::Index, u8)]) -> RawMessage<u32> {
    let mut message = message.clone();
    for (place, value) in scribble {
        if !message.payload.is_empty() {
            let place = place.index(message.payload.len());
            message.payload[place] = *value;
        }
    }
    message
}

fn scribble() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6)
}

#[test]
fn requests_have_one_written_form() {
    let front_end = front_end_requests::rows().iter().map(crate::golden::Golden::raw).collect::<Vec<_>>();
    let back_end = back_end_requests::rows().iter().map(crate::golden::Golden::raw).collect::<Vec<_>>();
    proptest!(|(scribble in scribble())| {
        for message in &front_end {
            if let Ok(request) = FrontEndRequest::decode(scribbled(message, &scribble)) {
                let written = request.clone().encode(false);
                prop_assert_eq!(FrontEndRequest::decode(over_the_wire(&written)).unwrap(), request.clone());
                prop_assert_eq!(request.encode(false), written);
            }
        }
        for message in &back_end {
            if let Ok(request) = BackEndRequest::decode(scribbled(message, &scribble)) {
                let written = request.clone().encode(false);
                prop_assert_eq!(BackEndRequest::decode(over_the_wire(&written)).unwrap(), request.clone());
                prop_assert_eq!(request.encode(false), written);
            }
        }
    });
}

#[test]
fn replies_have_one_written_form() {
    let rows = replies::front_end_rows().iter().map(crate::golden::Golden::raw).collect::<Vec<_>>();
    proptest!(|(scribble in scribble())| {
        for message in &rows {
            let code = message.header.request;
            if let Ok(reply) = FrontEndReply::decode(code, scribbled(message, &scribble)) {
                let written = reply.clone().encode(code);
                prop_assert_eq!(FrontEndReply::decode(code, over_the_wire(&written)).unwrap(), reply.clone());
                prop_assert_eq!(reply.encode(code), written);
            }
        }
    });
}
