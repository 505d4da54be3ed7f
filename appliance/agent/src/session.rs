//! The life of a device set: it waits for a back-end, then for a front-end, relays requests, and clears away.
//!
//! # Theory of operation
//!
//! The status field of the control device holds one bit of each side; together they are the state (control profile,
//! "Sessions"). This side sets BACK_END_UP when the back-end is ready, and clears it when the back-end has failed; the
//! device sets FRONT_END_UP when a front-end has come, and clears both when it has gone.
//!
//! ```text
//!             back-end ready            front-end comes
//!   ┌─► down ─────────────────► ready ───────────────────► connected ──┐
//!   │     ▲                       │ back-end fails             │ │      │
//!   │     └───────────────────────┼────────────────────────────┘ │      │
//!   │        front-end gone       ▼        back-end fails        │      │
//!   └───────────────────────── orphaned ◄────────────────────────┘      │
//!   └───────────────────────────────────────────────────────────────────┘
//! ```
//!
//! *Down* lasts until nothing of the session before is left in the back-end. *Ready* holds a connection to the back-end on
//! which nothing but GET_FEATURES was said. *Connected* takes one request after the other, and answers each one: with the
//! back-end's reply, or with a refusal of its own. *Orphaned* lasts until the device has taken note.
//!
//! Bridge and back-end may send anything. A frame of another session is dropped; one that cannot be decoded, or is no
//! request, ends the session; a back-end that answers wrongly or too late is ended. The control device itself failing is
//! the end of the device set.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::time::timeout;
use tracing::{debug, error, info, warn};
use vvu_protocol::DecodeError;
use vvu_protocol::control::{Channel, ConfigSpace, Frame, Handle, Status};
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, RawMessage};

use crate::back_end::{BackEndLink, LinkError};
use crate::control::{ControlError, ControlEvent, ControlPort};
use crate::doorbell::Doorbell;
use crate::in_one_line;
use crate::supervisor::Supervisor;
use crate::translate::{Descriptor, Refusal, translate};
use crate::uuid::Uuid;
use crate::window::Window;

/// How long a back-end may take to answer a request: as long as its slowest disk may keep GET_VRING_BASE waiting.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// What a refused request is answered with: "anything else" than 0 (control profile, "Frame", rule 2). A bridge that waits for
/// a reply of another form ends the session, which is right for a request that it should not have sent.
const REFUSED: u64 = 1;

/// Refusals of one session that are logged as warnings: a front-end can cause as many as it likes.
const REFUSALS_LOGGED: u32 = 16;

/// State of a device set, as the status field of the control device shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Down,
    Ready,
    Connected { session: u32 },
    Orphaned,
}

/// Why a session, or the waiting for one, has ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("front-end has gone")]
    FrontEnd,
    #[error("back-end has failed")]
    BackEnd(#[from] LinkError),
    #[error("back-end did not answer {request} within {} s", REQUEST_TIMEOUT.as_secs())]
    NoAnswer { request: &'static str },
    #[error("bridge sent what is no request")]
    NotRequest(#[from] DecodeError),
    #[error("bridge sent an answer that nobody waits for")]
    Unasked,
}

/// Either the session goes on, or it has ended; [`ControlError`] ends the device set.
type Step = Result<Option<Ended>, ControlError>;

/// One emulated device.
#[derive(Debug)]
pub struct DeviceSet<P, D> {
    uuid: Uuid,
    port: P,
    doorbell: D,
    window: Window,
    supervisor: Supervisor,
    state: State,
    /// Refusals in this session.
    refusals: u32,
}

impl<P: ControlPort, D: Doorbell> DeviceSet<P, D> {
    /// Puts a device set together. Its status is down.
    pub const fn new(uuid: Uuid, port: P, doorbell: D, window: Window, supervisor: Supervisor) -> Self {
        Self { uuid, port, doorbell, window, supervisor, state: State::Down, refusals: 0 }
    }

    /// Serves one front-end after the other, for ever. A back-end that was given up leaves the set down.
    ///
    /// # Errors
    /// [`ControlError`] if the control device is of no use any more.
    pub async fn serve(mut self) -> Result<Infallible, ControlError> {
        loop {
            match self.supervisor.ready().await {
                Ok(link) => self.serve_one(link).await?,
                Err(gave_up) => {
                    error!(set = %self.uuid, "{gave_up}");
                    return self.stay_down().await;
                }
            }
        }
    }

    /// From a back-end that is ready to a device set that is down.
    async fn serve_one(&mut self, mut link: BackEndLink) -> Result<(), ControlError> {
        self.port.set_back_end_up(true)?;
        self.set_state(State::Ready);
        let ended = self.session(&mut link).await?;
        // The back-end hears of it first: what it holds of this session it may let go of now.
        drop(link);
        if !matches!(ended, Ended::FrontEnd) {
            warn!(set = %self.uuid, "{}", in_one_line(&ended));
            self.port.set_back_end_up(false)?;
            self.set_state(State::Orphaned);
        }
        match &ended {
            Ended::BackEnd(LinkError::Closed | LinkError::Socket(_)) => self.supervisor.note_end().await,
            Ended::BackEnd(_) | Ended::NoAnswer { .. } => self.supervisor.end().await,
            Ended::FrontEnd | Ended::NotRequest(_) | Ended::Unasked => {}
        }
        while self.port.config()?.status.contains(Status::FRONT_END_UP) {
            self.port.config_change().await?;
        }
        self.set_state(State::Down);
        Ok(())
    }

    /// From ready to the end of the session.
    async fn session(&mut self, link: &mut BackEndLink) -> Result<Ended, ControlError> {
        loop {
            // A peer that never lets us wait would keep other device sets from their turn.
            tokio::task::consume_budget().await;
            let event = tokio::select! {
                event = self.port.event() => event?,
                error = link.broken() => return Ok(error.into()),
            };
            if let Some(ended) = self.handle_event(event, link).await? {
                return Ok(ended);
            }
        }
    }

    async fn handle_event(&mut self, event: ControlEvent, link: &mut BackEndLink) -> Step {
        match event {
            ControlEvent::ConfigChange => self.handle_config(),
            ControlEvent::Frame(bytes) => self.handle_frame(&bytes, link).await,
        }
    }

    fn handle_config(&mut self) -> Step {
        let config = self.port.config()?;
        match (self.state, connected_session(&config)) {
            (State::Ready, Some(session)) => self.set_state(State::Connected { session }),
            (State::Connected { session }, now) if now != Some(session) => return Ok(Some(Ended::FrontEnd)),
            _ => {}
        }
        Ok(None)
    }

    async fn handle_frame(&mut self, bytes: &[u8], link: &mut BackEndLink) -> Step {
        if self.state == State::Ready {
            // The first frame of a session may be seen before the change of the status that came before it.
            self.handle_config()?;
        }
        let State::Connected { session } = self.state else {
            debug!(set = %self.uuid, "dropped a frame: no front-end is connected");
            return Ok(None);
        };
        match Frame::decode(bytes) {
            Err(error) => Ok(Some(error.into())),
            Ok(frame) if frame.session != session => {
                debug!(set = %self.uuid, session = frame.session, "dropped a frame of another session");
                Ok(None)
            }
            Ok(frame) if frame.channel == Channel::BackEnd || frame.message.header.is_reply => Ok(Some(Ended::Unasked)),
            Ok(frame) => match FrontEndRequest::decode(frame.message) {
                Err(error) => Ok(Some(error.into())),
                Ok(request) => self.handle_request(session, request, link).await,
            },
        }
    }

    async fn handle_request(&mut self, session: u32, request: FrontEndRequest<Handle>, link: &mut BackEndLink) -> Step {
        let (code, name) = (request.code(), request.name());
        let reply = match translate(request, &self.window, &mut self.doorbell) {
            Err(refusal) => {
                self.log_refusal(code, name, &refusal);
                FrontEndReply::Acknowledgement(REFUSED)
            }
            Ok(request) => match self.exchange(request, link).await? {
                Ok(reply) => reply,
                Err(ended) => return Ok(Some(ended)),
            },
        };
        debug!(set = %self.uuid, session, ?reply, "{name}");
        let message = without_descriptors(reply, code);
        self.port.send(&Frame::new(Channel::FrontEnd, session, message))?;
        Ok(None)
    }

    /// Sends a request to the back-end and waits for its answer: not too long, and not if the front-end has gone.
    async fn exchange(
        &mut self,
        request: FrontEndRequest<Descriptor>,
        link: &mut BackEndLink,
    ) -> Result<Result<FrontEndReply<OwnedFd>, Ended>, ControlError> {
        let name = request.name();
        let answer = timeout(REQUEST_TIMEOUT, link.request(request));
        tokio::pin!(answer);
        loop {
            tokio::select! {
                answer = &mut answer => return Ok(match answer {
                    Ok(answer) => answer.map_err(Ended::from),
                    Err(_) => Err(Ended::NoAnswer { request: name }),
                }),
                change = self.port.config_change() => {
                    change?;
                    if let Some(ended) = self.handle_config()? {
                        return Ok(Err(ended));
                    }
                }
            }
        }
    }

    async fn stay_down(&mut self) -> Result<Infallible, ControlError> {
        loop {
            // Takes what comes, so that the device does not find its queues full.
            self.port.event().await?;
            tokio::task::consume_budget().await;
        }
    }

    fn log_refusal(&mut self, code: u32, name: &str, refusal: &Refusal) {
        self.refusals = self.refusals.saturating_add(1);
        if self.refusals <= REFUSALS_LOGGED {
            warn!(set = %self.uuid, code, "{name} is refused: {}", in_one_line(refusal));
        } else {
            debug!(set = %self.uuid, code, "{name} is refused: {}", in_one_line(refusal));
        }
    }

    fn set_state(&mut self, state: State) {
        if matches!(state, State::Connected { .. }) {
            self.refusals = 0;
        }
        info!(set = %self.uuid, "{:?} -> {state:?}", self.state);
        self.state = state;
    }
}

/// The session whose front-end is connected, if both sides are up.
fn connected_session(config: &ConfigSpace) -> Option<u32> {
    config.status.contains(Status::BACK_END_UP | Status::FRONT_END_UP).then_some(config.session)
}

/// A reply as it crosses. None of the requests that are carried is answered with a descriptor; one that came all the same
/// was refused when the reply was decoded.
fn without_descriptors<F>(reply: FrontEndReply<F>, code: u32) -> RawMessage<Handle> {
    let RawMessage { header, payload, .. } = reply.encode(code);
    RawMessage { header, payload, descriptors: Vec::new() }
}
