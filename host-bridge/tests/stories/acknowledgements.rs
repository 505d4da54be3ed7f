//! Who is told what of a request that has no reply of its own.

use std::os::fd::OwnedFd;

use vvu_protocol::address::FileOffset;
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::message::{
    FRONT_END_REQUESTS, FrontEndReply, FrontEndRequest, Inflight, RawMessage, ReplyPayload, VringState,
};
use vvu_socket::event;

use crate::scripted::front_end::{DriverMemory, repeated, vring_file};
use crate::scripted::{Scene, exchange, told};

use FrontEndRequest as R;

const GET_FEATURES: u32 = 1;
const SET_OWNER: u32 = 3;
const SET_VRING_NUM: u32 = 8;
const GET_QUEUE_NUM: u32 = 17;
const UNKNOWN: u32 = 77;

/// Requests with a code that the bridge relays, or answers out of its own knowledge; all others are not carried.
const CARRIED: [u32; 22] = [1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 24, 25, 34, 39];
const CARRIED_WITH_REPLY: u32 = 40;

/// An acknowledgement is sent if the flag is set and REPLY_ACK was negotiated, and only then.
#[tokio::test]
async fn an_acknowledgement_is_sent_when_asked_for() {
    let mut scene = Scene::ready().await;
    let mut front_end = scene.new_front_end();
    scene.agent.sees_front_end().await;
    // Asked for, and not negotiated: the next message is the reply to the next request.
    front_end.send(R::SetOwner, true).await;
    scene.agent.obliges().await;
    exchange(&mut front_end, &mut scene.agent, R::GetQueueNum, FrontEndReply::Number(1)).await;
    scene.negotiate(&mut front_end).await;
    // Negotiated, and not asked for.
    front_end.send(R::SetOwner, false).await;
    scene.agent.obliges().await;
    front_end.send(R::GetQueueNum, false).await;
    scene.agent.request().await;
    scene.agent.answer(FrontEndReply::Number(1)).await;
    front_end.reply(GET_QUEUE_NUM).await;
    // Both.
    told(&mut front_end, &mut scene.agent, R::SetOwner).await;
}

/// What the back-end refuses is not acknowledged as done.
#[tokio::test]
async fn a_refusal_of_the_back_end_is_passed_on() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let request = R::SetVringNum(VringState { index: 0, num: 3 });
    front_end.send(request, true).await;
    scene.agent.request().await;
    scene.agent.answer(FrontEndReply::Acknowledgement(22)).await;
    assert_eq!(front_end.acknowledgement(SET_VRING_NUM).await, 22);
    told(&mut front_end, &mut scene.agent, R::SetOwner).await;
}

/// A failure that the front-end does not want to hear of ends its session: what was not done is never taken for done.
#[tokio::test]
async fn a_failure_that_cannot_be_told_ends_the_session() {
    let mut scene = Scene::ready().await;
    let memory = DriverMemory::new(8 << 20);
    let too_long = || R::SetMemTable(vec![memory.region(0, 16 << 20)]);
    let (_read, pipe) = rustix::pipe::pipe().unwrap();

    let mut front_end = scene.connect_front_end().await;
    front_end.send(R::SetOwner, false).await;
    scene.agent.request().await;
    scene.agent.answer(FrontEndReply::Acknowledgement(1)).await;
    front_end.sees_end().await;
    scene.clear_away().await;

    let unknown = R::Unknown(RawMessage::request(UNKNOWN, false, vec![1, 2, 3], vec![]));
    for request in [too_long(), R::SetVringCall(vring_file(0, Some(&pipe))), unknown] {
        let mut front_end = scene.connect_front_end().await;
        front_end.send(request, false).await;
        front_end.sees_end().await;
        scene.clear_away().await;
    }

    // The same if it asks for an answer that it has not negotiated.
    let mut front_end = scene.new_front_end();
    scene.agent.sees_front_end().await;
    front_end.send(too_long(), true).await;
    front_end.sees_end().await;
    scene.clear_away().await;
    scene.proves_alive().await;
}

/// A request that nobody has heard of, and any that is not carried, is refused by name. The session goes on, and the agent
/// never sees it. If the request has a reply of its own, there is no way to refuse it: the session ends.
/// (hardening: ERR, LOG and INFLIGHT that panic or disconnect; repeated inflight messages that leak.)
#[tokio::test]
async fn what_is_not_carried_is_refused_by_name() {
    let mut scene = Scene::ready().await;
    let descriptor_count = scene.proves_alive().await;
    let mut refused = vec![UNKNOWN, 0, u32::MAX];
    let mut ending = Vec::new();
    for row in FRONT_END_REQUESTS.iter().filter(|row| !CARRIED.contains(&row.code) && row.code != CARRIED_WITH_REPLY) {
        if row.reply == ReplyPayload::None { refused.push(row.code) } else { ending.push(row.code) }
    }
    assert_eq!((refused.len(), ending.len()), (3 + 10, 11));

    let mut front_end = scene.connect_front_end().await;
    let file = event::create().unwrap();
    for code in refused {
        let bytes = well_formed(code).to_bytes();
        for _ in 0..3 {
            front_end.send_raw(&bytes, &repeated(&file, descriptors_of(code)));
            assert_ne!(front_end.acknowledgement(code).await, 0, "request {code}");
        }
        assert!(!scene.agent.has_frame(), "the agent saw request {code}");
    }
    told(&mut front_end, &mut scene.agent, R::SetOwner).await;
    scene.end_session(front_end).await;

    for code in ending {
        let mut front_end = scene.connect_front_end().await;
        front_end.send_raw(&well_formed(code).to_bytes(), &repeated(&file, descriptors_of(code)));
        front_end.sees_end().await;
        assert!(!scene.agent.has_frame(), "the agent saw request {code}");
        scene.clear_away().await;
    }
    assert_eq!(scene.proves_alive().await, descriptor_count, "descriptors leak");
}

fn descriptors_of(code: u32) -> usize {
    FRONT_END_REQUESTS.iter().find(|row| row.code == code).map_or(0, |row| *row.descriptors.start())
}

/// A message with a payload of the right length, asking for an answer.
fn well_formed(code: u32) -> RawMessage<OwnedFd> {
    let len = match code {
        6 | 41 => 16,
        22 => 32,
        23 | 27 | 35 | 42 => 8,
        31 | 32 => 24,
        37 | 38 => 40,
        _ => 0,
    };
    RawMessage::request(code, true, vec![0; len], vec![])
}

/// GET_INFLIGHT_FD is not offered; a front-end that asks all the same cannot be answered.
#[tokio::test]
async fn an_inflight_buffer_that_was_not_offered_ends_the_session() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let inflight = Inflight { mmap_size: 0, mmap_offset: FileOffset(0), queue_count: u16::MAX, queue_size: u16::MAX };
    front_end.send(R::GetInflightFd(inflight), false).await;
    front_end.sees_end().await;
    scene.clear_away().await;
    assert!(scene.bridge.logged("GET_INFLIGHT_FD, which it was not offered"));
    scene.proves_alive().await;
}

/// Features that were not offered are not set: the session ends before the back-end hears of them.
#[tokio::test]
async fn features_that_were_not_offered_end_the_session() {
    let mut scene = Scene::ready().await;
    let features = [Features::LOG_ALL, Features::ACCESS_PLATFORM].map(R::SetFeatures);
    let protocol = [ProtocolFeatures::INFLIGHT_SHMFD, ProtocolFeatures::BACKEND_REQ, ProtocolFeatures::LOG_SHMFD];
    for request in features.into_iter().chain(protocol.map(R::SetProtocolFeatures)) {
        let mut front_end = scene.connect_front_end().await;
        front_end.send(request, false).await;
        front_end.sees_end().await;
        scene.clear_away().await;
        assert!(!scene.agent.has_frame(), "the agent was told");
    }
    // Nothing was offered yet.
    let mut front_end = scene.new_front_end();
    scene.agent.sees_front_end().await;
    front_end.send(R::SetFeatures(Features::VERSION_1), false).await;
    front_end.sees_end().await;
    scene.clear_away().await;

    // What was offered can be set, and then only that.
    let mut front_end = scene.connect_front_end().await;
    let (_, reply) = exchange(&mut front_end, &mut scene.agent, R::GetFeatures, FrontEndReply::Number(1 << 32)).await;
    assert!(matches!(reply, FrontEndReply::Number(bits) if bits == 1 << 32), "{reply:?} to {GET_FEATURES}");
    told(&mut front_end, &mut scene.agent, R::SetFeatures(Features::VERSION_1)).await;
    front_end.send(R::SetFeatures(Features::EVENT_IDX), true).await;
    front_end.sees_end().await;
    scene.clear_away().await;
}

/// Every request that is carried reaches the agent, with the flag that asks for an answer, and its payload as it was.
#[tokio::test]
async fn carried_requests_reach_the_agent() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let agent = &mut scene.agent;
    let state = VringState { index: 1, num: 128 };
    for (request, expected) in [
        (R::SetOwner, R::SetOwner),
        (R::ResetOwner, R::ResetOwner),
        (R::SetVringNum(state), R::SetVringNum(state)),
        (R::SetVringBase(state), R::SetVringBase(state)),
        (R::SetVringEnable(state), R::SetVringEnable(state)),
        (R::SendRarp(7), R::SendRarp(7)),
        (R::NetSetMtu(1500), R::NetSetMtu(1500)),
        (R::ResetDevice, R::ResetDevice),
        (R::SetStatus(15), R::SetStatus(15)),
    ] {
        assert_eq!(told(&mut front_end, agent, request).await, expected);
    }
    let (_, reply) = exchange(&mut front_end, agent, R::GetStatus, FrontEndReply::Number(15)).await;
    assert!(matches!(reply, FrontEndReply::Number(15)), "{reply:?}");
    assert_eq!(SET_OWNER, R::<OwnedFd>::SetOwner.code());
}
