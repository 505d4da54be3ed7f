//! The client's end of an ivshmem server's socket: numbers, with a descriptor beside some of them.
//!
//! Source: QEMU documentation, "Device Specification for Inter-VM shared memory device", section "Client-Server protocol".

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::Interest;

/// A connection to an ivshmem server.
#[derive(Debug)]
pub struct ServerStream(tokio::net::UnixStream);

impl ServerStream {
    /// Connects. Needs a tokio runtime with I/O.
    ///
    /// # Errors
    /// If nobody listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_nonblocking(true)?;
        Ok(Self(tokio::net::UnixStream::from_std(stream)?))
    }

    /// Waits until there is something to receive, or the server has closed the connection. May be cancelled.
    ///
    /// # Errors
    /// If the socket cannot be watched.
    pub async fn readable(&self) -> io::Result<()> {
        self.0.readable().await
    }

    /// The next number and its descriptor, or `None` if the server has closed the connection. May be cancelled.
    ///
    /// # Errors
    /// If the socket fails, or what comes is no number.
    pub async fn recv(&self) -> io::Result<Option<(i64, Option<OwnedFd>)>> {
        self.0.async_io(Interest::READABLE, || receive(&self.0)).await
    }
}

impl AsFd for ServerStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn receive(stream: &impl AsFd) -> io::Result<Option<(i64, Option<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 8];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    match received.bytes {
        0 => Ok(None),
        8 => Ok(Some((i64::from_le_bytes(bytes), descriptor))),
        // A stream may be cut anywhere, but no server sends less than a number at once.
        found => Err(io::Error::new(io::ErrorKind::InvalidData, format!("expected a number of 8 bytes, {found} came"))),
    }
}
