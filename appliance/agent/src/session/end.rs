//! Why sessions end, and whose fault that is.

use std::io;

use vvu_protocol::DecodeError;
use vvu_protocol::control::Channel;
use vvu_socket::SocketError;

use super::front_end::REQUEST_TIMEOUT;
use crate::back_end::LinkError;

/// Why a session, or the waiting for one, has ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("front-end has gone")]
    FrontEndGone,
    #[error("back-end has failed")]
    Link(#[from] LinkError),
    #[error("back-end did not answer {request} within {} s", REQUEST_TIMEOUT.as_secs())]
    NoAnswer { request: &'static str },
    #[error("requests of the back-end")]
    BackChannel(#[source] SocketError),
    #[error("back-end sent what is no request")]
    NotBackEndRequest(#[source] DecodeError),
    #[error("pipe for the state of the device")]
    State(#[source] io::Error),
    #[error("bridge sent what is no message of the {channel:?} channel")]
    NotMessage {
        channel: Channel,
        #[source]
        source: DecodeError,
    },
    #[error("bridge sent no frame")]
    NotFrame(#[source] DecodeError),
    #[error("bridge sent an answer on the {0:?} channel that nobody waits for")]
    Unasked(Channel),
    #[error("bridge sent a request on the {0:?} channel out of turn")]
    OutOfTurn(Channel),
}

/// Who has to be replaced, if anybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// Not the back-end.
    NotBackEnd,
    /// The back-end, which has closed its connection; it may have died.
    BackEndClosed,
    /// The back-end; it has to be ended.
    BackEnd,
}

impl End {
    pub(super) const fn fault(&self) -> Fault {
        match self {
            Self::Link(LinkError::Closed | LinkError::Socket(SocketError::Io(_) | SocketError::Truncated { .. })) => {
                Fault::BackEndClosed
            }
            Self::Link(_)
            | Self::NoAnswer { .. }
            | Self::BackChannel(_)
            | Self::NotBackEndRequest(_)
            | Self::State(_) => Fault::BackEnd,
            Self::FrontEndGone
            | Self::NotMessage { .. }
            | Self::NotFrame(_)
            | Self::Unasked(_)
            | Self::OutOfTurn(_) => Fault::NotBackEnd,
        }
    }
}
