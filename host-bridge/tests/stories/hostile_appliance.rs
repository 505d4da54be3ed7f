//! What a hostile or broken appliance may do. It is dropped, with one line that says why; the front-end stays connected, and
//! gets the next appliance.

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

/// A session in which the agent does something, and why the bridge drops the appliance then.
async fn agent_is_dropped(reason: &str, act: impl FnOnce(&mut Agent)) {
    let (mut scene, front_end) = Scene::connected().await;
    act(&mut scene.agent);
    scene.is_dropped(reason, &front_end).await;
}

#[tokio::test]
async fn garbage_is_no_frame() {
    agent_is_dropped(CONTROL, |agent| agent.post(&[0xa5; 100])).await;
    agent_is_dropped(CONTROL, |agent| agent.post(&[])).await;
    agent_is_dropped(CONTROL, |agent| agent.post(&[0; 19])).await;
}

/// A frame longer than 4096 bytes, in a chain of two buffers.
#[tokio::test]
async fn a_frame_has_a_limit() {
    agent_is_dropped("frame", |agent| {
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
    agent_is_dropped("queue 1", |agent| jump(&mut agent.transmit)).await;

    // The receive queue is looked at when there is a frame for it.
    let (mut scene, front_end) = Scene::connected().await;
    jump(&mut scene.agent.receive);
    front_end.send(R::SetOwner, true).await;
    scene.is_dropped("queue 0", &front_end).await;
}

/// A descriptor that points outside the appliance's memory, or across its end. (hardening: an address that is translated without a
/// check of the whole range, a range over two regions, a descriptor into memory that is no RAM.)
#[tokio::test]
async fn descriptors_stay_in_memory() {
    for (address, len) in [(0x8000_0000, 64), (0x1f_fff0, 64), (WINDOW_BAR, 64), (u64::MAX - 8, 64), (0, u32::MAX)] {
        agent_is_dropped("queue 1", |agent| {
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
    scene.is_dropped("queue 1", &front_end).await;

    let (mut scene, mut front_end) = Scene::connected().await;
    told(&mut front_end, &mut scene.agent, memory.whole()).await;
    let ring = WINDOW_USER + MEMORY_OFFSET.0;
    let addresses =
        VringAddresses { index: 0, flags: 0, descriptors: ring, used: ring + 0x2000, available: ring + 0x1000, log: 0 };
    scene.vmm.control.post(&R::SetVringAddr(addresses).encode(false)).await;
    scene.vmm.fence().await;
    front_end.send(R::SetOwner, true).await;
    scene.is_dropped("queue 0", &front_end).await;
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
    agent_is_dropped(CONTROL, |agent| agent.transmit.offer(SIZE)).await;
    agent_is_dropped(CONTROL, |agent| agent.transmit.offer(u16::MAX)).await;
    agent_is_dropped(CONTROL, |agent| chain(agent, 4, Some(0))).await;
    agent_is_dropped(CONTROL, |agent| chain(agent, 4, Some(SIZE))).await;
    agent_is_dropped(CONTROL, |agent| chain(agent, 0, None)).await;
}

/// A buffer for the bridge to write into that is too short, or not writable: nothing is written, and the appliance is dropped.
#[tokio::test]
async fn receive_buffers_hold_a_frame() {
    for (len, writable) in [(16, true), (0, true), (BUFFER_LEN, false)] {
        let mut scene = Scene::ready().await;
        let front_end = scene.new_front_end();
        scene.agent.sees_front_end().await;
        let address = scene.agent.receive.buffer(0);
        for index in 0..SIZE {
            scene.agent.receive.describe(index, Descriptor { address, len, writable, next: None });
        }
        front_end.send(R::GetFeatures, false).await;
        scene.is_dropped("queue 0", &front_end).await;
    }
}

fn answer(session: u32, code: u32) -> Vec<u8> {
    let message = FrontEndReply::Acknowledgement(0).encode(code);
    Frame::new(Channel::FrontEnd, session, message).encode().unwrap()
}

#[tokio::test]
async fn an_answer_that_nobody_waits_for_ends_the_appliance() {
    agent_is_dropped("nobody waits for", |agent| agent.post(&answer(agent.session, 3))).await;
    agent_is_dropped("nobody waits for", |agent| {
        let message = RawMessage::reply(2, vec![0; 8], vec![]);
        agent.post(&Frame::new(Channel::BackEnd, agent.session, message).encode().unwrap());
    })
    .await;
    // A request on the channel of the front-end.
    agent_is_dropped(CONTROL, |agent| {
        let message = R::SetOwner.encode(true);
        agent.post(&Frame::new(Channel::FrontEnd, agent.session, message).encode().unwrap());
    })
    .await;
}

/// Answers that do not fit the request under way: to another request, of another form, with a handle.
#[tokio::test]
async fn a_wrong_answer_ends_the_appliance() {
    let number = FrontEndReply::Number(0).encode(1);
    let short = RawMessage::reply(3, vec![0; 4], vec![]);
    let handle = RawMessage::reply(3, vec![0; 8], vec![vvu_protocol::control::Handle::Window]);
    let question = R::SetOwner.encode(true);
    for message in [number, short, handle, question] {
        let (mut scene, front_end) = Scene::connected().await;
        front_end.send(R::SetOwner, true).await;
        scene.agent.request().await;
        let session = scene.agent.session;
        scene.agent.post(&Frame::new(Channel::FrontEnd, session, message).encode().unwrap());
        scene.is_dropped(CONTROL, &front_end).await;
    }
}

/// An agent that asks and takes no answers: frames for it have a limit.
#[tokio::test]
async fn frames_for_an_agent_that_takes_none_have_a_limit() {
    let (mut scene, front_end) = Scene::connected().await;
    let message = BackEndRequest::ConfigChange.encode(true);
    let bytes = Frame::new(Channel::BackEnd, scene.agent.session, message).encode().unwrap();
    for _ in 0..32 {
        scene.agent.post(&bytes);
    }
    scene.is_dropped("takes no frames", &front_end).await;
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
        let mut scene = Scene::ready().await;
        scene.vmm.control.post(&message).await;
        eprintln!("row: {name}");
        scene.bridge.drops(1, "of the appliance").await;
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
    let mut scene = Scene::ready().await;
    scene.vmm.answers_unasked().await;
    scene.bridge.drops(1, "nobody waits for").await;
}

/// Memory that can shrink would let its owner kill the bridge; the refusal says what to change.
#[tokio::test]
async fn memory_that_can_shrink_is_refused() {
    let mut bridge = Bridge::start().await;
    let vmm = Vmm::connect_with_unsealed_ram(bridge.directory(), Journal::default()).await;
    vmm.hands_out_memory().await;
    bridge.drops(1, "memory-backend-memfd,seal=on").await;
}

/// The VMM closes one of its three sockets, with a request under way or without.
#[tokio::test]
async fn an_appliance_that_goes_away_is_dropped() {
    for (device, is_busy) in ["control", "window", "doorbell"].into_iter().flat_map(|it| [(it, false), (it, true)]) {
        let (mut scene, front_end) = Scene::connected().await;
        if is_busy {
            front_end.send(R::SetOwner, true).await;
            scene.agent.request().await;
        }
        match device {
            "control" => scene.vmm.control.close(),
            "window" => scene.vmm.window.close(),
            _ => scene.vmm.doorbell.close(),
        }
        scene.is_dropped(&format!("closed the {device} device's socket"), &front_end).await;
    }
}

/// The same before there was any front-end, and before all three were there.
#[tokio::test]
async fn an_appliance_that_does_not_boot_is_dropped() {
    let mut scene = Scene::ready().await;
    scene.vmm.control.close();
    scene.bridge.drops(1, "closed the control device's socket").await;
    scene.next_appliance().await;
    scene.bridge.notified("STATUS=ready for a front-end").await;
    scene.proves_alive().await;

    let bridge = Bridge::start().await;
    drop(std::os::unix::net::UnixStream::connect(bridge.directory().join("window.sock")).unwrap());
    bridge.says(&["gone before it was there", "closed the window device's socket"]).await;
    // It was never counted.
    Scene::around(bridge).await.proves_alive().await;
}

/// The VMM refuses the header of the window.
#[tokio::test]
async fn a_window_without_a_header_is_of_no_use() {
    let mut bridge = Bridge::start().await;
    let vmm = Vmm::connect(bridge.directory(), Journal::default()).await;
    vmm.decides(Verdict::Refuse);
    vmm.start_window().await;
    bridge.drops(1, "refused SHMEM_MAP").await;
}
