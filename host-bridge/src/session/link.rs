//! One attachment to an appliance: questions to its agent, and the frames of all channels sorted.
//!
//! The channels run independently: whoever waits for something of the appliance waits in [`Link::ask`] or [`Link::meanwhile`],
//! and frames of the other channels go to [`BackChannel`] and [`StateTransfer`] all the while.

use std::time::Duration;

use tokio::sync::watch;
use vvu_protocol::control::{Channel, Frame, Handle};
use vvu_protocol::message::{FRONT_END_REQUESTS, FrontEndReply, FrontEndRequest, RawMessage, ReplyPayload, RequestRow};

use super::SessionError;
use super::back_channel::BackChannel;
use super::state_transfer::StateTransfer;
use crate::appliance::control::{ControlPort, ControlState};
use crate::appliance::window::WindowState;
use crate::appliance::{Appliance, ApplianceError};

/// How long the agent may take for an answer. GET_VRING_BASE waits for all requests in flight, on a disk that may be slow.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);

/// Answer that says "not done". The specification gives its value no further meaning.
pub(super) const REFUSED: u64 = 1;

/// What belongs to an attachment, and what of the front-end runs beside its main channel.
#[derive(Debug, Default)]
pub(super) struct Link {
    attachment: u32,
    watch: Option<ApplianceWatch>,
    /// The front-end's connection for requests of the back-end.
    pub(super) back_channel: BackChannel,
    /// The state of the device while it is saved or loaded.
    pub(super) transfer: StateTransfer,
}

impl Link {
    /// A new attachment: whatever is lost from now on belongs to it.
    pub(super) fn begin(&mut self, attachment: u32, appliance: &mut Appliance) {
        // What another back-end was told of a transfer is of no use to this one.
        self.transfer.lost();
        self.attachment = attachment;
        self.watch = Some(ApplianceWatch::new(appliance));
    }

    /// The appliance or its back-end is lost.
    pub(super) fn lost(&mut self) {
        self.watch = None;
        self.transfer.lost();
    }

    /// Number of the protocol's session.
    pub(super) const fn attachment(&self) -> u32 {
        self.attachment
    }

    /// Sends a request to the agent and waits for the answer.
    pub(super) async fn ask(
        &mut self,
        control: &mut ControlPort,
        request: FrontEndRequest<Handle>,
        resume: bool,
    ) -> Result<FrontEndReply<Handle>, SessionError> {
        let (code, name) = (request.code(), request.name());
        let frame = Frame { resume, ..Frame::new(Channel::FrontEnd, self.attachment, request.encode(true)) };
        control.commands.send(&frame).await?;
        match tokio::time::timeout(ANSWER_TIMEOUT, self.answer(control, code)).await {
            Ok(reply) => reply,
            Err(_) => Err(ApplianceError::Timeout { what: name, seconds: ANSWER_TIMEOUT.as_secs() }.into()),
        }
    }

    async fn answer(&mut self, control: &mut ControlPort, code: u32) -> Result<FrontEndReply<Handle>, SessionError> {
        loop {
            tokio::select! {
                // An answer that has come counts, even if the back-end went down right after it.
                biased;
                frame = control.recv() => {
                    if let Some(message) = self.sort(frame?, control).await? {
                        return Ok(decode(code, message)?);
                    }
                }
                lost = self.lost_one() => return Err(lost),
            }
        }
    }

    /// Waits for `event`, and serves the other channels meanwhile.
    pub(super) async fn meanwhile<T>(
        &mut self,
        control: &mut ControlPort,
        event: impl Future<Output = T>,
    ) -> Result<T, SessionError> {
        tokio::pin!(event);
        loop {
            tokio::select! {
                biased;
                value = &mut event => return Ok(value),
                frame = control.recv() => self.take_unasked(frame?, control).await?,
            }
        }
    }

    /// The same, unless something is lost that the attachment cannot live without.
    pub(super) async fn meanwhile_attached<T>(
        &mut self,
        control: &mut ControlPort,
        event: impl Future<Output = T>,
    ) -> Result<T, SessionError> {
        tokio::pin!(event);
        loop {
            tokio::select! {
                biased;
                value = &mut event => return Ok(value),
                frame = control.recv() => self.take_unasked(frame?, control).await?,
                lost = self.lost_one() => return Err(lost),
            }
        }
    }

    /// Takes a frame while no answer on the main channel is waited for.
    pub(super) async fn take_unasked(&mut self, frame: Frame, control: &ControlPort) -> Result<(), SessionError> {
        match self.sort(frame, control).await? {
            None => Ok(()),
            Some(_) => Err(unasked().into()),
        }
    }

    /// Passes a frame on to where it belongs, or gives back what answers on the main channel.
    async fn sort(&mut self, frame: Frame, control: &ControlPort) -> Result<Option<RawMessage<Handle>>, SessionError> {
        if frame.session != self.attachment {
            tracing::debug!(attachment = self.attachment, of = frame.session, "dropped a frame of another session");
            return Ok(None);
        }
        let channel = frame.channel;
        let answer = match channel {
            Channel::FrontEnd => return Ok(Some(frame.message)),
            Channel::BackEnd if frame.message.header.is_reply => return Err(unasked().into()),
            Channel::BackEnd => self.back_channel.take(frame.message, &control.commands, self.attachment)?,
            Channel::State => self.transfer.take(frame.message)?,
        };
        if let Some(message) = answer {
            control.commands.send(&Frame::new(channel, self.attachment, message)).await?;
        }
        Ok(None)
    }

    /// Waits until something is lost that the attachment cannot live without, if only for a moment. May be cancelled.
    pub(super) async fn lost_one(&mut self) -> SessionError {
        match &mut self.watch {
            Some(watch) => watch.lost().await,
            None => SessionError::BackEndDown,
        }
    }
}

/// Reads an answer of the agent. A request with a reply of its own is refused by one without payload.
fn decode(code: u32, message: RawMessage<Handle>) -> Result<FrontEndReply<Handle>, ApplianceError> {
    let has_own_reply = |row: &&RequestRow| row.code == code && row.reply != ReplyPayload::None;
    let is_refusal = message.header.is_reply && message.header.request == code && message.payload.is_empty();
    if is_refusal && FRONT_END_REQUESTS.iter().find(has_own_reply).is_some_and(|row| row.reply != ReplyPayload::Config)
    {
        return Ok(FrontEndReply::Acknowledgement(REFUSED));
    }
    let decoded = FrontEndReply::decode(code, message);
    decoded.map_err(|source| ApplianceError::Decode { device: "control", source })
}

/// An answer nobody waits for is a fault of the appliance.
pub(super) const fn unasked() -> ApplianceError {
    ApplianceError::Request { device: "control", request: "an answer nobody waits for" }
}

/// What an attachment cannot live without, since its beginning: the back-end and the mappings.
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
