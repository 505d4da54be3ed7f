//! Requests of the back-end, over the socket that SET_BACKEND_REQ_FD hands over.
//!
//! The crate knows CONFIG_CHANGE_MSG, the shared objects and SHMEM_MAP and SHMEM_UNMAP.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserMMap, VhostUserMMapFlags, VhostUserProtocolFeatures, VhostUserSharedMsg,
};
use vhost::vhost_user::{
    Backend, Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler,
    VhostUserFrontendReqHandlerMut,
};
use vm_memory::ByteValued;
use vvu_protocol::DecodeError;
use vvu_protocol::address::FileOffset;
use vvu_protocol::message::{BackEndReply, BackEndRequest, FrontEndReply, FrontEndRequest, RawMessage, ShmemMap};
use vvu_socket::MessageSocket;

use crate::descriptor::{Identity, identified, identity, memfd};
use crate::recorder::CrateBackEnd;
use crate::session::{FEATURES, FrontEnd, MAP, PROTOCOL_FEATURES, UUID, in_time};

/// The driver VM's VMM behind the crate's front-end: it writes down what reached it.
#[derive(Default)]
struct Recorder {
    seen: Vec<BackEndRequest<Identity>>,
}

impl Recorder {
    fn note(&mut self, request: BackEndRequest<Identity>) -> HandlerResult<u64> {
        self.seen.push(request);
        Ok(0)
    }
}

fn uuid(theirs: &VhostUserSharedMsg) -> [u8; 16] {
    theirs.as_slice().try_into().expect("16 bytes")
}

fn shmem_map(theirs: &VhostUserMMap) -> ShmemMap {
    ShmemMap {
        region: theirs.shmid,
        file_offset: FileOffset(theirs.fd_offset),
        region_offset: theirs.shm_offset,
        len: theirs.len,
        writable: theirs.flags == VhostUserMMapFlags::WRITABLE.bits(),
    }
}

impl VhostUserFrontendReqHandlerMut for Recorder {
    fn handle_config_change(&mut self) -> HandlerResult<u64> {
        self.note(BackEndRequest::ConfigChange)
    }

    fn shared_object_add(&mut self, object: &VhostUserSharedMsg) -> HandlerResult<u64> {
        self.note(BackEndRequest::SharedObjectAdd(uuid(object)))
    }

    fn shared_object_remove(&mut self, object: &VhostUserSharedMsg) -> HandlerResult<u64> {
        self.note(BackEndRequest::SharedObjectRemove(uuid(object)))
    }

    fn shmem_map(&mut self, map: &VhostUserMMap, file: &dyn AsRawFd) -> HandlerResult<u64> {
        self.note(BackEndRequest::ShmemMap(shmem_map(map), identity(file.as_raw_fd())))
    }

    fn shmem_unmap(&mut self, map: &VhostUserMMap) -> HandlerResult<u64> {
        self.seen.push(BackEndRequest::ShmemUnmap(shmem_map(map)));
        Err(std::io::Error::from_raw_os_error(22))
    }
}

/// The back-end's end of the crate's channel, which the crate shows as a number only.
struct ChannelEnd(RawFd);

impl AsRawFd for ChannelEnd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// The crate's front-end up to SET_BACKEND_REQ_FD. Ends with the connection.
fn hand_over_channel(stream: UnixStream, channel: &ChannelEnd) {
    let mut session = Frontend::from_stream(stream, 1);
    session.get_features().unwrap();
    let features = VhostUserProtocolFeatures::from_bits_truncate(PROTOCOL_FEATURES.bits());
    session.set_protocol_features(features).unwrap();
    session.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    session.set_backend_request_fd(channel).unwrap();
}

/// Our back-end up to SET_BACKEND_REQ_FD.
async fn take_channel(stream: UnixStream) -> MessageSocket {
    let mut socket = MessageSocket::new(stream).unwrap();
    loop {
        let message = socket.recv().await.unwrap().expect("a request, not the end");
        let request = FrontEndRequest::decode(message).unwrap();
        let code = request.code();
        let reply = |reply: FrontEndReply<OwnedFd>| reply.encode(code);
        match request {
            FrontEndRequest::GetFeatures => socket.send(&reply(FrontEndReply::Number(FEATURES.bits()))).await.unwrap(),
            FrontEndRequest::SetProtocolFeatures(_) => {}
            FrontEndRequest::SetBackendReqFd(channel) => {
                socket.send(&reply(FrontEndReply::Acknowledgement(0))).await.unwrap();
                return MessageSocket::new(UnixStream::from(channel)).unwrap();
            }
            other => panic!("{} was not to be sent", other.name()),
        }
    }
}

#[tokio::test]
async fn ours_reach_the_crates_front_end() {
    let recorder = Arc::new(Mutex::new(Recorder::default()));
    let mut handler = FrontendReqHandler::new(Arc::clone(&recorder)).unwrap();
    handler.set_reply_ack_flag(true);
    let channel = ChannelEnd(handler.get_tx_raw_fd());
    let file = memfd();
    let requests = [
        (BackEndRequest::ConfigChange, true),
        (BackEndRequest::SharedObjectAdd(UUID), true),
        (BackEndRequest::SharedObjectRemove(UUID), true),
        (BackEndRequest::ShmemMap(MAP, Arc::clone(&file)), true),
        (BackEndRequest::ShmemMap(ShmemMap { writable: false, ..MAP }, Arc::clone(&file)), true),
        (BackEndRequest::ShmemUnmap(MAP), false),
    ];
    let count = requests.len();

    let (ours, theirs) = UnixStream::pair().unwrap();
    let front_end = tokio::task::spawn_blocking(move || {
        hand_over_channel(theirs, &channel);
        // The last one is refused, which the crate passes on as an error.
        (0..count).map(|_| handler.handle_request().is_ok()).collect::<Vec<_>>()
    });
    let mut expected = Vec::new();
    in_time(async {
        let mut channel = take_channel(ours).await;
        for (request, succeeds) in requests {
            let code = request.code();
            let message = request.encode(true);
            expected.push(BackEndRequest::decode(identified(&message)).unwrap());
            channel.send(&message).await.unwrap();
            let reply = channel.recv().await.unwrap().expect("an answer, not the end");
            let reply = BackEndReply::decode(code, reply).unwrap();
            assert!(matches!(reply, BackEndReply::Acknowledgement(error) if (error == 0) == succeeds), "{reply:?}");
        }
    })
    .await;
    assert_eq!(front_end.await.unwrap(), [true, true, true, true, true, false]);
    assert_eq!(recorder.lock().unwrap().seen, expected);
}

/// Our front-end's next request from the channel, acknowledged with `result`.
async fn next_request(channel: &mut MessageSocket, result: u64) -> RawMessage<Identity> {
    let message = channel.recv().await.unwrap().expect("a request, not the end");
    let acknowledgement: RawMessage<OwnedFd> = BackEndReply::Acknowledgement(result).encode(message.header.request);
    assert!(message.header.needs_reply);
    channel.send(&acknowledgement).await.unwrap();
    identified(&message)
}

/// Our front-end with the crate's back-end behind it, and both ends of the channel.
async fn session() -> (FrontEnd, CrateBackEnd, MessageSocket, Backend) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let back_end = CrateBackEnd::serve(theirs);
    let mut front_end = FrontEnd::new(MessageSocket::new(ours).unwrap());
    front_end.negotiate().await;
    let (channel, passed) = UnixStream::pair().unwrap();
    front_end.order(FrontEndRequest::SetBackendReqFd(Arc::new(passed.into()))).await;
    let device = back_end.channel.try_recv().unwrap();
    device.set_reply_ack_flag(true);
    device.set_shared_object_flag(true);
    device.set_shmem_flag(true);
    (front_end, back_end, MessageSocket::new(channel).unwrap(), device)
}

#[tokio::test]
async fn those_of_the_crate_reach_our_front_end() {
    in_time(async {
        let (front_end, back_end, mut channel, device) = session().await;
        let file = memfd();
        let expected_file = identity(file.as_raw_fd());
        let requests = tokio::task::spawn_blocking(move || {
            let object = VhostUserSharedMsg::from_slice(&UUID).unwrap();
            let flags = VhostUserMMapFlags::WRITABLE.bits();
            let (fd_offset, shm_offset, len) = (MAP.file_offset.0, MAP.region_offset, MAP.len);
            let map = VhostUserMMap { shmid: MAP.region, padding: [0; 7], fd_offset, shm_offset, len, flags };
            device.shared_object_add(object).unwrap();
            device.shared_object_remove(object).unwrap();
            device.shmem_map(&map, &file).unwrap();
            device.shmem_unmap(&map).unwrap_err();
        });
        let expected = [
            (BackEndRequest::SharedObjectAdd(UUID), 0),
            (BackEndRequest::SharedObjectRemove(UUID), 0),
            (BackEndRequest::ShmemMap(MAP, expected_file), 0),
            (BackEndRequest::ShmemUnmap(MAP), 22),
        ];
        for (request, result) in expected {
            let message = next_request(&mut channel, result).await;
            assert_eq!(BackEndRequest::decode(message), Ok(request));
        }
        requests.await.unwrap();
        drop(front_end);
        back_end.finish().await;
    })
    .await;
}

/// The crate sends a descriptor with the request, the specification has it in the reply: a difference on purpose.
#[tokio::test]
async fn the_crates_look_up_of_a_shared_object_is_refused() {
    in_time(async {
        let (_front_end, _back_end, mut channel, device) = session().await;
        let request = tokio::task::spawn_blocking(move || {
            let object = VhostUserSharedMsg::from_slice(&UUID).unwrap();
            device.shared_object_lookup(object, &memfd()).unwrap();
        });
        let message = next_request(&mut channel, 0).await;
        let what = "SHARED_OBJECT_LOOKUP";
        assert_eq!(BackEndRequest::decode(message), Err(DecodeError::Descriptors { what, expected: 0..=0, found: 1 }));
        request.await.unwrap();
    })
    .await;
}
