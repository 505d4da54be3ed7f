//! One session: the life of a front-end's connection, which outlives back-ends and whole appliances.
//!
//! The session remembers what the front-end has set (`device_state`). [`Session::attach`] brings a back-end to that state,
//! [`Session::serve`] relays requests from then on: each one is decoded once, and then answered by the bridge itself, by the
//! agent, or refused by name. The next one is taken when the one before is answered, so there is never more than one under
//! way. What was not done is never answered as done; if a failure cannot be told because the front-end asked for no answer,
//! the session ends. If the back-end goes meanwhile, the request is kept, and asked again after the next
//! [`Session::attach`].
//!
//! ```text
//!              attach                    interrupt                 drain
//! detached ──────────────► attached ◄──────────────► attached ──────────────► drained: every vring has an exact base
//!    ▲  │   (replay)          │         (idle)                                   │ attach to another appliance
//!    │  └ hung_up             │ BackEndDown, WindowLost, Appliance               ▼
//!    └────── lost ────────────┘                                               attached
//! ```

mod back_channel;
mod device_state;
mod dirty_log;
mod inflight;
mod link;
mod log_tail;
mod memory;
mod relay;
mod replay;
mod side_channels;
mod state_transfer;
mod vrings;

use std::rc::Rc;

use vvu_protocol::DecodeError;
use vvu_protocol::features::ProtocolFeatures;
use vvu_socket::{MessageSocket, SocketError};

use self::device_state::DeviceState;
use self::link::Link;
use self::log_tail::LogTail;
use self::relay::{Relay, UnderWay};
use crate::appliance::{Appliance, ApplianceError};

/// Why a session, or its attachment to an appliance, ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The front-end closed its socket.
    #[error("front-end disconnected")]
    Closed,
    /// The front-end's socket failed, or what came was no message.
    #[error("front-end")]
    Socket(#[from] SocketError),
    /// A message of the front-end could not be decoded.
    #[error("front-end sent a message that is not valid")]
    Decode(#[from] DecodeError),
    /// The front-end uses a feature that it was not offered.
    #[error("front-end sets features {found:#x}, of which {surplus:#x} were not offered")]
    Features {
        /// What it sets.
        found: u64,
        /// What of that was not offered.
        surplus: u64,
    },
    /// The front-end names a queue that does not exist.
    #[error("front-end names queue {found}, the device has {count}")]
    Queue {
        /// Index that came.
        found: u32,
        /// Number of queues.
        count: usize,
    },
    /// A request failed, and the front-end did not ask for an answer.
    #[error("{request} failed, and the front-end cannot be told otherwise")]
    Untold {
        /// Name of the request.
        request: &'static str,
    },
    /// A request has a reply of its own, but this bridge does not carry it.
    #[error("front-end sent {request}, which it was not offered: {reason}")]
    NotOffered {
        /// Name of the request.
        request: &'static str,
        /// Why it is not carried.
        reason: &'static str,
    },
    /// The next back-end does not offer what was negotiated with the one before.
    #[error("the next back-end cannot take over: of the {what} that were negotiated it does not offer {missing:#x}")]
    LessOffered {
        /// Which kind.
        what: &'static str,
        /// What it lacks.
        missing: u64,
    },
    /// The next back-end cannot take over what the front-end has set.
    #[error("the next back-end cannot take over: {request} was answered with {answer}")]
    NotReplayed {
        /// Name of the request.
        request: &'static str,
        /// What the back-end answered.
        answer: u64,
    },
    /// The back-end in the appliance has gone; the same appliance may have another one soon.
    #[error("the back-end in the appliance went down")]
    BackEndDown,
    /// The appliance has reset its window, and driver memory is gone from it; it may boot again.
    #[error("the appliance has reset the window device")]
    WindowLost,
    /// The appliance broke the protocol, or is gone: this one is of no use any more.
    #[error("appliance")]
    Appliance(#[from] ApplianceError),
}

/// Who has to go after a [`SessionError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// The front-end: the session is over, the appliance is as good as before once it has cleared the session away.
    FrontEnd,
    /// The back-end: the session goes on when the same appliance has a back-end and a window again.
    BackEnd,
    /// The appliance: the session goes on with another one.
    Appliance,
}

impl SessionError {
    /// Who has to go.
    #[must_use]
    pub const fn blame(&self) -> Blame {
        match self {
            Self::Closed
            | Self::Socket(_)
            | Self::Decode(_)
            | Self::Features { .. }
            | Self::Queue { .. }
            | Self::Untold { .. }
            | Self::NotOffered { .. }
            | Self::LessOffered { .. }
            | Self::NotReplayed { .. } => Blame::FrontEnd,
            Self::BackEndDown | Self::WindowLost => Blame::BackEnd,
            Self::Appliance(_) => Blame::Appliance,
        }
    }
}

/// [`Session::serve`] was interrupted: no request is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interrupted;

/// One session. Needs a tokio `LocalSet`. Its calls must not be cancelled as long as the session is to go on, but for
/// [`Session::hung_up`].
#[derive(Debug)]
pub struct Session {
    number: u32,
    front_end: MessageSocket,
    state: DeviceState,
    link: Link,
    under_way: Option<UnderWay>,
    /// A back-end is being brought to the state of the one before, or was lost while it was.
    attaches: bool,
    /// What the back-end offers, the front-end's knowledge or not.
    back_end_protocol: ProtocolFeatures,
    /// Stands in the window for the end of the dirty log.
    log_tail: Option<Rc<LogTail>>,
}

impl Session {
    /// A session of a front-end that has just connected. `number` is for the log.
    #[must_use]
    pub fn new(number: u32, front_end: MessageSocket) -> Self {
        let (state, link) = (DeviceState::default(), Link::default());
        let back_end_protocol = ProtocolFeatures::empty();
        Self { number, front_end, state, link, under_way: None, attaches: false, back_end_protocol, log_tail: None }
    }

    /// Shows the agent that a front-end is there, as the protocol's session `attachment`, and brings the back-end to the
    /// state that the front-end has set. `attachment` is larger than every one before at this device set. A session whose
    /// front-end has set nothing yet replays nothing.
    ///
    /// What the same appliance has mapped from before stays mapped, as far as it is still of use.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn attach(&mut self, attachment: u32, appliance: &mut Appliance) -> Result<(), SessionError> {
        Relay { session: self, appliance }.attach(attachment).await
    }

    /// Relays until something ends it, or until `interrupt` is ready and no request is under way.
    ///
    /// # Errors
    /// [`SessionError`] says what ended it; [`SessionError::Closed`] is the orderly end.
    pub async fn serve(
        &mut self,
        appliance: &mut Appliance,
        interrupt: impl Future<Output = ()>,
    ) -> Result<Interrupted, SessionError> {
        Relay { session: self, appliance }.serve(interrupt).await
    }

    /// Stops all started vrings in order, and remembers their bases: the next [`Session::attach`] is to another appliance.
    ///
    /// # Errors
    /// [`SessionError`]; vrings that were not stopped are as after [`Session::lost`].
    pub async fn drain(&mut self, appliance: &mut Appliance) -> Result<(), SessionError> {
        Relay { session: self, appliance }.drain().await
    }

    /// The appliance or its back-end is lost: nobody knows how far vrings have come. A request under way will be asked again
    /// after the next [`Session::attach`].
    pub fn lost(&mut self) {
        self.link.lost();
    }

    /// Waits until the front-end hangs up, while there is no back-end. Requests stay unread, in the socket. May be cancelled.
    pub async fn hung_up(&mut self) -> SessionError {
        match self.front_end.hung_up().await {
            Ok(()) => SessionError::Closed,
            Err(error) => SessionError::Socket(error.into()),
        }
    }
}
