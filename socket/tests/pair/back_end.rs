//! Our codec as back-end, the crate's `Frontend` as front-end.
//!
//! Not walked through: what the crate's front-end has no function for (as in `front_end`), and a refused GET_CONFIG, for
//! which the crate waits for as many bytes as it asked for, whatever the header says.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight,
    VhostUserSharedMsg,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::ByteValued;
use vmm_sys_util::eventfd::EventFd;
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{
    ConfigSpace, DeviceStatePhase, DeviceStateTransfer, FrontEndReply as Reply, FrontEndRequest as Request,
    StateDirection, VringFile, VringState,
};
use vvu_socket::MessageSocket;

use crate::descriptor::{Identity, identified, identity, memfd};
use crate::session::{
    ADDRESSES, CONFIG, CONFIG_OFFSET, FEATURES, HIGH, INFLIGHT, INFLIGHT_WANTED, LOG, LOW, PLUGGED, PROTOCOL_FEATURES,
    QUEUE_COUNT, SLOT_COUNT, UUID, VRING_BASE, in_time, shmem_config,
};

/// Our back-end: answers every request until the end of the session, and returns them.
async fn serve(stream: UnixStream, own_file: OwnedFd) -> Vec<Request<Identity>> {
    let mut socket = MessageSocket::new(stream).unwrap();
    let mut seen = Vec::new();
    while let Some(message) = socket.recv().await.unwrap() {
        let needs_reply = message.header.needs_reply;
        let request = Request::decode(identified(&message)).unwrap();
        let answer = answer(&request, &own_file).or(needs_reply.then_some(Reply::Acknowledgement(0)));
        if let Some(reply) = answer {
            socket.send(&reply.encode(request.code())).await.unwrap();
        }
        seen.push(request);
    }
    seen
}

/// The answer to a request that has one of its own.
fn answer(request: &Request<Identity>, own_file: &OwnedFd) -> Option<Reply<OwnedFd>> {
    let own_file = || own_file.try_clone().unwrap();
    Some(match request {
        Request::GetFeatures => Reply::Number(FEATURES.bits()),
        Request::GetProtocolFeatures => Reply::Number(PROTOCOL_FEATURES.bits()),
        Request::GetQueueNum => Reply::Number(QUEUE_COUNT),
        Request::GetMaxMemSlots => Reply::Number(SLOT_COUNT),
        Request::CheckDeviceState => Reply::Number(0),
        Request::SetLogBase(..) => Reply::LogBase,
        Request::GetVringBase(state) => Reply::VringState(VringState { num: VRING_BASE, ..*state }),
        Request::GetConfig(asked) => Reply::Config(Some(ConfigSpace { bytes: CONFIG.to_vec(), ..asked.clone() })),
        Request::GetInflightFd(_) => Reply::Inflight(INFLIGHT, own_file()),
        Request::GetSharedObject(_) => Reply::SharedObject(Some(own_file())),
        Request::SetDeviceStateFd(DeviceStateTransfer { direction: StateDirection::Save, .. }, _) => {
            Reply::DeviceState(0x100, None)
        }
        Request::SetDeviceStateFd(..) => Reply::DeviceState(0, Some(own_file())),
        Request::GetShmemConfig => Reply::ShmemConfig(shmem_config()),
        Request::SetVringNum(VringState { num: 0, .. }) => Reply::Acknowledgement(1),
        _ => return None,
    })
}

/// Runs `front_end`, a session of the crate's front-end, against our back-end. It returns what it expects to have been seen
/// after the negotiation.
async fn run(front_end: impl FnOnce(&mut Frontend, &Identity) -> Vec<Request<Identity>> + Send + 'static) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let own_file = memfd().try_clone().unwrap();
    let own_identity = identity(own_file.as_raw_fd());
    let session = tokio::task::spawn_blocking(move || {
        let mut session = Frontend::from_stream(theirs, 1);
        negotiate(&mut session);
        front_end(&mut session, &own_identity)
    });
    let seen = in_time(serve(ours, own_file)).await;
    let negotiation = [
        Request::SetOwner,
        Request::GetFeatures,
        Request::GetProtocolFeatures,
        Request::SetProtocolFeatures(PROTOCOL_FEATURES),
        Request::SetFeatures(FEATURES),
        Request::GetQueueNum,
    ];
    assert_eq!(seen, [&negotiation[..], &session.await.unwrap()].concat());
}

/// Features, protocol features, number of queues. From then on the crate asks for an acknowledgement of every request.
fn negotiate(session: &mut Frontend) {
    session.set_owner().unwrap();
    assert_eq!(Features::from_bits_retain(session.get_features().unwrap()), FEATURES);
    let offered = session.get_protocol_features().unwrap();
    assert_eq!(ProtocolFeatures::from_bits_retain(offered.bits()), PROTOCOL_FEATURES);
    session.set_protocol_features(VhostUserProtocolFeatures::from_bits_truncate(PROTOCOL_FEATURES.bits())).unwrap();
    session.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    session.set_features(FEATURES.bits()).unwrap();
    assert_eq!(session.get_queue_num().unwrap(), QUEUE_COUNT);
}

/// A region and its file in the crate's terms.
fn info(region: &MemoryRegion, file: &impl AsRawFd) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: region.guest_address.0,
        memory_size: region.size,
        userspace_addr: region.user_address.0,
        mmap_offset: region.mmap_offset.0,
        mmap_handle: file.as_raw_fd(),
    }
}

fn event(index: u8, event: &EventFd) -> VringFile<Identity> {
    VringFile { index, descriptor: Some(identity(event.as_raw_fd())) }
}

fn vring(num: u32) -> VringState {
    VringState { index: 2, num }
}

#[tokio::test]
async fn memory_and_dirty_log() {
    run(|session, _| {
        let files = [memfd(), memfd(), memfd()];
        let [low, high, plugged] = files.each_ref().map(|file| identity(file.as_raw_fd()));
        session.set_mem_table(&[info(&LOW, &files[0]), info(&HIGH, &files[1])]).unwrap();
        assert_eq!(session.get_max_mem_slots().unwrap(), SLOT_COUNT);
        session.add_mem_region(&info(&PLUGGED, &files[2])).unwrap();
        session.remove_mem_region(&info(&PLUGGED, &files[2])).unwrap();
        let (mmap_size, mmap_offset, mmap_handle) = (LOG.size, LOG.mmap_offset.0, files[0].as_raw_fd());
        session.set_log_base(0, Some(VhostUserDirtyLogRegion { mmap_size, mmap_offset, mmap_handle })).unwrap();
        session.set_log_fd(files[1].as_raw_fd()).unwrap();
        vec![
            Request::SetMemTable(vec![(LOW, low.clone()), (HIGH, high.clone())]),
            Request::GetMaxMemSlots,
            Request::AddMemReg(PLUGGED, plugged),
            Request::RemMemReg(PLUGGED),
            Request::SetLogBase(LOG, low),
            Request::SetLogFd(high),
        ]
    })
    .await;
}

#[tokio::test]
async fn a_vring_is_started_and_stopped() {
    run(|session, _| {
        let addresses = VringConfigData {
            queue_max_size: 256,
            queue_size: 256,
            flags: ADDRESSES.flags,
            desc_table_addr: ADDRESSES.descriptors,
            used_ring_addr: ADDRESSES.used,
            avail_ring_addr: ADDRESSES.available,
            log_addr: Some(ADDRESSES.log),
        };
        let [kick, call, err] = std::array::from_fn(|_| EventFd::new(0).unwrap());
        session.set_vring_num(2, 256).unwrap();
        session.set_vring_base(2, 7).unwrap();
        session.set_vring_addr(2, &addresses).unwrap();
        session.set_vring_call(2, &call).unwrap();
        session.set_vring_err(2, &err).unwrap();
        session.set_vring_kick(2, &kick).unwrap();
        session.set_vring_enable(2, true).unwrap();
        session.set_vring_enable(2, false).unwrap();
        assert_eq!(session.get_vring_base(2).unwrap(), VRING_BASE);
        session.reset_device().unwrap();
        session.reset_owner().unwrap();
        vec![
            Request::SetVringNum(vring(256)),
            Request::SetVringBase(vring(7)),
            Request::SetVringAddr(ADDRESSES),
            Request::SetVringCall(event(2, &call)),
            Request::SetVringErr(event(2, &err)),
            Request::SetVringKick(event(2, &kick)),
            Request::SetVringEnable(vring(1)),
            Request::SetVringEnable(vring(0)),
            Request::GetVringBase(vring(0)),
            Request::ResetDevice,
            Request::ResetOwner,
        ]
    })
    .await;
}

#[tokio::test]
async fn configuration_space() {
    run(|session, _| {
        let size = u32::try_from(CONFIG.len()).unwrap();
        let nothing = vec![0; CONFIG.len()];
        let no_flags = VhostUserConfigFlags::empty();
        let (theirs, content) = session.get_config(CONFIG_OFFSET, size, no_flags, &nothing).unwrap();
        assert_eq!(({ theirs.offset }, { theirs.size }, content.as_slice()), (CONFIG_OFFSET, size, CONFIG));
        session.set_config(CONFIG_OFFSET, VhostUserConfigFlags::WRITABLE, CONFIG).unwrap();
        let shmem = session.get_shmem_config().unwrap();
        assert_eq!((shmem.nregions, &shmem.memory_sizes[..4]), (2, &[0x20_0000, 0, 0x1000, 0][..]));
        vec![
            Request::GetConfig(ConfigSpace { offset: CONFIG_OFFSET, flags: 0, bytes: nothing }),
            Request::SetConfig(ConfigSpace { offset: CONFIG_OFFSET, flags: 1, bytes: CONFIG.to_vec() }),
            Request::GetShmemConfig,
        ]
    })
    .await;
}

#[tokio::test]
async fn inflight_buffer_and_shared_objects() {
    run(|session, own_file| {
        let buffer = memfd();
        let wanted = VhostUserInflight::new(0, 0, INFLIGHT_WANTED.queue_count, INFLIGHT_WANTED.queue_size);
        let (theirs, file) = session.get_inflight_fd(&wanted).unwrap();
        assert_eq!((theirs.mmap_size, theirs.mmap_offset), (INFLIGHT.mmap_size, INFLIGHT.mmap_offset.0));
        assert_eq!((theirs.num_queues, theirs.queue_size), (INFLIGHT.queue_count, INFLIGHT.queue_size));
        assert_eq!(identity(file.as_raw_fd()), *own_file);
        session.set_inflight_fd(&theirs, buffer.as_raw_fd()).unwrap();
        let object = session.get_shared_object(VhostUserSharedMsg::from_slice(&UUID).unwrap()).unwrap();
        assert_eq!(identity(object.as_raw_fd()), *own_file);
        vec![
            Request::GetInflightFd(INFLIGHT_WANTED),
            Request::SetInflightFd(INFLIGHT, identity(buffer.as_raw_fd())),
            Request::GetSharedObject(UUID),
        ]
    })
    .await;
}

#[tokio::test]
async fn device_state() {
    run(|session, own_file| {
        let channel = memfd();
        let pass = || channel.try_clone().unwrap();
        let stopped = VhostTransferStatePhase::STOPPED;
        let save = session.set_device_state_fd(VhostTransferStateDirection::SAVE, stopped, pass()).unwrap();
        assert!(save.is_none());
        let load = session.set_device_state_fd(VhostTransferStateDirection::LOAD, stopped, pass()).unwrap();
        assert_eq!(identity(load.unwrap().as_raw_fd()), *own_file);
        session.check_device_state().unwrap();
        let transfer = |direction| DeviceStateTransfer { direction, phase: DeviceStatePhase::Stopped };
        let channel = identity(channel.as_raw_fd());
        vec![
            Request::SetDeviceStateFd(transfer(StateDirection::Save), channel.clone()),
            Request::SetDeviceStateFd(transfer(StateDirection::Load), channel),
            Request::CheckDeviceState,
        ]
    })
    .await;
}

#[tokio::test]
async fn a_refusal_arrives_and_the_session_goes_on() {
    run(|session, _| {
        session.set_vring_num(2, 0).unwrap_err();
        session.set_vring_num(2, 256).unwrap();
        vec![Request::SetVringNum(vring(0)), Request::SetVringNum(vring(256))]
    })
    .await;
}
