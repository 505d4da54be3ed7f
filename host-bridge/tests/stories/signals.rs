//! Kicks and calls: what the bridge passes on between the eventfds of the front-end and those of the doorbell device.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::fcntl_getfl;
use vvu_protocol::control::Handle;
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, VringFile, VringState};
use vvu_socket::event::{self, Event};

use crate::scripted::front_end::{DriverMemory, FrontEnd, vring_file};
use crate::scripted::{Scene, exchange, told, within};

use FrontEndRequest as R;

const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;

/// Peers of queue 0.
const CALL: PeerId = PeerId(1);
const ERROR: PeerId = PeerId(2);

const STATE: VringState = VringState { index: 0, num: 0 };

/// An eventfd as many VMMs make it: one that blocks.
fn blocking_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

async fn arrives(descriptor: &OwnedFd, what: &str) {
    let event = Event::new(descriptor.try_clone().unwrap()).unwrap();
    within(what, event.signalled()).await.unwrap();
}

/// Signals go both ways on each queue, and the eventfds keep their flags: O_NONBLOCK is shared with their owner.
#[tokio::test]
async fn kicks_and_calls_are_relayed() {
    let (mut scene, mut front_end) = Scene::connected().await;
    for index in 0..2_u8 {
        let [kick, call, error] = [(); 3].map(|()| blocking_eventfd());
        let flags = fcntl_getfl(&kick).unwrap();
        let agent = &mut scene.agent;
        told(&mut front_end, agent, R::SetVringKick(vring_file(index, Some(&kick)))).await;
        told(&mut front_end, agent, R::SetVringCall(vring_file(index, Some(&call)))).await;
        told(&mut front_end, agent, R::SetVringErr(vring_file(index, Some(&error)))).await;
        for _ in 0..3 {
            event::signal(&kick).unwrap();
            scene.vmm.doorbell.rings(Vector(u16::from(index))).await;
            scene.vmm.doorbell.ring(PeerId(1 + 2 * u16::from(index)));
            arrives(&call, "a call").await;
            scene.vmm.doorbell.ring(PeerId(2 + 2 * u16::from(index)));
            arrives(&error, "an error").await;
        }
        for descriptor in [&kick, &call, &error] {
            assert_eq!(event::take(descriptor).unwrap(), None, "a signal too many");
            assert_eq!(fcntl_getfl(descriptor).unwrap(), flags, "flags of an eventfd have changed");
        }
    }
}

/// A kick that was made before the bridge got the eventfd is not lost. (hardening: a kick before the ring is ready, a kick
/// lost while a vring restarts.)
#[tokio::test]
async fn a_kick_that_came_first_arrives() {
    let (mut scene, mut front_end) = Scene::connected().await;
    for _ in 0..2 {
        let kick = blocking_eventfd();
        event::signal(&kick).unwrap();
        front_end.send(R::SetVringKick(vring_file(0, Some(&kick))), true).await;
        scene.agent.request().await;
        scene.vmm.fence().await;
        assert!(!scene.vmm.doorbell.has_rung(Vector(0)), "the kick came before the back-end listens");
        scene.agent.answer(FrontEndReply::Acknowledgement(0)).await;
        assert_eq!(front_end.acknowledgement(SET_VRING_KICK).await, 0);
        scene.vmm.doorbell.rings(Vector(0)).await;
    }
}

/// After the stop of a vring its kicks go nowhere.
#[tokio::test]
async fn a_stopped_vring_is_not_kicked() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let kick = blocking_eventfd();
    told(&mut front_end, &mut scene.agent, R::SetVringKick(vring_file(0, Some(&kick)))).await;
    stop(&mut front_end, &mut scene).await;
    event::signal(&kick).unwrap();
    scene.vmm.fence().await;
    assert!(!scene.vmm.doorbell.has_rung(Vector(0)));
    assert_eq!(event::take(&kick).unwrap(), Some(1), "somebody took the kick");
}

async fn stop(front_end: &mut FrontEnd, scene: &mut Scene) {
    let answer = FrontEndReply::VringState(VringState { index: 0, num: 77 });
    let (_, reply) = exchange(front_end, &mut scene.agent, R::GetVringBase(STATE), answer).await;
    assert!(matches!(reply, FrontEndReply::VringState(VringState { index: 0, num: 77 })), "{reply:?}");
}

/// A call that comes while the front-end has handed over no eventfd is kept for it.
#[tokio::test]
async fn a_call_without_an_eventfd_is_kept() {
    let (mut scene, mut front_end) = Scene::connected().await;
    scene.vmm.doorbell.ring(CALL);
    scene.vmm.fence().await;
    let call = blocking_eventfd();
    told(&mut front_end, &mut scene.agent, R::SetVringCall(vring_file(0, Some(&call)))).await;
    arrives(&call, "the call that was kept").await;

    let seen = told(&mut front_end, &mut scene.agent, R::SetVringCall(vring_file(0, None))).await;
    assert_eq!(seen, R::SetVringCall(VringFile { index: 0, descriptor: None }));
    scene.vmm.doorbell.ring(CALL);
    scene.vmm.fence().await;
    assert_eq!(event::take(&call).unwrap(), None, "the call went to an eventfd that was taken back");
    let next = blocking_eventfd();
    told(&mut front_end, &mut scene.agent, R::SetVringCall(vring_file(0, Some(&next)))).await;
    arrives(&next, "the call that was kept").await;
}

/// QEMU masks an interrupt by handing over another eventfd: calls go to the last one.
#[tokio::test]
async fn calls_go_to_the_last_eventfd() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let (masked, unmasked) = (blocking_eventfd(), blocking_eventfd());
    told(&mut front_end, &mut scene.agent, R::SetVringCall(vring_file(0, Some(&unmasked)))).await;
    let seen = told(&mut front_end, &mut scene.agent, R::SetVringCall(vring_file(0, Some(&masked)))).await;
    // The back-end's own way to signal stays as it is.
    assert_eq!(seen, R::SetVringCall(VringFile { index: 0, descriptor: Some(Handle::Peer(CALL)) }));
    scene.vmm.doorbell.ring(CALL);
    arrives(&masked, "a masked call").await;
    told(&mut front_end, &mut scene.agent, R::SetVringCall(vring_file(0, Some(&unmasked)))).await;
    scene.vmm.doorbell.ring(CALL);
    arrives(&unmasked, "a call").await;
    assert_eq!(event::take(&masked).unwrap(), None);
}

/// A front-end that has the reply to GET_VRING_BASE takes the vring back: every call that was made before is there then.
#[tokio::test]
async fn calls_overtake_the_reply_that_stops_a_vring() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let call = blocking_eventfd();
    told(&mut front_end, &mut scene.agent, R::SetVringCall(vring_file(0, Some(&call)))).await;
    for round in 0..50 {
        front_end.send(R::GetVringBase(STATE), false).await;
        scene.agent.request().await;
        scene.vmm.doorbell.ring(CALL);
        scene.agent.answer(FrontEndReply::VringState(STATE)).await;
        front_end.reply(GET_VRING_BASE).await;
        assert_eq!(event::take(&call).unwrap(), Some(1), "round {round}");
    }
}

/// An eventfd whose count is full is awake already: nobody waits for room in it.
#[tokio::test]
async fn a_full_eventfd_holds_nobody_up() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let call = blocking_eventfd();
    rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    told(&mut front_end, &mut scene.agent, R::SetVringCall(vring_file(0, Some(&call)))).await;
    scene.vmm.doorbell.ring(CALL);
    scene.vmm.fence().await;
    told(&mut front_end, &mut scene.agent, R::SetOwner).await;
    assert_eq!(event::take(&call).unwrap(), Some(u64::MAX - 1));
    scene.vmm.doorbell.ring(CALL);
    arrives(&call, "a call after the count was taken").await;
}

/// A descriptor that is no eventfd is refused before anybody hears of it, and what was there before stays.
#[tokio::test]
async fn a_pipe_is_no_eventfd() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let (kick, call) = (blocking_eventfd(), blocking_eventfd());
    told(&mut front_end, &mut scene.agent, R::SetVringKick(vring_file(0, Some(&kick)))).await;
    told(&mut front_end, &mut scene.agent, R::SetVringCall(vring_file(0, Some(&call)))).await;
    let (_read, write) = rustix::pipe::pipe().unwrap();
    let file = || vring_file(0, Some(&write));
    let rows = [
        (R::SetVringKick(file()), SET_VRING_KICK),
        (R::SetVringCall(file()), SET_VRING_CALL),
        (R::SetVringErr(file()), SET_VRING_ERR),
    ];
    for (request, code) in rows {
        let name = request.name();
        front_end.send(request, true).await;
        assert_ne!(front_end.acknowledgement(code).await, 0, "{name}");
        assert!(!scene.agent.has_frame(), "{name}: the agent was told");
    }
    event::signal(&kick).unwrap();
    scene.vmm.doorbell.rings(Vector(0)).await;
    scene.vmm.doorbell.ring(CALL);
    arrives(&call, "a call").await;
}

/// An eventfd of semaphores that never runs empty keeps the bridge busy, and nobody else waiting.
#[tokio::test]
async fn a_kick_that_never_ends_holds_nobody_up() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::SEMAPHORE).unwrap();
    rustix::io::write(&kick, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    told(&mut front_end, &mut scene.agent, R::SetVringKick(vring_file(0, Some(&kick)))).await;
    scene.vmm.doorbell.rings(Vector(0)).await;
    for _ in 0..10 {
        told(&mut front_end, &mut scene.agent, R::SetOwner).await;
    }
    scene.vmm.fence().await;
    scene.end_session(front_end).await;
    scene.proves_alive().await;
}

/// A front-end that fills and empties its eventfd all the time makes signals to it fail. That is its own loss: the next
/// front-end gets its calls.
#[tokio::test]
async fn a_front_end_that_plays_with_its_eventfd_hurts_itself() {
    let (mut scene, mut front_end) = Scene::connected().await;
    for peer in [CALL, ERROR] {
        let toy = event::create().unwrap();
        let request = match peer {
            CALL => R::SetVringCall(vring_file(0, Some(&toy))),
            _ => R::SetVringErr(vring_file(0, Some(&toy))),
        };
        told(&mut front_end, &mut scene.agent, request).await;
        let stop = Arc::new(AtomicBool::new(false));
        let player = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                while !stop.load(Ordering::Relaxed) {
                    // Both fail in turn, since somebody else writes, too.
                    let _ = rustix::io::write(&toy, &(u64::MAX - 1).to_ne_bytes());
                    let _ = rustix::io::read(&toy, &mut [0; 8]);
                }
            }
        });
        for _ in 0..200 {
            scene.vmm.doorbell.ring(peer);
            scene.vmm.fence().await;
        }
        stop.store(true, Ordering::Relaxed);
        player.join().unwrap();
    }
    scene.end_session(front_end).await;

    let mut next = scene.connect_front_end().await;
    let (call, error) = (blocking_eventfd(), blocking_eventfd());
    told(&mut next, &mut scene.agent, R::SetVringCall(vring_file(0, Some(&call)))).await;
    told(&mut next, &mut scene.agent, R::SetVringErr(vring_file(0, Some(&error)))).await;
    scene.vmm.doorbell.ring(CALL);
    arrives(&call, "a call of the next session").await;
    scene.vmm.doorbell.ring(ERROR);
    arrives(&error, "an error of the next session").await;
    assert!(told(&mut next, &mut scene.agent, DriverMemory::new(8 << 20).whole()).await.code() == 5);
}
