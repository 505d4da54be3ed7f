//! The socket that front-ends connect to.

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
    /// A listening socket that the parent process left open under this number.
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
    /// The descriptor of `--fd` is no listening socket.
    #[error("descriptor {number} is not a listening unix socket; pass one on which listen(2) was called")]
    NotListening {
        /// The number.
        number: RawFd,
    },
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    /// To be removed at the end.
    path: Option<PathBuf>,
}

impl Listener {
    pub(crate) fn new(endpoint: &Endpoint) -> Result<Self, ListenerError> {
        match endpoint {
            Endpoint::Path(path) => Self::bind(path),
            Endpoint::Descriptor(number) => Self::adopt(*number),
        }
    }

    fn bind(path: &Path) -> Result<Self, ListenerError> {
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

    fn adopt(number: RawFd) -> Result<Self, ListenerError> {
        let descriptor = inherit(number).map_err(|source| ListenerError::Descriptor { number, source })?;
        let listening = rustix::net::sockopt::socket_acceptconn(&descriptor).unwrap_or(false);
        let unix = rustix::net::sockopt::socket_domain(&descriptor) == Ok(rustix::net::AddressFamily::UNIX);
        if !(listening && unix) {
            return Err(ListenerError::NotListening { number });
        }
        Ok(Self { socket: UnixListener::from(descriptor), path: None })
    }

    /// The socket in the form that takes the next connection.
    pub(crate) fn acceptor(&self) -> io::Result<vhost::vhost_user::Listener> {
        Ok(self.socket.try_clone()?.into())
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
        let bind = || Listener::new(&Endpoint::Path(path.clone()));
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
