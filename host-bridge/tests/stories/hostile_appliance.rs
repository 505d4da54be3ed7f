//! What a hostile or broken appliance may do. The bridge ends with one line that says why: the appliance has to be started
//! anew, and the front-end is disconnected.

use std::os::fd::OwnedFd;

use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress};
use vvu_protocol::control::{Channel, Frame};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{
    BackEndRequest, FrontEndReply, FrontEndRequest, RawMessage, VringAddresses, VringFile, VringState,
};
use vvu_protocol::window::MEMORY_OFFSET;

use crate::scripted::agent::Agent;
use crate::scripted::front_end::DriverMemory;
use crate::scripted::process::Bridge;
use crate::scripted::ring::{BUFFER_LEN, Descriptor, DriverRing, SIZE};
use crate::scripted::vmm::{Verdict, Vmm, WINDOW_BAR, WINDOW_USER};
use crate::scripted::{Journal, Scene, memory_file, told};

use FrontEndRequest as R;

const CONTROL: &str = "control";

/// A session in which the agent does something, and what the last line of the bridge says then.
async fn agent_ends_the_bridge(expected: &str, act: impl FnOnce(&mut Agent)) {
    let (mut scene, mut front_end) = Scene::connected().await;
    act(&mut scene.agent);
    front_end.sees_end().await;
    scene.bridge.ended().await.failed_with(expected);
}

#[tokio::test]
async fn garbage_is_no_frame() {
    agent_ends_the_bridge(CONTROL, |agent| agent.post(&[0xa5; 100])).await;
    agent_ends_the_bridge(CONTROL, |agent| agent.post(&[])).await;
    agent_ends_the_bridge(CONTROL, |agent| agent.post(&[0; 19])).await;
}

/// A frame longer than 4096 bytes, in a chain of two buffers.
#[tokio::test]
async fn a_frame_has_a_limit() {
    agent_ends_the_bridge("frame", |agent| {
        let [first, second] = [0, 1].map(|index| agent.transmit.buffer(index));
        let descriptor = |address, next| Descriptor { address, len: BUFFER_LEN, writable: false, next };
        agent.transmit.describe(0, descriptor(first, Some(1)));
        agent.transmit.describe(1, descriptor(second, None));
        agent.transmit.offer(0);
    })
    .await;
}

/// An available index further on than the ring is long.
#[tokio::test]
async fn the_ring_index_may_not_jump() {
    let jump = |ring: &mut DriverRing| ring.set_available_index(ring.available_index().wrapping_add(SIZE + 1));
    agent_ends_the_bridge("queue 1", |agent| jump(&mut agent.transmit)).await;

    // The receive queue is looked at when there is a frame for it.
    let (mut scene, mut front_end) = Scene::connected().await;
    jump(&mut scene.agent.receive);
    front_end.send(R::SetOwner, true).await;
    front_end.sees_end().await;
    scene.bridge.ended().await.failed_with("queue 0");
}

/// A descriptor that points outside the appliance's memory, or across its end. (hardening: an address that is translated without a
/// check of the whole range, a range over two regions, a descriptor into memory that is no RAM.)
#[tokio::test]
async fn descriptors_stay_in_memory() {
    for (address, len) in [(0x8000_0000, 64), (0x1f_fff0, 64), (WINDOW_BAR, 64), (u64::MAX - 8, 64), (0, u32::MAX)] {
        agent_ends_the_bridge("queue 1", |agent| {
            agent.transmit.describe(3, Descriptor { address, len, writable: false, next: None });
            agent.transmit.offer(3);
        })
        .await;
    }
}

/// A descriptor, or a whole ring, in driver memory that the control device's own memory table lists. The bridge has no way to
/// look there.
#[tokio::test]
async fn rings_stay_out_of_driver_memory() {
    let memory = DriverMemory::new(8 << 20);
    let address = WINDOW_BAR + MEMORY_OFFSET.0;
    let (mut scene, mut front_end) = Scene::connected().await;
    told(&mut front_end, &mut scene.agent, memory.whole()).await;
    scene.agent.transmit.describe(0, Descriptor { address, len: 64, writable: false, next: None });
    scene.agent.transmit.offer(0);
    front_end.sees_end().await;
    scene.bridge.ended().await.failed_with("queue 1");

    let (mut scene, mut front_end) = Scene::connected().await;
    told(&mut front_end, &mut scene.agent, memory.whole()).await;
    let ring = WINDOW_USER + MEMORY_OFFSET.0;
    let addresses =
        VringAddresses { index: 0, flags: 0, descriptors: ring, used: ring + 0x2000, available: ring + 0x1000, log: 0 };
    scene.vmm.control.post(&R::SetVringAddr(addresses).encode(false)).await;
    scene.vmm.fence().await;
    front_end.send(R::SetOwner, true).await;
    front_end.sees_end().await;
    scene.bridge.ended().await.failed_with("queue 0");
}

/// Heads and links that name no descriptor, chains that never end, buffers of no bytes. (hardening: `next` out of range, circular
/// chains, header-only chains.)
#[tokio::test]
async fn chains_end() {
    let chain = |agent: &mut Agent, len, next| {
        let address = agent.transmit.buffer(0);
        agent.transmit.describe(0, Descriptor { address, len, writable: false, next });
        agent.transmit.offer(0);
    };
    agent_ends_the_bridge(CONTROL, |agent| agent.transmit.offer(SIZE)).await;
    agent_ends_the_bridge(CONTROL, |agent| agent.transmit.offer(u16::MAX)).await;
    agent_ends_the_bridge(CONTROL, |agent| chain(agent, 4, Some(0))).await;
    agent_ends_the_bridge(CONTROL, |agent| chain(agent, 4, Some(SIZE))).await;
    agent_ends_the_bridge(CONTROL, |agent| chain(agent, 0, None)).await;
}

/// A buffer for the bridge to write into that is too short, or not writable: nothing is written, and the bridge ends.
#[tokio::test]
async fn receive_buffers_hold_a_frame() {
    for (len, writable) in [(16, true), (0, true), (BUFFER_LEN, false)] {
        let mut scene = Scene::ready().await;
        let mut front_end = scene.new_front_end();
        scene.agent.sees_front_end().await;
        let address = scene.agent.receive.buffer(0);
        for index in 0..SIZE {
            scene.agent.receive.describe(index, Descriptor { address, len, writable, next: None });
        }
        front_end.send(R::GetFeatures, false).await;
        front_end.sees_end().await;
        scene.bridge.ended().await.failed_with("queue 0");
    }
}

fn answer(session: u32, code: u32) -> Vec<u8> {
    let message = FrontEndReply::Acknowledgement(0).encode(code);
    Frame::new(Channel::FrontEnd, session, message).encode().unwrap()
}

#[tokio::test]
async fn an_answer_that_nobody_waits_for_ends_the_bridge() {
    agent_ends_the_bridge("nobody waits for", |agent| agent.post(&answer(agent.session, 3))).await;
    agent_ends_the_bridge("nobody waits for", |agent| {
        let message = RawMessage::reply(2, vec![0; 8], vec![]);
        agent.post(&Frame::new(Channel::BackEnd, agent.session, message).encode().unwrap());
    })
    .await;
    // A request on the channel of the front-end.
    agent_ends_the_bridge(CONTROL, |agent| {
        let message = R::SetOwner.encode(true);
        agent.post(&Frame::new(Channel::FrontEnd, agent.session, message).encode().unwrap());
    })
    .await;
}

/// Answers that do not fit the request under way: to another request, of another form, with a handle.
#[tokio::test]
async fn a_wrong_answer_ends_the_bridge() {
    let number = FrontEndReply::Number(0).encode(1);
    let short = RawMessage::reply(3, vec![0; 4], vec![]);
    let handle = RawMessage::reply(3, vec![0; 8], vec![vvu_protocol::control::Handle::Window]);
    let question = R::SetOwner.encode(true);
    for message in [number, short, handle, question] {
        let (mut scene, mut front_end) = Scene::connected().await;
        front_end.send(R::SetOwner, true).await;
        scene.agent.request().await;
        let session = scene.agent.session;
        scene.agent.post(&Frame::new(Channel::FrontEnd, session, message).encode().unwrap());
        front_end.sees_end().await;
        scene.bridge.ended().await.failed_with(CONTROL);
    }
}

/// An agent that asks and takes no answers: frames for it have a limit.
#[tokio::test]
async fn frames_for_an_agent_that_takes_none_have_a_limit() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let message = BackEndRequest::ConfigChange.encode(true);
    let bytes = Frame::new(Channel::BackEnd, scene.agent.session, message).encode().unwrap();
    for _ in 0..32 {
        scene.agent.post(&bytes);
    }
    front_end.sees_end().await;
    scene.bridge.ended().await.failed_with("takes no frames");
}

/// Messages of the appliance's VMM that QEMU does not send.
#[tokio::test]
async fn the_vmm_keeps_the_protocol() {
    let state = VringState { index: 2, num: 1 };
    let addresses = VringAddresses { index: 0, flags: 0, descriptors: 0x1000, used: 0x2000, available: 0x3000, log: 0 };
    let (_read, pipe) = rustix::pipe::pipe().unwrap();
    let kick = |index| VringFile { index, descriptor: Some(pipe.try_clone().unwrap()) };
    let rows: Vec<(&str, RawMessage<OwnedFd>)> = vec![
        ("a request that was not offered", R::GetMaxMemSlots.encode(false)),
        ("a request that nobody knows", RawMessage::request(99, false, vec![], vec![])),
        ("a reply", FrontEndReply::Number(0).encode(1)),
        ("a vring that does not exist", R::SetVringEnable(state).encode(false)),
        ("a vring with 2^32-1", R::SetVringNum(VringState { index: u32::MAX, num: 4 }).encode(false)),
        ("a queue of 3", R::SetVringNum(VringState { index: 0, num: 3 }).encode(false)),
        ("a base of 17 bits", R::SetVringBase(VringState { index: 0, num: 1 << 16 }).encode(false)),
        ("rings outside memory", R::SetVringAddr(addresses).encode(false)),
        ("a pipe as a kick", R::SetVringKick(kick(0)).encode(false)),
        ("a pipe as a call", R::SetVringCall(kick(1)).encode(false)),
        ("a table with an overlap", overlapping_table()),
    ];
    for (name, message) in rows {
        let scene = Scene::ready().await;
        scene.vmm.control.post(&message).await;
        eprintln!("row: {name}");
        scene.bridge.ended().await.failed_with("of the appliance");
    }
}

fn overlapping_table() -> RawMessage<OwnedFd> {
    let region = MemoryRegion {
        guest_address: GuestAddress(0),
        size: 1 << 20,
        user_address: UserAddress(0x7000_0000_0000),
        mmap_offset: FileOffset(0),
    };
    let file = || memory_file(1 << 20);
    R::SetMemTable(vec![(region, file()), (region, file())]).encode(false)
}

/// An answer on the back channel of the window that belongs to no request.
#[tokio::test]
async fn the_vmm_answers_what_it_was_asked() {
    let scene = Scene::ready().await;
    scene.vmm.answers_unasked().await;
    scene.bridge.ended().await.failed_with("nobody waits for");
}

/// Memory that can shrink would let its owner kill the bridge; the refusal says what to change.
#[tokio::test]
async fn memory_that_can_shrink_is_refused() {
    let bridge = Bridge::start().await;
    let vmm = Vmm::connect_with_unsealed_ram(bridge.directory(), Journal::default()).await;
    vmm.hands_out_memory().await;
    bridge.ended().await.failed_with("memory-backend-memfd,seal=on");
}

/// The VMM closes one of its three sockets.
#[tokio::test]
async fn the_bridge_ends_with_its_appliance() {
    for device in ["control", "window", "doorbell"] {
        let (scene, mut front_end) = Scene::connected().await;
        match device {
            "control" => scene.vmm.control.close(),
            "window" => scene.vmm.window.close(),
            _ => scene.vmm.doorbell.close(),
        }
        front_end.sees_end().await;
        scene.bridge.ended().await.failed_with(&format!("closed the {device} device's socket"));
    }
}

/// The same before there was any front-end, and before all three were there.
#[tokio::test]
async fn the_bridge_ends_with_an_appliance_that_does_not_boot() {
    let scene = Scene::ready().await;
    scene.vmm.control.close();
    scene.bridge.ended().await.failed_with("closed the control device's socket");

    let bridge = Bridge::start().await;
    drop(std::os::unix::net::UnixStream::connect(bridge.directory().join("window.sock")).unwrap());
    bridge.ended().await.failed_with("closed the window device's socket");
}

/// The VMM refuses the header of the window.
#[tokio::test]
async fn a_window_without_a_header_is_of_no_use() {
    let bridge = Bridge::start().await;
    let vmm = Vmm::connect(bridge.directory(), Journal::default()).await;
    vmm.decides(Verdict::Refuse);
    vmm.start_window().await;
    bridge.ended().await.failed_with("refused SHMEM_MAP");
}
