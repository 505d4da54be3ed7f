//! The doorbell device: an ivshmem server with one client, the appliance's VMM.
//!
//! It hands out the eventfds that [`crate::doorbells`] has chosen, all of them at the start, and then only watches the socket.
//! The shared memory of the device is one page with the uuid of the device set at its start.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vvu_protocol::doorbell::{OWN_PEER, ServerMessage};
use vvu_socket::MessageSocket;

use super::{ApplianceError, sent};
use crate::doorbells::Announcement;

const NAME: &str = "doorbell";

/// Length of the shared memory in bytes: one page.
const SHARED_LEN: u64 = 4096;

/// The task.
#[derive(Debug)]
pub struct Doorbell {
    socket: MessageSocket,
    shared: OwnedFd,
}

impl Doorbell {
    /// A server on the socket of the appliance's VMM.
    ///
    /// # Errors
    /// [`ApplianceError`] if the socket cannot be used or the shared memory cannot be made.
    pub fn new(stream: UnixStream, uuid: [u8; 16]) -> Result<Self, ApplianceError> {
        let socket =
            MessageSocket::new(stream).map_err(|source| ApplianceError::Io { what: "doorbell socket", source })?;
        let shared = shared_page(uuid).map_err(|errno| ApplianceError::Io {
            what: "shared memory of the doorbell device",
            source: errno.into(),
        })?;
        Ok(Self { socket, shared })
    }

    /// Introduces the appliance's device with its vectors and all peers, then waits for the end of the connection.
    ///
    /// # Errors
    /// [`ApplianceError`] says what ended it.
    pub async fn run(mut self, announcement: Announcement) -> Result<(), ApplianceError> {
        let Announcement { vectors, peers } = announcement;
        self.send(ServerMessage::Version).await?;
        self.send(ServerMessage::OwnId(OWN_PEER)).await?;
        self.send(ServerMessage::SharedMemory(self.shared.as_fd())).await?;
        for vector in &vectors {
            self.send(ServerMessage::Vector(OWN_PEER, vector.as_fd())).await?;
        }
        for (id, peer) in &peers {
            self.send(ServerMessage::Vector(*id, peer.as_fd())).await?;
        }
        tracing::debug!(vectors = vectors.len(), peers = peers.len(), "doorbell device of the appliance set up");
        // The client never sends anything.
        match self.socket.recv().await {
            Ok(None) => Err(ApplianceError::Gone { device: NAME }),
            Ok(Some(_)) => Err(ApplianceError::Request { device: NAME, request: "any message" }),
            Err(source) => Err(ApplianceError::Socket { device: NAME, source }),
        }
    }

    async fn send(&self, message: ServerMessage<BorrowedFd<'_>>) -> Result<(), ApplianceError> {
        let (bytes, descriptor) = message.encode();
        sent(NAME, self.socket.send_bytes(&bytes, descriptor.as_slice())).await
    }
}

fn shared_page(uuid: [u8; 16]) -> rustix::io::Result<OwnedFd> {
    let file = memfd_create("vvu-doorbell", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, SHARED_LEN)?;
    rustix::io::pwrite(&file, &uuid, 0)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}
