//! Requests of the back-end to the front-end, beside the main channel.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::{Duration, Instant};

use vvu_protocol::control::Channel;
use vvu_protocol::features::ProtocolFeatures;
use vvu_protocol::message::{BackEndRequest, ConfigSpace, FrontEndReply, FrontEndRequest, Iotlb, RawMessage};

use crate::scripted::channels::FrontEndBack;
use crate::scripted::front_end::FrontEnd;
use crate::scripted::{PROTOCOL, Scene, exchange, told};

use BackEndRequest as B;
use FrontEndReply as A;
use FrontEndRequest as R;

const IOTLB_MSG: u32 = 1;
const CONFIG_CHANGE: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
const WITH_BACK_CHANNEL: ProtocolFeatures = PROTOCOL.union(ProtocolFeatures::BACKEND_REQ);

async fn connected() -> (Scene, FrontEnd, FrontEndBack) {
    let (mut scene, mut front_end) = Scene::connected_with(WITH_BACK_CHANNEL, WITH_BACK_CHANNEL).await;
    let back = FrontEndBack::hand_over(&mut scene, &mut front_end).await;
    (scene, front_end, back)
}

/// A request on one channel never waits for the other one.
#[tokio::test]
async fn the_channels_are_independent() {
    let (mut scene, mut front_end, mut back) = connected().await;
    // The back-end asks and is answered while it has a request of the front-end to answer.
    front_end.send(R::SetOwner, true).await;
    scene.agent.request().await;
    for value in [0, 1] {
        scene.agent.asks(B::ConfigChange).await;
        back.request().await;
        back.reply(CONFIG_CHANGE, value).await;
        assert_eq!(scene.agent.is_answered(CONFIG_CHANGE).await, value);
    }
    scene.agent.answer(A::Acknowledgement(0)).await;
    assert_eq!(front_end.acknowledgement(SET_OWNER).await, 0);

    // QEMU reads the configuration space before it replies, and updates its IOTLB before it replies to a miss.
    scene.agent.asks(B::ConfigChange).await;
    back.request().await;
    let config = ConfigSpace { offset: 0, flags: 0, bytes: vec![0; 8] };
    let answer = A::Config(Some(config.clone()));
    let (seen, _) = exchange(&mut front_end, &mut scene.agent, R::GetConfig(config), answer).await;
    assert_eq!(seen.code(), GET_CONFIG);
    back.reply(CONFIG_CHANGE, 0).await;
    assert_eq!(scene.agent.is_answered(CONFIG_CHANGE).await, 0);
    let miss = Iotlb { iova: 0x1000, size: 0, user_address: 0, permission: 1, kind: 1 };
    scene.agent.asks(B::Iotlb(miss)).await;
    back.request().await;
    let update = Iotlb { size: 0x1000, user_address: 0x7000, kind: 2, ..miss };
    let (seen, _) = exchange(&mut front_end, &mut scene.agent, R::Iotlb(update), A::Number(0)).await;
    assert_eq!(seen, R::Iotlb(update));
    back.reply(IOTLB_MSG, 0).await;
    assert_eq!(scene.agent.is_answered(IOTLB_MSG).await, 0);
}

/// A front-end that has not negotiated replies gives none: the agent is answered when the request is on its way.
#[tokio::test]
async fn a_front_end_without_replies_is_not_waited_for() {
    let protocol = WITH_BACK_CHANNEL.difference(ProtocolFeatures::REPLY_ACK);
    let (mut scene, front_end) = Scene::connected_with(protocol, protocol).await;
    let (ours, theirs) = UnixStream::pair().unwrap();
    front_end.send(R::SetBackendReqFd(theirs.into()), false).await;
    scene.agent.obliges().await;
    let ours = vvu_socket::MessageSocket::new(ours).unwrap();
    let mut back = FrontEndBack::new(ours);
    for _ in 0..20 {
        scene.agent.asks(B::ConfigChange).await;
        assert_eq!(scene.agent.is_answered(CONFIG_CHANGE).await, 0);
        let (seen, asks) = back.request().await;
        assert!(matches!(seen, B::ConfigChange) && !asks, "{seen:?}");
    }
}

/// A front-end that does not reply is refused for after 30 seconds, and holds up nothing else. Its late reply is not taken for
/// the next one.
#[tokio::test]
async fn a_front_end_that_does_not_reply_is_not_waited_for_for_ever() {
    let (mut scene, mut front_end, mut back) = connected().await;
    let since = Instant::now();
    scene.agent.asks(B::ConfigChange).await;
    back.request().await;
    told(&mut front_end, &mut scene.agent, R::SetOwner).await;
    let value = tokio::time::timeout(Duration::from_secs(50), scene.agent.is_answered_late(CONFIG_CHANGE)).await;
    assert_ne!(value.expect("an answer in place of the front-end's"), 0);
    assert!(since.elapsed() > Duration::from_secs(29), "refused after {:?}", since.elapsed());
    let miss = Iotlb { iova: 0x1000, size: 0, user_address: 0, permission: 1, kind: 1 };
    scene.agent.asks(B::Iotlb(miss)).await;
    back.request().await;
    back.reply(CONFIG_CHANGE, 0).await;
    back.reply(IOTLB_MSG, 0).await;
    assert_eq!(scene.agent.is_answered(IOTLB_MSG).await, 0);
}

/// A front-end that closes its back channel, or sends there what is no reply, has none any more; its session goes on. The back-end is
/// refused, also what it had asked before.
#[tokio::test]
async fn a_broken_back_channel_breaks_nothing_else() {
    let reply_to_nothing = RawMessage::<OwnedFd>::reply(CONFIG_CHANGE, vec![0; 8], vec![]).to_bytes();
    let other_reply = RawMessage::<OwnedFd>::reply(IOTLB_MSG, vec![0; 8], vec![]).to_bytes();
    let request = RawMessage::<OwnedFd>::request(CONFIG_CHANGE, true, vec![], vec![]).to_bytes();
    let rows = [
        ("closed", None, true),
        ("a reply to nothing", Some(reply_to_nothing), false),
        ("a reply to another request", Some(other_reply), true),
        ("a request", Some(request), true),
        ("garbage", Some(vec![0xa5; 40]), true),
    ];
    let (mut scene, mut front_end, _) = connected().await;
    for (name, bytes, asked) in rows {
        let mut back = FrontEndBack::hand_over(&mut scene, &mut front_end).await;
        if asked {
            scene.agent.asks(B::ConfigChange).await;
            back.request().await;
        }
        match bytes {
            Some(bytes) => {
                back.send_bytes(&bytes).await;
                back.sees_end().await;
            }
            None => drop(back),
        }
        if asked {
            assert_ne!(scene.agent.is_answered(CONFIG_CHANGE).await, 0, "{name}");
        }
        scene.agent.asks(B::ConfigChange).await;
        assert_ne!(scene.agent.is_answered(CONFIG_CHANGE).await, 0, "{name}");
        told(&mut front_end, &mut scene.agent, R::SetOwner).await;
    }
}

/// The next back channel replaces the one before, and nothing of that stays. (hardening: repeated set-up messages.)
#[tokio::test]
async fn a_back_channel_is_replaced() {
    let (mut scene, mut front_end, mut old) = connected().await;
    let mut new = FrontEndBack::hand_over(&mut scene, &mut front_end).await;
    old.sees_end().await;
    scene.agent.asks(B::ConfigChange).await;
    new.request().await;
    new.reply(CONFIG_CHANGE, 0).await;
    assert_eq!(scene.agent.is_answered(CONFIG_CHANGE).await, 0);
    let count = scene.bridge.descriptor_count();
    for _ in 0..30 {
        new = FrontEndBack::hand_over(&mut scene, &mut front_end).await;
    }
    scene.vmm.fence().await;
    assert_eq!(scene.bridge.descriptor_count(), count, "descriptors of the bridge");

    // What is no unix stream socket is refused, and so is what the back-end does not take: the one before stays.
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    let (_read, pipe) = rustix::pipe::pipe().unwrap();
    for descriptor in [OwnedFd::from(datagram), pipe] {
        front_end.send(R::SetBackendReqFd(descriptor), true).await;
        assert_ne!(front_end.acknowledgement(SET_BACKEND_REQ_FD).await, 0);
        assert!(!scene.agent.has_frame(), "the agent was told");
    }
    let (_ours, theirs) = UnixStream::pair().unwrap();
    front_end.send(R::SetBackendReqFd(theirs.into()), true).await;
    scene.agent.request().await;
    scene.agent.answer(A::Acknowledgement(1)).await;
    assert_ne!(front_end.acknowledgement(SET_BACKEND_REQ_FD).await, 0);
    scene.agent.asks(B::ConfigChange).await;
    new.request().await;
    new.reply(CONFIG_CHANGE, 0).await;
    assert_eq!(scene.agent.is_answered(CONFIG_CHANGE).await, 0);
}

/// The back channel outlives appliances. What the lost one had asked is nobody's any more, and the new one is not held up by it.
#[tokio::test]
async fn a_back_channel_outlives_the_appliance() {
    let (mut scene, front_end, mut back) = connected().await;
    scene.agent.asks(B::ConfigChange).await;
    back.request().await;
    scene.appliance_is_replaced().await;
    let replayed = scene.replay(&front_end).await;
    assert!(replayed.iter().any(|(request, _)| request.code() == SET_BACKEND_REQ_FD), "{replayed:?}");
    // The configuration may have changed with the back-end.
    let (seen, asks) = back.request().await;
    assert!(matches!(seen, B::ConfigChange) && !asks, "{seen:?}");
    let miss = Iotlb { iova: 0x1000, size: 0, user_address: 0, permission: 1, kind: 1 };
    scene.agent.asks(B::Iotlb(miss)).await;
    back.request().await;
    back.reply(CONFIG_CHANGE, 0).await;
    back.reply(IOTLB_MSG, 0).await;
    assert_eq!(scene.agent.is_answered(IOTLB_MSG).await, 0);
}

/// An agent that asks again before it was answered, or answers there what nobody has asked, breaks the protocol: its appliance is
/// dropped, and the front-end gets the next one.
#[tokio::test]
async fn an_agent_has_one_request_under_way() {
    let (mut scene, front_end, mut back) = connected().await;
    scene.agent.asks(B::ConfigChange).await;
    back.request().await;
    scene.agent.asks(B::ConfigChange).await;
    scene.is_dropped("before the answer", &front_end).await;

    let (mut scene, front_end, _back) = connected().await;
    let reply = RawMessage::reply(CONFIG_CHANGE, vec![0; 8], vec![]);
    let frame = vvu_protocol::control::Frame::new(Channel::BackEnd, scene.agent.session, reply);
    scene.agent.post(&frame.encode().unwrap());
    scene.is_dropped("nobody waits for", &front_end).await;
}
