//! The state of the device while it is saved or loaded: bytes between the front-end's pipe and the agent.
//!
//! Each transfer has a task of its own; a pipe that is slow holds up nothing but its own transfer. One part is under way at a
//! time. A transfer has ended when the end of the stream was answered, and it has failed if anything else ended it: CHECK_DEVICE_STATE
//! asks for that.

use std::os::fd::OwnedFd;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use vvu_protocol::control::{Channel, Frame, Handle};
use vvu_protocol::message::{MAX_PAYLOAD_LEN, RawMessage, StateDirection};
use vvu_protocol::state::StateMessage;
use vvu_socket::stream::{Direction, Stream, StreamError};

use super::link::{REFUSED, unasked};
use crate::appliance::ApplianceError;
use crate::appliance::control::ControlCommands;

/// How a transfer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    UnderWay,
    /// The end of the stream has been answered.
    Complete,
    Failed,
}

/// The transfer of a session, if there is one.
#[derive(Debug, Default)]
pub(super) struct StateTransfer {
    current: Option<Transfer>,
}

#[derive(Debug)]
struct Transfer {
    direction: StateDirection,
    /// Messages of the agent: parts while saving, answers while loading. Taken back when the transfer is cut short.
    messages: Option<mpsc::Sender<StateMessage>>,
    progress: watch::Receiver<Progress>,
    task: JoinHandle<()>,
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A stream that may begin as soon as the back-end has agreed.
#[derive(Debug)]
pub(super) struct Prepared {
    stream: Stream,
    direction: StateDirection,
}

impl Prepared {
    /// Takes over the front-end's end of the stream.
    pub(super) fn new(descriptor: OwnedFd, direction: StateDirection) -> Result<Self, StreamError> {
        let way = match direction {
            StateDirection::Save => Direction::Write,
            StateDirection::Load => Direction::Read,
        };
        Ok(Self { stream: Stream::new(descriptor, way)?, direction })
    }
}

impl StateTransfer {
    /// Whether a transfer is under way.
    pub(super) fn is_under_way(&self) -> bool {
        self.current.as_ref().is_some_and(|transfer| *transfer.progress.borrow() == Progress::UnderWay)
    }

    /// Begins a transfer; one that has ended is forgotten.
    pub(super) fn begin(&mut self, prepared: Prepared, commands: ControlCommands, attachment: u32) {
        let Prepared { stream, direction } = prepared;
        // The agent has one message under way.
        let (sender, messages) = mpsc::channel(1);
        let (outcome, progress) = watch::channel(Progress::UnderWay);
        let link = AgentEnd { messages, commands, attachment };
        let task = tokio::task::spawn_local(async move {
            let result = match direction {
                StateDirection::Save => save(stream, link).await,
                StateDirection::Load => load(stream, link).await,
            };
            if let Err(error) = &result {
                tracing::warn!(attachment, ?direction, %error, "transfer of the device's state failed");
            }
            outcome.send_replace(if result.is_ok() { Progress::Complete } else { Progress::Failed });
        });
        self.current = Some(Transfer { direction, messages: Some(sender), progress, task });
    }

    /// Takes a message of the agent. What is answered at once comes back.
    ///
    /// # Errors
    /// [`ApplianceError`] if it does not belong to the transfer.
    pub(super) fn take(&mut self, message: RawMessage<Handle>) -> Result<Option<RawMessage<Handle>>, ApplianceError> {
        let decoded = StateMessage::decode(message);
        let message = decoded.map_err(|source| ApplianceError::Decode { device: "control", source })?;
        let is_part = matches!(message, StateMessage::Part(_));
        let transfer = self.current.as_ref().filter(|transfer| is_part == (transfer.direction == StateDirection::Save));
        match transfer {
            None if is_part => Ok(Some(StateMessage::Answer(REFUSED).encode())),
            None => Err(unasked()),
            Some(transfer) => {
                let taken = transfer.messages.as_ref().map(|messages| messages.try_send(message));
                match taken {
                    Some(Ok(())) => Ok(None),
                    Some(Err(mpsc::error::TrySendError::Full(_))) => {
                        let request = "a message before the answer to the one before";
                        Err(ApplianceError::Request { device: "control", request })
                    }
                    // Cut short, or failed: the next part is refused, a late answer does not matter.
                    _ if is_part => Ok(Some(StateMessage::Answer(REFUSED).encode())),
                    _ => Ok(None),
                }
            }
        }
    }

    /// Waits for the end of the transfer. Answers whether it succeeded, or `None` if there was none.
    pub(super) fn ended(&self) -> impl Future<Output = Option<bool>> + use<> {
        let progress = self.current.as_ref().map(|transfer| transfer.progress.clone());
        async move {
            let mut progress = progress?;
            let ended = progress.wait_for(|progress| *progress != Progress::UnderWay).await;
            Some(ended.is_ok_and(|progress| *progress == Progress::Complete))
        }
    }

    /// Gives up a transfer that does not end.
    pub(super) fn cut_short(&mut self) {
        if let Some(transfer) = &mut self.current {
            transfer.messages = None;
        }
    }

    /// The back-end is lost, and with it what was saved or loaded: a transfer before CHECK_DEVICE_STATE has failed.
    pub(super) fn lost(&mut self) {
        if let Some(transfer) = &mut self.current {
            transfer.task.abort();
            transfer.messages = None;
            let (_, failed) = watch::channel(Progress::Failed);
            transfer.progress = failed;
        }
    }

    /// The front-end has heard of its end.
    pub(super) fn forget(&mut self) {
        self.current = None;
    }
}

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
enum TransferError {
    #[error("front-end's end of the stream: {0}")]
    Stream(#[from] std::io::Error),
    #[error("the agent refused a part")]
    Refused,
    #[error("it was cut short")]
    CutShort,
    #[error("appliance: {0}")]
    Appliance(#[from] ApplianceError),
}

/// The agent's end of a transfer.
struct AgentEnd {
    messages: mpsc::Receiver<StateMessage>,
    commands: ControlCommands,
    attachment: u32,
}

impl AgentEnd {
    async fn send(&self, message: StateMessage) -> Result<(), TransferError> {
        let frame = Frame::new(Channel::State, self.attachment, message.encode());
        Ok(self.commands.send(&frame).await?)
    }

    async fn next_part(&mut self) -> Result<Vec<u8>, TransferError> {
        match self.messages.recv().await {
            Some(StateMessage::Part(bytes)) => Ok(bytes),
            Some(StateMessage::Answer(_)) | None => Err(TransferError::CutShort),
        }
    }

    /// Waits until nobody has a use for the transfer any more.
    async fn cut_short(&mut self) -> TransferError {
        // A second message before the answer to the first was refused before it came here.
        while self.messages.recv().await.is_some() {}
        TransferError::CutShort
    }

    /// Sends a part, and waits until it was taken.
    async fn deliver(&mut self, bytes: Vec<u8>) -> Result<(), TransferError> {
        self.send(StateMessage::Part(bytes)).await?;
        match self.messages.recv().await {
            Some(StateMessage::Answer(0)) => Ok(()),
            Some(_) => Err(TransferError::Refused),
            None => Err(TransferError::CutShort),
        }
    }
}

/// From the agent to the front-end. Each part is answered when the front-end's stream has taken it.
async fn save(stream: Stream, mut agent: AgentEnd) -> Result<(), TransferError> {
    loop {
        let part = agent.next_part().await?;
        if part.is_empty() {
            // The front-end reads until the end.
            drop(stream);
            return agent.send(StateMessage::Answer(0)).await;
        }
        let written = tokio::select! {
            written = stream.write_all(&part) => written.map_err(TransferError::from),
            error = agent.cut_short() => Err(error),
        };
        if let Err(error) = written {
            agent.send(StateMessage::Answer(REFUSED)).await?;
            return Err(error);
        }
        agent.send(StateMessage::Answer(0)).await?;
    }
}

/// From the front-end to the agent.
async fn load(stream: Stream, mut agent: AgentEnd) -> Result<(), TransferError> {
    loop {
        let part = tokio::select! {
            part = stream.read(MAX_PAYLOAD_LEN) => part?,
            error = agent.cut_short() => return Err(error),
        };
        let is_end = part.is_empty();
        agent.deliver(part).await?;
        if is_end {
            return Ok(());
        }
    }
}
