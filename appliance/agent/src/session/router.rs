//! Between the control device and the tasks of a session: hands each frame to the task of its channel, sends theirs, and
//! keeps to the rule that a channel has one request under way at a time.

use std::future;

use tokio::sync::mpsc;
use tracing::debug;
use vvu_protocol::control::{Channel, Frame, Handle, Status};
use vvu_protocol::message::RawMessage;

use super::end::End;
use super::state::{State, StateDoor, connected_session};
use crate::control::{ControlError, ControlEvent, ControlPort};

/// Messages for a task that it has not taken yet. Turns allow for one.
const INBOX_LEN: usize = 1;

const CHANNELS: [Channel; 3] = [Channel::FrontEnd, Channel::BackEnd, Channel::State];

/// What a frame says to a task.
#[derive(Debug)]
pub(super) struct Incoming {
    /// [`Frame::resume`].
    pub(super) resume: bool,
    pub(super) message: RawMessage<Handle>,
}

/// A task's end of its channel.
#[derive(Debug)]
pub(super) struct Mailbox {
    channel: Channel,
    from_bridge: mpsc::Receiver<Incoming>,
    to_bridge: mpsc::Sender<(Channel, RawMessage<Handle>)>,
}

impl Mailbox {
    pub(super) const fn channel(&self) -> Channel {
        self.channel
    }

    /// The next message. Nothing is lost if the future is dropped.
    pub(super) async fn receive(&mut self) -> Incoming {
        match self.from_bridge.recv().await {
            Some(incoming) => incoming,
            // The router is gone, and so is this task in a moment.
            None => future::pending().await,
        }
    }

    /// Sends a message.
    pub(super) async fn send(&self, message: RawMessage<Handle>) {
        if self.to_bridge.send((self.channel, message)).await.is_err() {
            future::pending().await
        }
    }
}

/// Whose request is under way on a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Nobody,
    Bridge,
    Agent,
}

impl Turn {
    /// Takes note of a message of the bridge.
    fn note_incoming(&mut self, channel: Channel, is_reply: bool) -> Result<(), End> {
        *self = match (*self, is_reply) {
            // Requests of the back-end come from here.
            (Self::Nobody, false) if channel != Channel::BackEnd => Self::Bridge,
            (Self::Agent, true) => Self::Nobody,
            (_, true) => return Err(End::Unasked(channel)),
            (_, false) => return Err(End::OutOfTurn(channel)),
        };
        Ok(())
    }

    /// Takes note of a message for the bridge. Only a request of the bridge that it should not have sent can be in the way.
    fn note_outgoing(&mut self, channel: Channel, is_reply: bool) -> Result<(), End> {
        *self = match (*self, is_reply) {
            (Self::Nobody, false) => Self::Agent,
            (Self::Bridge, true) => Self::Nobody,
            _ => return Err(End::OutOfTurn(channel)),
        };
        Ok(())
    }
}

#[derive(Debug)]
struct Route {
    channel: Channel,
    turn: Turn,
    inbox: mpsc::Sender<Incoming>,
}

/// Why the router stops.
enum Stop {
    Session(End),
    Device(ControlError),
}

impl From<End> for Stop {
    fn from(end: End) -> Self {
        Self::Session(end)
    }
}

impl From<ControlError> for Stop {
    fn from(error: ControlError) -> Self {
        Self::Device(error)
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Router<'a, P> {
    port: &'a mut P,
    state: &'a mut StateDoor,
    routes: [Route; CHANNELS.len()],
    outbox: mpsc::Receiver<(Channel, RawMessage<Handle>)>,
}

impl<'a, P: ControlPort> Router<'a, P> {
    /// A router and the ends for the tasks: of the front-end's channel, the back-end's, and the state's.
    pub(super) fn new(port: &'a mut P, state: &'a mut StateDoor) -> (Self, [Mailbox; CHANNELS.len()]) {
        let (to_bridge, outbox) = mpsc::channel(CHANNELS.len());
        let ends = CHANNELS.map(|channel| {
            let (inbox, from_bridge) = mpsc::channel(INBOX_LEN);
            let mailbox = Mailbox { channel, from_bridge, to_bridge: to_bridge.clone() };
            (Route { channel, turn: Turn::Nobody, inbox }, mailbox)
        });
        let (routes, mailboxes) = unzip(ends);
        (Self { port, state, routes, outbox }, mailboxes)
    }

    /// Runs from ready to the end of the session.
    pub(super) async fn run(mut self) -> Result<End, ControlError> {
        loop {
            // A peer that never lets us wait would keep other device sets from their turn.
            tokio::task::consume_budget().await;
            let step = tokio::select! {
                // What goes out first: turns keep it short, whereas a bridge may send frames to be dropped without end.
                biased;
                Some((channel, message)) = self.outbox.recv() => self.send(channel, message),
                event = self.port.event() => match event? {
                    ControlEvent::ConfigChange => self.handle_config(),
                    ControlEvent::Frame(bytes) => self.handle_frame(&bytes),
                },
            };
            match step {
                Ok(()) => {}
                Err(Stop::Session(end)) => return Ok(end),
                Err(Stop::Device(error)) => return Err(error),
            }
        }
    }

    fn handle_config(&mut self) -> Result<(), Stop> {
        let config = self.port.config()?;
        match (self.state.state(), connected_session(&config)) {
            (State::Ready, Some(session)) => self.state.set(State::Connected { session }),
            // It came and went between two looks: the device has cleared both bits and waits.
            (State::Ready, None) if !config.status.contains(Status::BACK_END_UP) => {
                return Err(End::FrontEndGone.into());
            }
            (State::Connected { session }, now) if now != Some(session) => return Err(End::FrontEndGone.into()),
            _ => {}
        }
        Ok(())
    }

    fn handle_frame(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        if self.state.state() == State::Ready {
            // The first frame of a session may be seen before the change of the status that came before it.
            self.handle_config()?;
        }
        let uuid = self.state.uuid();
        let State::Connected { session } = self.state.state() else {
            debug!(set = %uuid, "dropped a frame: no front-end is connected");
            return Ok(());
        };
        let frame = Frame::decode(bytes).map_err(End::NotFrame)?;
        if frame.session != session {
            debug!(set = %uuid, session = frame.session, "dropped a frame of another session");
            return Ok(());
        }
        let Frame { channel, resume, message, .. } = frame;
        let Some(route) = self.routes.iter_mut().find(|route| route.channel == channel) else {
            return Err(End::OutOfTurn(channel).into());
        };
        route.turn.note_incoming(channel, message.header.is_reply)?;
        let taken = route.inbox.try_send(Incoming { resume, message });
        Ok(taken.map_err(|_| End::OutOfTurn(channel))?)
    }

    fn send(&mut self, channel: Channel, message: RawMessage<Handle>) -> Result<(), Stop> {
        let State::Connected { session } = self.state.state() else {
            return Ok(());
        };
        if let Some(route) = self.routes.iter_mut().find(|route| route.channel == channel) {
            route.turn.note_outgoing(channel, message.header.is_reply)?;
        }
        Ok(self.port.send(&Frame::new(channel, session, message))?)
    }
}

fn unzip<A, B>(pairs: [(A, B); CHANNELS.len()]) -> ([A; CHANNELS.len()], [B; CHANNELS.len()]) {
    let [(a, x), (b, y), (c, z)] = pairs;
    ([a, b, c], [x, y, z])
}
