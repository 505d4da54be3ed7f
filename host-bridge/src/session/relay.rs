//! Requests of an attached front-end, one after the other.

use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::sync::watch;
use vvu_protocol::carriage::{self, Carriage};
use vvu_protocol::control::{Channel, Frame, Handle};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::{MAX_TABLE_REGIONS, MemoryError, MemoryRegion, check_table};
use vvu_protocol::message::{
    BackEndReply, FrontEndReply, FrontEndRequest, RawMessage, ReplyPayload, VringAddresses, VringFile, VringState,
};
use vvu_protocol::window::{Layout, Plan, RegionOfFile, WindowError};
use vvu_socket::event::EventError;

use super::{Interrupted, Session, SessionError};
use crate::appliance::control::ControlState;
use crate::appliance::window::WindowState;
use crate::appliance::{Appliance, ApplianceError, file_identity};
use crate::doorbells::{OutwardSignal, check_eventfd};
use crate::translate;

/// How long the agent may take for an answer. GET_VRING_BASE waits for all requests in flight, on a disk that may be slow.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);

/// Answer that says "not done". The specification gives its value no further meaning.
const REFUSED: u64 = 1;

/// Why a memory table was refused; the session goes on with the table before.
#[derive(Debug, thiserror::Error)]
enum TableError {
    #[error("memory table")]
    Table(#[from] MemoryError),
    #[error("memory table does not fit the window")]
    Window(#[from] WindowError),
    #[error("memory table: file of a region")]
    File(#[source] ApplianceError),
    #[error("memory table")]
    Refused(#[source] ApplianceError),
    #[error("memory table: the back-end answered {0}")]
    BackEnd(u64),
}

enum Answer {
    Reply(FrontEndReply<OwnedFd>),
    Acknowledgement(u64),
}

/// What a relay remembers between two calls.
#[derive(Debug, Default)]
pub(super) struct State {
    attachment: u32,
    watch: Option<ApplianceWatch>,
    offered: Option<Features>,
    offered_protocol: Option<ProtocolFeatures>,
    protocol: Option<ProtocolFeatures>,
}

impl State {
    pub(super) fn attach(&mut self, attachment: u32, appliance: &mut Appliance) {
        self.attachment = attachment;
        self.watch = Some(ApplianceWatch::new(appliance));
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
            tokio::select! {
                message = self.session.front_end.recv() => match message? {
                    Some(message) => self.take(message).await?,
                    None => return Err(SessionError::Closed),
                },
                frame = self.appliance.control.recv() => self.unasked(frame?).await?,
                lost = lost(&mut self.session.relay.watch) => return Err(lost),
                () = &mut interrupt => return Ok(Interrupted),
            }
        }
    }

    async fn take(&mut self, message: RawMessage<OwnedFd>) -> Result<(), SessionError> {
        let header = message.header;
        let request = FrontEndRequest::decode(message)?;
        let name = request.name();
        tracing::debug!(
            session = self.session.relay.attachment,
            request = name,
            code = header.request,
            "request of the front-end"
        );
        let reply = match self.handle(request).await? {
            Answer::Reply(reply) => reply,
            Answer::Acknowledgement(value) => {
                let asked = header.needs_reply
                    && self
                        .session
                        .relay
                        .protocol
                        .is_some_and(|protocol| protocol.contains(ProtocolFeatures::REPLY_ACK));
                match (asked, value) {
                    (true, value) => FrontEndReply::Acknowledgement(value),
                    (false, 0) => return Ok(()),
                    (false, _) => return Err(SessionError::Untold { request: name }),
                }
            }
        };
        Ok(self.session.front_end.send(&reply.encode(header.request)).await?)
    }

    async fn handle(&mut self, request: FrontEndRequest<OwnedFd>) -> Result<Answer, SessionError> {
        use FrontEndRequest as R;
        match request {
            R::GetFeatures => self.offer().await,
            R::SetFeatures(features) => self.set_features(features).await,
            R::GetProtocolFeatures => self.offer_protocol().await,
            R::SetProtocolFeatures(features) => self.set_protocol_features(features).await,
            R::GetQueueNum => self.queue_count().await,
            R::SetMemTable(table) => self.set_memory(table).await,
            R::SetVringKick(file) => self.set_kick(file).await,
            R::SetVringCall(file) => self.set_outward(OutwardSignal::Call, file).await,
            R::SetVringErr(file) => self.set_outward(OutwardSignal::Error, file).await,
            R::GetVringBase(state) => self.stop_vring(state).await,
            R::SetVringNum(VringState { index, .. })
            | R::SetVringBase(VringState { index, .. })
            | R::SetVringEnable(VringState { index, .. })
            | R::SetVringAddr(VringAddresses { index, .. }) => {
                self.check_queue(index)?;
                self.relay(request).await
            }
            other => self.relay(other).await,
        }
    }

    /// Sends a request to the agent as it is, and its answer back.
    async fn relay(&mut self, request: FrontEndRequest<OwnedFd>) -> Result<Answer, SessionError> {
        let (name, row) = (request.name(), request.row());
        let carried = match carriage::front_end(request.code()) {
            Carriage::Refused(reason) => Err(reason),
            _ => request.without_descriptors().ok_or("it has descriptors"),
        };
        let request = match carried {
            Ok(request) => request,
            Err(reason) => {
                tracing::warn!(session = self.session.relay.attachment, request = name, reason, "refused");
                let has_reply = row.is_some_and(|row| row.reply != ReplyPayload::None);
                let refusal = Answer::Acknowledgement(REFUSED);
                return if has_reply { Err(SessionError::NotOffered { request: name, reason }) } else { Ok(refusal) };
            }
        };
        match self.ask(request).await? {
            FrontEndReply::Acknowledgement(value) => Ok(Answer::Acknowledgement(value)),
            FrontEndReply::Number(value) => Ok(Answer::Reply(FrontEndReply::Number(value))),
            FrontEndReply::VringState(state) => Ok(Answer::Reply(FrontEndReply::VringState(state))),
            FrontEndReply::Config(config) => Ok(Answer::Reply(FrontEndReply::Config(config))),
            _ => Err(unexpected_answer(name)),
        }
    }

    async fn offer(&mut self) -> Result<Answer, SessionError> {
        let value = self.ask_number(FrontEndRequest::GetFeatures).await?;
        self.session.relay.offered = Some(Features::from_bits_retain(value));
        Ok(Answer::Reply(FrontEndReply::Number(value)))
    }

    async fn set_features(&mut self, features: Features) -> Result<Answer, SessionError> {
        check_offered(features.bits(), self.session.relay.offered.map_or(0, |offered| offered.bits()))?;
        self.relay(FrontEndRequest::SetFeatures(features)).await
    }

    async fn offer_protocol(&mut self) -> Result<Answer, SessionError> {
        let value = self.ask_number(FrontEndRequest::GetProtocolFeatures).await?;
        let offered = carriage::offer_protocol(ProtocolFeatures::from_bits_retain(value));
        self.session.relay.offered_protocol = Some(offered);
        Ok(Answer::Reply(FrontEndReply::Number(offered.bits())))
    }

    async fn set_protocol_features(&mut self, protocol: ProtocolFeatures) -> Result<Answer, SessionError> {
        check_offered(protocol.bits(), self.session.relay.offered_protocol.map_or(0, |offered| offered.bits()))?;
        self.session.relay.protocol = Some(protocol);
        self.relay(FrontEndRequest::SetProtocolFeatures(protocol.difference(carriage::OWN_PROTOCOL_FEATURES))).await
    }

    async fn queue_count(&mut self) -> Result<Answer, SessionError> {
        let back_end = self.ask_number(FrontEndRequest::GetQueueNum).await?;
        let count = back_end.min(self.appliance.doorbells.queue_count() as u64);
        Ok(Answer::Reply(FrontEndReply::Number(count)))
    }

    async fn set_kick(&mut self, file: VringFile<OwnedFd>) -> Result<Answer, SessionError> {
        let vector = self.appliance.doorbells.vector(file.index).ok_or(self.no_queue(file.index))?;
        if outcome("SET_VRING_KICK", check_eventfd(file.descriptor.as_ref())) != 0 {
            return Ok(Answer::Acknowledgement(REFUSED));
        }
        let translated = translate::vring_file(&file, Handle::Vector(vector));
        let value = self.ask_acknowledgement(FrontEndRequest::SetVringKick(translated)).await?;
        if value == 0 {
            // After the answer: only then somebody listens at the vector. What was signalled before is still there.
            let set = self.appliance.doorbells.set_kick(file.index, file.descriptor);
            return Ok(Answer::Acknowledgement(outcome("SET_VRING_KICK", set)));
        }
        Ok(Answer::Acknowledgement(value))
    }

    async fn set_outward(&mut self, signal: OutwardSignal, file: VringFile<OwnedFd>) -> Result<Answer, SessionError> {
        let peer = self.appliance.doorbells.peer(file.index, signal).ok_or(self.no_queue(file.index))?;
        let translated = translate::vring_file(&file, Handle::Peer(peer));
        // Before the request: the back-end may signal as soon as it has it.
        let set = self.appliance.doorbells.set_target(file.index, signal, file.descriptor);
        if outcome("eventfd of a vring", set) != 0 {
            return Ok(Answer::Acknowledgement(REFUSED));
        }
        let request = match signal {
            OutwardSignal::Call => FrontEndRequest::SetVringCall(translated),
            OutwardSignal::Error => FrontEndRequest::SetVringErr(translated),
        };
        self.ask_acknowledgement(request).await.map(Answer::Acknowledgement)
    }

    /// The driver VM's VMM takes the vring back with the answer: no call may come later.
    async fn stop_vring(&mut self, state: VringState) -> Result<Answer, SessionError> {
        self.check_queue(state.index)?;
        let answer = self.relay(FrontEndRequest::GetVringBase(state)).await?;
        let stopped = self.appliance.doorbells.stop(state.index);
        stopped.map_err(|source| ApplianceError::Io { what: "eventfds of a vring", source })?;
        Ok(answer)
    }

    /// Maps what is new, tells the back-end, unmaps what is old, and only then answers.
    async fn set_memory(&mut self, table: Vec<(MemoryRegion, OwnedFd)>) -> Result<Answer, SessionError> {
        let session = self.session.relay.attachment;
        let plan = match plan_table(&self.appliance.layout, &table) {
            Ok(plan) => plan,
            Err(error) => return Ok(refuse(session, &error)),
        };
        if let Err((mapped, error)) = self.map_new(&plan, &table).await? {
            self.unmap(plan.map.get(..mapped).unwrap_or_default()).await?;
            return Ok(refuse(session, &TableError::Refused(error)));
        }
        let regions: Vec<MemoryRegion> = table.iter().map(|(region, _)| *region).collect();
        let value = self.ask_acknowledgement(translate::memory_table(&regions, &plan.offsets)).await?;
        if value != 0 {
            self.unmap(&plan.map).await?;
            return Ok(refuse(session, &TableError::BackEnd(value)));
        }
        self.unmap(&plan.unmap).await?;
        self.appliance.layout.commit(&plan);
        tracing::info!(session, regions = regions.len(), files = plan.spans.len(), "driver memory is in the window");
        Ok(Answer::Acknowledgement(0))
    }

    /// Maps the plan's new spans. The inner error says how many had been mapped when the appliance's VMM refused one.
    async fn map_new(
        &mut self,
        plan: &Plan,
        table: &[(MemoryRegion, OwnedFd)],
    ) -> Result<Result<(), (usize, ApplianceError)>, SessionError> {
        for (index, span) in plan.map.iter().enumerate() {
            let files = table.iter().map(|(_, file)| file);
            let mut of_span = files.filter(|file| file_identity(file).is_ok_and(|(id, _)| id == span.file));
            let Some(file) = of_span.next() else { continue };
            let file =
                file.try_clone().map_err(|source| ApplianceError::Io { what: "duplicate of a memory file", source })?;
            match self.appliance.window.map(span, file).await {
                Ok(()) => {}
                Err(ApplianceError::Reset) => return Err(SessionError::WindowLost),
                Err(error @ ApplianceError::Refused { .. }) => return Ok(Err((index, error))),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Ok(()))
    }

    async fn unmap(&mut self, spans: &[vvu_protocol::window::Span]) -> Result<(), SessionError> {
        for span in spans {
            match self.appliance.window.unmap(span).await {
                Ok(()) => {}
                Err(ApplianceError::Reset) => return Err(SessionError::WindowLost),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    async fn ask_number(&mut self, request: FrontEndRequest<Handle>) -> Result<u64, SessionError> {
        let name = request.name();
        match self.ask(request).await? {
            FrontEndReply::Number(value) => Ok(value),
            _ => Err(unexpected_answer(name)),
        }
    }

    async fn ask_acknowledgement(&mut self, request: FrontEndRequest<Handle>) -> Result<u64, SessionError> {
        let name = request.name();
        match self.ask(request).await? {
            FrontEndReply::Acknowledgement(value) => Ok(value),
            _ => Err(unexpected_answer(name)),
        }
    }

    /// Sends a request to the agent and waits for the answer.
    async fn ask(&mut self, request: FrontEndRequest<Handle>) -> Result<FrontEndReply<Handle>, SessionError> {
        let (code, name) = (request.code(), request.name());
        let frame = Frame::new(Channel::FrontEnd, self.session.relay.attachment, request.encode(true));
        self.appliance.control.commands.send(&frame).await?;
        match tokio::time::timeout(ANSWER_TIMEOUT, self.answer(code)).await {
            Ok(reply) => reply,
            Err(_) => Err(ApplianceError::Timeout { what: name, seconds: ANSWER_TIMEOUT.as_secs() }.into()),
        }
    }

    async fn answer(&mut self, code: u32) -> Result<FrontEndReply<Handle>, SessionError> {
        loop {
            tokio::select! {
                // An answer that has come counts, even if the back-end went down right after it.
                biased;
                frame = self.appliance.control.recv() => {
                    let frame = frame?;
                    if frame.session == self.session.relay.attachment && frame.channel == Channel::FrontEnd {
                        let decoded = FrontEndReply::decode(code, frame.message);
                        return decoded.map_err(|source| ApplianceError::Decode { device: "control", source }.into());
                    }
                    self.unasked(frame).await?;
                }
                lost = lost(&mut self.session.relay.watch) => return Err(lost),
            }
        }
    }

    /// A frame that answers nothing: of an earlier session, or a request of the back-end, which is not offered.
    async fn unasked(&mut self, frame: Frame) -> Result<(), SessionError> {
        if frame.session != self.session.relay.attachment {
            tracing::debug!(
                session = self.session.relay.attachment,
                of = frame.session,
                "dropped a frame of another session"
            );
            return Ok(());
        }
        let code = frame.message.header.request;
        if frame.channel == Channel::FrontEnd || frame.message.header.is_reply {
            let request = "an answer nobody waits for";
            return Err(ApplianceError::Request { device: "control", request }.into());
        }
        let message = BackEndReply::Acknowledgement(REFUSED).encode(code);
        let reply = Frame::new(Channel::BackEnd, self.session.relay.attachment, message);
        Ok(self.appliance.control.commands.send(&reply).await?)
    }

    fn check_queue(&self, index: u32) -> Result<(), SessionError> {
        let count = self.appliance.doorbells.queue_count();
        let known = usize::try_from(index).is_ok_and(|index| index < count);
        if known { Ok(()) } else { Err(SessionError::Queue { found: index, count }) }
    }

    fn no_queue(&self, index: u8) -> SessionError {
        SessionError::Queue { found: u32::from(index), count: self.appliance.doorbells.queue_count() }
    }
}

/// What a session cannot live without, since its beginning: the back-end and the mappings.
#[derive(Debug)]
struct ApplianceWatch {
    control: watch::Receiver<ControlState>,
    downs: u64,
    window: watch::Receiver<WindowState>,
    losses: u64,
}

impl ApplianceWatch {
    fn new(appliance: &mut Appliance) -> Self {
        let losses = appliance.window.begin();
        let (control, window) = (appliance.control.state(), appliance.window.state());
        let downs = control.borrow().downs;
        Self { control, downs, window, losses }
    }

    /// Waits until one of them has gone, if only for a moment. May be cancelled.
    async fn lost(&mut self) -> SessionError {
        // If the task that sends a state is gone, so is what it stands for.
        tokio::select! {
            _ = self.control.wait_for(|state| state.downs != self.downs) => SessionError::BackEndDown,
            _ = self.window.wait_for(|state| state.losses != self.losses) => SessionError::WindowLost,
        }
    }
}

async fn lost(watch: &mut Option<ApplianceWatch>) -> SessionError {
    match watch {
        Some(watch) => watch.lost().await,
        None => SessionError::BackEndDown,
    }
}

fn check_offered(found: u64, offered: u64) -> Result<(), SessionError> {
    let surplus = found & !offered;
    if surplus == 0 { Ok(()) } else { Err(SessionError::Features { found, surplus }) }
}

fn unexpected_answer(request: &'static str) -> SessionError {
    ApplianceError::Request { device: "control", request }.into()
}

fn refuse(session: u32, error: &TableError) -> Answer {
    let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    tracing::warn!(session, %error, cause, "refused");
    Answer::Acknowledgement(REFUSED)
}

fn outcome(what: &'static str, result: Result<(), EventError>) -> u64 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            tracing::warn!(what, %error, "refused");
            REFUSED
        }
    }
}

fn plan_table(layout: &Layout, table: &[(MemoryRegion, OwnedFd)]) -> Result<Plan, TableError> {
    let regions: Vec<MemoryRegion> = table.iter().map(|(region, _)| *region).collect();
    check_table(&regions, MAX_TABLE_REGIONS)?;
    let entries = table.iter().map(|(region, file)| {
        let (file, file_len) = file_identity(file).map_err(TableError::File)?;
        Ok(RegionOfFile { region: *region, file, file_len })
    });
    Ok(layout.plan(&entries.collect::<Result<Vec<_>, TableError>>()?)?)
}
