//! Requests to the front-end, one at a time: misses of the IOMMU, and the change of the configuration space.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use vvu_protocol::DecodeError;
use vvu_protocol::message::{BackEndReply, BackEndRequest};
use vvu_socket::{MessageSocket, SocketError};

use super::LOG;
use crate::iommu::miss_message;
use crate::iotlb::Miss;
use crate::notices::Notices;
use crate::vring::Vring;

/// Why the channel is given up.
#[derive(Debug, thiserror::Error)]
enum ChannelError {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("malformed reply")]
    Malformed(#[from] DecodeError),
    #[error("message that was not asked for")]
    Unasked,
}

/// The channel of SET_BACKEND_REQ_FD.
pub(super) struct BackChannel {
    pub(super) socket: MessageSocket,
    pub(super) notices: Arc<Notices>,
    pub(super) vrings: Vec<Vring>,
    /// REPLY_ACK: each request is answered.
    pub(super) acknowledged: bool,
    /// CONFIG: the front-end knows CONFIG_CHANGE.
    pub(super) config: bool,
}

/// What there is to ask for.
enum Question {
    Mapping(usize, Miss),
    ConfigChange,
}

impl BackChannel {
    /// Asks what there is to ask for, until the channel is closed.
    pub(super) async fn run(mut self) {
        for vring in &self.vrings {
            vring.ask_again();
        }
        match self.exchange().await {
            Ok(()) => tracing::debug!("front-end has closed the back channel"),
            Err(error) => {
                if let Some(suppressed) = LOG.admit(Instant::now()) {
                    tracing::warn!(error = crate::in_one_line(&error), suppressed, "back channel is given up");
                }
            }
        }
    }

    async fn exchange(&mut self) -> Result<(), ChannelError> {
        loop {
            let Some(question) = self.next_question() else {
                tokio::select! {
                    () = self.notices.notified() => continue,
                    message = self.socket.recv() => {
                        return if message?.is_none() { Ok(()) } else { Err(ChannelError::Unasked) };
                    }
                }
            };
            let request: BackEndRequest<OwnedFd> = match &question {
                Question::Mapping(_, miss) => BackEndRequest::Iotlb(miss_message(*miss)),
                Question::ConfigChange => BackEndRequest::ConfigChange,
            };
            let code = request.code();
            self.socket.send(&request.encode(self.acknowledged)).await?;
            if !self.acknowledged {
                continue;
            }
            let Some(reply) = self.socket.recv().await? else { return Ok(()) };
            // A failure is an answer, too: what is missing then stays so.
            BackEndReply::decode(code, reply)?;
            if let Question::Mapping(index, miss) = question
                && let Some(vring) = self.vrings.get(index)
            {
                vring.answer_miss(miss);
            }
        }
    }

    fn next_question(&self) -> Option<Question> {
        let miss = self.vrings.iter().enumerate().find_map(|(index, vring)| Some((index, vring.take_miss()?)));
        if let Some((index, miss)) = miss {
            return Some(Question::Mapping(index, miss));
        }
        (self.notices.take_config_change() && self.config).then_some(Question::ConfigChange)
    }
}
