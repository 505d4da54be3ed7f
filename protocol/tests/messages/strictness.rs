//! A known message with a wrong length, number of descriptors, flag or value is an error, which ends the connection. A
//! request that is not known is a value, which can be refused.

use vvu_protocol::DecodeError;
use vvu_protocol::message::{BackEndReply, BackEndRequest, FrontEndReply, FrontEndRequest, Header, RawMessage};

use crate::golden::{Golden, hex};
use crate::{back_end_requests, front_end_requests, replies};

/// Who reads a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decoder {
    FrontEndRequest,
    FrontEndReply,
    BackEndRequest,
    BackEndReply,
}

impl Decoder {
    /// Whether it takes the message.
    fn check(self, message: RawMessage<u32>) -> Result<(), DecodeError> {
        let code = message.header.request;
        match self {
            Self::FrontEndRequest => FrontEndRequest::decode(message).map(drop),
            Self::FrontEndReply => FrontEndReply::decode(code, message).map(drop),
            Self::BackEndRequest => BackEndRequest::decode(message).map(drop),
            Self::BackEndReply => BackEndReply::decode(code, message).map(drop),
        }
    }

    fn message(self, code: u32, payload: Vec<u8>, descriptors: usize) -> RawMessage<u32> {
        let descriptors = vec![7; descriptors];
        match self {
            Self::FrontEndRequest | Self::BackEndRequest => RawMessage::request(code, false, payload, descriptors),
            Self::FrontEndReply | Self::BackEndReply => RawMessage::reply(code, payload, descriptors),
        }
    }
}

/// Every golden message with its decoder.
fn golden_messages() -> Vec<(Decoder, RawMessage<u32>)> {
    fn with<M>(decoder: Decoder, rows: &[Golden<M>]) -> Vec<(Decoder, RawMessage<u32>)> {
        rows.iter().map(|row| (decoder, row.raw())).collect()
    }
    [
        with(Decoder::FrontEndRequest, &front_end_requests::rows()),
        with(Decoder::FrontEndReply, &replies::front_end_rows()),
        with(Decoder::BackEndRequest, &back_end_requests::rows()),
        with(Decoder::BackEndReply, &replies::back_end_rows()),
    ]
    .concat()
}

/// Messages whose payload is not understood, or has no meaning beside the descriptor.
fn has_any_length(decoder: Decoder, code: u32) -> bool {
    match decoder {
        Decoder::FrontEndRequest => code == 26, // CREATE_CRYPTO_SESSION
        // SET_LOG_BASE (with a limit, see below), CREATE_CRYPTO_SESSION, POSTCOPY_ADVISE, GET_SHARED_OBJECT
        Decoder::FrontEndReply => [6, 26, 28, 41].contains(&code),
        Decoder::BackEndRequest | Decoder::BackEndReply => false,
    }
}

/// Messages that may come with a descriptor and without.
fn descriptor_is_optional(decoder: Decoder, code: u32) -> bool {
    match decoder {
        Decoder::FrontEndRequest => code == 38, // REM_MEM_REG: one is closed unseen
        Decoder::FrontEndReply => code == 41,   // GET_SHARED_OBJECT: none if there is no such object
        Decoder::BackEndReply => code == 8,     // SHARED_OBJECT_LOOKUP: likewise
        Decoder::BackEndRequest => false,
    }
}

/// The same message with another length of its payload.
fn resized(message: &RawMessage<u32>, len: usize) -> RawMessage<u32> {
    let mut message = message.clone();
    message.payload.resize(len, 0);
    message.header.payload_len = len;
    message
}

#[test]
fn every_wrong_length_is_an_error() {
    for (decoder, message) in golden_messages() {
        let (code, right) = (message.header.request, message.payload.len());
        assert_eq!(decoder.check(message.clone()), Ok(()), "{message:?}");
        let refused_config = decoder == Decoder::FrontEndReply && code == 24;
        let shorter = [right.checked_sub(1), (right > 0 && !refused_config).then_some(0)];
        for wrong in shorter.into_iter().flatten().chain([right + 1]) {
            let result = decoder.check(resized(&message, wrong));
            if has_any_length(decoder, code) {
                continue;
            }
            let names_it = matches!(result, Err(DecodeError::Length { found, .. }) if found == wrong);
            assert!(names_it, "{wrong} bytes as {message:?}: {result:?}");
        }
    }
}

#[test]
fn the_payload_without_defined_content_has_a_limit() {
    let reply = |len| Decoder::FrontEndReply.check(Decoder::FrontEndReply.message(6, vec![0; len], 0));
    assert_eq!(reply(16), Ok(()));
    assert!(matches!(reply(17), Err(DecodeError::LengthRange { found: 17, .. })));
}

#[test]
fn every_wrong_number_of_descriptors_is_an_error() {
    for (decoder, message) in golden_messages() {
        let right = message.descriptors.len();
        for wrong in (0..=9).filter(|count| *count != right) {
            if descriptor_is_optional(decoder, message.header.request) && wrong <= 1 {
                continue;
            }
            let result = decoder.check(RawMessage { descriptors: vec![7; wrong], ..message.clone() });
            let names_it = matches!(result, Err(DecodeError::Descriptors { found, .. }) if found == wrong);
            assert!(names_it, "{wrong} descriptors with {message:?}: {result:?}");
        }
    }
}

#[test]
fn every_wrong_flag_is_an_error() {
    for (_, message) in golden_messages() {
        let mut bytes = message.header.encode();
        assert_eq!(Header::decode(&bytes), Ok(message.header));
        let flags = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
        for reserved in 4..32 {
            let found = flags | 1 << reserved;
            bytes[4..8].copy_from_slice(&found.to_le_bytes());
            assert_eq!(Header::decode(&bytes), Err(DecodeError::Flags { found }));
        }
        for version in [0, 2, 3] {
            bytes[4..8].copy_from_slice(&(flags & !3 | version).to_le_bytes());
            assert_eq!(Header::decode(&bytes), Err(DecodeError::Version { found: version }));
        }
    }
}

#[test]
fn a_request_is_no_reply_and_a_reply_no_request() {
    for (decoder, mut message) in golden_messages() {
        message.header.is_reply = !message.header.is_reply;
        let flags = if message.header.is_reply { 5 } else { 1 };
        assert_eq!(decoder.check(message), Err(DecodeError::Flags { found: flags }));
    }
}

#[test]
fn a_reply_to_another_request_is_an_error() {
    let wrong = Err(DecodeError::WrongReply { expected: 2, found: 3 });
    assert_eq!(FrontEndReply::decode(2, RawMessage::<u32>::reply(3, vec![0; 8], vec![])).map(drop), wrong);
    assert_eq!(BackEndReply::decode(2, RawMessage::<u32>::reply(3, vec![0; 8], vec![])).map(drop), wrong);
}

#[test]
fn every_wrong_value_is_an_error() {
    use Decoder::{BackEndReply, BackEndRequest, FrontEndReply, FrontEndRequest};
    let region = "0000000000000000 0010000000000000 0000000000000000 0000000000000000 ";
    let table = |count: &str, regions: usize| format!("{count} 00000000 {}", region.repeat(regions));
    let area = |vring: &str| format!("{vring} 0010000000000000 0000000000000000");
    let map = |flags: &str| format!("01 00000000000000 {} {flags}", "0010000000000000".repeat(3));
    let shmem = |count: &str| format!("{count} 00000000 0010000000000000 {}", "0000000000000000".repeat(255));
    let config = |header: &str, len: usize| format!("{header} {}", "00".repeat(len));
    let cases = [
        ("nine regions", FrontEndRequest, 5, table("09000000", 9), 8, "region count"),
        ("2³²−1 regions", FrontEndRequest, 5, table("ffffffff", 2), 2, "region count"),
        ("more regions than descriptors", FrontEndRequest, 5, table("03000000", 3), 2, "3 to 3"),
        ("fewer regions than descriptors", FrontEndRequest, 5, table("01000000", 1), 2, "1 to 1"),
        ("vring with an unknown bit", FrontEndRequest, 12, "0002000000000000".into(), 1, "vring 0x200"),
        ("vring with a high bit", FrontEndRequest, 13, "0000000000000080".into(), 1, "vring 0x8000"),
        ("\"no descriptor\" with one", FrontEndRequest, 14, "0001000000000000".into(), 1, "0 to 0"),
        ("no descriptor, unsaid", FrontEndRequest, 12, "0000000000000000".into(), 0, "1 to 1"),
        ("257 bytes", FrontEndRequest, 24, config("00000000 01010000 00000000", 257), 0, "size 0x101"),
        ("bytes beyond the space", FrontEndRequest, 25, config("fd000000 04000000 00000000", 4), 0, "offset 0xfd"),
        ("offset that overflows", FrontEndRequest, 25, config("ffffffff 01000000 00000000", 1), 0, "offset 0xffffffff"),
        ("transfer direction", FrontEndRequest, 42, "02000000 00000000".into(), 1, "direction 0x2"),
        ("transfer phase", FrontEndRequest, 42, "00000000 01000000".into(), 1, "phase 0x1"),
        ("notifier with an unknown bit", BackEndRequest, 3, area("0002000000000000"), 1, "vring 0x200"),
        ("notifier's \"no descriptor\" with one", BackEndRequest, 3, area("0001000000000000"), 1, "0 to 0"),
        ("flags of SHMEM_MAP", BackEndRequest, 9, map("0200000000000000"), 1, "flags 0x2"),
        ("flags of SHMEM_UNMAP", BackEndRequest, 10, map("0000000000000080"), 0, "flags 0x8000"),
        ("more shared memory regions than sizes", FrontEndReply, 44, shmem("02000000"), 0, "region count 0x2"),
        ("fewer shared memory regions than sizes", FrontEndReply, 44, shmem("00000000"), 0, "region count 0x0"),
        ("failed transfer with a descriptor", FrontEndReply, 42, "0100000000000000".into(), 1, "0 to 0"),
        ("transfer without a descriptor", FrontEndReply, 42, "0000000000000000".into(), 0, "1 to 1"),
        ("failed look-up with a descriptor", BackEndReply, 8, "0100000000000000".into(), 1, "0 to 0"),
    ];
    for (what, decoder, code, payload, descriptors, expected) in cases {
        let result = decoder.check(decoder.message(code, hex(&payload), descriptors));
        let text = result.expect_err(what).to_string();
        assert!(text.contains(expected), "{what}: \"{text}\" does not say \"{expected}\"");
    }
}

#[test]
fn unknown_requests_are_values() {
    for (payload_len, descriptors) in [(0, 0), (7, 1), (3840, 8)] {
        for code in [0, 45, 1000, u32::MAX] {
            let message = RawMessage::request(code, true, vec![1; payload_len], vec![7; descriptors]);
            let request = FrontEndRequest::decode(message.clone()).unwrap();
            assert_eq!(request, FrontEndRequest::Unknown(message.clone()));
            assert_eq!((request.code(), request.name()), (code, "unknown request"));
            assert!(request.row().is_none());
            assert_eq!(request.encode(true), message);
        }
        for code in [0, 11, 1000, u32::MAX] {
            let message = RawMessage::request(code, true, vec![1; payload_len], vec![7; descriptors]);
            let request = BackEndRequest::decode(message.clone()).unwrap();
            assert_eq!(request, BackEndRequest::Unknown(message.clone()));
            assert_eq!((request.code(), request.name()), (code, "unknown request"));
            assert!(request.row().is_none());
            assert_eq!(request.encode(true), message);
        }
    }
}

/// How a refused request is answered: a number that is not 0.
#[test]
fn the_refusal_of_an_unknown_request_is_understood() {
    let refusal = RawMessage::<u32>::reply(1000, 1_u64.to_le_bytes().to_vec(), vec![]);
    assert_eq!(FrontEndReply::decode(1000, refusal.clone()), Ok(FrontEndReply::Acknowledgement(1)));
    assert_eq!(BackEndReply::decode(1000, refusal), Ok(BackEndReply::Acknowledgement(1)));
}
