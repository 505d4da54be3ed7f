//! The request tables, against the vhost crate and against the specification's lists.

use vhost::vhost_user::message::{BackendReq, FrontendReq};
use vvu_protocol::message::{BACK_END_REQUESTS, FRONT_END_REQUESTS, MAX_DESCRIPTORS, ReplyPayload, RequestRow};

/// "The reply payload" of each request that has one (specification, "Front-end message types"). SET_LOG_BASE has none there,
/// but stands in the list of requests that need a reply ("Communication"), as does GET_INFLIGHT_FD. ADD_MEM_REG and
/// REM_MEM_REG name the request's payload in the place of the reply's; SET_MEM_TABLE has a reply in postcopy migration only,
/// which is not carried.
const REPLIES_TO_THE_FRONT_END: [(&str, ReplyPayload); 17] = [
    ("GET_FEATURES", ReplyPayload::Number),
    ("SET_LOG_BASE", ReplyPayload::LogBase),
    ("GET_VRING_BASE", ReplyPayload::VringState),
    ("GET_PROTOCOL_FEATURES", ReplyPayload::Number),
    ("GET_QUEUE_NUM", ReplyPayload::Number),
    ("IOTLB_MSG", ReplyPayload::Number),
    ("GET_CONFIG", ReplyPayload::Config),
    ("CREATE_CRYPTO_SESSION", ReplyPayload::Bytes),
    ("POSTCOPY_ADVISE", ReplyPayload::Descriptor),
    ("POSTCOPY_END", ReplyPayload::Number),
    ("GET_INFLIGHT_FD", ReplyPayload::Inflight),
    ("GET_MAX_MEM_SLOTS", ReplyPayload::Number),
    ("GET_STATUS", ReplyPayload::Number),
    ("GET_SHARED_OBJECT", ReplyPayload::SharedObject),
    ("SET_DEVICE_STATE_FD", ReplyPayload::DeviceState),
    ("CHECK_DEVICE_STATE", ReplyPayload::Number),
    ("GET_SHMEM_CONFIG", ReplyPayload::ShmemConfig),
];

/// The requests with descriptors (specification, "Communication" and each message), with how many.
const DESCRIPTORS_OF_THE_FRONT_END: [(&str, std::ops::RangeInclusive<usize>); 12] = [
    ("SET_MEM_TABLE", 0..=MAX_DESCRIPTORS),
    ("SET_LOG_BASE", 1..=1),
    ("SET_LOG_FD", 1..=1),
    ("SET_VRING_KICK", 0..=1),
    ("SET_VRING_CALL", 0..=1),
    ("SET_VRING_ERR", 0..=1),
    ("SET_BACKEND_REQ_FD", 1..=1),
    ("SET_INFLIGHT_FD", 1..=1),
    ("GPU_SET_SOCKET", 1..=1),
    ("ADD_MEM_REG", 1..=1),
    ("REM_MEM_REG", 0..=1),
    ("SET_DEVICE_STATE_FD", 1..=1),
];

/// The entry with this name.
fn entry<T: Clone>(table: &[(&str, T)], name: &str) -> Option<T> {
    table.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone())
}

fn names(rows: &[RequestRow]) -> Vec<&'static str> {
    rows.iter().map(|row| row.name).collect()
}

#[test]
fn codes_and_names_are_those_of_the_vhost_crate() {
    for row in &FRONT_END_REQUESTS {
        let theirs = FrontendReq::try_from(row.code).expect("a request of the crate");
        assert_eq!(format!("{theirs:?}"), row.name);
    }
    for row in &BACK_END_REQUESTS {
        let theirs = BackendReq::try_from(row.code).expect("a request of the crate");
        assert_eq!(format!("{theirs:?}"), row.name);
    }
}

/// If this fails, the crate has learnt a request that has to be added here.
#[test]
fn the_vhost_crate_knows_no_further_requests() {
    for code in (0..256).filter(|code| !(1..=44).contains(code)) {
        assert!(FrontendReq::try_from(code).is_err(), "request {code} of the front-end");
    }
    for code in (0..256).filter(|code| !(1..=10).contains(code)) {
        assert!(BackendReq::try_from(code).is_err(), "request {code} of the back-end");
    }
}

#[test]
fn replies_and_descriptors_are_those_of_the_specification() {
    for row in &FRONT_END_REQUESTS {
        let reply = entry(&REPLIES_TO_THE_FRONT_END, row.name).unwrap_or(ReplyPayload::None);
        let descriptors = entry(&DESCRIPTORS_OF_THE_FRONT_END, row.name).unwrap_or(0..=0);
        assert_eq!((row.reply, row.descriptors.clone()), (reply, descriptors), "{}", row.name);
    }
    for row in &BACK_END_REQUESTS {
        let (reply, descriptors) = match row.name {
            "SHARED_OBJECT_LOOKUP" => (ReplyPayload::SharedObject, 0..=0),
            "VRING_HOST_NOTIFIER_MSG" => (ReplyPayload::None, 0..=1),
            "SHMEM_MAP" => (ReplyPayload::None, 1..=1),
            _ => (ReplyPayload::None, 0..=0),
        };
        assert_eq!((row.reply, row.descriptors.clone()), (reply, descriptors), "{}", row.name);
    }
}

#[test]
fn the_lists_name_requests_that_exist() {
    let known = names(&FRONT_END_REQUESTS);
    let replies = REPLIES_TO_THE_FRONT_END.iter().map(|(name, _)| name);
    let descriptors = DESCRIPTORS_OF_THE_FRONT_END.iter().map(|(name, _)| name);
    for name in replies.chain(descriptors) {
        assert!(known.contains(name), "{name}");
    }
}
