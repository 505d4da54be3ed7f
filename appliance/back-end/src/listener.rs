//! Where front-ends come from: a socket that they connect to, or a connection that was inherited.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::descriptors::inherit;

/// Where front-ends connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A socket that is created at this path, and removed at the end.
    Path(PathBuf),
    /// A socket that the parent process left open under this number: a listening one, or one that is connected to the only
    /// front-end to be served.
    Descriptor(RawFd),
}

/// Why there is no socket to listen on.
#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    /// Another process serves the path.
    #[error("{path} is in use by a running program; end it, or choose another path")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something that is no socket has the path.
    #[error("{path} exists and is no socket; remove it, or choose another path")]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket cannot be created.
    #[error("cannot listen at {path}")]
    Bind {
        /// The path.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The number of `--fd` is no descriptor to use.
    #[error("descriptor {number} cannot be used")]
    Descriptor {
        /// The number.
        number: RawFd,
        /// Cause.
        source: io::Error,
    },
    /// The descriptor of `--fd` is no socket that a front-end can come from.
    #[error(
        "descriptor {number} is neither a listening nor a connected unix socket; pass one on which listen(2) was called, \
         or one of a connected pair"
    )]
    NoSocketOfUse {
        /// The number.
        number: RawFd,
    },
}

/// See the module's text.
#[derive(Debug)]
pub enum FrontEnds {
    /// One after the other.
    Listening(Listener),
    /// This one only.
    Connected(UnixStream),
    /// The one is gone.
    NoMore,
}

impl FrontEnds {
    /// Listens, or takes the descriptor over. To be called before anything else opens descriptors: that of
    /// [`Endpoint::Descriptor`] must not be mixed up with one that is opened here.
    ///
    /// # Errors
    /// [`ListenerError`] says what to do.
    pub fn new(endpoint: &Endpoint) -> Result<Self, ListenerError> {
        match endpoint {
            Endpoint::Path(path) => Listener::bind(path).map(Self::Listening),
            Endpoint::Descriptor(number) => Self::adopt(*number),
        }
    }

    fn adopt(number: RawFd) -> Result<Self, ListenerError> {
        let descriptor = inherit(number).map_err(|source| ListenerError::Descriptor { number, source })?;
        let unix = rustix::net::sockopt::socket_domain(&descriptor) == Ok(rustix::net::AddressFamily::UNIX);
        let stream = rustix::net::sockopt::socket_type(&descriptor) == Ok(rustix::net::SocketType::STREAM);
        if !(unix && stream) {
            return Err(ListenerError::NoSocketOfUse { number });
        }
        if rustix::net::sockopt::socket_acceptconn(&descriptor).unwrap_or(false) {
            return Ok(Self::Listening(Listener { socket: UnixListener::from(descriptor), path: None }));
        }
        if rustix::net::getpeername(&descriptor).is_err() {
            return Err(ListenerError::NoSocketOfUse { number });
        }
        Ok(Self::Connected(UnixStream::from(descriptor)))
    }

    /// What becomes readable when [`FrontEnds::accept`] has a front-end. None if there will be no more.
    #[must_use]
    pub fn waiting(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Listening(listener) => Some(listener.socket.as_fd()),
            Self::Connected(stream) => Some(stream.as_fd()),
            Self::NoMore => None,
        }
    }

    /// The next front-end; waits for it.
    ///
    /// # Errors
    /// What accept(2) says, and NotConnected if there will be no more.
    pub fn accept(&mut self) -> io::Result<UnixStream> {
        if let Self::Listening(listener) = self {
            return listener.accept();
        }
        match std::mem::replace(self, Self::NoMore) {
            Self::Connected(stream) => Ok(stream),
            _ => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    /// To be removed at the end.
    path: Option<PathBuf>,
}

impl Listener {
    /// Listens at a path. What a program that was killed has left there is replaced.
    ///
    /// # Errors
    /// [`ListenerError`] says what to do.
    pub(crate) fn bind(path: &Path) -> Result<Self, ListenerError> {
        let failure = |source| ListenerError::Bind { path: path.to_owned(), source };
        match std::fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(ListenerError::NoSocket { path: path.to_owned() });
            }
            // A socket file outlives a program that was killed; nobody answers there any more.
            Ok(_) => match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).map_err(failure)?;
                }
                _ => return Err(ListenerError::InUse { path: path.to_owned() }),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failure(error)),
        }
        let socket = UnixListener::bind(path).map_err(failure)?;
        Ok(Self { socket, path: Some(path.to_owned()) })
    }

    /// The next connection; waits for it.
    pub(crate) fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().map(|(stream, _)| stream)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(%error, path = %path.display(), "socket cannot be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_a_live_one_and_a_file_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let bind = || Listener::bind(&path);
        let live = bind().unwrap();
        assert!(matches!(bind(), Err(ListenerError::InUse { .. })));
        drop(live);
        assert!(!path.exists());

        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file behind, as a killed program does");
        drop(bind().unwrap());

        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(), Err(ListenerError::NoSocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
