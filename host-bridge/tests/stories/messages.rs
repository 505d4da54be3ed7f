//! One story for each message of the specification: who answers it, and what each side sees. They follow the two tables of
//! `docs/protocol.md`; a row without a story fails.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress};
use vvu_protocol::carriage::{self, Carriage};
use vvu_protocol::control::Handle;
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{
    BACK_END_REQUESTS, BackEndRequest, ConfigSpace, DeviceStatePhase, DeviceStateTransfer, FRONT_END_REQUESTS,
    FrontEndReply, FrontEndRequest, Inflight, Iotlb, LogArea, RawMessage, ReplyPayload, StateDirection, VringAddresses,
    VringFile, VringState,
};
use vvu_protocol::window::{INFLIGHT_OFFSET, LOG_OFFSET, MEMORY_OFFSET};
use vvu_socket::event;

use crate::scripted::channels::FrontEndBack;
use crate::scripted::front_end::{FrontEnd, USER_BASE};
use crate::scripted::{QUEUES, Scene, memory_file};

use FrontEndReply as A;
use FrontEndRequest as R;

const MIB: u64 = 1 << 20;
const STATE: VringState = VringState { index: 1, num: 128 };
const DONE: A<Handle> = A::Acknowledgement(0);

/// What one request of the front-end is about.
struct Story {
    request: R<OwnedFd>,
    /// What the agent sees and answers; `None` if the bridge answers by itself.
    agent: Option<(R<Handle>, A<Handle>)>,
    /// What the front-end gets; a descriptor is a 0.
    reply: A<u8>,
}

/// A request that crosses as it is, and is acknowledged.
fn acknowledged(request: R<OwnedFd>, seen: R<Handle>) -> Story {
    Story { request, agent: Some((seen, DONE)), reply: A::Acknowledgement(0) }
}

fn numbered(request: R<OwnedFd>, seen: R<Handle>, answer: u64, reply: u64) -> Story {
    Story { request, agent: Some((seen, A::Number(answer))), reply: A::Number(reply) }
}

/// What the scene's front-end has negotiated: all that there is, but that the bridge sets no inflight buffer by itself.
fn negotiated() -> ProtocolFeatures {
    let offered = carriage::offer_protocol(ProtocolFeatures::all());
    offered.difference(ProtocolFeatures::INFLIGHT_SHMFD)
}

fn region(at: u64, offset: u64) -> MemoryRegion {
    MemoryRegion {
        guest_address: GuestAddress(at),
        size: 4 * MIB,
        user_address: UserAddress(USER_BASE + at),
        mmap_offset: FileOffset(offset),
    }
}

/// The story of a request by its code. They build on one another, in the order of the codes.
fn story(code: u32) -> Option<Story> {
    memory_story(code).or_else(|| vring_story(code)).or_else(|| device_story(code))
}

fn device_story(code: u32) -> Option<Story> {
    let features = Features::VERSION_1 | Features::LOG_ALL;
    let config = |byte| ConfigSpace { offset: 4, flags: 0, bytes: vec![byte; 8] };
    let iotlb = Iotlb { iova: 0x1000, size: 0x2000, user_address: 0x7000, permission: 3, kind: 2 };
    let transfer = DeviceStateTransfer { direction: StateDirection::Load, phase: DeviceStatePhase::Stopped };
    Some(match code {
        1 => numbered(R::GetFeatures, R::GetFeatures, u64::MAX, u64::MAX),
        2 => acknowledged(R::SetFeatures(features), R::SetFeatures(features)),
        3 => acknowledged(R::SetOwner, R::SetOwner),
        4 => acknowledged(R::ResetOwner, R::ResetOwner),
        15 => numbered(R::GetProtocolFeatures, R::GetProtocolFeatures, negotiated().bits(), negotiated().bits()),
        16 => acknowledged(
            R::SetProtocolFeatures(negotiated()),
            R::SetProtocolFeatures(negotiated().difference(carriage::OWN_PROTOCOL_FEATURES)),
        ),
        17 => numbered(R::GetQueueNum, R::GetQueueNum, 64, u64::from(QUEUES)),
        19 => acknowledged(R::SendRarp(7), R::SendRarp(7)),
        20 => acknowledged(R::NetSetMtu(1500), R::NetSetMtu(1500)),
        21 => {
            let (_, theirs) = UnixStream::pair().unwrap();
            acknowledged(R::SetBackendReqFd(theirs.into()), R::SetBackendReqFd(Handle::BackChannel))
        }
        22 => numbered(R::Iotlb(iotlb), R::Iotlb(iotlb), 0, 0),
        24 => Story {
            request: R::GetConfig(config(0)),
            agent: Some((R::GetConfig(config(0)), A::Config(Some(config(9))))),
            reply: A::Config(Some(config(9))),
        },
        25 => acknowledged(R::SetConfig(config(3)), R::SetConfig(config(3))),
        34 => acknowledged(R::ResetDevice, R::ResetDevice),
        39 => acknowledged(R::SetStatus(15), R::SetStatus(15)),
        40 => numbered(R::GetStatus, R::GetStatus, 15, 15),
        42 => Story {
            request: R::SetDeviceStateFd(transfer, pipe_that_has_ended()),
            agent: Some((R::SetDeviceStateFd(transfer, Handle::Stream), A::DeviceState(0x100, None))),
            reply: A::DeviceState(0x100, None),
        },
        43 => numbered(R::CheckDeviceState, R::CheckDeviceState, 0, 0),
        _ => return None,
    })
}

fn pipe_that_has_ended() -> OwnedFd {
    rustix::pipe::pipe().unwrap().0
}

fn vring_story(code: u32) -> Option<Story> {
    let addresses =
        VringAddresses { index: 1, flags: 1, descriptors: 0x1000, used: 0x3000, available: 0x2000, log: 0x5000 };
    let file = || VringFile { index: 1, descriptor: Some(event::create().unwrap()) };
    let handle = |handle| VringFile { index: 1, descriptor: Some(handle) };
    let stopped = VringState { index: 1, num: 77 };
    Some(match code {
        8 => acknowledged(R::SetVringNum(STATE), R::SetVringNum(STATE)),
        9 => acknowledged(R::SetVringAddr(addresses), R::SetVringAddr(addresses)),
        10 => acknowledged(R::SetVringBase(STATE), R::SetVringBase(STATE)),
        11 => Story {
            request: R::GetVringBase(STATE),
            agent: Some((R::GetVringBase(STATE), A::VringState(stopped))),
            reply: A::VringState(stopped),
        },
        12 => acknowledged(R::SetVringKick(file()), R::SetVringKick(handle(Handle::Vector(Vector(1))))),
        13 => acknowledged(R::SetVringCall(file()), R::SetVringCall(handle(Handle::Peer(PeerId(3))))),
        14 => acknowledged(R::SetVringErr(file()), R::SetVringErr(handle(Handle::Peer(PeerId(4))))),
        18 => acknowledged(R::SetVringEnable(STATE), R::SetVringEnable(STATE)),
        _ => return None,
    })
}

fn memory_story(code: u32) -> Option<Story> {
    let window = MEMORY_OFFSET.0;
    let log = |offset| LogArea { size: 0x2000, mmap_offset: FileOffset(offset) };
    let inflight = |size, offset| Inflight {
        mmap_size: size,
        mmap_offset: FileOffset(offset),
        queue_count: QUEUES,
        queue_size: 128,
    };
    Some(match code {
        5 => acknowledged(
            R::SetMemTable(vec![(region(0, 0), memory_file(4 * MIB))]),
            R::SetMemTable(vec![(region(0, window), Handle::Window)]),
        ),
        6 => Story {
            request: R::SetLogBase(log(0x1000), memory_file(0x4000)),
            agent: Some((R::SetLogBase(log(LOG_OFFSET.0), Handle::Window), A::LogBase)),
            reply: A::LogBase,
        },
        7 => acknowledged(R::SetLogFd(event::create().unwrap()), R::SetLogFd(Handle::Peer(PeerId(1 + 2 * QUEUES)))),
        // Two queues of 64 bytes and 128 entries of 32 bytes, in whole pages.
        31 => {
            Story { request: R::GetInflightFd(inflight(0, 0)), agent: None, reply: A::Inflight(inflight(0x3000, 0), 0) }
        }
        32 => acknowledged(
            R::SetInflightFd(inflight(0x3000, 0), memory_file(2 * MIB)),
            R::SetInflightFd(inflight(0x3000, INFLIGHT_OFFSET.0), Handle::Window),
        ),
        36 => Story { request: R::GetMaxMemSlots, agent: None, reply: A::Number(509) },
        37 => acknowledged(
            R::AddMemReg(region(4 * MIB, 0), memory_file(4 * MIB)),
            R::AddMemReg(region(4 * MIB, window + 4 * MIB), Handle::Window),
        ),
        38 => acknowledged(R::RemMemReg(region(4 * MIB, 0)), R::RemMemReg(region(4 * MIB, window + 4 * MIB))),
        _ => return None,
    })
}

/// A message that has the length of its code and says nothing, asking for an answer.
fn well_formed(code: u32) -> RawMessage<OwnedFd> {
    let len = match code {
        23 | 27 | 35 => 8,
        41 => 16,
        _ => 0,
    };
    RawMessage::request(code, true, vec![0; len], vec![])
}

/// Every message of the front-end, with and without a flag that asks for an answer where it has none of its own.
#[tokio::test]
async fn each_request_of_the_front_end_has_its_story() {
    let (mut scene, mut front_end) = Scene::connected_with(negotiated(), negotiated()).await;
    let mut refused = Vec::new();
    for row in &FRONT_END_REQUESTS {
        eprintln!("row: {} {}", row.code, row.name);
        let carriage = carriage::front_end(row.code);
        match (carriage, story(row.code)) {
            (Carriage::Refused(_), None) => refused.push(row),
            (_, Some(story)) => {
                assert_eq!(carriage == Carriage::Answered, story.agent.is_none(), "{}", row.name);
                tell(&mut scene, &mut front_end, story).await;
            }
            (_, None) => panic!("{} has no story", row.name),
        }
    }
    scene.end_session(front_end).await;
    for row in refused {
        let mut front_end = scene.connect_front_end().await;
        let descriptors: Vec<OwnedFd> = (0..*row.descriptors.start()).map(|_| event::create().unwrap()).collect();
        let borrowed: Vec<_> = descriptors.iter().map(std::os::fd::AsFd::as_fd).collect();
        front_end.send_raw(&well_formed(row.code).to_bytes(), &borrowed);
        if row.reply == ReplyPayload::None {
            assert_ne!(front_end.acknowledgement(row.code).await, 0, "{}", row.name);
            drop(front_end);
        } else {
            front_end.sees_end().await;
        }
        scene.bridge.says(&["refused", row.name]).await;
        scene.clear_away().await;
        assert!(!scene.agent.has_frame(), "the agent was told of {}", row.name);
    }
}

async fn tell(scene: &mut Scene, front_end: &mut FrontEnd, story: Story) {
    let Story { request, agent, reply } = story;
    let (code, name) = (request.code(), request.name());
    front_end.send(request, true).await;
    if let Some((expected, answer)) = agent {
        assert_eq!(scene.agent.request().await, expected, "{name}");
        scene.agent.answer(answer).await;
    }
    if code == 42 {
        // The stream that the front-end has handed over has ended already: the agent is told.
        scene.agent.takes_empty_state().await;
    }
    let reply = reply.encode(code);
    let got = front_end.raw_reply().await;
    assert_eq!((got.header, got.payload), (reply.header, reply.payload), "{name}");
    assert_eq!(got.descriptors.len(), reply.descriptors.len(), "{name}");
}

/// Every message of the back-end: what is carried reaches the front-end and its reply the agent, what is not is refused.
#[tokio::test]
async fn each_request_of_the_back_end_has_its_story() {
    let (mut scene, mut front_end) = Scene::connected_with(negotiated(), negotiated()).await;
    let mut back = FrontEndBack::hand_over(&mut scene, &mut front_end).await;
    let iotlb = Iotlb { iova: 0x1000, size: 0, user_address: 0, permission: 1, kind: 1 };
    for row in &BACK_END_REQUESTS {
        eprintln!("row: {} {}", row.code, row.name);
        let request = match row.code {
            1 => BackEndRequest::Iotlb(iotlb),
            2 => BackEndRequest::ConfigChange,
            _ => {
                assert!(matches!(carriage::back_end(row.code), Carriage::Refused(_)), "{} has no story", row.name);
                let len = [24, 8, 8, 16, 16, 16, 40, 40][usize::try_from(row.code - 3).unwrap()];
                let handles = vec![Handle::Window; *row.descriptors.start()];
                let mut payload = vec![0; len];
                // VRING_HOST_NOTIFIER_MSG: no descriptor comes.
                payload[1] = u8::from(row.code == 3);
                BackEndRequest::decode(RawMessage::request(row.code, true, payload, handles)).unwrap()
            }
        };
        let is_carried = carriage::back_end(row.code) == Carriage::Carried;
        scene.agent.asks(request).await;
        if is_carried {
            let (seen, asks) = back.request().await;
            assert_eq!((seen.code(), asks), (row.code, true), "{}", row.name);
            if row.code == 1 {
                assert!(matches!(seen, BackEndRequest::Iotlb(seen) if seen == iotlb), "{seen:?}");
            }
            back.reply(row.code, 0).await;
        }
        assert_eq!(scene.agent.is_answered(row.code).await == 0, is_carried, "{}", row.name);
    }
}
