//! The state of the device while it is saved or loaded: from the agent to the front-end's pipe, or the other way round.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use tokio::sync::oneshot;
use vvu_protocol::control::Handle;
use vvu_protocol::features::ProtocolFeatures;
use vvu_protocol::message::{
    DeviceStatePhase, DeviceStateTransfer, FrontEndReply, FrontEndRequest, MAX_PAYLOAD_LEN, StateDirection,
};
use vvu_protocol::state::StateMessage;

use crate::scripted::front_end::FrontEnd;
use crate::scripted::{PROTOCOL, Scene, exchange, memory_file, told, within};

use FrontEndReply as A;
use FrontEndRequest as R;
use StateMessage::{Answer, Part};

const SET_DEVICE_STATE_FD: u32 = 42;
const CHECK_DEVICE_STATE: u32 = 43;
const WITH_STATE: ProtocolFeatures = PROTOCOL.union(ProtocolFeatures::DEVICE_STATE);
const ACCEPTED: u64 = 0x100;

async fn connected() -> (Scene, FrontEnd) {
    Scene::connected_with(WITH_STATE, WITH_STATE).await
}

fn set_stream(direction: StateDirection, descriptor: OwnedFd) -> R<OwnedFd> {
    R::SetDeviceStateFd(DeviceStateTransfer { direction, phase: DeviceStatePhase::Stopped }, descriptor)
}

/// The front-end hands over a stream, and the back-end agrees.
async fn begins(scene: &mut Scene, front_end: &mut FrontEnd, direction: StateDirection, descriptor: OwnedFd) {
    let request = set_stream(direction, descriptor);
    let answer = A::DeviceState(ACCEPTED, None);
    let (seen, reply) = exchange(front_end, &mut scene.agent, request, answer).await;
    assert!(matches!(seen, R::SetDeviceStateFd(seen, Handle::Stream) if seen.direction == direction), "{seen:?}");
    assert!(matches!(reply, A::DeviceState(ACCEPTED, None)), "{reply:?}");
}

async fn check(front_end: &mut FrontEnd) -> u64 {
    match front_end.reply(CHECK_DEVICE_STATE).await {
        A::Number(value) => value,
        other => panic!("expected a number, {other:?} came"),
    }
}

/// Reads a stream to its end, in a thread of its own.
fn read_to_end(read: OwnedFd) -> oneshot::Receiver<Vec<u8>> {
    let (sender, receiver) = oneshot::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        File::from(read).read_to_end(&mut bytes).unwrap();
        // Nobody waits any more if the test has failed.
        let _ = sender.send(bytes);
    });
    receiver
}

fn some_bytes(len: usize) -> Vec<u8> {
    (0..len).map(|index| u8::try_from(index % 251).unwrap()).collect()
}

/// What the agent sends comes out of the pipe, in order, to its end; then the back-end is asked whether all went well.
#[tokio::test]
async fn state_is_saved() {
    for answer in [0, 1] {
        let (mut scene, mut front_end) = connected().await;
        let (read, write) = rustix::pipe::pipe().unwrap();
        begins(&mut scene, &mut front_end, StateDirection::Save, write).await;
        let saved = read_to_end(read);
        let state = some_bytes(300_000);
        for part in state.chunks(MAX_PAYLOAD_LEN).chain([&[][..]]) {
            scene.agent.sends_state(Part(part.to_vec())).await;
            assert_eq!(scene.agent.state().await, Answer(0));
        }
        let saved = within("the end of the state", saved).await.unwrap();
        assert!(saved == state, "the state has changed on its way");
        front_end.send(R::CheckDeviceState, false).await;
        assert_eq!(scene.agent.request().await, R::CheckDeviceState);
        scene.agent.answer(A::Number(answer)).await;
        assert_eq!(check(&mut front_end).await, answer);
    }
}

/// What comes out of the pipe goes to the agent, in order, to its end. The back-end is asked when it has all of it.
#[tokio::test]
async fn state_is_loaded() {
    let (mut scene, mut front_end) = connected().await;
    let (read, write) = rustix::pipe::pipe().unwrap();
    begins(&mut scene, &mut front_end, StateDirection::Load, read).await;
    let state = some_bytes(200_000);
    let writer = std::thread::spawn({
        let state = state.clone();
        move || File::from(write).write_all(&state)
    });
    front_end.send(R::CheckDeviceState, false).await;
    let mut loaded = Vec::new();
    loop {
        let Part(part) = scene.agent.state().await else { panic!("expected a part") };
        let is_end = part.is_empty();
        loaded.extend(part);
        scene.vmm.fence().await;
        assert!(!scene.agent.has_frame(), "something came before the answer to a part");
        scene.agent.sends_state(Answer(0)).await;
        if is_end {
            break;
        }
    }
    writer.join().unwrap().unwrap();
    assert!(loaded == state, "the state has changed on its way");
    assert_eq!(scene.agent.request().await, R::CheckDeviceState);
    scene.agent.answer(A::Number(0)).await;
    assert_eq!(check(&mut front_end).await, 0);
    scene.end_session(front_end).await;
    scene.proves_alive().await;
}

/// A pipe that nobody reads or writes holds up its own transfer and nothing else.
#[tokio::test]
async fn a_slow_pipe_holds_nobody_up() {
    let (mut scene, mut front_end) = connected().await;
    let (read, write) = rustix::pipe::pipe().unwrap();
    begins(&mut scene, &mut front_end, StateDirection::Save, write).await;
    let part = vec![7; MAX_PAYLOAD_LEN];
    let mut sent = 0;
    // A pipe holds 64 KiB or less.
    loop {
        scene.agent.sends_state(Part(part.clone())).await;
        sent += part.len();
        scene.vmm.fence().await;
        scene.vmm.fence().await;
        if !scene.agent.has_frame() {
            break;
        }
        assert_eq!(scene.agent.state().await, Answer(0));
        assert!(sent < 1 << 20, "the pipe takes everything");
    }
    told(&mut front_end, &mut scene.agent, R::SetOwner).await;
    // A second one is refused meanwhile.
    let (_, other) = rustix::pipe::pipe().unwrap();
    front_end.send(set_stream(StateDirection::Save, other), false).await;
    assert!(matches!(front_end.reply(SET_DEVICE_STATE_FD).await, A::DeviceState(value, None) if value & 0xff != 0));
    assert!(!scene.agent.has_frame(), "the agent was told of a second transfer");
    let mut bytes = vec![0; sent];
    let reader = std::thread::spawn(move || File::from(read).read_exact(&mut bytes).map(|()| bytes));
    assert_eq!(scene.agent.state().await, Answer(0));
    reader.join().unwrap().unwrap();
}

/// A transfer that fails on either side is answered as failed, and the back-end is not asked.
#[tokio::test]
async fn a_transfer_that_fails_is_told() {
    // The front-end reads no more.
    let (mut scene, mut front_end) = connected().await;
    let (read, write) = rustix::pipe::pipe().unwrap();
    begins(&mut scene, &mut front_end, StateDirection::Save, write).await;
    drop(read);
    scene.agent.sends_state(Part(vec![1])).await;
    assert_ne!(scene.agent.state().await, Answer(0));
    front_end.send(R::CheckDeviceState, false).await;
    assert_ne!(check(&mut front_end).await, 0);

    // The agent takes no more.
    let (read, write) = rustix::pipe::pipe().unwrap();
    begins(&mut scene, &mut front_end, StateDirection::Load, read).await;
    rustix::io::write(&write, b"state").unwrap();
    assert_eq!(scene.agent.state().await, Part(b"state".to_vec()));
    scene.agent.sends_state(Answer(5)).await;
    front_end.send(R::CheckDeviceState, false).await;
    assert_ne!(check(&mut front_end).await, 0);
    assert!(!scene.agent.has_frame(), "the back-end was asked");

    // A part that belongs to no transfer.
    scene.agent.sends_state(Part(vec![1])).await;
    assert_ne!(scene.agent.state().await, Answer(0));

    // The back-end does not agree, or the stream is none.
    let (_, write) = rustix::pipe::pipe().unwrap();
    front_end.send(set_stream(StateDirection::Save, write), false).await;
    scene.agent.request().await;
    scene.agent.answer(A::refusal(SET_DEVICE_STATE_FD)).await;
    assert!(matches!(front_end.reply(SET_DEVICE_STATE_FD).await, A::DeviceState(value, None) if value & 0xff != 0));
    front_end.send(set_stream(StateDirection::Load, memory_file(4096)), false).await;
    assert!(matches!(front_end.reply(SET_DEVICE_STATE_FD).await, A::DeviceState(value, None) if value & 0xff != 0));
    assert!(!scene.agent.has_frame(), "the agent was told of a stream that is none");
}

/// The back-end is lost in the middle, or before it was asked whether all went well: the transfer has failed, whatever the next
/// back-end would say.
#[tokio::test]
async fn a_transfer_does_not_outlive_the_back_end() {
    let (mut scene, mut front_end) = connected().await;
    for is_complete in [false, true] {
        let (read, write) = rustix::pipe::pipe().unwrap();
        begins(&mut scene, &mut front_end, StateDirection::Save, write).await;
        let last = if is_complete { vec![] } else { vec![1] };
        for part in [vec![0; 100], last] {
            scene.agent.sends_state(Part(part)).await;
            assert_eq!(scene.agent.state().await, Answer(0));
        }
        scene.back_end_restarts().await;
        scene.replay(&front_end).await;
        within("the end of the state", read_to_end(read)).await.unwrap();
        front_end.send(R::CheckDeviceState, false).await;
        assert_ne!(check(&mut front_end).await, 0);
        assert!(!scene.agent.has_frame(), "the back-end was asked");
    }
    let count = scene.bridge.descriptor_count();
    for _ in 0..10 {
        let (read, write) = rustix::pipe::pipe().unwrap();
        begins(&mut scene, &mut front_end, StateDirection::Load, read).await;
        drop(write);
        scene.agent.takes_empty_state().await;
        exchange(&mut front_end, &mut scene.agent, R::CheckDeviceState, A::Number(0)).await;
    }
    assert_eq!(scene.bridge.descriptor_count(), count, "descriptors of the bridge");
}
