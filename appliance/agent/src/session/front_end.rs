//! The front-end's requests: each is translated, put to the back-end, and answered, with the back-end's reply or a
//! refusal.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::timeout;
use tracing::{debug, info};
use vvu_protocol::control::Handle;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, RawMessage, StateDirection, VringState};
use vvu_socket::MessageSocket;

use super::back_channel::BackChannels;
use super::device_state::Transfers;
use super::end::End;
use super::refusal::{Refusal, RefusalLog};
use super::router::{Incoming, Mailbox};
use super::signals::{SignalChange, Signals};
use super::vrings::{Fact, Position, Vrings};
use crate::back_end::{BackEndLink, LinkError};
use crate::doorbell::Doorbell;
use crate::memory_map::{Change, MemoryMap, Situation};
use crate::regions::RegionError;
use crate::translate::{
    Descriptor, OurEnd, TranslateError, Translation, memory_region, memory_request, pipe_of_back_end, translate,
};
use crate::uuid::Uuid;
use crate::window::Window;

/// How long a back-end may take to answer a request: as long as its slowest disk may keep GET_VRING_BASE waiting.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// What a refused request is answered with: "anything else" than 0 (control profile, "Frame", rule 2).
pub(super) const REFUSED: u64 = 1;

/// Reply to SET_DEVICE_STATE_FD that says: done, use the descriptor that you have.
const NO_DESCRIPTOR_OF_MINE: u64 = 0x100;

/// Bits of that reply that say whether it has failed.
const STATE_FAILURE: u64 = 0xff;

type Reply = FrontEndReply<OwnedFd>;

const DONE: Reply = FrontEndReply::Acknowledgement(0);

/// Why a request has no reply of the back-end.
enum Failure {
    Refused(Refusal),
    Ended(End),
}

impl From<End> for Failure {
    fn from(end: End) -> Self {
        Self::Ended(end)
    }
}

impl From<LinkError> for Failure {
    fn from(error: LinkError) -> Self {
        Self::Ended(error.into())
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<TranslateError> for Failure {
    fn from(error: TranslateError) -> Self {
        Self::Refused(error.into())
    }
}

impl From<RegionError> for Failure {
    fn from(error: RegionError) -> Self {
        Self::Refused(error.into())
    }
}

/// Serves channel 0.
#[derive(Debug)]
pub(super) struct FrontEndTask<'a, D, W> {
    uuid: Uuid,
    bridge: Mailbox,
    link: BackEndLink,
    doorbell: &'a mut D,
    window: &'a W,
    back_channels: Rc<BackChannels>,
    transfers: Rc<Transfers>,
    memory: MemoryMap,
    vrings: Vrings,
    signals: Signals,
    refusals: RefusalLog,
}

impl<'a, D: Doorbell, W: Window> FrontEndTask<'a, D, W> {
    pub(super) fn new(
        uuid: Uuid,
        bridge: Mailbox,
        link: BackEndLink,
        doorbell: &'a mut D,
        window: &'a W,
        back_channels: Rc<BackChannels>,
        transfers: Rc<Transfers>,
    ) -> Self {
        let (memory, vrings, refusals) = (MemoryMap::new(window.window_len()), Vrings::new(), RefusalLog::new(uuid));
        let signals = Signals::default();
        Self { uuid, bridge, link, doorbell, window, back_channels, transfers, memory, vrings, signals, refusals }
    }

    pub(super) async fn run(mut self) -> End {
        loop {
            let incoming = tokio::select! {
                // Nothing is asked of a back-end that is gone.
                biased;
                error = self.link.broken() => return error.into(),
                incoming = self.bridge.receive() => incoming,
            };
            match self.answer(incoming).await {
                Ok(answer) => self.bridge.send(answer).await,
                Err(end) => return end,
            }
        }
    }

    async fn answer(&mut self, Incoming { resume, message }: Incoming) -> Result<RawMessage<Handle>, End> {
        let channel = self.bridge.channel();
        let request = FrontEndRequest::decode(message).map_err(|source| End::NotMessage { channel, source })?;
        let (code, name) = (request.code(), request.name());
        let reply = match self.handle(request, resume).await {
            Ok(reply) => reply,
            Err(Failure::Refused(refusal)) => {
                self.refusals.log(code, name, &refusal);
                FrontEndReply::refusal(code)
            }
            Err(Failure::Ended(end)) => return Err(end),
        };
        debug!(set = %self.uuid, ?reply, "{name}");
        Ok(without_descriptors(reply, code))
    }

    async fn handle(&mut self, request: FrontEndRequest<Handle>, resume: bool) -> Result<Reply, Failure> {
        use FrontEndRequest as R;
        match request {
            R::SetVringBase(base) if resume => self.resume(base).await,
            _ if resume => Err(Refusal::ResumeOther.into()),
            R::SetMemTable(table) => {
                let table = table.into_iter().map(memory_region).collect::<Result<Vec<_>, _>>()?;
                self.change_memory(|memory, situation| memory.replaced(&table, situation)).await
            }
            R::AddMemReg(region, handle) => {
                let region = memory_region((region, handle))?;
                self.change_memory(|memory, situation| memory.added(region, situation)).await
            }
            R::RemMemReg(region) => self.change_memory(|memory, situation| memory.removed(&region, situation)).await,
            R::SetDeviceStateFd(..) if self.transfers.under_way() => Err(Refusal::TransferUnderWay.into()),
            other => self.pass_on(other).await,
        }
    }

    /// A request that the back-end gets as it is, but for its descriptors.
    async fn pass_on(&mut self, request: FrontEndRequest<Handle>) -> Result<Reply, Failure> {
        let (fact, change) = (Fact::of(&request), SignalChange::of(&request));
        let Translation { request, ours } = translate(request, self.window, self.doorbell)?;
        let state = match ours {
            None => None,
            Some(OurEnd::BackChannel(stream)) => {
                // In place before the back-end hears of it: it may use it before it answers.
                self.back_channels.put(MessageSocket::new(stream).map_err(TranslateError::from)?);
                None
            }
            Some(OurEnd::State(direction, pipe)) => Some((direction, pipe)),
        };
        let reply = self.ask(request).await?;
        if let Some(fact) = fact.filter(|_| !is_refusal(&reply)) {
            self.vrings.note(fact);
        }
        if let Some(change) = change {
            if !is_refusal(&reply) {
                self.signals.note(change);
            }
            // What was replaced, or what the back-end has refused, is used by nobody.
            self.doorbell.keep_only(&self.signals.in_use());
        }
        match (state, reply) {
            (Some((direction, pipe)), FrontEndReply::DeviceState(value, theirs)) => {
                self.start_transfer(direction, pipe, value, theirs)
            }
            (_, reply) => Ok(reply),
        }
    }

    /// The back-end has answered SET_DEVICE_STATE_FD.
    fn start_transfer(
        &self,
        direction: StateDirection,
        ours: OwnedFd,
        value: u64,
        theirs: Option<OwnedFd>,
    ) -> Result<Reply, Failure> {
        if value & STATE_FAILURE != 0 {
            return Ok(FrontEndReply::DeviceState(value, None));
        }
        let pipe = match theirs {
            Some(theirs) => pipe_of_back_end(&theirs, direction).map_err(Refusal::Pipe)?,
            None => ours,
        };
        self.transfers.start(direction, pipe).map_err(Refusal::Pipe)?;
        Ok(FrontEndReply::DeviceState(NO_DESCRIPTOR_OF_MINE, None))
    }

    /// Brings a change of memory about, step by step.
    async fn change_memory(
        &mut self,
        plan: impl FnOnce(&MemoryMap, Situation<'_>) -> Result<Change, RegionError>,
    ) -> Result<Reply, Failure> {
        let slots = timeout(REQUEST_TIMEOUT, self.link.memory_slots()).await;
        let slots = slots.map_err(|_| End::NoAnswer { request: "GET_MAX_MEM_SLOTS" })??;
        let seams = self.window.seams();
        let situation = Situation { slots, running: self.vrings.are_running(), seams: &seams };
        let change = plan(&self.memory, situation)?;
        for step in &change.steps {
            let reply = self.ask(memory_request(step, self.window)?).await?;
            if is_refusal(&reply) {
                return Ok(reply);
            }
            self.memory.note_step(step);
        }
        self.memory.commit(change);
        Ok(DONE)
    }

    /// SET_VRING_BASE with the position where the back-end before was lost.
    async fn resume(&mut self, base: VringState) -> Result<Reply, Failure> {
        let index = base.index;
        let num = match self.vrings.position(index)? {
            Position::InflightBuffer => {
                info!(set = %self.uuid, index, "vring resumes where its inflight buffer says");
                base.num
            }
            Position::UsedIndexAt(address) => {
                let len = size_of::<u16>() as u64;
                let offset = self.memory.window_offset(address, len).ok_or(Refusal::UsedRing { index, address })?;
                let used = self.window.read_u16(offset).map_err(|source| Refusal::UsedIndex { index, source })?;
                info!(set = %self.uuid, index, used, "vring resumes at the index of its used ring");
                u32::from(used)
            }
        };
        Ok(self.ask(FrontEndRequest::SetVringBase(VringState { num, ..base })).await?)
    }

    /// Puts a request to the back-end and waits for its answer, but not too long.
    async fn ask(&mut self, request: FrontEndRequest<Descriptor>) -> Result<Reply, End> {
        let name = request.name();
        match timeout(REQUEST_TIMEOUT, self.link.request(request)).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(End::NoAnswer { request: name }),
        }
    }
}

const fn is_refusal(reply: &Reply) -> bool {
    matches!(reply, FrontEndReply::Acknowledgement(value) if *value != 0)
}

/// A reply as it crosses. None of the requests that are carried is answered with a descriptor that stands for anything in
/// the other VM.
fn without_descriptors(reply: Reply, code: u32) -> RawMessage<Handle> {
    let RawMessage { header, payload, .. } = reply.encode(code);
    RawMessage { header, payload, descriptors: Vec::new() }
}
