//! What runs beside the main channel: its beginning, and the one question about its end.

use std::os::fd::AsFd;
use std::time::Duration;

use tokio::time::timeout;
use vvu_protocol::features::ProtocolFeatures;
use vvu_protocol::message::{DeviceStateTransfer, FrontEndReply, FrontEndRequest, StateDirection};

use super::SessionError;
use super::device_state::Descriptor;
use super::link::{ANSWER_TIMEOUT, REFUSED};
use super::relay::{Answer, Relay, number, unexpected_answer};
use super::state_transfer::{Prepared, StateTransfer};
use crate::appliance::ApplianceError;
use crate::translate;

/// Reply to SET_DEVICE_STATE_FD: done, and no descriptor comes back.
const STATE_ACCEPTED: u64 = 0x100;

/// How long the stream of a transfer may go on after CHECK_DEVICE_STATE, which is meant to come behind its end.
const STREAM_TIMEOUT: Duration = ANSWER_TIMEOUT;

impl Relay<'_> {
    pub(super) async fn set_back_channel(&mut self, descriptor: &Descriptor) -> Result<Answer, SessionError> {
        let ours = duplicate(descriptor)?;
        let asks_replies = self.session.state.has_negotiated(ProtocolFeatures::REPLY_ACK);
        let before = std::mem::take(&mut self.session.link.back_channel);
        // Before the request: the back-end may ask as soon as it has the channel.
        if let Err(error) = self.session.link.back_channel.replace(ours, asks_replies) {
            self.session.link.back_channel = before;
            return Ok(self.refuse("SET_BACKEND_REQ_FD", error));
        }
        let value = self.ask_acknowledgement(translate::back_channel()).await?;
        if value != 0 {
            self.session.link.back_channel = before;
        }
        Ok(Answer::Acknowledgement(value))
    }

    /// Brings a new back-end to the back channel that the front-end has.
    pub(super) async fn replay_back_channel(&mut self) -> Result<Answer, SessionError> {
        self.ask_acknowledgement(translate::back_channel()).await.map(Answer::Acknowledgement)
    }

    pub(super) async fn set_state_stream(
        &mut self,
        transfer: DeviceStateTransfer,
        descriptor: &Descriptor,
    ) -> Result<Answer, SessionError> {
        let refused = || Answer::Reply(FrontEndReply::DeviceState(STATE_ACCEPTED | REFUSED, None));
        if self.session.link.transfer.is_under_way() {
            tracing::warn!(session = self.session.number, "refused a transfer of the device's state: one is under way");
            return Ok(refused());
        }
        let prepared = match Prepared::new(duplicate(descriptor)?, transfer.direction) {
            Ok(prepared) => prepared,
            Err(error) => {
                self.refuse("SET_DEVICE_STATE_FD", error);
                return Ok(refused());
            }
        };
        let (commands, attachment) = (self.appliance.control.commands.clone(), self.session.link.attachment());
        let begin = |transfer: &mut StateTransfer, prepared| transfer.begin(prepared, commands, attachment);
        // A back-end may send as soon as it has the stream, and takes nothing before it has agreed.
        let (before, after) = match transfer.direction {
            StateDirection::Save => (Some(prepared), None),
            StateDirection::Load => (None, Some(prepared)),
        };
        if let Some(prepared) = before {
            begin.clone()(&mut self.session.link.transfer, prepared);
        }
        match self.ask(translate::state_stream(transfer)).await? {
            FrontEndReply::DeviceState(value, None) if value & 0xff == 0 => {
                if let Some(prepared) = after {
                    begin(&mut self.session.link.transfer, prepared);
                }
                Ok(Answer::Reply(FrontEndReply::DeviceState(STATE_ACCEPTED, None)))
            }
            FrontEndReply::DeviceState(..) | FrontEndReply::Acknowledgement(_) => {
                self.session.link.transfer.forget();
                Ok(refused())
            }
            _ => Err(unexpected_answer("SET_DEVICE_STATE_FD")),
        }
    }

    /// The back-end is asked when all of the stream has been delivered; whether it was, is known here.
    pub(super) async fn check_state(&mut self) -> Result<Answer, SessionError> {
        let ended = timeout(STREAM_TIMEOUT, self.session.link.transfer.ended());
        let ended = self.session.link.meanwhile_attached(&mut self.appliance.control, ended).await?;
        let answer = match ended {
            Ok(Some(true) | None) => number(self.ask_number(FrontEndRequest::CheckDeviceState).await?),
            Ok(Some(false)) => number(REFUSED),
            Err(_) => {
                self.session.link.transfer.cut_short();
                return Ok(number(REFUSED));
            }
        };
        self.session.link.transfer.forget();
        Ok(answer)
    }
}

fn duplicate(descriptor: &Descriptor) -> Result<std::os::fd::OwnedFd, SessionError> {
    let what = "duplicate of a descriptor of the front-end";
    let duplicate = descriptor.as_fd().try_clone_to_owned();
    duplicate.map_err(|source| ApplianceError::Io { what, source }.into())
}
