//! Kick and call eventfds of the front-end that the appliance's VMM is given as they are.

use std::os::fd::OwnedFd;

use vvu_protocol::control::Handle;
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, VringFile, VringState};
use vvu_socket::event;

use crate::scripted::front_end::{FrontEnd, vring_file};
use crate::scripted::process::Bridge;
use crate::scripted::{Scene, exchange, told};

use FrontEndRequest as R;

const SET_VRING_KICK: u32 = 12;

/// Peers 1 to 5 and vectors 0 and 1 are those of the relay.
const FIRST_PEER: u16 = 6;
const FIRST_VECTOR: u16 = 2;

/// A scene whose doorbell device has four vectors.
async fn connected() -> (Scene, FrontEnd) {
    let bridge = Bridge::start_where(&["--vectors", "4"]).await;
    let mut scene = Scene::around(bridge).await;
    let front_end = scene.connect_front_end().await;
    (scene, front_end)
}

/// The front-end asks for something that has the VMM told of an eventfd first.
async fn handed_over(
    scene: &mut Scene,
    front_end: &mut FrontEnd,
    eventfd: &OwnedFd,
    request: R<OwnedFd>,
) -> (i64, R<Handle>) {
    let code = request.code();
    front_end.send(request, true).await;
    let (id, given) = scene.vmm.doorbell.message().await;
    assert_eq!(event::identity(given.unwrap()).unwrap(), event::identity(eventfd).unwrap(), "another eventfd");
    let seen = scene.agent.request().await;
    scene.agent.answer(FrontEndReply::Acknowledgement(0)).await;
    assert_eq!(front_end.acknowledgement(code).await, 0);
    (id, seen)
}

const fn kick_handle(index: u8, vector: u16) -> R<Handle> {
    R::SetVringKick(VringFile { index, descriptor: Some(Handle::Vector(Vector(vector))) })
}

const fn call_handle(peer: u16) -> R<Handle> {
    R::SetVringCall(VringFile { index: 0, descriptor: Some(Handle::Peer(PeerId(peer))) })
}

/// The agent hears of a vector when the VMM has read of it, and not before; from then on nobody stands in the way.
#[tokio::test]
async fn the_vmm_hears_of_an_eventfd_first() {
    let (mut scene, mut front_end) = connected().await;
    let kick = event::create().unwrap();
    front_end.send(R::SetVringKick(vring_file(1, Some(&kick))), true).await;
    scene.vmm.fence().await;
    assert!(!scene.agent.has_frame(), "the agent was told before the VMM");
    assert!(matches!(scene.vmm.doorbell.message().await, (0, Some(_))));
    assert_eq!(scene.agent.request().await, kick_handle(1, FIRST_VECTOR));
    scene.agent.answer(FrontEndReply::Acknowledgement(0)).await;
    assert_eq!(front_end.acknowledgement(SET_VRING_KICK).await, 0);
    event::take(&kick).unwrap();
    event::signal(&kick).unwrap();
    scene.vmm.fence().await;
    assert_eq!(event::take(&kick).unwrap(), Some(1), "the bridge has taken a kick");
    assert!(!scene.vmm.doorbell.has_rung(Vector(1)));
}

/// A driver that masks its interrupt makes the front-end swap two eventfds: both are known after the first time.
#[tokio::test]
async fn a_masked_interrupt_costs_nothing_the_second_time() {
    let (mut scene, mut front_end) = connected().await;
    let (unmasked, masked) = (event::create().unwrap(), event::create().unwrap());
    for (peer, call) in (FIRST_PEER..).zip([&unmasked, &masked]) {
        let request = R::SetVringCall(vring_file(0, Some(call)));
        let seen = handed_over(&mut scene, &mut front_end, call, request).await;
        assert_eq!(seen, (i64::from(peer), call_handle(peer)));
    }
    for (peer, call) in (FIRST_PEER..).zip([&unmasked, &masked]) {
        event::take(call).unwrap();
        let seen = told(&mut front_end, &mut scene.agent, R::SetVringCall(vring_file(0, Some(call)))).await;
        assert_eq!(seen, call_handle(peer));
        assert_eq!(event::take(call).unwrap(), Some(1), "a call may have gone to the other one");
    }
    // The front-end goes, and with it what it had.
    scene.end_session(front_end).await;
    for peer in [FIRST_PEER, FIRST_PEER + 1] {
        assert!(matches!(scene.vmm.doorbell.message().await, (id, None) if id == i64::from(peer)));
    }
}

/// The same kick eventfd is the same vector after a stop, in another queue, and for the next front-end; when there are no more,
/// kicks are relayed.
#[tokio::test]
async fn vectors_last_and_run_out() {
    let (mut scene, mut front_end) = connected().await;
    let (one, other) = (event::create().unwrap(), event::create().unwrap());
    for (vector, kick) in (FIRST_VECTOR..).zip([&one, &other]) {
        let request = R::SetVringKick(vring_file(0, Some(kick)));
        assert_eq!(handed_over(&mut scene, &mut front_end, kick, request).await, (0, kick_handle(0, vector)));
    }
    let state = VringState { index: 0, num: 0 };
    exchange(&mut front_end, &mut scene.agent, R::GetVringBase(state), FrontEndReply::VringState(state)).await;
    scene.end_session(front_end).await;
    let mut front_end = scene.connect_front_end().await;
    let seen = told(&mut front_end, &mut scene.agent, R::SetVringKick(vring_file(1, Some(&one)))).await;
    assert_eq!(seen, kick_handle(1, FIRST_VECTOR));

    let surplus = event::create().unwrap();
    let seen = told(&mut front_end, &mut scene.agent, R::SetVringKick(vring_file(0, Some(&surplus)))).await;
    assert_eq!(seen, kick_handle(0, 0), "there are four vectors");
    scene.bridge.says(&["signals are relayed", "vectors"]).await;
    event::signal(&surplus).unwrap();
    scene.vmm.doorbell.rings(Vector(0)).await;
}

/// A VMM that does not read what it is told holds up one request, and no longer than it may.
#[tokio::test]
async fn a_vmm_that_does_not_read_is_dropped() {
    let (mut scene, front_end) = connected().await;
    let kick = event::create().unwrap();
    front_end.send(R::SetVringKick(vring_file(0, Some(&kick))), true).await;
    scene.bridge.drops(1, "takes no messages of the doorbell device").await;
    assert!(!front_end.has_message(), "the front-end waits for the next appliance");
}
