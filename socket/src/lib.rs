//! What crosses between processes: vhost-user messages over a unix stream socket, with the file descriptors that come beside
//! them, and the eventfds ([`event`]) and pipes ([`stream`]) among these; and what an ivshmem server says ([`ivshmem`]).
//!
//! Used by the bridge (towards the front-end and towards the appliance's VMM) and by the agent (towards the back-end). It
//! moves whole messages and owns every descriptor from the moment the kernel hands it over: what is surplus, truncated
//! or belongs to a broken message is closed. It never looks into a payload, and never changes the flags of a descriptor.

pub mod event;
pub mod ivshmem;
pub mod stream;
mod unread;

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use vvu_protocol::DecodeError;
use vvu_protocol::message::{Header, MAX_DESCRIPTORS, RawMessage};

/// Why no message could be received or sent. After any of them the stream is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The system call failed.
    #[error("socket")]
    Io(#[from] io::Error),
    /// The header is not one of vhost-user.
    #[error("peer sent no vhost-user message")]
    Header(#[from] DecodeError),
    /// The peer closed the stream in the middle of a message.
    #[error("peer closed the socket after {received} bytes of a message")]
    Truncated {
        /// Bytes of the message that came.
        received: usize,
    },
    /// More descriptors than a message may have; all of them are closed.
    #[error("peer sent more than {MAX_DESCRIPTORS} file descriptors with one message")]
    SurplusDescriptors,
}

impl From<Errno> for SocketError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// One end of a vhost-user connection.
#[derive(Debug)]
pub struct MessageSocket {
    stream: tokio::net::UnixStream,
    inbox: Inbox,
}

/// The message that is being received. Kept here, not on the stack of `recv`, so that a cancelled `recv` loses nothing.
#[derive(Debug, Default)]
struct Inbox {
    bytes: Vec<u8>,
    header: Option<Header>,
    descriptors: Vec<OwnedFd>,
}

impl Inbox {
    /// Bytes that are still missing from the header or, once it is known, from the payload.
    fn missing(&self) -> usize {
        let wanted = self.header.map_or(Header::LEN, |header| Header::LEN + header.payload_len);
        wanted - self.bytes.len()
    }

    fn take(&mut self, header: Header) -> RawMessage<OwnedFd> {
        let Self { mut bytes, descriptors, .. } = std::mem::take(self);
        RawMessage { header, payload: bytes.split_off(Header::LEN), descriptors }
    }
}

impl MessageSocket {
    /// Takes over a connected stream. Needs a tokio runtime with I/O.
    ///
    /// # Errors
    /// If the stream cannot be registered for events.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream: tokio::net::UnixStream::from_std(stream)?, inbox: Inbox::default() })
    }

    /// The next message, or `None` if the peer has closed the stream between two messages. May be cancelled: what has been
    /// received so far stays, and the next call goes on from there.
    ///
    /// # Errors
    /// [`SocketError`]; the stream is of no use any more then.
    pub async fn recv(&mut self) -> Result<Option<RawMessage<OwnedFd>>, SocketError> {
        loop {
            if let Some(header) = self.inbox.header
                && self.inbox.missing() == 0
            {
                return Ok(Some(self.inbox.take(header)));
            }
            let (stream, inbox) = (&self.stream, &mut self.inbox);
            let received = stream.async_io(Interest::READABLE, || receive_some(stream, inbox)).await?;
            if self.inbox.descriptors.len() > MAX_DESCRIPTORS {
                return Err(SocketError::SurplusDescriptors);
            }
            if received == 0 {
                return match self.inbox.bytes.len() {
                    0 => Ok(None),
                    received => Err(SocketError::Truncated { received }),
                };
            }
            if self.inbox.header.is_none()
                && let Some(bytes) = self.inbox.bytes.first_chunk::<{ Header::LEN }>()
            {
                self.inbox.header = Some(Header::decode(bytes)?);
            }
        }
    }

    /// Waits until the peer has closed the stream, whatever it has sent before and nobody has read. May be cancelled.
    ///
    /// # Errors
    /// If the stream cannot be watched.
    pub async fn hung_up(&self) -> io::Result<()> {
        self.hang_up()?.happened().await
    }

    /// Watches for the same, and keeps this end of the stream open for as long.
    ///
    /// # Errors
    /// If the stream cannot be watched.
    #[expect(unsafe_code, reason = "tokio wants the promise that the descriptor stays what it is")]
    pub fn hang_up(&self) -> io::Result<HangUp> {
        let descriptor = self.stream.as_fd().try_clone_to_owned()?;
        // SAFETY: an OwnedFd is open for as long as it lives, and always returns the same descriptor; the AsyncFd owns it.
        let registered = unsafe { AsyncFd::register_with_interest(descriptor, Interest::PRIORITY) };
        Ok(HangUp(registered.map_err(|error| error.into_parts().1)?))
    }

    /// How much the peer has not read yet of what was sent: 0 if it has read all, else some number of bytes.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn unread(&self) -> io::Result<usize> {
        unread::unread(&self.stream)
    }

    /// Sends one message, header and payload in one system call as long as the socket takes them. Must not be cancelled.
    ///
    /// # Errors
    /// [`SocketError::Io`]; the stream is of no use any more then.
    pub async fn send<F: AsFd>(&self, message: &RawMessage<F>) -> Result<(), SocketError> {
        let descriptors = message.descriptors.iter().map(AsFd::as_fd).collect::<Vec<_>>();
        self.send_bytes(&message.to_bytes(), &descriptors).await
    }

    /// Sends bytes with descriptors beside the first of them. Must not be cancelled.
    ///
    /// # Errors
    /// [`SocketError::Io`]; the stream is of no use any more then.
    pub async fn send_bytes(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
        let mut rest = bytes;
        let mut descriptors = descriptors;
        while !rest.is_empty() {
            let sent = self.stream.async_io(Interest::WRITABLE, || send_some(&self.stream, rest, descriptors)).await?;
            rest = rest.get(sent..).unwrap_or_default();
            descriptors = &[];
        }
        Ok(())
    }
}

/// The end of a stream, waited for.
#[derive(Debug)]
pub struct HangUp(AsyncFd<OwnedFd>);

impl HangUp {
    /// Waits until the peer has closed the stream. May be cancelled.
    ///
    /// # Errors
    /// If the stream cannot be watched.
    pub async fn happened(&self) -> io::Result<()> {
        // A unix socket has no priority data, so nothing wakes this but the end of the stream.
        self.0.ready(Interest::PRIORITY).await.map(drop)
    }
}

/// One `recvmsg`: appends to the message in the inbox. A control buffer that was too small counts as one descriptor too many.
fn receive_some(stream: &impl AsFd, inbox: &mut Inbox) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS + 1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; inbox.missing()];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            inbox.descriptors.extend(descriptors);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, SocketError::SurplusDescriptors));
    }
    inbox.bytes.extend_from_slice(bytes.get(..received.bytes).unwrap_or_default());
    Ok(received.bytes)
}

/// One `sendmsg`.
fn send_some(stream: &impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, SocketError::SurplusDescriptors));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags)?)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsRawFd;

    use super::*;

    fn pair() -> (MessageSocket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (MessageSocket::new(ours).unwrap(), theirs)
    }

    fn eventfd() -> OwnedFd {
        rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()
    }

    /// Sends `count` copies of a pipe's end; the returned other end reads end-of-file when all of them are closed.
    fn send_raw(stream: &UnixStream, bytes: &[u8], count: usize) -> UnixStream {
        let (sent, kept) = UnixStream::pair().unwrap();
        let borrowed = vec![sent.as_fd(); count];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
        sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
        kept
    }

    #[tokio::test]
    async fn a_message_with_descriptors_arrives_whole() {
        let (mut ours, theirs) = pair();
        let theirs = MessageSocket::new(theirs).unwrap();
        let message = RawMessage::request(5, true, vec![7; 100], (0..MAX_DESCRIPTORS).map(|_| eventfd()).collect());
        theirs.send(&message).await.unwrap();
        let received = ours.recv().await.unwrap().unwrap();
        assert_eq!((received.header, received.payload), (message.header, message.payload));
        assert_eq!(received.descriptors.len(), MAX_DESCRIPTORS);
        for descriptor in &received.descriptors {
            assert!(rustix::io::fcntl_getfd(descriptor).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        }
    }

    #[tokio::test]
    async fn a_message_in_pieces_survives_cancelled_receives() {
        use std::io::Write;
        let (mut ours, mut theirs) = pair();
        let bytes = RawMessage::<OwnedFd>::request(3, false, vec![1, 2, 3, 4], vec![]).to_bytes();
        for byte in &bytes[..bytes.len() - 1] {
            theirs.write_all(&[*byte]).unwrap();
            tokio::select! {
                biased;
                _ = ours.recv() => panic!("a message came before its last byte"),
                () = std::future::ready(()) => {}
            }
        }
        theirs.write_all(&bytes[bytes.len() - 1..]).unwrap();
        assert_eq!(ours.recv().await.unwrap().unwrap().payload, [1, 2, 3, 4]);
        drop(theirs);
        assert!(ours.recv().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn the_end_is_seen_behind_unread_messages() {
        use std::io::Write;
        let (mut ours, mut theirs) = pair();
        let bytes = RawMessage::<OwnedFd>::request(3, false, vec![1, 2, 3, 4], vec![]).to_bytes();
        for _ in 0..3 {
            theirs.write_all(&bytes).unwrap();
            tokio::select! {
                biased;
                _ = ours.hung_up() => panic!("the peer is still there"),
                () = tokio::time::sleep(std::time::Duration::from_millis(20)) => {}
            }
        }
        drop(theirs);
        ours.hung_up().await.unwrap();
        // What was sent before is still there.
        for _ in 0..3 {
            assert_eq!(ours.recv().await.unwrap().unwrap().payload, [1, 2, 3, 4]);
        }
        assert!(ours.recv().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn broken_messages_end_the_connection_and_leak_nothing() {
        let header = |size: u8| [1, 0, 0, 0, 1, 0, 0, 0, size, 0, 0, 0];
        for (bytes, count) in
            [(header(0).to_vec(), 9), (header(0).to_vec(), 30), (vec![9; 12], 3), (header(4).to_vec(), 1)]
        {
            let (mut ours, theirs) = pair();
            let mut kept = send_raw(&theirs, &bytes, count);
            drop(theirs);
            assert!(ours.recv().await.is_err(), "{count} descriptors");
            drop(ours);
            kept.set_nonblocking(true).unwrap();
            assert_eq!(kept.read(&mut [0]).unwrap(), 0, "{count} descriptors");
        }
    }

    #[tokio::test]
    async fn flags_of_a_passed_descriptor_stay() {
        let (mut ours, theirs) = pair();
        let descriptor = eventfd();
        let before = rustix::fs::fcntl_getfl(&descriptor).unwrap();
        let theirs = MessageSocket::new(theirs).unwrap();
        theirs.send(&RawMessage::request(12, false, vec![0; 8], vec![descriptor.as_fd()])).await.unwrap();
        let received = ours.recv().await.unwrap().unwrap();
        assert_ne!(received.descriptors[0].as_raw_fd(), descriptor.as_raw_fd());
        assert_eq!(rustix::fs::fcntl_getfl(&descriptor).unwrap(), before);
    }
}
