//! The doorbell device: an ivshmem server with one client, the appliance's VMM.
//!
//! It hands out the eventfds that [`crate::doorbells`] has chosen: those of the relay at the start, those of the front-end as they
//! come. The shared memory of the device is one page with the uuid of the device set at its start.
//!
//! The client never answers. A vector that it does not know yet must not be used (QEMU with KVM aborts when the guest unmasks
//! it), and a peer that it does not know is signalled in vain. So whoever names one waits until the client has read all
//! that was sent: QEMU does what a message says in the same turn of its main loop in which it reads it, and nothing of
//! the guest is carried out in between, since both hold QEMU's big lock.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use tokio::sync::{mpsc, watch};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};
use vvu_protocol::doorbell::{OWN_PEER, ServerMessage};
use vvu_socket::{HangUp, MessageSocket, SocketError};

use super::{ApplianceError, SEND_TIMEOUT, sent};
use crate::doorbells::Announcement;

const NAME: &str = "doorbell";

/// Length of the shared memory in bytes: one page.
const SHARED_LEN: u64 = 4096;

/// How often to look at once whether the client has read its messages, before time is given to it: QEMU's main loop needs
/// some ten microseconds, and a timer of the runtime a millisecond.
const LOOKS: u32 = 100;

/// How long to wait between two looks after that.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// A message whose eventfd the bridge holds, too.
pub(crate) type Message = ServerMessage<OwnedFd>;

/// The task.
#[derive(Debug)]
pub struct Doorbell {
    socket: MessageSocket,
    shared: OwnedFd,
    messages: mpsc::UnboundedReceiver<Message>,
    /// How many of them the client has read.
    read: watch::Sender<u64>,
}

/// How the rest of the bridge talks to the task. Messages are not bounded here, but by the numbers of vectors and peers.
#[derive(Debug)]
pub struct DoorbellPort {
    messages: mpsc::UnboundedSender<Message>,
    /// How many were sent.
    sent: u64,
    read: watch::Receiver<u64>,
    hang_up: Option<HangUp>,
}

impl DoorbellPort {
    /// Sends a message to the client after all others.
    pub(crate) fn send(&mut self, message: Message) {
        // A task that is gone has ended the appliance, as whoever waits will see.
        if self.messages.send(message).is_ok() {
            self.sent += 1;
        }
    }

    /// Waits until the client has read, and so knows, all that was sent before this call. May be cancelled.
    pub(crate) fn all_read(&self) -> impl Future<Output = Result<(), ApplianceError>> + use<> {
        let (sent, mut read) = (self.sent, self.read.clone());
        async move {
            let known = read.wait_for(|read| *read >= sent).await;
            known.map(drop).map_err(|_| ApplianceError::Gone { device: NAME })
        }
    }

    /// What tells when the client's process has closed its end: once, for whoever asks first.
    pub(crate) fn take_hang_up(&mut self) -> Option<HangUp> {
        self.hang_up.take()
    }
}

impl Doorbell {
    /// A server on the socket of the appliance's VMM.
    ///
    /// # Errors
    /// [`ApplianceError`] if the socket cannot be used or the shared memory cannot be made.
    pub fn new(stream: UnixStream, uuid: [u8; 16]) -> Result<(Self, DoorbellPort), ApplianceError> {
        let socket = MessageSocket::new(stream).map_err(socket_failed)?;
        let hang_up = Some(socket.hang_up().map_err(socket_failed)?);
        let shared = shared_page(uuid).map_err(|errno| ApplianceError::Io {
            what: "shared memory of the doorbell device",
            source: errno.into(),
        })?;
        let (sender, messages) = mpsc::unbounded_channel();
        let (read, reader) = watch::channel(0);
        let port = DoorbellPort { messages: sender, sent: 0, read: reader, hang_up };
        Ok((Self { socket, shared, messages, read }, port))
    }

    /// Introduces the appliance's device with its vectors and all peers, then passes on what comes from the port, until the
    /// connection ends.
    ///
    /// # Errors
    /// [`ApplianceError`] says what ended it.
    pub async fn run(mut self, announcement: Announcement) -> Result<(), ApplianceError> {
        let Announcement { vectors, peers } = announcement;
        self.send(Message::Version).await?;
        self.send(Message::OwnId(OWN_PEER)).await?;
        self.send(ServerMessage::SharedMemory(self.shared.as_fd())).await?;
        for vector in &vectors {
            self.send(ServerMessage::Vector(OWN_PEER, vector.as_fd())).await?;
        }
        for (id, peer) in &peers {
            self.send(ServerMessage::Vector(*id, peer.as_fd())).await?;
        }
        tracing::debug!(vectors = vectors.len(), peers = peers.len(), "doorbell device of the appliance set up");
        loop {
            let message = tokio::select! {
                ended = ended(&mut self.socket) => return Err(ended),
                message = self.messages.recv() => message,
            };
            match message {
                Some(message) => self.pass_on(message).await?,
                // The port is gone, with all that might use the device.
                None => return Err(ended(&mut self.socket).await),
            }
        }
    }

    async fn send<F: AsFd>(&self, message: ServerMessage<F>) -> Result<(), ApplianceError> {
        let (bytes, descriptor) = message.encode();
        sent(NAME, self.socket.send_bytes(&bytes, descriptor.as_ref().map(AsFd::as_fd).as_slice())).await
    }

    /// Sends a message, and what follows at once, and waits until the client has read it.
    async fn pass_on(&mut self, message: Message) -> Result<(), ApplianceError> {
        let (mut next, mut count) = (Some(message), 0);
        while let Some(message) = next {
            self.send(message).await?;
            count += 1;
            next = self.messages.try_recv().ok();
        }
        self.client_reads().await?;
        self.read.send_modify(|read| *read += count);
        Ok(())
    }

    /// No event tells that a peer has read: neither the socket nor the ivshmem protocol has one.
    async fn client_reads(&self) -> Result<(), ApplianceError> {
        let deadline = Instant::now() + SEND_TIMEOUT;
        let mut looks = 0;
        while self.socket.unread().map_err(socket_failed)? > 0 {
            looks += 1;
            if looks < LOOKS {
                yield_now().await;
            } else if Instant::now() < deadline {
                sleep(LOOK_INTERVAL).await;
            } else {
                return Err(ApplianceError::Stuck { device: NAME });
            }
        }
        Ok(())
    }
}

/// Waits for the end of the connection. The client never sends anything. May be cancelled.
async fn ended(socket: &mut MessageSocket) -> ApplianceError {
    match socket.recv().await {
        Ok(None) => ApplianceError::Gone { device: NAME },
        Ok(Some(_)) => ApplianceError::Request { device: NAME, request: "any message" },
        Err(source) => ApplianceError::Socket { device: NAME, source },
    }
}

fn socket_failed(source: std::io::Error) -> ApplianceError {
    ApplianceError::Socket { device: NAME, source: SocketError::Io(source) }
}

fn shared_page(uuid: [u8; 16]) -> rustix::io::Result<OwnedFd> {
    let file = memfd_create("vvu-doorbell", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, SHARED_LEN)?;
    rustix::io::pwrite(&file, &uuid, 0)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}
