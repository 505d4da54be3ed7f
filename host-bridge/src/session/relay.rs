//! Requests of an attached front-end, one after the other: who answers each, and what of it lasts.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::timeout;
use vvu_protocol::carriage::{self, Carriage};
use vvu_protocol::control::Handle;
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MAX_SLOTS;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, Header, RawMessage, ReplyPayload, VringFile, VringState};
use vvu_socket::SocketError;

use super::device_state::{Descriptor, Request};
use super::link::REFUSED;
use super::{Interrupted, Session, SessionError};
use crate::appliance::{Appliance, ApplianceError};

/// How long the front-end may take to make room in its socket. It has asked for the answer that waits.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// Length of an inflight description without the padding of the C structure.
const SHORT_INFLIGHT_LEN: usize = 20;

/// What a request is answered with.
#[derive(Debug)]
pub(super) enum Answer {
    /// Its own reply.
    Reply(FrontEndReply<Descriptor>),
    /// 0 for done, anything else for refused.
    Acknowledgement(u64),
}

/// A request of the front-end that is not answered yet.
#[derive(Debug, Clone)]
pub(super) struct UnderWay {
    header: Header,
    pub(super) request: Request,
}

impl UnderWay {
    fn decode(message: RawMessage<OwnedFd>) -> Result<Self, SessionError> {
        let header = message.header;
        Ok(Self { header, request: FrontEndRequest::decode(message)?.map_descriptors(Rc::new) })
    }
}

/// A session at work with an appliance.
pub(super) struct Relay<'a> {
    pub(super) session: &'a mut Session,
    pub(super) appliance: &'a mut Appliance,
}

impl Relay<'_> {
    pub(super) async fn serve(mut self, interrupt: impl Future<Output = ()>) -> Result<Interrupted, SessionError> {
        tokio::pin!(interrupt);
        loop {
            if let Some(under_way) = self.session.under_way.clone() {
                self.work(under_way).await?;
            }
            let Session { front_end, link, .. } = &mut *self.session;
            tokio::select! {
                message = front_end.recv() => match message? {
                    Some(message) => self.session.under_way = Some(UnderWay::decode(message)?),
                    None => return Err(SessionError::Closed),
                },
                frame = self.appliance.control.recv() => link.take_unasked(frame?, &self.appliance.control).await?,
                lost = link.lost_one() => return Err(lost),
                () = &mut interrupt => return Ok(Interrupted),
            }
        }
    }

    /// Answers a request. If the appliance is lost meanwhile, it stays under way.
    async fn work(&mut self, under_way: UnderWay) -> Result<(), SessionError> {
        let UnderWay { header, request } = under_way;
        let (session, name) = (self.session.number, request.name());
        tracing::debug!(session, request = name, code = header.request, "request of the front-end");
        let answer = self.handle(&request).await?;
        self.session.under_way = None;
        match &answer {
            Answer::Acknowledgement(0) => self.session.state.apply(&request, &FrontEndReply::Acknowledgement(0)),
            Answer::Acknowledgement(_) => {}
            Answer::Reply(reply) => self.session.state.apply(&request, reply),
        }
        let has_own_reply = request.row().is_some_and(|row| row.reply != ReplyPayload::None);
        let asked = header.needs_reply && self.session.state.has_negotiated(ProtocolFeatures::REPLY_ACK);
        let reply = match answer {
            Answer::Reply(reply) => reply,
            Answer::Acknowledgement(value) if asked && !has_own_reply => FrontEndReply::Acknowledgement(value),
            Answer::Acknowledgement(0) => return Ok(()),
            Answer::Acknowledgement(_) => return Err(SessionError::Untold { request: name }),
        };
        self.reply(&header, reply).await
    }

    async fn reply(&self, header: &Header, reply: FrontEndReply<Descriptor>) -> Result<(), SessionError> {
        let is_inflight = matches!(reply, FrontEndReply::Inflight(..));
        let mut message = reply.encode(header.request);
        if is_inflight && header.payload_len == SHORT_INFLIGHT_LEN {
            // Who sends the structure without its padding reads it without.
            message.payload.truncate(SHORT_INFLIGHT_LEN);
            message.header.payload_len = message.payload.len();
        }
        match timeout(SEND_TIMEOUT, self.session.front_end.send(&message)).await {
            Ok(sent) => Ok(sent?),
            Err(_) => Err(SocketError::Io(std::io::ErrorKind::TimedOut.into()).into()),
        }
    }

    /// Does what a request asks for, whether the front-end asks or the bridge does in its place.
    pub(super) async fn handle(&mut self, request: &Request) -> Result<Answer, SessionError> {
        use FrontEndRequest as R;
        self.check_queue_of(request)?;
        match request {
            R::GetFeatures => self.offer().await,
            R::SetFeatures(features) => self.set_features(*features).await,
            R::GetProtocolFeatures => self.offer_protocol().await,
            R::SetProtocolFeatures(features) => self.set_protocol_features(*features).await,
            R::GetQueueNum => self.queue_count().await,
            R::GetMaxMemSlots => Ok(number(MAX_SLOTS as u64)),
            R::SetMemTable(table) => self.set_memory(table).await,
            R::AddMemReg(region, file) => self.add_region(region, file).await,
            R::RemMemReg(region) => self.remove_region(region).await,
            R::SetLogBase(area, file) => self.set_log(area, file).await,
            R::SetLogFd(descriptor) => self.set_log_signal(descriptor).await,
            R::GetInflightFd(wanted) => self.make_inflight(wanted),
            R::SetInflightFd(inflight, file) => self.set_inflight(inflight, file).await,
            R::SetVringNum(state) => self.set_vring_size(state).await,
            R::SetVringKick(file) => self.set_kick(file).await,
            R::SetVringCall(file) => self.set_call(file).await,
            R::SetVringErr(file) => self.set_error(file).await,
            R::GetVringBase(state) => self.stop_vring(*state).await,
            R::SetBackendReqFd(descriptor) => self.set_back_channel(descriptor).await,
            R::SetDeviceStateFd(transfer, descriptor) => self.set_state_stream(*transfer, descriptor).await,
            R::CheckDeviceState => self.check_state().await,
            other => self.carry(other.clone()).await,
        }
    }

    fn check_queue_of(&self, request: &Request) -> Result<(), SessionError> {
        use FrontEndRequest as R;
        let found = match request {
            R::SetVringNum(VringState { index, .. })
            | R::SetVringBase(VringState { index, .. })
            | R::GetVringBase(VringState { index, .. })
            | R::SetVringEnable(VringState { index, .. }) => *index,
            R::SetVringAddr(addresses) => addresses.index,
            R::SetVringKick(VringFile { index, .. })
            | R::SetVringCall(VringFile { index, .. })
            | R::SetVringErr(VringFile { index, .. }) => u32::from(*index),
            _ => return Ok(()),
        };
        let count = self.appliance.doorbells.queue_count();
        let exists = usize::try_from(found).is_ok_and(|index| index < count);
        if exists { Ok(()) } else { Err(SessionError::Queue { found, count }) }
    }

    /// Sends a request to the agent as it is, and its answer back; or refuses it by name.
    pub(super) async fn carry(&mut self, request: Request) -> Result<Answer, SessionError> {
        let (name, row) = (request.name(), request.row());
        let carried = match carriage::front_end(request.code()) {
            Carriage::Refused(reason) => Err(reason),
            _ => request.without_descriptors().ok_or("it has descriptors"),
        };
        let request = match carried {
            Ok(request) => request,
            Err(reason) => {
                tracing::warn!(session = self.session.number, request = name, reason, "refused");
                let has_reply = row.is_some_and(|row| row.reply != ReplyPayload::None);
                let refusal = Answer::Acknowledgement(REFUSED);
                return if has_reply { Err(SessionError::NotOffered { request: name, reason }) } else { Ok(refusal) };
            }
        };
        match self.ask(request).await? {
            FrontEndReply::Acknowledgement(value) => Ok(Answer::Acknowledgement(value)),
            FrontEndReply::Number(value) => Ok(number(value)),
            FrontEndReply::Config(config) => Ok(Answer::Reply(FrontEndReply::Config(config))),
            _ => Err(unexpected_answer(name)),
        }
    }

    async fn offer(&mut self) -> Result<Answer, SessionError> {
        Ok(number(self.ask_number(FrontEndRequest::GetFeatures).await?))
    }

    async fn set_features(&mut self, features: Features) -> Result<Answer, SessionError> {
        check_offered(features.bits(), self.session.state.offered().map_or(0, |offered| offered.bits()))?;
        let answer = self.carry(FrontEndRequest::SetFeatures(features)).await?;
        if !features.contains(Features::LOG_ALL) {
            self.merge_log_tail();
        }
        Ok(answer)
    }

    async fn offer_protocol(&mut self) -> Result<Answer, SessionError> {
        let back_end = self.ask_number(FrontEndRequest::GetProtocolFeatures).await?;
        self.session.back_end_protocol = ProtocolFeatures::from_bits_retain(back_end);
        Ok(number(carriage::offer_protocol(self.session.back_end_protocol).bits()))
    }

    async fn set_protocol_features(&mut self, protocol: ProtocolFeatures) -> Result<Answer, SessionError> {
        check_offered(protocol.bits(), self.session.state.offered_protocol().map_or(0, |offered| offered.bits()))?;
        self.tell_protocol_features(protocol).await
    }

    /// The back-end gets what was negotiated but for what the bridge offers by itself, and with what the bridge uses by
    /// itself.
    pub(super) async fn tell_protocol_features(&mut self, protocol: ProtocolFeatures) -> Result<Answer, SessionError> {
        let own = self.session.back_end_protocol.intersection(ProtocolFeatures::INFLIGHT_SHMFD);
        let told = protocol.difference(carriage::OWN_PROTOCOL_FEATURES).union(own);
        self.carry(FrontEndRequest::SetProtocolFeatures(told)).await
    }

    async fn queue_count(&mut self) -> Result<Answer, SessionError> {
        let back_end = self.ask_number(FrontEndRequest::GetQueueNum).await?;
        Ok(number(back_end.min(self.appliance.doorbells.queue_count() as u64)))
    }

    /// Sends a request to the agent and waits for the answer.
    pub(super) async fn ask(
        &mut self,
        request: FrontEndRequest<Handle>,
    ) -> Result<FrontEndReply<Handle>, SessionError> {
        self.session.link.ask(&mut self.appliance.control, request, false).await
    }

    pub(super) async fn ask_number(&mut self, request: FrontEndRequest<Handle>) -> Result<u64, SessionError> {
        let name = request.name();
        match self.ask(request).await? {
            FrontEndReply::Number(value) => Ok(value),
            _ => Err(unexpected_answer(name)),
        }
    }

    pub(super) async fn ask_acknowledgement(&mut self, request: FrontEndRequest<Handle>) -> Result<u64, SessionError> {
        let name = request.name();
        match self.ask(request).await? {
            FrontEndReply::Acknowledgement(value) => Ok(value),
            _ => Err(unexpected_answer(name)),
        }
    }

    /// Refuses a request, and says why in the log.
    pub(super) fn refuse(&self, what: &'static str, error: impl Into<anyhow::Error>) -> Answer {
        let error = error.into();
        tracing::warn!(session = self.session.number, what, "refused: {error:#}");
        Answer::Acknowledgement(REFUSED)
    }
}

fn check_offered(found: u64, offered: u64) -> Result<(), SessionError> {
    let surplus = found & !offered;
    if surplus == 0 { Ok(()) } else { Err(SessionError::Features { found, surplus }) }
}

pub(super) const fn number(value: u64) -> Answer {
    Answer::Reply(FrontEndReply::Number(value))
}

pub(super) fn unexpected_answer(request: &'static str) -> SessionError {
    ApplianceError::Request { device: "control", request }.into()
}
