//! What a back-end is told that takes over, so that the front-end notices nothing.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use vvu_protocol::address::FileOffset;
use vvu_protocol::carriage;
use vvu_protocol::control::{Handle, Status};
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::message::{
    ConfigSpace, FrontEndReply, FrontEndRequest, Inflight, LogArea, VringAddresses, VringState,
};
use vvu_protocol::window::{INFLIGHT_OFFSET, LOG_OFFSET};
use vvu_socket::event;

use crate::scripted::channels::Replayed;
use crate::scripted::front_end::{DriverMemory, FrontEnd, vring_file};
use crate::scripted::{QUEUES, Scene, exchange, memory_file, told};

use FrontEndReply as A;
use FrontEndRequest as R;

const SET_OWNER: u32 = 3;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const FEATURES: Features = Features::VERSION_1.union(Features::EVENT_IDX);

const fn state(index: u32, num: u32) -> VringState {
    VringState { index, num }
}

const fn addresses(index: u32) -> VringAddresses {
    let at = 0x7fa4_0000_0000 + 0x1_0000 * index as u64;
    VringAddresses { index, flags: 0, descriptors: at, used: at + 0x2000, available: at + 0x1000, log: at }
}

fn offered() -> ProtocolFeatures {
    carriage::offer_protocol(ProtocolFeatures::all())
}

/// Eventfds of one vring.
#[derive(Debug)]
struct Events {
    kick: OwnedFd,
    call: OwnedFd,
    error: OwnedFd,
}

impl Events {
    fn new() -> Self {
        let [kick, call, error] = [(); 3].map(|()| event::create().unwrap());
        Self { kick, call, error }
    }

    /// The vring is set up, started and enabled.
    async fn start(&self, scene: &mut Scene, front_end: &mut FrontEnd, index: u8) {
        let number = u32::from(index);
        for request in [
            R::SetVringNum(state(number, 256)),
            R::SetVringBase(state(number, 7 + number)),
            R::SetVringAddr(addresses(number)),
            R::SetVringCall(vring_file(index, Some(&self.call))),
            R::SetVringErr(vring_file(index, Some(&self.error))),
            R::SetVringKick(vring_file(index, Some(&self.kick))),
            R::SetVringEnable(state(number, 1)),
        ] {
            told(front_end, &mut scene.agent, request).await;
        }
    }

    fn forget(&self) {
        for descriptor in [&self.kick, &self.call, &self.error] {
            event::take(descriptor).unwrap();
        }
    }
}

/// Without the two questions that come first.
fn told_of(replayed: &[Replayed]) -> Vec<R<Handle>> {
    let (questions, told) = replayed.split_at(2);
    let questions: Vec<_> = questions.iter().map(|(request, _)| request.clone()).collect();
    assert_eq!(questions, [R::GetFeatures, R::GetProtocolFeatures]);
    told.iter().map(|(request, _)| request.clone()).collect()
}

/// Everything that a front-end can set reaches the next back-end, once, in an order in which it can be used; and nothing else.
#[tokio::test]
async fn everything_is_told_in_order() {
    let (mut scene, mut front_end) = Scene::connected_with(offered(), offered()).await;
    let memory = DriverMemory::new(8 << 20);
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let log = LogArea { size: 0x1000, mmap_offset: FileOffset(0) };
    let inflight = Inflight { mmap_size: 0x4000, mmap_offset: FileOffset(0), queue_count: QUEUES, queue_size: 256 };
    let config = |offset, bytes: &[u8]| R::SetConfig(ConfigSpace { offset, flags: 0, bytes: bytes.to_vec() });
    let agent = &mut scene.agent;
    for request in [
        // Each of these replaces the one before.
        R::SetStatus(1),
        R::NetSetMtu(9000),
        R::SetFeatures(Features::VERSION_1),
        R::SetStatus(15),
        config(8, &[1, 2, 3, 4]),
        config(10, &[9, 9]),
        config(32, &[1]),
        R::NetSetMtu(1500),
        R::SetInflightFd(inflight, memory_file(0x4000)),
        R::SetLogFd(event::create().unwrap()),
        R::SetBackendReqFd(theirs.into()),
        memory.pc_table(),
        R::SetOwner,
        R::SetFeatures(FEATURES),
        // Nothing of these lasts.
        R::SendRarp(1),
    ] {
        told(&mut front_end, agent, request).await;
    }
    exchange(&mut front_end, agent, R::SetLogBase(log, memory_file(0x1000)), A::LogBase).await;
    exchange(&mut front_end, agent, R::GetStatus, A::Number(15)).await;
    let events = [Events::new(), Events::new()];
    events[0].start(&mut scene, &mut front_end, 0).await;
    events[1].start(&mut scene, &mut front_end, 1).await;
    exchange(&mut front_end, &mut scene.agent, R::GetVringBase(state(1, 0)), A::VringState(state(1, 99))).await;

    scene.appliance_is_replaced().await;
    let replayed = scene.replay(&front_end).await;
    let peer = |id| Handle::Peer(PeerId(id));
    let file = |index, handle| vvu_protocol::message::VringFile { index, descriptor: Some(handle) };
    let R::SetMemTable(table) = placed(memory.pc_table()) else { panic!("no table") };
    let expected = vec![
        R::SetProtocolFeatures(offered().difference(carriage::OWN_PROTOCOL_FEATURES)),
        R::SetOwner,
        R::SetFeatures(FEATURES),
        R::SetMemTable(table),
        R::SetBackendReqFd(Handle::BackChannel),
        R::SetLogBase(LogArea { mmap_offset: FileOffset(LOG_OFFSET.0), ..log }, Handle::Window),
        R::SetLogFd(peer(1 + 2 * QUEUES)),
        R::SetInflightFd(Inflight { mmap_offset: FileOffset(INFLIGHT_OFFSET.0), ..inflight }, Handle::Window),
        R::SetConfig(ConfigSpace { offset: 8, flags: 0, bytes: vec![1, 2, 9, 9] }),
        R::SetConfig(ConfigSpace { offset: 32, flags: 0, bytes: vec![1] }),
        R::NetSetMtu(1500),
        R::SetVringNum(state(0, 256)),
        R::SetVringAddr(addresses(0)),
        R::SetVringBase(state(0, 7)),
        R::SetVringCall(file(0, peer(1))),
        R::SetVringErr(file(0, peer(2))),
        R::SetVringKick(file(0, Handle::Vector(Vector(0)))),
        R::SetVringEnable(state(0, 1)),
        // Stopped in order: no addresses, and not started.
        R::SetVringNum(state(1, 256)),
        R::SetVringBase(state(1, 99)),
        R::SetVringCall(file(1, peer(3))),
        R::SetVringErr(file(1, peer(4))),
        R::SetVringEnable(state(1, 1)),
        R::SetStatus(15),
    ];
    assert_eq!(told_of(&replayed), expected);
    let resumed: Vec<_> = replayed.iter().filter(|(_, is_resumed)| *is_resumed).collect();
    assert!(matches!(resumed.as_slice(), [(R::SetVringBase(VringState { index: 0, .. }), true)]), "{resumed:?}");
    assert_eq!(scene.vmm.driver_mappings().len(), 3, "memory, log and inflight buffer");
}

/// The table as the agent sees it in a window with nothing else.
fn placed(table: R<OwnedFd>) -> R<Handle> {
    let R::SetMemTable(regions) = table else { panic!("no table") };
    let placed = regions.into_iter().map(|(region, _)| {
        let offset = vvu_protocol::window::MEMORY_OFFSET.0 + region.mmap_offset.0;
        (vvu_protocol::memory::MemoryRegion { mmap_offset: FileOffset(offset), ..region }, Handle::Window)
    });
    R::SetMemTable(placed.collect())
}

/// A back-end that comes back in the same appliance finds the window as it was: nothing is mapped again, and nothing unmapped.
#[tokio::test]
async fn the_window_of_the_same_appliance_stays() {
    let (mut scene, mut front_end) = Scene::connected_with(offered(), offered()).await;
    let memory = DriverMemory::new(8 << 20);
    told(&mut front_end, &mut scene.agent, memory.pc_table()).await;
    let log = R::SetLogBase(LogArea { size: 0x1100, mmap_offset: FileOffset(0) }, memory_file(0x1100));
    exchange(&mut front_end, &mut scene.agent, log, A::LogBase).await;
    let before = scene.vmm.driver_mappings();
    scene.journal.take();
    scene.back_end_restarts().await;
    scene.replay(&front_end).await;
    let notes = scene.journal.take();
    assert!(!notes.iter().any(|note| note.starts_with("SHMEM")), "{notes:?}");
    assert_eq!(scene.vmm.driver_mappings(), before);
}

/// A front-end that has set nothing yet has nothing said for it.
#[tokio::test]
async fn a_fresh_front_end_is_only_announced() {
    let mut scene = Scene::ready().await;
    let mut front_end = scene.new_front_end();
    scene.agent.sees_front_end().await;
    for _ in 0..2 {
        scene.back_end_restarts().await;
        scene.vmm.fence().await;
        assert!(!scene.agent.has_frame(), "something was replayed");
    }
    exchange(&mut front_end, &mut scene.agent, R::GetFeatures, A::Number(5)).await;
}

/// A request under way when the back-end is lost is asked again after the replay, and answered once. What may have started the vring
/// leaves its position unknown; what may have stopped it does, too.
#[tokio::test]
async fn a_request_under_way_is_asked_again() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let events = Events::new();
    told(&mut front_end, &mut scene.agent, R::SetVringBase(state(0, 5))).await;
    let is_resumed = |replayed: &[Replayed]| replayed.iter().any(|(_, is_resumed)| *is_resumed);
    let offered = ProtocolFeatures::all().difference(ProtocolFeatures::INFLIGHT_SHMFD);

    front_end.send(R::SetOwner, true).await;
    scene.agent.request().await;
    scene.back_end_restarts().await;
    let replayed = scene.agent.answers_replay_with(offered, SET_OWNER).await;
    assert!(!is_resumed(&replayed) && !replayed.iter().any(|(request, _)| *request == R::SetOwner), "{replayed:?}");
    assert_eq!(front_end.acknowledgement(SET_OWNER).await, 0);

    front_end.send(R::SetVringKick(vring_file(0, Some(&events.kick))), true).await;
    scene.agent.request().await;
    scene.back_end_restarts().await;
    let replayed = scene.agent.answers_replay_with(offered, SET_VRING_KICK).await;
    assert!(is_resumed(&replayed), "the back-end may have moved: {replayed:?}");
    assert_eq!(front_end.acknowledgement(SET_VRING_KICK).await, 0);

    front_end.send(R::GetVringBase(state(0, 0)), false).await;
    scene.agent.request().await;
    scene.appliance_is_replaced().await;
    let replayed = scene.agent.answers_replay_with(offered, GET_VRING_BASE).await;
    assert!(is_resumed(&replayed), "{replayed:?}");
    assert!(matches!(front_end.reply(GET_VRING_BASE).await, A::VringState(VringState { index: 0, num: 0 })));

    scene.vmm.fence().await;
    assert!(!front_end.has_message() && !scene.agent.has_frame(), "something was answered or asked twice");
}

/// After a replay each kick and each call is signalled once, and kicks made while there was no back-end arrive.
#[tokio::test]
async fn both_sides_are_woken_once() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let events = Events::new();
    events.start(&mut scene, &mut front_end, 0).await;
    scene.vmm.fence().await;
    for _ in 0..2 {
        events.forget();
        scene.back_end_restarts().await;
        scene.replay(&front_end).await;
        scene.vmm.doorbell.rings(Vector(0)).await;
        scene.vmm.fence().await;
        assert!(!scene.vmm.doorbell.has_rung(Vector(0)), "kicked twice");
        assert!(!scene.vmm.doorbell.has_rung(Vector(1)), "a vring that was never started is kicked");
        assert_eq!(event::take(&events.call).unwrap(), Some(1));
        assert_eq!(event::take(&events.error).unwrap(), None);
    }
}

/// A back-end that offers less than was negotiated cannot take over: the session ends, and the next one works with what there is.
#[tokio::test]
async fn a_back_end_that_offers_less_ends_the_session() {
    for is_protocol in [false, true] {
        let (mut scene, mut front_end) = Scene::connected().await;
        told(&mut front_end, &mut scene.agent, R::SetFeatures(FEATURES)).await;
        scene.agent.set_status(Status::empty()).await;
        scene.agent.sees_end().await;
        scene.agent.set_status(Status::BACK_END_UP).await;
        scene.agent.sees_front_end().await;
        assert_eq!(scene.agent.request().await, R::GetFeatures);
        let offered = if is_protocol { u64::MAX } else { Features::VERSION_1.bits() };
        scene.agent.answer(A::Number(offered)).await;
        if is_protocol {
            assert_eq!(scene.agent.request().await, R::GetProtocolFeatures);
            scene.agent.answer(A::Number(0)).await;
        }
        front_end.sees_end().await;
        scene.bridge.says(&["does not offer"]).await;
        scene.clear_away().await;
        scene.proves_alive().await;
    }
}

/// A back-end that refuses what the one before had taken ends the session.
#[tokio::test]
async fn a_back_end_that_refuses_the_replay_ends_the_session() {
    let (mut scene, mut front_end) = Scene::connected().await;
    told(&mut front_end, &mut scene.agent, R::NetSetMtu(1500)).await;
    scene.back_end_restarts().await;
    for answer in [A::Number(u64::MAX), A::Number(u64::MAX), A::Acknowledgement(0), A::Acknowledgement(1)] {
        scene.agent.request().await;
        scene.agent.answer(answer).await;
    }
    front_end.sees_end().await;
    scene.bridge.says(&["NET_SET_MTU was answered with 1"]).await;
    scene.clear_away().await;
    scene.proves_alive().await;
}

/// The back-end is lost again in the middle of a replay, at every step of it: the next one is told everything.
#[tokio::test]
async fn a_replay_may_be_cut_short_anywhere() {
    let (mut scene, mut front_end) = Scene::connected_with(offered(), offered()).await;
    let memory = DriverMemory::new(8 << 20);
    told(&mut front_end, &mut scene.agent, memory.pc_table()).await;
    let inflight = Inflight { mmap_size: 0x4000, mmap_offset: FileOffset(0), queue_count: QUEUES, queue_size: 256 };
    told(&mut front_end, &mut scene.agent, R::SetInflightFd(inflight, memory_file(0x4000))).await;
    Events::new().start(&mut scene, &mut front_end, 0).await;
    scene.back_end_restarts().await;
    let whole = scene.replay(&front_end).await;
    for len in 0..whole.len() {
        if len % 2 == 0 {
            scene.back_end_restarts().await
        } else {
            scene.appliance_is_replaced().await
        }
        for (expected, _) in whole.iter().take(len) {
            let seen = scene.agent.request().await;
            assert_eq!(seen, *expected, "step {len}");
            let number = matches!(seen, R::GetFeatures | R::GetProtocolFeatures);
            scene.agent.answer(if number { A::Number(u64::MAX) } else { A::Acknowledgement(0) }).await;
        }
        assert_eq!(scene.agent.request().await, whole[len].0);
    }
    scene.back_end_restarts().await;
    assert_eq!(scene.replay(&front_end).await, whole);
    assert_eq!(scene.vmm.driver_mappings().len(), 2);
    assert!(!front_end.has_message(), "the front-end has noticed");
}

/// The back-end is lost again and again when a replay has just mapped the log: the window does not fill up with the pages that
/// stand for its end.
#[tokio::test]
async fn logs_of_replays_that_were_cut_short_do_not_pile_up() {
    let (mut scene, mut front_end) = Scene::connected_with(offered(), offered()).await;
    told(&mut front_end, &mut scene.agent, DriverMemory::new(8 << 20).pc_table()).await;
    let log = R::SetLogBase(LogArea { size: 0x80, mmap_offset: FileOffset(0) }, memory_file(0x80));
    exchange(&mut front_end, &mut scene.agent, log, A::LogBase).await;
    let before = scene.vmm.driver_mappings().len();
    scene.back_end_restarts().await;
    for _ in 0..4 {
        loop {
            let answer = match scene.agent.request().await {
                R::SetLogBase(..) => break,
                R::GetFeatures | R::GetProtocolFeatures => A::Number(u64::MAX),
                _ => A::Acknowledgement(0),
            };
            scene.agent.answer(answer).await;
        }
        scene.back_end_restarts().await;
    }
    scene.replay(&front_end).await;
    assert_eq!(scene.vmm.driver_mappings().len(), before);
    assert!(!front_end.has_message(), "the front-end has noticed");
}
