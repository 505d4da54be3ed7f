//! A pipe or socket that came from another process, for bytes in one direction: read or written without ever blocking on it and
//! without ever changing its flags.
//!
//! O_NONBLOCK lives on the open file that all its holders share, so it is never set or cleared here. A socket takes the wish not
//! to wait with each call. A pipe does so for `splice` only (splice(2), SPLICE_F_NONBLOCK), so bytes pass through a pipe of
//! our own.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the other process.
    Read,
    /// To the other process.
    Write,
}

/// Most bytes that are moved at once: what a pipe holds at least (pipe(7), PIPE_BUF).
pub const PART_LEN: usize = 4096;

/// Why a descriptor cannot serve as a stream.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// It is neither a pipe nor a socket.
    #[error("expected a pipe or a socket, a file of another kind came")]
    Kind,
    /// A system call failed.
    #[error("stream")]
    Io(#[from] io::Error),
}

/// One end of a stream.
#[derive(Debug)]
pub struct Stream {
    descriptor: AsyncFd<OwnedFd>,
    direction: Direction,
    /// The pipe on the way, if the descriptor is a pipe: where bytes go in, and where they come out.
    relay: Option<(OwnedFd, OwnedFd)>,
}

impl Stream {
    /// Takes over a descriptor. Needs a tokio runtime with I/O.
    ///
    /// # Errors
    /// [`StreamError`] if it is of another kind or cannot be registered.
    #[expect(unsafe_code, reason = "tokio wants the promise that the descriptor stays what it is")]
    pub fn new(descriptor: OwnedFd, direction: Direction) -> Result<Self, StreamError> {
        let status = fstat(&descriptor).map_err(io::Error::from)?;
        let relay = match FileType::from_raw_mode(status.st_mode) {
            FileType::Fifo => {
                let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(io::Error::from)?;
                Some((into, out))
            }
            FileType::Socket => None,
            _ => return Err(StreamError::Kind),
        };
        let interest = match direction {
            Direction::Read => Interest::READABLE,
            Direction::Write => Interest::WRITABLE,
        };
        // SAFETY: an OwnedFd is open for as long as it lives, and always returns the same descriptor; the AsyncFd owns it.
        let registered = unsafe { AsyncFd::register_with_interest(descriptor, interest) };
        let descriptor = registered.map_err(|error| error.into_parts().1)?;
        Ok(Self { descriptor, direction, relay })
    }

    /// Waits for bytes, and reads at most `limit` and [`PART_LEN`] of them; none at the end of the stream. May be cancelled.
    ///
    /// # Errors
    /// If the descriptor cannot be read, or is for writing.
    pub async fn read(&self, limit: usize) -> io::Result<Vec<u8>> {
        self.check(Direction::Read)?;
        let mut bytes = vec![0; limit.min(PART_LEN)];
        let read_some = |descriptor: &OwnedFd| match &self.relay {
            None => Ok(recv(descriptor, &mut bytes[..], RecvFlags::DONTWAIT)?.0),
            Some((into, out)) => {
                let moved = splice_some(descriptor, into, bytes.len())?;
                if moved == 0 { Ok(0) } else { Ok(rustix::io::read(out, &mut bytes[..])?) }
            }
        };
        let len = self.descriptor.async_io(Interest::READABLE, read_some).await?;
        bytes.truncate(len);
        Ok(bytes)
    }

    /// Writes all of `bytes`. A stream whose write was cancelled is of no use any more.
    ///
    /// # Errors
    /// If nobody reads any more, or the descriptor is for reading.
    pub async fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        self.check(Direction::Write)?;
        for part in bytes.chunks(PART_LEN) {
            match &self.relay {
                None => self.send(part).await?,
                Some((into, out)) => self.pass_on(into, out, part).await?,
            }
        }
        Ok(())
    }

    async fn send(&self, part: &[u8]) -> io::Result<()> {
        let mut rest = part;
        while !rest.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let send_some = |descriptor: &OwnedFd| {
                Ok(sendmsg(descriptor, &[IoSlice::new(rest)], &mut SendAncillaryBuffer::default(), flags)?)
            };
            let sent = self.descriptor.async_io(Interest::WRITABLE, send_some).await?;
            rest = rest.get(sent..).unwrap_or_default();
        }
        Ok(())
    }

    /// The pipe on the way is empty before and after.
    async fn pass_on(&self, into: &OwnedFd, out: &OwnedFd, part: &[u8]) -> io::Result<()> {
        let mut missing = rustix::io::write(into, part)?;
        if missing != part.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        while missing > 0 {
            let pass_some = |descriptor: &OwnedFd| splice_some(out, descriptor, missing);
            missing -= self.descriptor.async_io(Interest::WRITABLE, pass_some).await?;
        }
        Ok(())
    }

    fn check(&self, wanted: Direction) -> io::Result<()> {
        if self.direction == wanted { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }
}

fn splice_some(from: &OwnedFd, to: &OwnedFd, len: usize) -> io::Result<usize> {
    match splice(from, None, to, None, len, SpliceFlags::NONBLOCK) {
        Ok(moved) => Ok(moved),
        Err(Errno::AGAIN) => Err(io::ErrorKind::WouldBlock.into()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A stream of each kind, and the other process's end of it.
    fn pairs(direction: Direction) -> [(Stream, OwnedFd); 2] {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let (ours, theirs) = match direction {
            Direction::Read => (read, write),
            Direction::Write => (write, read),
        };
        let (socket, peer) = UnixStream::pair().unwrap();
        [(Stream::new(ours, direction).unwrap(), theirs), (Stream::new(socket.into(), direction).unwrap(), peer.into())]
    }

    async fn is_pending(event: impl Future) -> bool {
        tokio::select! {
            biased;
            _ = event => false,
            () = tokio::task::yield_now() => true,
        }
    }

    #[tokio::test]
    async fn bytes_are_read_to_the_end_without_blocking() {
        for (stream, peer) in pairs(Direction::Read) {
            let flags = rustix::fs::fcntl_getfl(stream.descriptor.get_ref()).unwrap();
            assert!(is_pending(stream.read(100)).await);
            rustix::io::write(&peer, b"some bytes").unwrap();
            assert_eq!(stream.read(4).await.unwrap(), b"some");
            assert_eq!(stream.read(100).await.unwrap(), b" bytes");
            assert!(is_pending(stream.read(100)).await);
            drop(peer);
            assert_eq!(stream.read(100).await.unwrap(), b"");
            assert_eq!(rustix::fs::fcntl_getfl(stream.descriptor.get_ref()).unwrap(), flags);
            assert!(stream.write_all(b"x").await.is_err(), "it is for reading");
        }
    }

    #[tokio::test]
    async fn a_slow_reader_is_waited_for_without_blocking() {
        for (stream, peer) in pairs(Direction::Write) {
            let sent: Vec<u8> = (0..3_000_000_u32).map(|number| u8::try_from(number % 251).unwrap()).collect();
            let mut write = Box::pin(stream.write_all(&sent));
            assert!(is_pending(&mut write).await, "more than the stream holds was taken");
            let reader = std::thread::spawn(move || {
                let mut received = Vec::new();
                let mut part = vec![0; 70_000];
                loop {
                    match rustix::io::read(&peer, &mut part).unwrap() {
                        0 => return received,
                        len => received.extend_from_slice(&part[..len]),
                    }
                }
            });
            write.as_mut().await.unwrap();
            drop(write);
            drop(stream);
            assert!(reader.join().unwrap() == sent, "bytes were lost or changed");
        }
    }

    #[tokio::test]
    async fn a_reader_that_has_gone_is_an_error() {
        for (stream, peer) in pairs(Direction::Write) {
            drop(peer);
            assert!(stream.write_all(b"x").await.is_err());
            assert!(stream.read(1).await.is_err(), "it is for writing");
        }
    }

    #[tokio::test]
    async fn other_kinds_of_files_are_refused() {
        let event = crate::event::create().unwrap();
        assert!(matches!(Stream::new(event, Direction::Read), Err(StreamError::Kind)));
        let file = rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(matches!(Stream::new(file, Direction::Write), Err(StreamError::Kind)));
        // The wrong end of a pipe is found at the first byte.
        let (read, _write) = rustix::pipe::pipe().unwrap();
        if let Ok(stream) = Stream::new(read, Direction::Write) {
            let written = tokio::time::timeout(std::time::Duration::from_secs(1), stream.write_all(b"x")).await;
            assert!(!matches!(written, Ok(Ok(()))));
        }
    }
}
