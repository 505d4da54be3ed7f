//! The state of the device on its way: from the back-end's pipe to the bridge, or the other way.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe::{Receiver, Sender};
use tracing::debug;
use vvu_protocol::message::{MAX_PAYLOAD_LEN, StateDirection};
use vvu_protocol::state::StateMessage;

use super::end::End;
use super::front_end::REFUSED;
use super::router::Mailbox;
use super::slot::Slot;
use crate::uuid::Uuid;

/// A transfer that begins.
#[derive(Debug)]
enum Transfer {
    Save(Receiver),
    Load(Sender),
}

/// Where a transfer is left for its task, and whether one is under way.
#[derive(Debug, Default)]
pub(super) struct Transfers {
    next: Slot<Transfer>,
    under_way: Cell<bool>,
}

impl Transfers {
    pub(super) fn under_way(&self) -> bool {
        self.under_way.get()
    }

    /// Begins a transfer by way of our end of a pipe.
    ///
    /// # Errors
    /// If the descriptor is not that.
    pub(super) fn start(&self, direction: StateDirection, pipe: OwnedFd) -> io::Result<()> {
        let transfer = match direction {
            StateDirection::Save => Transfer::Save(Receiver::from_owned_fd(pipe)?),
            StateDirection::Load => Transfer::Load(Sender::from_owned_fd(pipe)?),
        };
        self.under_way.set(true);
        self.next.put(transfer);
        Ok(())
    }
}

/// Serves channel 2.
#[derive(Debug)]
pub(super) struct DeviceStateTask {
    uuid: Uuid,
    bridge: Mailbox,
    transfers: Rc<Transfers>,
}

impl DeviceStateTask {
    pub(super) const fn new(uuid: Uuid, bridge: Mailbox, transfers: Rc<Transfers>) -> Self {
        Self { uuid, bridge, transfers }
    }

    pub(super) async fn run(mut self) -> End {
        loop {
            let step = tokio::select! {
                // A transfer comes before its parts.
                biased;
                transfer = self.transfers.next.take() => {
                    let step = match transfer {
                        Transfer::Save(pipe) => self.save(pipe).await,
                        Transfer::Load(pipe) => self.load(pipe).await,
                    };
                    self.transfers.under_way.set(false);
                    step
                }
                part = part(&mut self.bridge) => match part {
                    // Of a transfer that has failed here.
                    Ok(_) => {
                        answer(&self.bridge, REFUSED).await;
                        Ok(())
                    }
                    Err(end) => Err(end),
                },
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    /// Until the back-end closes its end, or the bridge does not want any more. The back-end sees the latter by a pipe that
    /// nobody reads.
    async fn save(&mut self, mut pipe: Receiver) -> Result<(), End> {
        let mut sent = 0;
        loop {
            let mut bytes = vec![0; MAX_PAYLOAD_LEN];
            let len = pipe.read(&mut bytes).await.map_err(End::State)?;
            bytes.truncate(len);
            sent += len;
            self.bridge.send(StateMessage::Part(bytes).encode()).await;
            let taken = taken(&mut self.bridge).await?;
            if !taken || len == 0 {
                debug!(set = %self.uuid, sent, taken, "state of the device is saved");
                return Ok(());
            }
        }
    }

    /// Until the bridge has said that there are no more parts, or the back-end does not take any more.
    async fn load(&mut self, mut pipe: Sender) -> Result<(), End> {
        let mut received = 0;
        loop {
            let bytes = part(&mut self.bridge).await?;
            received += bytes.len();
            if bytes.is_empty() {
                drop(pipe);
                debug!(set = %self.uuid, received, "state of the device is loaded");
                answer(&self.bridge, 0).await;
                return Ok(());
            }
            if let Err(error) = pipe.write_all(&bytes).await {
                debug!(set = %self.uuid, received, "back-end takes no more of its state: {error}");
                drop(pipe);
                answer(&self.bridge, REFUSED).await;
                return Ok(());
            }
            answer(&self.bridge, 0).await;
        }
    }
}

/// The next part from the bridge. Nothing is lost if the future is dropped.
async fn part(bridge: &mut Mailbox) -> Result<Vec<u8>, End> {
    match message(bridge).await? {
        StateMessage::Part(bytes) => Ok(bytes),
        StateMessage::Answer(_) => Err(End::Unasked(bridge.channel())),
    }
}

/// Whether the bridge has taken a part.
async fn taken(bridge: &mut Mailbox) -> Result<bool, End> {
    match message(bridge).await? {
        StateMessage::Answer(value) => Ok(value == 0),
        StateMessage::Part(_) => Err(End::OutOfTurn(bridge.channel())),
    }
}

async fn message(bridge: &mut Mailbox) -> Result<StateMessage, End> {
    let channel = bridge.channel();
    StateMessage::decode(bridge.receive().await.message).map_err(|source| End::NotMessage { channel, source })
}

async fn answer(bridge: &Mailbox, value: u64) {
    bridge.send(StateMessage::Answer(value).encode()).await;
}
