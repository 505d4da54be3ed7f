//! Bringing a back-end to the state that the front-end has set.
//!
//! The requests are those of the front-end, in an order that suits a back-end which knows nothing yet, and go the same way: what
//! the same appliance has mapped is used again. A back-end that offers less than was negotiated cannot take over.

use vvu_protocol::carriage;
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, VringState};
use vvu_protocol::window::Area;

use super::SessionError;
use super::device_state::Step;
use super::relay::{Answer, Relay, UnderWay, unexpected_answer};
use crate::appliance::file_identity;

impl Relay<'_> {
    pub(super) async fn attach(mut self, attachment: u32) -> Result<(), SessionError> {
        tracing::debug!(session = self.session.number, attachment, appliance = self.appliance.number, "attaches");
        self.session.link.begin(attachment, self.appliance);
        self.appliance.control.commands.connect(attachment).await?;
        let is_fresh = self.session.state.offered().is_none() && self.session.state.offered_protocol().is_none();
        self.unmap_leftovers().await?;
        self.session.attaches = true;
        self.negotiate().await?;
        let steps = self.session.state.steps();
        let step_count = steps.len();
        for step in steps {
            self.take_step(step).await?;
        }
        self.session.attaches = false;
        if !is_fresh || step_count > 0 {
            self.wake_both_sides();
            tracing::info!(session = self.session.number, attachment, step_count, "the back-end has taken over");
        }
        Ok(())
    }

    /// The same appliance may still have mapped what a request was about that was under way when the back-end was lost, or a
    /// replay that was, beside what it was to replace: both areas have room for two. Which log is which does not show, for the
    /// page that stands for the end of one is none of its file: neither stays. The bits are in the page, not in its mapping.
    async fn unmap_leftovers(&mut self) -> Result<(), SessionError> {
        let inflight = self.session.state.inflight().map(|(_, file)| file_identity(&file)).transpose()?;
        let mut kept = self.mapped_in(Area::INFLIGHT);
        kept.retain(|span| inflight.is_some_and(|(file, _)| file == span.file));
        self.keep_only(Area::INFLIGHT, &kept).await?;
        let log_was_under_way =
            matches!(self.session.under_way, Some(UnderWay { request: FrontEndRequest::SetLogBase(..), .. }));
        if log_was_under_way || self.session.attaches { self.keep_only(Area::LOG, &[]).await } else { Ok(()) }
    }

    /// Checks that the back-end offers what was negotiated, and negotiates it again.
    async fn negotiate(&mut self) -> Result<(), SessionError> {
        let state = &self.session.state;
        let (features, protocol) = (state.features(), state.protocol());
        let (asks_features, asks_protocol) = (state.offered().is_some(), state.offered_protocol().is_some());
        let (mut offered, mut offered_protocol) = (Features::all(), ProtocolFeatures::all());
        if asks_features {
            offered = Features::from_bits_retain(self.ask_number(FrontEndRequest::GetFeatures).await?);
            check_still_offered("device features", features.map_or(0, |features| features.bits()), offered.bits())?;
        }
        if asks_protocol {
            let value = self.ask_number(FrontEndRequest::GetProtocolFeatures).await?;
            offered_protocol = ProtocolFeatures::from_bits_retain(value);
            self.session.back_end_protocol = offered_protocol;
            let offered = carriage::offer_protocol(offered_protocol);
            let negotiated = protocol.map_or(0, |protocol| protocol.bits());
            check_still_offered("protocol features", negotiated, offered.bits())?;
        }
        self.session.state.narrow_offer(offered, offered_protocol);
        if let Some(protocol) = protocol {
            let answer = self.tell_protocol_features(protocol).await?;
            check_done("SET_PROTOCOL_FEATURES", &answer)?;
        }
        if self.session.state.own_inflight().is_some() && !offered_protocol.contains(ProtocolFeatures::INFLIGHT_SHMFD) {
            tracing::warn!(session = self.session.number, "the next back-end does not track requests in flight");
            self.session.state.set_own_inflight(None);
        }
        Ok(())
    }

    async fn take_step(&mut self, step: Step) -> Result<(), SessionError> {
        let (name, answer) = match step {
            Step::Memory => ("SET_MEM_TABLE", self.replay_memory().await?),
            Step::Resume(state) => ("SET_VRING_BASE", self.resume(state).await?),
            Step::BackChannel => ("SET_BACKEND_REQ_FD", self.replay_back_channel().await?),
            Step::Ask(request) => (request.name(), self.handle(&request).await?),
        };
        check_done(name, &answer)
    }

    /// SET_VRING_BASE of a vring whose position is only known to its used ring.
    async fn resume(&mut self, state: VringState) -> Result<Answer, SessionError> {
        let request = FrontEndRequest::SetVringBase(state);
        let name = request.name();
        match self.session.link.ask(&mut self.appliance.control, request, true).await? {
            FrontEndReply::Acknowledgement(value) => Ok(Answer::Acknowledgement(value)),
            _ => Err(unexpected_answer(name)),
        }
    }

    /// A kick, a call or a change of the configuration may have been lost with the back-end before; one too many is harmless.
    fn wake_both_sides(&mut self) {
        self.appliance.doorbells.signal_all();
        if self.session.state.has_negotiated(ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::CONFIG) {
            self.session.link.back_channel.notify_config_change();
        }
    }
}

fn check_done(request: &'static str, answer: &Answer) -> Result<(), SessionError> {
    match answer {
        Answer::Acknowledgement(0) | Answer::Reply(_) => Ok(()),
        Answer::Acknowledgement(answer) => Err(SessionError::NotReplayed { request, answer: *answer }),
    }
}

fn check_still_offered(what: &'static str, negotiated: u64, offered: u64) -> Result<(), SessionError> {
    let missing = negotiated & !offered;
    if missing == 0 { Ok(()) } else { Err(SessionError::LessOffered { what, missing }) }
}
