//! Beginning and end of sessions, as the status field shows them.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use vvu_protocol::control::{Channel, Frame, Status};
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_protocol::message::{BackEndReply, BackEndRequest, FrontEndReply, FrontEndRequest, RawMessage};
use vvu_socket::event;

use crate::scripted::front_end::{DriverMemory, vring_file};
use crate::scripted::vmm::Verdict;
use crate::scripted::{Scene, exchange, told};

use FrontEndRequest as R;

const GET_FEATURES: u32 = 1;
const SET_OWNER: u32 = 3;
const SEND_RARP: u32 = 19;

/// The front-end goes: the agent is told, and driver memory stays mapped until nobody in the appliance uses it any more. A
/// front-end that comes meanwhile waits, and gets the next session.
#[tokio::test]
async fn a_session_is_cleared_away_before_the_next_begins() {
    let (mut scene, mut first) = Scene::connected().await;
    let memory = DriverMemory::new(8 << 20);
    told(&mut first, &mut scene.agent, memory.pc_table()).await;
    scene.journal.take();

    drop(first);
    let config = scene.agent.sees_end().await;
    assert_eq!((config.status, config.session), (Status::empty(), 1));
    let mut second = scene.new_front_end();
    second.send(R::GetFeatures, false).await;
    scene.vmm.fence().await;
    assert_eq!(scene.vmm.driver_mappings().len(), 1, "driver memory was unmapped while the back-end may use it");
    assert_eq!(scene.agent.config().await.status, Status::empty());
    assert!(!scene.agent.has_frame(), "a session began before the last one was cleared away");

    scene.agent.set_status(Status::BACK_END_UP).await;
    let config = scene.agent.sees_front_end().await;
    assert_eq!((config.status, config.session), (Status::BACK_END_UP | Status::FRONT_END_UP, 2));
    assert_eq!(scene.vmm.driver_mappings(), [], "driver memory of the first session is in the second");
    assert_eq!(scene.agent.request().await, R::GetFeatures);
    scene.agent.answer(FrontEndReply::Number(0)).await;
    second.reply(GET_FEATURES).await;
}

/// The back-end is up again after a session, and gone while driver memory is unmapped: the next front-end waits.
#[tokio::test]
async fn a_back_end_may_go_while_memory_is_unmapped() {
    let (mut scene, mut first) = Scene::connected().await;
    told(&mut first, &mut scene.agent, DriverMemory::new(8 << 20).whole()).await;
    let (release, held) = oneshot::channel();
    scene.vmm.decides(Verdict::Hold(held));
    drop(first);
    scene.agent.sees_end().await;
    scene.agent.set_status(Status::BACK_END_UP).await;
    scene.vmm.asked("SHMEM_UNMAP").await;
    scene.agent.set_status(Status::empty()).await;
    let second = scene.new_front_end();
    release.send(()).unwrap();
    scene.bridge.says(&["event=Cleared"]).await;
    scene.vmm.fence().await;
    assert_eq!(scene.agent.config().await.status, Status::empty(), "a front-end was taken on without a back-end");
    scene.agent.set_status(Status::BACK_END_UP).await;
    scene.agent.sees_front_end().await;
    scene.bridge.notified("STATUS=front-end connected").await;
    scene.end_session(second).await;
    scene.proves_alive().await;
}

/// While one front-end has the device, others are turned away, and the one does not notice.
#[tokio::test]
async fn a_second_front_end_is_turned_away() {
    let (mut scene, mut first) = Scene::connected().await;
    for _ in 0..3 {
        scene.new_front_end().sees_end().await;
    }
    told(&mut first, &mut scene.agent, R::SetOwner).await;
    scene.end_session(first).await;
    scene.proves_alive().await;
}

/// The back-end dies, with a request under way or without: the front-end notices nothing. The session that the status field
/// shows ends, and the next back-end begins another one.
#[tokio::test]
async fn a_front_end_outlives_its_back_end() {
    let (mut scene, mut front_end) = Scene::connected().await;
    for (session, status) in [(1, Status::FRONT_END_UP), (2, Status::empty())] {
        front_end.send(R::SetOwner, true).await;
        scene.agent.request().await;
        if session == 2 {
            scene.agent.answer(FrontEndReply::Acknowledgement(0)).await;
            assert_eq!(front_end.acknowledgement(SET_OWNER).await, 0);
        }
        scene.agent.set_status(status).await;
        let config = scene.agent.sees_end().await;
        assert_eq!((config.status, config.session), (Status::empty(), session));
        scene.bridge.notified("STATUS=front-end connected, waiting for the appliance").await;
        scene.vmm.fence().await;
        assert!(!front_end.has_message() && !scene.agent.has_frame(), "somebody was told something");
        scene.agent.set_status(Status::BACK_END_UP).await;
        let config = scene.agent.sees_front_end().await;
        assert_eq!((config.status, config.session), (Status::BACK_END_UP | Status::FRONT_END_UP, session + 1));
        if session == 1 {
            scene.agent.answers_replay_until(SET_OWNER).await;
            assert_eq!(front_end.acknowledgement(SET_OWNER).await, 0);
        }
        scene.bridge.notified("STATUS=front-end connected").await;
    }
}

/// The back-end dies while there is no front-end: the next front-end waits until there is a back-end again.
#[tokio::test]
async fn a_front_end_waits_for_a_back_end() {
    let mut scene = Scene::ready().await;
    scene.agent.set_status(Status::empty()).await;
    let mut front_end = scene.new_front_end();
    front_end.send(R::GetFeatures, false).await;
    scene.vmm.fence().await;
    assert_eq!(scene.agent.config().await.status, Status::empty(), "a front-end was taken on without a back-end");
    scene.agent.set_status(Status::BACK_END_UP).await;
    let config = scene.agent.sees_front_end().await;
    assert_eq!((config.status, config.session), (Status::BACK_END_UP | Status::FRONT_END_UP, 1));
    assert_eq!(scene.agent.request().await, R::GetFeatures);
    scene.agent.answer(FrontEndReply::Number(0)).await;
    front_end.reply(GET_FEATURES).await;
}

/// The appliance is reset in the middle of a request: all its mappings are gone. After the boot the header is there again, driver
/// memory is mapped again, and the request is asked again, whichever device is reset first.
#[tokio::test]
async fn the_appliance_may_be_reset() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let memory = DriverMemory::new(8 << 20);
    told(&mut front_end, &mut scene.agent, memory.pc_table()).await;
    let mapped = scene.vmm.driver_mappings();
    for window_first in [false, true] {
        front_end.send(R::SendRarp(1), true).await;
        scene.agent.request().await;
        if window_first {
            scene.vmm.reset_window().await;
        }
        scene.vmm.control.stop().await;
        if !window_first {
            scene.vmm.reset_window().await;
        }
        scene.journal.take();
        scene.reboot_agent().await;
        scene.vmm.start_window().await;
        scene.agent.sees(|config| config.window_len != 0, "the window's header").await;
        let config = scene.agent.config().await;
        assert_eq!((config.status, config.session), (Status::empty(), scene.agent.session));
        assert!(scene.vmm.header().is_some(), "the header is mapped again");
        assert_eq!(scene.vmm.driver_mappings(), [], "mapped without a back-end");
        scene.agent.set_status(Status::BACK_END_UP).await;
        scene.agent.sees_front_end().await;
        scene.agent.answers_replay_until(SEND_RARP).await;
        assert_eq!(front_end.acknowledgement(SEND_RARP).await, 0);
        assert_eq!(scene.vmm.driver_mappings(), mapped);
        assert!(!scene.journal.take().contains(&"SHMEM_UNMAP asked".to_owned()), "unmapped what was not mapped");
    }
    scene.end_session(front_end).await;
    scene.proves_alive().await;
}

/// The window device alone is reset, by its driver: driver memory is gone from the window, until it is back and the agent has
/// a back-end again.
#[tokio::test]
async fn mappings_are_made_again_after_a_reset_of_the_window() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let memory = DriverMemory::new(8 << 20);
    told(&mut front_end, &mut scene.agent, memory.pc_table()).await;
    let mapped = scene.vmm.driver_mappings();
    let interrupts = scene.agent.unseen_interrupts();
    scene.vmm.reset_window().await;
    // An interrupt now could come in the middle of a reset of the machine, and kill QEMU.
    scene.vmm.fence().await;
    assert_eq!(scene.agent.unseen_interrupts(), interrupts);
    let shown = scene.agent.config().await;
    assert_eq!((shown.status, shown.window_len), (Status::empty(), 0));
    // A back-end alone is not enough.
    scene.agent.set_status(Status::BACK_END_UP).await;
    scene.vmm.fence().await;
    assert_eq!(scene.agent.config().await.status, Status::BACK_END_UP);
    scene.vmm.start_window().await;
    scene.agent.sees_front_end().await;
    scene.replay(&front_end).await;
    assert_eq!(scene.vmm.driver_mappings(), mapped);
    scene.end_session(front_end).await;
    scene.proves_alive().await;
}

/// The window device is reset while nobody is connected: no front-end is taken on without a window.
#[tokio::test]
async fn a_front_end_waits_for_the_window() {
    let mut scene = Scene::ready().await;
    scene.vmm.reset_window().await;
    let front_end = scene.new_front_end();
    scene.vmm.fence().await;
    assert_eq!(scene.agent.config().await.status, Status::BACK_END_UP, "a front-end was taken on without a window");
    scene.vmm.start_window().await;
    scene.agent.sees_front_end().await;
    scene.end_session(front_end).await;
}

/// What belongs to another session is dropped: it neither answers a request of this one nor ends it.
#[tokio::test]
async fn frames_of_another_session_are_ignored() {
    let (mut scene, first) = Scene::connected().await;
    first.send(R::SetOwner, true).await;
    scene.agent.request().await;
    drop(first);
    // The bridge still waits for the answer; the session ends with it.
    scene.agent.answer(FrontEndReply::Acknowledgement(0)).await;
    scene.clear_away().await;

    let mut second = scene.connect_front_end().await;
    let stale = |session, value| {
        let message = FrontEndReply::Acknowledgement(value).encode(SET_OWNER);
        Frame::new(Channel::FrontEnd, session, message)
    };
    scene.agent.send(&stale(1, 0)).await;
    second.send(R::SetOwner, true).await;
    scene.agent.request().await;
    for session in [1, 3, 0, u32::MAX] {
        scene.agent.send(&stale(session, 7)).await;
    }
    scene.agent.answer(FrontEndReply::Acknowledgement(0)).await;
    assert_eq!(second.acknowledgement(SET_OWNER).await, 0);
    scene.end_session(second).await;

    // Also when there is no session at all, and more than there is room for.
    for session in 0..20 {
        let frame = stale(session % 3, 0).encode().unwrap();
        scene.agent.post(&frame);
    }
    scene.proves_alive().await;
}

/// A request of the back-end, which the front-end was not offered, is refused by the bridge and not passed on.
#[tokio::test]
async fn requests_of_the_back_end_are_refused() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let message = BackEndRequest::ConfigChange.encode(true);
    let frame = Frame::new(Channel::BackEnd, scene.agent.session, message);
    scene.agent.send(&frame).await;
    let answer = scene.agent.frame().await;
    assert_eq!((answer.channel, answer.session), (Channel::BackEnd, frame.session));
    let code = frame.message.header.request;
    assert_ne!(BackEndReply::decode(code, answer.message).unwrap(), BackEndReply::Acknowledgement(0));

    // In the middle of a request of the front-end, too.
    front_end.send(R::SetOwner, true).await;
    scene.agent.request().await;
    scene.agent.send(&frame).await;
    assert_eq!(scene.agent.frame().await.channel, Channel::BackEnd);
    scene.agent.answer(FrontEndReply::Acknowledgement(0)).await;
    assert_eq!(front_end.acknowledgement(SET_OWNER).await, 0);
}

/// The agent owns one bit of the configuration space; everything else it writes is ignored.
#[tokio::test]
async fn the_agent_writes_one_bit_of_the_configuration_space() {
    let scene = Scene::ready().await;
    let before = scene.agent.config().await;
    for (offset, len) in [(4, 4), (8, 16), (36, 4), (40, 8), (0, 8), (60, 4), (0, 64)] {
        scene.vmm.control.write_config(offset, &vec![0xff; len]).await;
        assert_eq!(scene.agent.config().await, before, "{len} bytes at {offset}");
    }
    for (offset, len) in [(0, 0), (0, 3), (1, 4), (4, 60), (63, 1), (64, 4), (252, 4)] {
        scene.vmm.control.write_part_of_config(offset, vec![0; len]).await;
        assert_eq!(scene.agent.config().await, before, "a part of {len} bytes at {offset}");
    }
    scene.vmm.control.write_part_of_config(0, vec![0; 4]).await;
    assert_eq!(scene.agent.config().await.status, Status::empty());
    scene.agent.set_status(Status::from_bits_retain(u32::MAX)).await;
    assert_eq!(scene.agent.config().await, before);
}

/// Signals that come after the end of their session go nowhere, and the next front-end does not get them either.
#[tokio::test]
async fn late_signals_go_nowhere() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let (kick, call) = (event::create().unwrap(), event::create().unwrap());
    told(&mut front_end, &mut scene.agent, R::SetVringKick(vring_file(0, Some(&kick)))).await;
    told(&mut front_end, &mut scene.agent, R::SetVringCall(vring_file(0, Some(&call)))).await;
    drop(front_end);
    scene.agent.sees_end().await;
    event::signal(&kick).unwrap();
    scene.vmm.doorbell.ring(PeerId(1));
    scene.vmm.fence().await;
    assert!(!scene.vmm.doorbell.has_rung(Vector(0)), "a kick after the end of the session");
    assert_eq!(event::take(&call).unwrap(), None, "a call after the end of the session");
    scene.agent.set_status(Status::BACK_END_UP).await;
    scene.bridge.notified("STATUS=ready for a front-end").await;

    let mut next = scene.connect_front_end().await;
    let call = event::create().unwrap();
    told(&mut next, &mut scene.agent, R::SetVringCall(vring_file(0, Some(&call)))).await;
    assert_eq!(event::take(&call).unwrap(), None);
}

/// An agent that does not clear a session away is given up after 30 seconds, and its appliance dropped. Driver memory is taken
/// out of its window first.
#[tokio::test]
async fn an_appliance_that_keeps_a_session_is_given_up() {
    let (mut scene, mut front_end) = Scene::connected().await;
    told(&mut front_end, &mut scene.agent, DriverMemory::new(8 << 20).whole()).await;
    drop(front_end);
    scene.agent.sees_end().await;
    let since = Instant::now();
    scene.vmm.asked_within(Duration::from_secs(60), "SHMEM_UNMAP").await;
    assert!(since.elapsed() > Duration::from_secs(29), "given up after {:?}", since.elapsed());
    scene.bridge.drops(1, "the end of a session within 30 s").await;
    assert_eq!(scene.vmm.driver_mappings(), []);
    scene.next_appliance().await;
    scene.bridge.notified("STATUS=ready for a front-end").await;
    scene.proves_alive().await;
}

/// A request of which the front-end has sent half is not lost, and not taken for a whole one.
#[tokio::test]
async fn a_request_may_come_in_pieces() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let bytes = RawMessage::<std::os::fd::OwnedFd>::request(SET_OWNER, true, vec![], vec![]).to_bytes();
    for piece in bytes.chunks(5) {
        assert!(!scene.agent.has_frame());
        front_end.send_raw(piece, &[]);
        scene.vmm.fence().await;
    }
    assert_eq!(scene.agent.obliges().await, R::SetOwner);
    assert_eq!(front_end.acknowledgement(SET_OWNER).await, 0);
    exchange(&mut front_end, &mut scene.agent, R::GetFeatures, FrontEndReply::Number(0)).await;
}
