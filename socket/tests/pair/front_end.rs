//! Our codec as front-end, the crate's `BackendReqHandler` as back-end.
//!
//! Not walked through, because the crate's back-end knows no more of them than the code: SET_LOG_FD, SEND_RARP, NET_SET_MTU,
//! IOTLB_MSG, SET_VRING_ENDIAN, crypto sessions, postcopy, VRING_KICK, SET_STATUS and GET_STATUS.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vvu_protocol::message::{
    ConfigSpace, DeviceStatePhase, DeviceStateTransfer, FrontEndReply as Reply, FrontEndRequest as Request,
    StateDirection, VringFile, VringState,
};
use vvu_socket::MessageSocket;

use crate::descriptor::{Identity, eventfd, identity, memfd};
use crate::recorder::CrateBackEnd;
use crate::session::{
    ADDRESSES, CONFIG, CONFIG_OFFSET, FrontEnd, HIGH, INFLIGHT, INFLIGHT_WANTED, LOG, LOW, PLUGGED, QUEUE_COUNT,
    SLOT_COUNT, Shared, UUID, VRING_BASE, in_time, shmem_config,
};

/// A session that has its features, and the back-end that it runs against.
async fn session() -> (FrontEnd, CrateBackEnd) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let back_end = CrateBackEnd::serve(theirs);
    let mut front_end = FrontEnd::new(MessageSocket::new(ours).unwrap());
    front_end.negotiate().await;
    (front_end, back_end)
}

/// Ends the session: every request has to have reached the device as it was sent.
async fn finish(front_end: FrontEnd, back_end: CrateBackEnd) {
    let sent = front_end.end();
    assert_eq!(back_end.finish().await, sent);
}

fn own_file(back_end: &CrateBackEnd) -> Identity {
    identity(back_end.recorder.lock().unwrap().own_file.as_raw_fd())
}

fn is(descriptor: &OwnedFd, expected: &Identity) -> bool {
    identity(descriptor.as_raw_fd()) == *expected
}

fn vring(num: u32) -> VringState {
    VringState { index: 2, num }
}

fn event(descriptor: Option<Shared>) -> VringFile<Shared> {
    VringFile { index: 2, descriptor }
}

#[tokio::test]
async fn memory_and_dirty_log() {
    in_time(async {
        let (mut front_end, back_end) = session().await;
        front_end.order(Request::SetMemTable(vec![(LOW, memfd()), (HIGH, memfd())])).await;
        let slots = front_end.ask(Request::GetMaxMemSlots).await;
        assert!(matches!(slots, Reply::Number(SLOT_COUNT)), "{slots:?}");
        front_end.order(Request::AddMemReg(PLUGGED, memfd())).await;
        front_end.order(Request::RemMemReg(PLUGGED)).await;
        let log = front_end.ask(Request::SetLogBase(LOG, memfd())).await;
        assert!(matches!(log, Reply::LogBase), "{log:?}");
        // As many regions as a message may have.
        front_end.order(Request::SetMemTable((0..8).map(|_| (HIGH, memfd())).collect())).await;
        finish(front_end, back_end).await;
    })
    .await;
}

#[tokio::test]
async fn a_vring_is_started_and_stopped() {
    in_time(async {
        let (mut front_end, back_end) = session().await;
        let queues = front_end.ask(Request::GetQueueNum).await;
        assert!(matches!(queues, Reply::Number(QUEUE_COUNT)), "{queues:?}");
        front_end.order(Request::SetVringNum(vring(256))).await;
        front_end.order(Request::SetVringBase(vring(7))).await;
        front_end.order(Request::SetVringAddr(ADDRESSES)).await;
        front_end.order(Request::SetVringCall(event(Some(eventfd())))).await;
        front_end.order(Request::SetVringErr(event(Some(eventfd())))).await;
        front_end.order(Request::SetVringKick(event(Some(eventfd())))).await;
        front_end.order(Request::SetVringEnable(vring(1))).await;
        // To be polled from here on.
        front_end.order(Request::SetVringCall(event(None))).await;
        front_end.order(Request::SetVringEnable(vring(0))).await;
        let base = front_end.ask(Request::GetVringBase(vring(0))).await;
        assert!(matches!(base, Reply::VringState(state) if state == vring(VRING_BASE)), "{base:?}");
        front_end.order(Request::ResetDevice).await;
        front_end.order(Request::ResetOwner).await;
        finish(front_end, back_end).await;
    })
    .await;
}

#[tokio::test]
async fn configuration_space() {
    in_time(async {
        let (mut front_end, back_end) = session().await;
        let space = |offset, bytes: &[u8]| ConfigSpace { offset, flags: 0, bytes: bytes.to_vec() };
        let nothing = vec![0; CONFIG.len()];
        let config = front_end.ask(Request::GetConfig(space(CONFIG_OFFSET, &nothing))).await;
        let expected = space(CONFIG_OFFSET, CONFIG);
        assert!(matches!(&config, Reply::Config(Some(config)) if *config == expected), "{config:?}");
        let refused = front_end.ask(Request::GetConfig(space(0, &nothing))).await;
        assert!(matches!(refused, Reply::Config(None)), "{refused:?}");
        front_end.order(Request::SetConfig(ConfigSpace { flags: 1, ..expected })).await;
        let shmem = front_end.ask(Request::GetShmemConfig).await;
        assert!(matches!(&shmem, Reply::ShmemConfig(config) if *config == shmem_config()), "{shmem:?}");
        finish(front_end, back_end).await;
    })
    .await;
}

#[tokio::test]
async fn inflight_buffer_and_shared_objects() {
    in_time(async {
        let (mut front_end, back_end) = session().await;
        let own_file = own_file(&back_end);
        let inflight = front_end.ask(Request::GetInflightFd(INFLIGHT_WANTED)).await;
        let expected = matches!(&inflight, Reply::Inflight(area, buffer) if *area == INFLIGHT && is(buffer, &own_file));
        assert!(expected, "{inflight:?}");
        front_end.order(Request::SetInflightFd(INFLIGHT, memfd())).await;
        let object = front_end.ask(Request::GetSharedObject(UUID)).await;
        assert!(matches!(&object, Reply::SharedObject(Some(object)) if is(object, &own_file)), "{object:?}");
        let absent = front_end.ask(Request::GetSharedObject([1; 16])).await;
        assert!(matches!(absent, Reply::SharedObject(None)), "{absent:?}");
        finish(front_end, back_end).await;
    })
    .await;
}

#[tokio::test]
async fn device_state() {
    in_time(async {
        let (mut front_end, back_end) = session().await;
        let own_file = own_file(&back_end);
        let transfer = |direction| DeviceStateTransfer { direction, phase: DeviceStatePhase::Stopped };
        let save = front_end.ask(Request::SetDeviceStateFd(transfer(StateDirection::Save), memfd())).await;
        assert!(matches!(save, Reply::DeviceState(0x100, None)), "{save:?}");
        let load = front_end.ask(Request::SetDeviceStateFd(transfer(StateDirection::Load), memfd())).await;
        assert!(matches!(&load, Reply::DeviceState(0, Some(channel)) if is(channel, &own_file)), "{load:?}");
        let check = front_end.ask(Request::CheckDeviceState).await;
        assert!(matches!(check, Reply::Number(0)), "{check:?}");
        finish(front_end, back_end).await;
    })
    .await;
}

#[tokio::test]
async fn a_refusal_arrives_and_the_session_goes_on() {
    in_time(async {
        let (mut front_end, back_end) = session().await;
        let refused = front_end.ask(Request::SetVringNum(VringState { index: 5, num: 256 })).await;
        assert!(matches!(refused, Reply::Acknowledgement(error) if error != 0), "{refused:?}");
        front_end.order(Request::SetVringNum(vring(256))).await;
        finish(front_end, back_end).await;
    })
    .await;
}

#[tokio::test]
async fn a_session_without_acknowledgements() {
    in_time(async {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let back_end = CrateBackEnd::serve(theirs);
        let mut front_end = FrontEnd::new(MessageSocket::new(ours).unwrap());
        front_end.tell(Request::SetOwner).await;
        front_end.tell(Request::SetVringNum(vring(256))).await;
        front_end.tell(Request::SetMemTable(vec![(LOW, memfd())])).await;
        front_end.tell(Request::SetVringKick(event(Some(eventfd())))).await;
        // Whatever comes now belongs to this request.
        let base = front_end.ask(Request::GetVringBase(vring(0))).await;
        assert!(matches!(base, Reply::VringState(state) if state == vring(VRING_BASE)), "{base:?}");
        finish(front_end, back_end).await;
    })
    .await;
}
