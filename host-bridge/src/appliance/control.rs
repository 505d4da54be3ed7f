//! The control device: frames to and from the agent, and the configuration space with the state of both halves.
//!
//! [`Control`] is the task that owns the socket; [`ControlPort`] is how the session uses it. The task always serves the
//! socket: the appliance's VMM holds its main lock while it waits for an answer here.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use tokio::sync::{mpsc, oneshot, watch};
use virtio_queue::QueueT;
use vvu_protocol::control::{CONFIG_STATUS_OFFSET, ConfigSpace, Frame, RECEIVE_QUEUE, Status, TRANSMIT_QUEUE};
use vvu_protocol::features::Features;
use vvu_protocol::message::{BackEndRequest, ConfigSpace as ConfigAccess};
use vvu_protocol::window::FileId;
use vvu_socket::{MessageSocket, event};

use super::device::{Effect, GenericDevice, Model};
use super::memory::ApplianceMemory;
use super::queue::{put_buffer, take_buffer};
use super::window::WindowState;
use super::{ApplianceError, sent};

const NAME: &str = "control";

/// Frames of the agent that wait for the session. The agent has one request and one reply under way at the most.
const FRAMES_MAX: usize = 4;

/// Commands that wait for the task.
const COMMANDS_MAX: usize = 4;

/// Frames for the agent that wait for a buffer. The bridge has one request and one reply under way at the most.
const OUTGOING_MAX: usize = 8;

/// What the session has to know of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ControlState {
    /// The agent has set BACK_END_UP since the last time it was clear.
    pub back_end_up: bool,
    /// How often the back-end went down, by the agent's word or by a reset of the appliance.
    pub downs: u64,
}

/// What the control device has to do with the window.
#[derive(Debug)]
pub struct WindowLink {
    /// Its state; the agent gets to see the window whenever it is ready.
    pub state: watch::Receiver<WindowState>,
    /// Its length in bytes.
    pub len: u64,
    /// Whether the agent wants its header not to be mapped yet.
    pub hold: watch::Sender<bool>,
}

#[derive(Debug)]
enum Command {
    Send(Vec<u8>),
    Connect { session: u32 },
    Clear { session: u32, done: oneshot::Sender<()> },
}

/// How the rest of the bridge talks to the agent.
#[derive(Debug)]
pub struct ControlPort {
    /// What is asked of the control device.
    pub commands: ControlCommands,
    frames: mpsc::Receiver<Frame>,
    state: watch::Receiver<ControlState>,
}

impl ControlPort {
    /// The agent's state, now and on change.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<ControlState> {
        self.state.clone()
    }

    /// The next frame of the agent. May be cancelled.
    ///
    /// # Errors
    /// [`ApplianceError::Gone`] if the task has ended.
    pub async fn recv(&mut self) -> Result<Frame, ApplianceError> {
        self.frames.recv().await.ok_or(ApplianceError::Gone { device: NAME })
    }
}

/// What can be asked of the control device. Every call fails with [`ApplianceError::Gone`] if its task has ended.
#[derive(Debug, Clone)]
pub struct ControlCommands(mpsc::Sender<Command>);

impl ControlCommands {
    /// Sends a frame to the agent.
    ///
    /// # Errors
    /// [`ApplianceError::Gone`], or [`ApplianceError::Decode`] if the frame cannot be encoded.
    pub async fn send(&self, frame: &Frame) -> Result<(), ApplianceError> {
        let bytes = frame.encode().map_err(|source| ApplianceError::Decode { device: NAME, source })?;
        self.command(Command::Send(bytes)).await
    }

    /// Shows the agent that a front-end is connected, as session `session`. From the first call on, no further file is taken
    /// for the appliance's own memory.
    ///
    /// # Errors
    /// [`ApplianceError::Gone`].
    pub async fn connect(&self, session: u32) -> Result<(), ApplianceError> {
        self.command(Command::Connect { session }).await
    }

    /// Shows the agent that session `session` has ended: both status bits are clear afterwards.
    ///
    /// # Errors
    /// [`ApplianceError::Gone`].
    pub async fn disconnect(&self, session: u32) -> Result<(), ApplianceError> {
        let (done, cleared) = oneshot::channel();
        self.command(Command::Clear { session, done }).await?;
        cleared.await.map_err(|_| ApplianceError::Gone { device: NAME })
    }

    async fn command(&self, command: Command) -> Result<(), ApplianceError> {
        self.0.send(command).await.map_err(|_| ApplianceError::Gone { device: NAME })
    }
}

/// The task.
#[derive(Debug)]
pub struct Control {
    socket: MessageSocket,
    device: GenericDevice,
    back_channel: Option<MessageSocket>,
    config: ConfigSpace,
    memory: ApplianceMemory,
    window: WindowLink,
    commands: mpsc::Receiver<Command>,
    frames: mpsc::Sender<Frame>,
    state: watch::Sender<ControlState>,
    outgoing: VecDeque<Vec<u8>>,
    /// The transmit queue has buffers that did not fit into `frames`.
    stalled: bool,
}

impl Control {
    /// A control device on the socket of the appliance's VMM, and the port to it. `window_header` is the file behind the
    /// window's header.
    ///
    /// # Errors
    /// [`ApplianceError`] if the socket cannot be used.
    pub fn new(
        stream: UnixStream,
        uuid: [u8; 16],
        max_queues: u16,
        window_header: FileId,
        mut window: WindowLink,
    ) -> Result<(Self, ControlPort), ApplianceError> {
        window.state.mark_changed();
        let socket =
            MessageSocket::new(stream).map_err(|source| ApplianceError::Io { what: "control socket", source })?;
        let model = Model { name: NAME, features: Features::empty(), queue_count: 2, shared_memory: Vec::new() };
        let (command_sender, commands) = mpsc::channel(COMMANDS_MAX);
        let (frames, frame_receiver) = mpsc::channel(FRAMES_MAX);
        let (state, state_receiver) = watch::channel(ControlState::default());
        let control = Self {
            socket,
            device: GenericDevice::new(model)?,
            back_channel: None,
            config: ConfigSpace {
                status: Status::empty(),
                max_queues: u32::from(max_queues),
                uuid,
                session: 0,
                window_len: 0,
            },
            memory: ApplianceMemory::new(window_header),
            window,
            commands,
            frames,
            state,
            outgoing: VecDeque::new(),
            stalled: false,
        };
        let port =
            ControlPort { commands: ControlCommands(command_sender), frames: frame_receiver, state: state_receiver };
        Ok((control, port))
    }

    /// Serves until the appliance or the rest of the bridge is gone.
    ///
    /// # Errors
    /// [`ApplianceError`] says what ended it.
    pub async fn run(mut self) -> Result<(), ApplianceError> {
        loop {
            let (receive, transmit) = self.device.kicks();
            tokio::select! {
                message = self.socket.recv() => {
                    let message = message.map_err(|source| ApplianceError::Socket { device: NAME, source })?;
                    let message = message.ok_or(ApplianceError::Gone { device: NAME })?;
                    let effect = self.device.serve(&self.socket, message, &self.config.encode()).await?;
                    self.apply(effect).await?;
                }
                kicked = kicked(receive) => { kicked?; self.flush_outgoing()?; }
                kicked = kicked(transmit) => { kicked?; self.drain_transmit()?; }
                Ok(()) = self.window.state.changed() => self.config_changed().await?,
                () = room(&self.frames), if self.stalled => self.drain_transmit()?,
                command = self.commands.recv() => match command {
                    Some(command) => self.execute(command).await?,
                    None => return Ok(()),
                },
            }
        }
    }

    async fn apply(&mut self, effect: Effect) -> Result<(), ApplianceError> {
        match effect {
            Effect::None => {}
            Effect::BackChannel(descriptor) => self.back_channel = Some(back_channel(descriptor)?),
            Effect::Memory(table) => self.memory.update(table)?,
            Effect::ConfigWritten(written) => self.config_written(&written),
            Effect::Started => {
                tracing::debug!("control device of the appliance started");
                self.flush_outgoing()?;
                self.drain_transmit()?;
            }
            Effect::Stopped => {
                tracing::info!("control device of the appliance stopped");
                self.outgoing.clear();
                self.stalled = false;
                self.config.status.remove(Status::BACK_END_UP);
                self.back_end_down();
                self.hold_window(false);
            }
        }
        Ok(())
    }

    /// The agent writes the status field and nothing else, and all bits but its own are ignored. QEMU hands over the whole
    /// configuration space with each write, so what counts is the status field within it.
    fn config_written(&mut self, written: &ConfigAccess) {
        let offset = usize::try_from(written.offset).unwrap_or(usize::MAX);
        let skipped = CONFIG_STATUS_OFFSET.checked_sub(offset);
        let field = skipped.and_then(|skipped| written.bytes.get(skipped..)).and_then(|field| field.first_chunk());
        let Some(value) = field.copied().map(u32::from_le_bytes) else {
            tracing::debug!(offset, len = written.bytes.len(), "ignored a write to the configuration space");
            return;
        };
        let written = Status::from_bits_retain(value);
        self.hold_window(written.contains(Status::HOLD_WINDOW));
        let up = written.contains(Status::BACK_END_UP);
        let was_up = self.config.status.contains(Status::BACK_END_UP);
        self.config.status.set(Status::BACK_END_UP, up);
        match (was_up, up) {
            (false, true) => {
                self.state.send_modify(|state| state.back_end_up = true);
            }
            (true, false) => self.back_end_down(),
            _ => {}
        }
    }

    fn hold_window(&mut self, hold: bool) {
        self.window.hold.send_if_modified(|held| std::mem::replace(held, hold) != hold);
    }

    fn back_end_down(&mut self) {
        self.state.send_modify(|state| {
            state.back_end_up = false;
            state.downs = state.downs.wrapping_add(1);
        });
    }

    async fn execute(&mut self, command: Command) -> Result<(), ApplianceError> {
        match command {
            Command::Send(bytes) => {
                if self.outgoing.len() >= OUTGOING_MAX {
                    return Err(ApplianceError::Queue {
                        queue: RECEIVE_QUEUE,
                        problem: "the agent takes no frames".into(),
                    });
                }
                self.outgoing.push_back(bytes);
                self.flush_outgoing()
            }
            Command::Connect { session } => {
                self.memory.seal();
                self.config.session = session;
                self.config.status.insert(Status::FRONT_END_UP);
                self.config_changed().await
            }
            Command::Clear { session, done } => {
                self.config.session = session;
                self.config.status = Status::empty();
                self.state.send_modify(|state| state.back_end_up = false);
                // Nobody waits any more if the bridge is about to end.
                let _ = done.send(());
                self.config_changed().await
            }
        }
    }

    /// Raises a configuration interrupt. Without a running device there is nobody to interrupt: the agent reads the
    /// configuration space when it starts the device. A window that is gone means that the appliance is being reset, and an
    /// interrupt at a device that has just been stopped kills QEMU; when the window is back the agent gets one.
    async fn config_changed(&mut self) -> Result<(), ApplianceError> {
        let window_ready = self.window.state.borrow().ready;
        self.config.window_len = if window_ready { self.window.len } else { 0 };
        let interruptible = self.device.is_running() && window_ready;
        let Some(back_channel) = self.back_channel.as_ref().filter(|_| interruptible) else {
            return Ok(());
        };
        let message = BackEndRequest::<OwnedFd>::ConfigChange.encode(false);
        sent(NAME, back_channel.send(&message)).await
    }

    fn flush_outgoing(&mut self) -> Result<(), ApplianceError> {
        let running = self.device.is_running();
        let Some(vring) = self.device.vring(RECEIVE_QUEUE).filter(|vring| running && vring.queue.ready()) else {
            return Ok(());
        };
        let mut signal = false;
        while let Some(bytes) = self.outgoing.front() {
            if !put_buffer(RECEIVE_QUEUE, &mut vring.queue, self.memory.map(), bytes)? {
                break;
            }
            self.outgoing.pop_front();
            signal = true;
        }
        call(vring.call.as_ref().filter(|_| signal))
    }

    fn drain_transmit(&mut self) -> Result<(), ApplianceError> {
        self.stalled = false;
        let running = self.device.is_running();
        let Some(vring) = self.device.vring(TRANSMIT_QUEUE).filter(|vring| running && vring.queue.ready()) else {
            return Ok(());
        };
        let mut signal = false;
        loop {
            let Ok(permit) = self.frames.try_reserve() else {
                self.stalled = true;
                break;
            };
            let Some(bytes) = take_buffer(TRANSMIT_QUEUE, &mut vring.queue, self.memory.map())? else {
                break;
            };
            signal = true;
            match Frame::decode(&bytes) {
                Ok(frame) => permit.send(frame),
                Err(source) => return Err(ApplianceError::Decode { device: NAME, source }),
            }
        }
        call(vring.call.as_ref().filter(|_| signal))
    }
}

fn call(descriptor: Option<&OwnedFd>) -> Result<(), ApplianceError> {
    let signalled = descriptor.map_or(Ok(()), event::signal);
    signalled.map_err(|source| ApplianceError::Io { what: "interrupt of the control device", source })
}

/// Waits until the session takes frames again.
async fn room(frames: &mpsc::Sender<Frame>) {
    // Without a session there is nobody to wait for, and the task is about to end.
    let _ = frames.reserve().await;
}

async fn kicked(event: Option<&event::Event>) -> Result<(), ApplianceError> {
    match event {
        Some(event) => {
            let taken = event.signalled().await;
            taken.map(drop).map_err(|source| ApplianceError::Io { what: "kick of the control device", source })
        }
        None => std::future::pending().await,
    }
}

/// The socket for requests to the appliance's VMM.
pub(super) fn back_channel(descriptor: OwnedFd) -> Result<MessageSocket, ApplianceError> {
    MessageSocket::new(UnixStream::from(descriptor))
        .map_err(|source| ApplianceError::Io { what: "back channel of the appliance's VMM", source })
}
