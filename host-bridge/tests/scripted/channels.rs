//! What a story needs beside the main channel: the other two channels of the agent, and a back-end that takes over.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use vvu_protocol::control::{Channel, Frame, Handle, Status};
use vvu_protocol::features::ProtocolFeatures;
use vvu_protocol::message::{BackEndReply, BackEndRequest, FrontEndReply, FrontEndRequest};
use vvu_protocol::state::StateMessage;
use vvu_socket::MessageSocket;

use super::agent::Agent;
use super::front_end::FrontEnd;
use super::{Scene, exchange, told, within};

/// What a front-end sends to mark the end of a replay for the agent.
const MARK: u64 = 0xfeed;
const SEND_RARP: u32 = 19;

/// A request of a replay, and whether it has the flag "resume".
pub(crate) type Replayed = (FrontEndRequest<Handle>, bool);

impl Scene {
    /// A scene with a front-end that has negotiated `protocol`, with a back-end that offers `offered`.
    pub(crate) async fn connected_with(offered: ProtocolFeatures, protocol: ProtocolFeatures) -> (Self, FrontEnd) {
        let mut scene = Self::ready().await;
        let front_end = scene.connect_front_end_with(offered, protocol).await;
        (scene, front_end)
    }

    /// The next front-end connects, and negotiates `protocol` with a back-end that offers `offered`.
    pub(crate) async fn connect_front_end_with(
        &mut self,
        offered: ProtocolFeatures,
        protocol: ProtocolFeatures,
    ) -> FrontEnd {
        let mut front_end = self.new_front_end();
        self.agent.sees_front_end().await;
        let agent = &mut self.agent;
        exchange(&mut front_end, agent, FrontEndRequest::GetFeatures, FrontEndReply::Number(u64::MAX)).await;
        let answer = FrontEndReply::Number(offered.bits());
        exchange(&mut front_end, agent, FrontEndRequest::GetProtocolFeatures, answer).await;
        front_end.send(FrontEndRequest::SetProtocolFeatures(protocol), false).await;
        agent.obliges().await;
        self.journal.take();
        front_end
    }

    /// The back-end dies and comes back, in the same appliance. The front-end stays.
    pub(crate) async fn back_end_restarts(&mut self) {
        self.agent.set_status(Status::empty()).await;
        self.agent.sees_end().await;
        self.agent.set_status(Status::BACK_END_UP).await;
        self.agent.sees_front_end().await;
    }

    /// The appliance dies, and another one takes its place. The front-end stays.
    pub(crate) async fn appliance_is_replaced(&mut self) {
        self.vmm.dies();
        self.next_appliance().await;
        self.agent.sees_front_end().await;
    }

    /// Lets the new back-end be told everything, and answers what that was.
    pub(crate) async fn replay(&mut self, front_end: &FrontEnd) -> Vec<Replayed> {
        front_end.send(FrontEndRequest::SendRarp(MARK), false).await;
        let replayed = self.agent.answers_replay_until(SEND_RARP).await;
        assert!(!front_end.has_message(), "the front-end has noticed");
        replayed
    }
}

impl Agent {
    /// Answers all requests with "done", to the one with this code, which is not among what comes back.
    pub(crate) async fn answers_replay_until(&mut self, last: u32) -> Vec<Replayed> {
        self.answers_replay_with(ProtocolFeatures::all(), last).await
    }

    /// The same with a back-end that offers these protocol features.
    pub(crate) async fn answers_replay_with(&mut self, offered: ProtocolFeatures, last: u32) -> Vec<Replayed> {
        let mut replayed = Vec::new();
        loop {
            let request = self.request().await;
            let is_resumed = self.is_resumed();
            let answer = match &request {
                FrontEndRequest::GetFeatures => FrontEndReply::Number(u64::MAX),
                FrontEndRequest::GetProtocolFeatures => FrontEndReply::Number(offered.bits()),
                FrontEndRequest::SetLogBase(..) => FrontEndReply::LogBase,
                FrontEndRequest::GetVringBase(state) => FrontEndReply::VringState(*state),
                _ => FrontEndReply::Acknowledgement(0),
            };
            self.answer(answer).await;
            if request.code() == last && !is_resumed {
                return replayed;
            }
            replayed.push((request, is_resumed));
        }
    }

    /// The back-end asks the front-end.
    pub(crate) async fn asks(&mut self, request: BackEndRequest<Handle>) {
        let frame = Frame::new(Channel::BackEnd, self.session, request.encode(true));
        self.send(&frame).await;
    }

    /// Waits for the answer to a request of the back-end, which must be the next frame.
    pub(crate) async fn is_answered(&mut self, code: u32) -> u64 {
        let frame = self.frame().await;
        assert_eq!((frame.channel, frame.session), (Channel::BackEnd, self.session), "{frame:?}");
        match BackEndReply::decode(code, frame.message).unwrap() {
            BackEndReply::Acknowledgement(value) => value,
            BackEndReply::SharedObject(None) => 1,
            other => panic!("expected an acknowledgement, {other:?} came"),
        }
    }

    /// The same, of an answer that takes longer than anything else.
    pub(crate) async fn is_answered_late(&mut self, code: u32) -> u64 {
        while !self.has_frame() {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        self.is_answered(code).await
    }

    /// Sends a message of the state channel.
    pub(crate) async fn sends_state(&mut self, message: StateMessage) {
        self.send(&Frame::new(Channel::State, self.session, message.encode())).await;
    }

    /// The state of the device is loaded, and has no bytes.
    pub(crate) async fn takes_empty_state(&mut self) {
        assert_eq!(self.state().await, StateMessage::Part(Vec::new()));
        self.sends_state(StateMessage::Answer(0)).await;
    }

    /// Waits for a message of the state channel, which must be the next frame.
    pub(crate) async fn state(&mut self) -> StateMessage {
        let frame = self.frame().await;
        assert_eq!((frame.channel, frame.session), (Channel::State, self.session), "{frame:?}");
        StateMessage::decode(frame.message).unwrap()
    }
}

/// The front-end's end of a back channel.
#[derive(Debug)]
pub(crate) struct FrontEndBack {
    socket: MessageSocket,
}

impl FrontEndBack {
    pub(crate) const fn new(socket: MessageSocket) -> Self {
        Self { socket }
    }

    /// The front-end hands over a new back channel, and the agent hears of it.
    pub(crate) async fn hand_over(scene: &mut Scene, front_end: &mut FrontEnd) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let seen = told(front_end, &mut scene.agent, FrontEndRequest::SetBackendReqFd(theirs.into())).await;
        assert_eq!(seen, FrontEndRequest::SetBackendReqFd(Handle::BackChannel));
        Self::new(MessageSocket::new(ours).unwrap())
    }

    /// Waits for the next request, and whether it asks for a reply.
    pub(crate) async fn request(&mut self) -> (BackEndRequest<OwnedFd>, bool) {
        let message = within("a request of the back-end", self.socket.recv()).await.unwrap();
        let message = message.expect("the bridge closed the back channel");
        let asks = message.header.needs_reply;
        (BackEndRequest::decode(message).unwrap(), asks)
    }

    pub(crate) async fn reply(&self, code: u32, value: u64) {
        self.socket.send(&BackEndReply::<OwnedFd>::Acknowledgement(value).encode(code)).await.unwrap();
    }

    pub(crate) async fn send_bytes(&self, bytes: &[u8]) {
        self.socket.send_bytes(bytes, &[]).await.unwrap();
    }

    /// Waits until the bridge closes it.
    pub(crate) async fn sees_end(&mut self) {
        let end = within("the bridge to close the back channel", self.socket.recv()).await;
        assert!(!matches!(end, Ok(Some(_))), "expected the end of the back channel, {end:?} came");
    }
}
