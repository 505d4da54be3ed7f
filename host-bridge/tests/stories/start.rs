//! How a front-end starts a device, and what each half sees of it.

use std::os::fd::OwnedFd;

use uuid::Uuid;
use vvu_protocol::address::FileOffset;
use vvu_protocol::control::{Handle, Status};
use vvu_protocol::dax;
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::message::{ConfigSpace, FrontEndReply, FrontEndRequest, VringAddresses, VringFile, VringState};
use vvu_protocol::window::{ALIGNMENT, HEADER_LEN, Layout, MEMORY_OFFSET};
use vvu_socket::event;

use crate::scripted::agent::Agent;
use crate::scripted::front_end::{DriverMemory, FrontEnd, USER_BASE, vring_file};
use crate::scripted::process::{Bridge, UUID};
use crate::scripted::vmm::Vmm;
use crate::scripted::{Journal, QUEUES, Scene, WINDOW_LEN, exchange, told};

use FrontEndRequest as R;

/// The three devices of one set carry the same uuid, and the window begins with the info block of a device-DAX node.
#[tokio::test]
async fn the_appliance_finds_one_device_set() {
    let scene = Scene::ready().await;
    let uuid = *UUID.parse::<Uuid>().unwrap().as_bytes();
    let window_len = Layout::new(WINDOW_LEN).unwrap().len();

    let config = scene.agent.config().await;
    assert_eq!((config.status, config.session), (Status::BACK_END_UP, 0));
    assert_eq!((config.uuid, config.max_queues, config.window_len), (uuid, u32::from(QUEUES), window_len));
    assert_eq!(scene.vmm.doorbell.uuid, uuid);

    let header = scene.vmm.header().expect("the header is mapped");
    assert_eq!(rustix::fs::fstat(&header).unwrap().st_size.unsigned_abs(), HEADER_LEN);
    let mut block = vec![0; dax::INFO_BLOCK_LEN];
    rustix::io::pread(&header, &mut block, dax::INFO_BLOCK_OFFSET).unwrap();
    assert_eq!(block, dax::info_block(uuid, window_len));
}

/// An agent that has several sets holds the windows back until all of them run.
#[tokio::test]
async fn the_header_waits_for_the_agent() {
    let bridge = Bridge::start().await;
    let vmm = Vmm::connect(bridge.directory(), Journal::default()).await;
    let agent = Agent::start_control(&vmm).await;
    agent.set_status(Status::HOLD_WINDOW).await;
    vmm.start_window().await;
    vmm.fence().await;
    assert!(vmm.header().is_none(), "the header is mapped too early");
    assert_eq!((agent.config().await.window_len, agent.unseen_interrupts()), (0, 0));
    agent.set_status(Status::empty()).await;
    let config = agent.sees(|config| config.window_len != 0, "the window's header").await;
    assert_eq!(config.status, Status::empty());
    assert!(vmm.header().is_some());
}

/// What QEMU 11.1 sends for vhost-user-blk with two queues of which the firmware starts one, from the connection to the
/// first request, message by message and with its flags.
#[tokio::test]
async fn qemu_starts_a_disk() {
    let mut scene = Scene::ready().await;
    let mut front_end = scene.new_front_end();
    let config = scene.agent.sees_front_end().await;
    assert_eq!((config.status, config.session), (Status::BACK_END_UP | Status::FRONT_END_UP, 1));
    let agent = &mut scene.agent;
    realize(&mut front_end, agent).await;

    let features = Features::VERSION_1 | Features::PROTOCOL_FEATURES;
    let (call, kick) = (event::create().unwrap(), event::create().unwrap());
    assert_eq!(unanswered(&front_end, agent, R::SetFeatures(features)).await, R::SetFeatures(features));
    for index in 0..2 {
        let seen = told(&mut front_end, agent, R::SetVringCall(vring_file(index, Some(&call)))).await;
        assert_eq!(seen, R::SetVringCall(handle(index, Handle::Peer(PeerId(1 + 2 * u16::from(index))))));
    }
    unanswered(&front_end, agent, R::SetFeatures(features)).await;

    let memory = DriverMemory::new(16 << 20);
    let R::SetMemTable(table) = told(&mut front_end, agent, memory.whole()).await else { panic!("no memory table") };
    let [(region, Handle::Window)] = table[..] else { panic!("{table:?}") };
    assert_eq!((region.guest_address.0, region.size, region.user_address.0), (0, 16 << 20, USER_BASE));
    assert_eq!(region.mmap_offset.0, MEMORY_OFFSET.0);
    assert!(region.mmap_offset.0.is_multiple_of(ALIGNMENT));
    let [map] = scene.vmm.driver_mappings()[..] else { panic!("expected one mapping") };
    assert_eq!((map.region_offset, map.file_offset, map.len), (MEMORY_OFFSET.0, FileOffset(0), 16 << 20));
    assert!(map.writable);

    let state = |num| VringState { index: 0, num };
    let addresses = VringAddresses {
        index: 0,
        flags: 0,
        descriptors: USER_BASE + 0x1000,
        used: USER_BASE + 0x3000,
        available: USER_BASE + 0x2000,
        log: 0,
    };
    assert_eq!(unanswered(&front_end, agent, R::SetVringNum(state(128))).await, R::SetVringNum(state(128)));
    assert_eq!(unanswered(&front_end, agent, R::SetVringBase(state(0))).await, R::SetVringBase(state(0)));
    assert_eq!(unanswered(&front_end, agent, R::SetVringAddr(addresses)).await, R::SetVringAddr(addresses));
    let seen = told(&mut front_end, agent, R::SetVringKick(vring_file(0, Some(&kick)))).await;
    assert_eq!(seen, R::SetVringKick(handle(0, Handle::Vector(Vector(0)))));
    for index in 0..2 {
        let enable = VringState { index, num: 1 };
        let seen = told(&mut front_end, agent, R::SetVringEnable(enable)).await;
        assert_eq!(seen, R::SetVringEnable(enable));
    }
    event::signal(&kick).unwrap();
    scene.vmm.doorbell.rings(Vector(0)).await;
}

/// The part of the start before the guest runs.
async fn realize(front_end: &mut FrontEnd, agent: &mut Agent) {
    let features = FrontEndReply::Number((Features::VERSION_1 | Features::PROTOCOL_FEATURES).bits());
    let (_, reply) = exchange(front_end, agent, R::GetFeatures, features.clone()).await;
    assert_eq!(number(reply), (Features::VERSION_1 | Features::PROTOCOL_FEATURES).bits());
    let offered = ProtocolFeatures::MQ | ProtocolFeatures::CONFIG;
    let (_, reply) = exchange(front_end, agent, R::GetProtocolFeatures, FrontEndReply::Number(offered.bits())).await;
    let chosen = offered | ProtocolFeatures::REPLY_ACK;
    assert_eq!(number(reply), (chosen | ProtocolFeatures::CONFIGURE_MEM_SLOTS).bits());
    // The acknowledgement of requests is between front-end and bridge; the control profile always has it.
    let seen = unanswered(front_end, agent, R::SetProtocolFeatures(chosen)).await;
    assert_eq!(seen, R::SetProtocolFeatures(offered));
    // The back-end has more queues than the bridge.
    let (_, reply) = exchange(front_end, agent, R::GetQueueNum, FrontEndReply::Number(64)).await;
    assert_eq!(number(reply), u64::from(QUEUES));
    assert_eq!(unanswered(front_end, agent, R::SetOwner).await, R::SetOwner);
    exchange(front_end, agent, R::GetFeatures, features).await;
    let event = event::create().unwrap();
    for index in 0..2_u8 {
        let call = Handle::Peer(PeerId(1 + 2 * u16::from(index)));
        let seen = told(front_end, agent, R::SetVringCall(vring_file(index, Some(&event)))).await;
        assert_eq!(seen, R::SetVringCall(handle(index, call)));
        let error = Handle::Peer(PeerId(2 + 2 * u16::from(index)));
        let seen = told(front_end, agent, R::SetVringErr(vring_file(index, Some(&event)))).await;
        assert_eq!(seen, R::SetVringErr(handle(index, error)));
    }
    let space = |byte| ConfigSpace { offset: 0, flags: 0, bytes: vec![byte; 57] };
    let answer = FrontEndReply::Config(Some(space(7)));
    let (seen, reply) = exchange(front_end, agent, R::GetConfig(space(0)), answer).await;
    assert_eq!(seen, R::GetConfig(space(0)));
    assert!(matches!(reply, FrontEndReply::Config(Some(config)) if config == space(7)));
}

/// A request without "need reply": the agent is asked for an answer all the same, and the front-end gets none.
async fn unanswered(front_end: &FrontEnd, agent: &mut Agent, request: R<OwnedFd>) -> R<Handle> {
    front_end.send(request, false).await;
    agent.obliges().await
}

fn handle(index: u8, handle: Handle) -> VringFile<Handle> {
    VringFile { index, descriptor: Some(handle) }
}

fn number(reply: FrontEndReply<OwnedFd>) -> u64 {
    match reply {
        FrontEndReply::Number(value) => value,
        other => panic!("expected a number, {other:?} came"),
    }
}

/// What the two halves cannot carry is never offered, whatever the back-end has; what the bridge does by itself always is.
/// (hardening: a feature mask made of bit numbers.)
#[tokio::test]
async fn features_are_masked_to_what_is_carried() {
    let mut scene = Scene::ready().await;
    let mut front_end = scene.new_front_end();
    let agent = &mut scene.agent;
    agent.sees_front_end().await;

    let (_, reply) = exchange(&mut front_end, agent, R::GetFeatures, FrontEndReply::Number(u64::MAX)).await;
    assert_eq!(number(reply), u64::MAX);
    let (_, reply) = exchange(&mut front_end, agent, R::GetProtocolFeatures, FrontEndReply::Number(u64::MAX)).await;
    let carried = ProtocolFeatures::MQ
        | ProtocolFeatures::LOG_SHMFD
        | ProtocolFeatures::RARP
        | ProtocolFeatures::REPLY_ACK
        | ProtocolFeatures::MTU
        | ProtocolFeatures::BACKEND_REQ
        | ProtocolFeatures::CONFIG
        | ProtocolFeatures::INFLIGHT_SHMFD
        | ProtocolFeatures::RESET_DEVICE
        | ProtocolFeatures::CONFIGURE_MEM_SLOTS
        | ProtocolFeatures::STATUS
        | ProtocolFeatures::DEVICE_STATE
        | ProtocolFeatures::GET_VRING_BASE_INFLIGHT;
    assert_eq!(ProtocolFeatures::from_bits_retain(number(reply)), carried);

    let (_, reply) = exchange(&mut front_end, agent, R::GetProtocolFeatures, FrontEndReply::Number(0)).await;
    let own = ProtocolFeatures::REPLY_ACK | ProtocolFeatures::CONFIGURE_MEM_SLOTS;
    assert_eq!(ProtocolFeatures::from_bits_retain(number(reply)), own);
}

/// A back-end with fewer queues than the bridge has them all, and one that refuses the configuration space says so.
#[tokio::test]
async fn a_modest_back_end_is_shown_as_it_is() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let agent = &mut scene.agent;
    let (_, reply) = exchange(&mut front_end, agent, R::GetQueueNum, FrontEndReply::Number(1)).await;
    assert_eq!(number(reply), 1);
    let wanted = ConfigSpace { offset: 4, flags: 0, bytes: vec![0; 8] };
    let (_, reply) = exchange(&mut front_end, agent, R::GetConfig(wanted.clone()), FrontEndReply::Config(None)).await;
    assert!(matches!(reply, FrontEndReply::Config(None)), "{reply:?}");
    assert_eq!(told(&mut front_end, agent, R::SetConfig(wanted.clone())).await, R::SetConfig(wanted));
}
