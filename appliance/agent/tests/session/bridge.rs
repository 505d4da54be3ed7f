//! The bridge's end of a control device that is made of channels, and a doorbell device that is made of eventfds.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::Notify;
use vvu_agent::control::{ControlError, ControlEvent, ControlPort};
use vvu_agent::doorbell::{Doorbell, DoorbellError, SignalsInUse};
use vvu_protocol::control::{Channel, ConfigSpace, Frame, Handle, Status};
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_protocol::message::{BackEndReply, BackEndRequest, FrontEndReply, FrontEndRequest, RawMessage};
use vvu_protocol::state::StateMessage;
use vvu_socket::event;

/// Vectors of the doorbell device.
pub(crate) const VECTORS: u16 = 4;

#[derive(Debug)]
struct Shared {
    config: ConfigSpace,
    /// The configuration space has changed since the agent was told last.
    changed: bool,
    to_agent: VecDeque<Vec<u8>>,
    to_bridge: VecDeque<Frame>,
}

/// Both ends of the control device.
#[derive(Debug, Clone)]
pub(crate) struct Bridge {
    shared: Rc<RefCell<Shared>>,
    agent: Rc<Notify>,
    bridge: Rc<Notify>,
}

/// The agent's end.
#[derive(Debug)]
pub(crate) struct Port(Bridge);

impl Bridge {
    pub(crate) fn new(window_len: u64) -> (Self, Port) {
        let config = ConfigSpace { status: Status::empty(), max_queues: 4, uuid: [7; 16], session: 0, window_len };
        let shared = Shared { config, changed: false, to_agent: VecDeque::new(), to_bridge: VecDeque::new() };
        let bridge = Self { shared: Rc::new(RefCell::new(shared)), agent: Rc::default(), bridge: Rc::default() };
        (bridge.clone(), Port(bridge))
    }

    /// Changes the configuration space and tells the agent.
    pub(crate) fn change(&self, change: impl FnOnce(&mut ConfigSpace)) {
        let mut shared = self.shared.borrow_mut();
        change(&mut shared.config);
        shared.changed = true;
        self.agent.notify_one();
    }

    pub(crate) async fn status(&self, wanted: Status) {
        while self.shared.borrow().config.status != wanted {
            self.bridge.notified().await;
        }
    }

    pub(crate) fn session(&self) -> u32 {
        self.shared.borrow().config.session
    }

    /// A front-end comes as soon as there is a back-end.
    pub(crate) async fn connect(&self) {
        self.status(Status::BACK_END_UP).await;
        self.change(|config| {
            config.session += 1;
            config.status.insert(Status::FRONT_END_UP);
        });
    }

    /// The front-end goes.
    pub(crate) fn disconnect(&self) {
        self.change(|config| config.status = Status::empty());
    }

    /// Waits for the agent to say that the back-end is gone, and closes the front-end's connection.
    pub(crate) async fn orphaned(&self) {
        self.status(Status::FRONT_END_UP).await;
        self.disconnect();
    }

    pub(crate) fn send_bytes(&self, bytes: Vec<u8>) {
        self.shared.borrow_mut().to_agent.push_back(bytes);
        self.agent.notify_one();
    }

    pub(crate) fn send_frame(&self, channel: Channel, session: u32, message: RawMessage<Handle>) {
        self.send_bytes(Frame::new(channel, session, message).encode().unwrap());
    }

    pub(crate) fn send(&self, request: FrontEndRequest<Handle>) {
        self.send_frame(Channel::FrontEnd, self.session(), request.encode(true));
    }

    /// The next frame of the agent on the front-end's channel.
    pub(crate) async fn frame(&self) -> Frame {
        self.frame_on(Channel::FrontEnd).await
    }

    /// The next frame on a channel. Those of other channels stay, those of sessions before are dropped.
    async fn frame_on(&self, channel: Channel) -> Frame {
        loop {
            {
                let Shared { config, to_bridge, .. } = &mut *self.shared.borrow_mut();
                to_bridge.retain(|frame| frame.session == config.session);
                if let Some(position) = to_bridge.iter().position(|frame| frame.channel == channel) {
                    return to_bridge.remove(position).unwrap();
                }
            }
            self.bridge.notified().await;
        }
    }

    /// Whether the agent has said something in this session that nobody has taken.
    pub(crate) fn has_frames(&self) -> bool {
        let shared = self.shared.borrow();
        shared.to_bridge.iter().any(|frame| frame.session == shared.config.session)
    }

    /// Sends SET_VRING_BASE with the flag resume.
    pub(crate) fn send_resume(&self, request: FrontEndRequest<Handle>) {
        let frame = Frame::new(Channel::FrontEnd, self.session(), request.encode(true));
        self.send_bytes(Frame { resume: true, ..frame }.encode().unwrap());
    }

    /// Waits for a request of the back-end, and insists on the flag that asks for an answer.
    pub(crate) async fn back_end_request(&self) -> BackEndRequest<Handle> {
        let message = self.frame_on(Channel::BackEnd).await.message;
        assert!(message.header.needs_reply);
        BackEndRequest::decode(message).unwrap()
    }

    /// Answers a request of the back-end.
    pub(crate) fn answer_back_end(&self, code: u32, value: u64) {
        self.send_frame(Channel::BackEnd, self.session(), BackEndReply::Acknowledgement(value).encode(code));
    }

    /// The next message about the state of the device.
    pub(crate) async fn state(&self) -> StateMessage {
        StateMessage::decode(self.frame_on(Channel::State).await.message).unwrap()
    }

    pub(crate) fn send_state(&self, message: StateMessage) {
        self.send_frame(Channel::State, self.session(), message.encode());
    }

    /// Sends a request and waits for its answer.
    pub(crate) async fn ask(&self, request: FrontEndRequest<Handle>) -> FrontEndReply<Handle> {
        let code = request.code();
        self.send(request);
        FrontEndReply::decode(code, self.frame().await.message).unwrap()
    }
}

impl ControlPort for Port {
    fn config(&mut self) -> Result<ConfigSpace, ControlError> {
        Ok(self.0.shared.borrow().config)
    }

    fn set_back_end_up(&mut self, up: bool) -> Result<(), ControlError> {
        self.0.shared.borrow_mut().config.status.set(Status::BACK_END_UP, up);
        self.0.bridge.notify_one();
        Ok(())
    }

    async fn event(&mut self) -> Result<ControlEvent, ControlError> {
        loop {
            {
                let mut shared = self.0.shared.borrow_mut();
                if let Some(frame) = shared.to_agent.pop_front() {
                    return Ok(ControlEvent::Frame(frame));
                }
                if std::mem::take(&mut shared.changed) {
                    return Ok(ControlEvent::ConfigChange);
                }
            }
            self.0.agent.notified().await;
        }
    }

    async fn config_change(&mut self) -> Result<(), ControlError> {
        while !std::mem::take(&mut self.0.shared.borrow_mut().changed) {
            self.0.agent.notified().await;
        }
        Ok(())
    }

    fn send(&mut self, frame: &Frame) -> Result<(), ControlError> {
        // As it crosses: what cannot be encoded, or not be decoded again, does not get through.
        let bytes = frame.encode().map_err(ControlError::Frame)?;
        self.0.shared.borrow_mut().to_bridge.push_back(Frame::decode(&bytes).unwrap());
        self.0.bridge.notify_one();
        Ok(())
    }
}

/// Eventfds of vectors and peers, which a test signals and waits for in the doorbell device's place.
#[derive(Debug, Clone)]
pub(crate) struct Eventfds {
    vectors: Vec<Arc<OwnedFd>>,
    peers: Rc<RefCell<BTreeMap<PeerId, Arc<OwnedFd>>>>,
    /// What the session has looked up and not given up.
    in_use: Rc<RefCell<SignalsInUse>>,
}

impl Eventfds {
    pub(crate) fn new() -> Self {
        let vectors = (0..VECTORS).map(|_| Arc::new(event::create().unwrap())).collect();
        Self { vectors, peers: Rc::default(), in_use: Rc::default() }
    }

    /// Numbers of the vectors and peers that the session uses.
    pub(crate) fn in_use(&self) -> (Vec<u16>, Vec<u16>) {
        let in_use = self.in_use.borrow();
        let vectors = in_use.vectors.iter().map(|vector| vector.0).collect();
        (vectors, in_use.peers.iter().map(|peer| peer.0).collect())
    }
}

impl Doorbell for Eventfds {
    fn vector(&mut self, vector: Vector) -> Result<Arc<OwnedFd>, DoorbellError> {
        let found = self.vectors.get(usize::from(vector.0)).cloned();
        let found = found.ok_or(DoorbellError::NoVector { vector, count: self.vectors.len() })?;
        self.in_use.borrow_mut().vectors.insert(vector);
        Ok(found)
    }

    fn peer(&mut self, peer: PeerId) -> Result<Arc<OwnedFd>, DoorbellError> {
        self.in_use.borrow_mut().peers.insert(peer);
        let mut peers = self.peers.borrow_mut();
        Ok(Arc::clone(peers.entry(peer).or_insert_with(|| Arc::new(event::create().unwrap()))))
    }

    fn keep_only(&mut self, in_use: &SignalsInUse) {
        let mut before = self.in_use.borrow_mut();
        assert!(in_use.vectors.is_subset(&before.vectors) && in_use.peers.is_subset(&before.peers));
        before.clone_from(in_use);
    }
}
