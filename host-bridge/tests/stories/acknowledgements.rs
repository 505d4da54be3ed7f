//! Who is told what of a request that has no reply of its own.

use std::os::fd::OwnedFd;

use vvu_protocol::carriage::{self, Carriage};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::message::{FRONT_END_REQUESTS, FrontEndReply, FrontEndRequest, RawMessage, ReplyPayload, VringState};
use vvu_socket::event;

use crate::scripted::front_end::{DriverMemory, repeated, vring_file};
use crate::scripted::{PROTOCOL, Scene, exchange, told};

use FrontEndRequest as R;

const GET_FEATURES: u32 = 1;
const SET_OWNER: u32 = 3;
const SET_VRING_NUM: u32 = 8;
const GET_QUEUE_NUM: u32 = 17;
const UNKNOWN: u32 = 77;

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

/// A request that nobody has heard of, and any that is not carried, is refused by name, as often as it comes. The session goes on,
/// and the agent never sees it. (Refusals that end the session have their stories in `messages`.)
#[tokio::test]
async fn what_is_not_carried_is_refused_by_name() {
    let mut scene = Scene::ready().await;
    let descriptor_count = scene.proves_alive().await;
    let refused = FRONT_END_REQUESTS
        .iter()
        .filter(|row| matches!(carriage::front_end(row.code), Carriage::Refused(_)) && row.reply == ReplyPayload::None);
    let codes = [UNKNOWN, 0, u32::MAX].into_iter().chain(refused.map(|row| row.code));
    let mut front_end = scene.connect_front_end().await;
    let file = event::create().unwrap();
    for code in codes {
        let bytes = well_formed(code).to_bytes();
        for _ in 0..3 {
            front_end.send_raw(&bytes, &repeated(&file, descriptors_of(code)));
            assert_ne!(front_end.acknowledgement(code).await, 0, "request {code}");
        }
        assert!(!scene.agent.has_frame(), "the agent saw request {code}");
    }
    told(&mut front_end, &mut scene.agent, R::SetOwner).await;
    scene.end_session(front_end).await;
    assert_eq!(scene.proves_alive().await, descriptor_count, "descriptors leak");
}

fn descriptors_of(code: u32) -> usize {
    FRONT_END_REQUESTS.iter().find(|row| row.code == code).map_or(0, |row| *row.descriptors.start())
}

/// A message with a payload of the right length, asking for an answer.
fn well_formed(code: u32) -> RawMessage<OwnedFd> {
    let len = if matches!(code, 23 | 27 | 35) { 8 } else { 0 };
    RawMessage::request(code, true, vec![0; len], vec![])
}

/// Features that were not offered are not set: the session ends before the back-end hears of them.
#[tokio::test]
async fn features_that_were_not_offered_end_the_session() {
    let mut scene = Scene::ready().await;
    let features = [ProtocolFeatures::INFLIGHT_SHMFD, ProtocolFeatures::BACKEND_REQ, ProtocolFeatures::PAGEFAULT];
    for surplus in features {
        let mut front_end = scene.connect_front_end_with(PROTOCOL, PROTOCOL).await;
        front_end.send(R::SetProtocolFeatures(PROTOCOL | surplus), false).await;
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
