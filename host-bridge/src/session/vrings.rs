//! Vrings: their eventfds, their start and stop, and the inflight buffer that has to be there before the first start.

use std::rc::Rc;

use vvu_protocol::control::Handle;
use vvu_protocol::features::ProtocolFeatures;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, Inflight, VringFile, VringState};
use vvu_protocol::window::{Area, Buffer, Span};

use super::SessionError;
use super::device_state::{Descriptor, Request};
use super::inflight::{self, InflightError, OWN_QUEUE_SIZE_MIN};
use super::relay::{Answer, Relay, unexpected_answer};
use crate::appliance::{ApplianceError, file_identity};
use crate::doorbells::{OutwardSignal, check_eventfd};
use crate::translate;

impl Relay<'_> {
    pub(super) async fn set_kick(&mut self, file: &VringFile<Descriptor>) -> Result<Answer, SessionError> {
        if let Err(error) = check_eventfd(file.descriptor.as_deref()) {
            return Ok(self.refuse("SET_VRING_KICK", error));
        }
        if let Err(refusal) = self.provide_inflight().await? {
            return Ok(refusal);
        }
        let vector = self.appliance.doorbells.vector(file.index, file.descriptor.as_ref());
        let vector = vector.ok_or_else(|| self.no_queue(file.index))?;
        self.all_known().await?;
        self.session.state.crosses(&Request::SetVringKick(file.clone()));
        let translated = translate::vring_file(file, Handle::Vector(vector));
        let value = self.ask_acknowledgement(FrontEndRequest::SetVringKick(translated)).await?;
        if value == 0 {
            // After the answer: only then somebody listens at the vector. What was signalled before is still there.
            if let Err(error) = self.appliance.doorbells.set_kick(file.index, vector, file.descriptor.clone()) {
                return Ok(self.refuse("SET_VRING_KICK", error));
            }
        }
        Ok(Answer::Acknowledgement(value))
    }

    fn no_queue(&self, index: u8) -> SessionError {
        SessionError::Queue { found: u32::from(index), count: self.appliance.doorbells.queue_count() }
    }

    /// The appliance's VMM has heard of all that the agent may be told of.
    async fn all_known(&mut self) -> Result<(), SessionError> {
        let known = self.appliance.doorbells.all_known();
        self.session.link.meanwhile_attached(&mut self.appliance.control, known).await??;
        Ok(())
    }

    pub(super) async fn set_call(&mut self, file: &VringFile<Descriptor>) -> Result<Answer, SessionError> {
        self.set_outward(OutwardSignal::Call, file).await
    }

    pub(super) async fn set_error(&mut self, file: &VringFile<Descriptor>) -> Result<Answer, SessionError> {
        self.set_outward(OutwardSignal::Error, file).await
    }

    async fn set_outward(
        &mut self,
        signal: OutwardSignal,
        file: &VringFile<Descriptor>,
    ) -> Result<Answer, SessionError> {
        if let Err(error) = check_eventfd(file.descriptor.as_deref()) {
            return Ok(self.refuse("eventfd of a vring", error));
        }
        let peer = self.appliance.doorbells.peer(file.index, signal, file.descriptor.as_ref());
        let peer = peer.ok_or_else(|| self.no_queue(file.index))?;
        self.all_known().await?;
        // Before the request: the back-end may signal as soon as it has it.
        if let Err(error) = self.appliance.doorbells.set_target(file.index, signal, peer, file.descriptor.clone()) {
            return Ok(self.refuse("eventfd of a vring", error));
        }
        let translated = translate::vring_file(file, Handle::Peer(peer));
        let request = match signal {
            OutwardSignal::Call => FrontEndRequest::SetVringCall(translated),
            OutwardSignal::Error => FrontEndRequest::SetVringErr(translated),
        };
        let value = self.ask_acknowledgement(request).await?;
        if value == 0
            && signal == OutwardSignal::Call
            && let Err(error) = self.appliance.doorbells.call_was_set(file.index, peer, file.descriptor.clone())
        {
            return Ok(self.refuse("eventfd of a vring", error));
        }
        Ok(Answer::Acknowledgement(value))
    }

    /// The front-end takes the vring back with the answer: every call has come by then, and every bit of the dirty log.
    pub(super) async fn stop_vring(&mut self, state: VringState) -> Result<Answer, SessionError> {
        let name = "GET_VRING_BASE";
        let reply = match self.ask(FrontEndRequest::GetVringBase(state)).await? {
            FrontEndReply::VringState(reply) if reply.index == state.index => reply,
            FrontEndReply::Acknowledgement(value) => return Ok(Answer::Acknowledgement(value)),
            _ => return Err(unexpected_answer(name)),
        };
        let stopped = self.appliance.doorbells.stop(state.index);
        stopped.map_err(|source| ApplianceError::Io { what: "eventfds of a vring", source })?;
        self.merge_log_tail();
        Ok(Answer::Reply(FrontEndReply::VringState(reply)))
    }

    /// Stops what the front-end has started, so that another appliance can go on from there.
    pub(super) async fn drain(mut self) -> Result<(), SessionError> {
        for index in self.session.state.started() {
            match self.stop_vring(VringState { index, num: 0 }).await? {
                Answer::Reply(FrontEndReply::VringState(state)) => self.session.state.drained(index, state.num),
                // The front-end has not asked for it, and is not to blame.
                _ => return Err(unexpected_answer("GET_VRING_BASE")),
            }
        }
        Ok(())
    }

    pub(super) async fn set_vring_size(&mut self, state: &VringState) -> Result<Answer, SessionError> {
        if let Some(own) = self.session.state.own_inflight()
            && state.num > u32::from(own.queue_size)
        {
            let error = InflightError::LargeVring { found: state.num, limit: own.queue_size };
            return Ok(self.refuse("SET_VRING_NUM", error));
        }
        self.carry(FrontEndRequest::SetVringNum(*state)).await
    }

    /// GET_INFLIGHT_FD: a new buffer each time, which only the front-end keeps.
    pub(super) fn make_inflight(&mut self, wanted: &Inflight) -> Result<Answer, SessionError> {
        let queues = self.appliance.doorbells.queue_count();
        let made = inflight::describe(wanted.queue_count, wanted.queue_size, queues)
            .and_then(|inflight| Ok((inflight, inflight::buffer(&inflight)?)));
        Ok(match made {
            Ok((inflight, file)) => Answer::Reply(FrontEndReply::Inflight(inflight, Rc::new(file))),
            Err(error) => self.refuse("GET_INFLIGHT_FD", error),
        })
    }

    /// The new buffer is mapped beside the one before, which goes when the back-end has agreed.
    pub(super) async fn set_inflight(
        &mut self,
        inflight: &Inflight,
        file: &Descriptor,
    ) -> Result<Answer, SessionError> {
        let buffer = match self.place_inflight(inflight, file) {
            Ok(buffer) => buffer,
            Err(error) => return Ok(self.refuse("SET_INFLIGHT_FD", error)),
        };
        let pieces: Vec<(Span, _)> = buffer.span.map(|span| (span, file.as_ref())).into_iter().collect();
        let before = self.mapped_in(Area::INFLIGHT);
        if let Err(error) = self.map_buffer(&pieces).await? {
            return Ok(self.refuse("SET_INFLIGHT_FD", error));
        }
        let value = self.ask_acknowledgement(translate::inflight(inflight, buffer.offset)).await?;
        let kept = if value == 0 { buffer.span.into_iter().collect() } else { before };
        self.keep_only(Area::INFLIGHT, &kept).await?;
        Ok(Answer::Acknowledgement(value))
    }

    fn place_inflight(&self, inflight: &Inflight, file: &Descriptor) -> Result<Buffer, anyhow::Error> {
        inflight::check(inflight, self.appliance.doorbells.queue_count())?;
        let identity = file_identity(file)?;
        let mapped = self.appliance.window.mapped();
        let buffer = Area::INFLIGHT.place(identity, inflight.mmap_offset, inflight.mmap_size, mapped);
        let buffer = buffer.map_err(InflightError::from)?;
        if buffer.tail.is_some() {
            return Err(InflightError::Unaligned.into());
        }
        Ok(buffer)
    }

    /// Gives the back-end an inflight buffer of the bridge's own, if it can use one and the front-end has none: what is in
    /// flight when an appliance is lost is lost with no front-end then. The inner answer is a refusal.
    async fn provide_inflight(&mut self) -> Result<Result<(), Answer>, SessionError> {
        let state = &self.session.state;
        let is_negotiated =
            state.protocol().is_some() && self.session.back_end_protocol.contains(ProtocolFeatures::INFLIGHT_SHMFD);
        if !is_negotiated || state.inflight().is_some() || !state.started().is_empty() {
            return Ok(Ok(()));
        }
        let (queues, largest) = (self.appliance.doorbells.queue_count(), state.largest_vring());
        let queue_size = u16::try_from(largest).unwrap_or(u16::MAX).max(OWN_QUEUE_SIZE_MIN);
        let made = inflight::describe(u16::try_from(queues).unwrap_or(u16::MAX), queue_size, queues)
            .and_then(|inflight| Ok((inflight, Rc::new(inflight::buffer(&inflight)?))));
        let (inflight, file) = match made {
            Ok(made) => made,
            Err(error) => return Ok(Err(self.refuse("start of a vring without an inflight buffer", error))),
        };
        match self.set_inflight(&inflight, &file).await? {
            Answer::Acknowledgement(0) => {
                self.session.state.set_own_inflight(Some((inflight, file)));
                Ok(Ok(()))
            }
            refusal => Ok(Err(refusal)),
        }
    }
}
