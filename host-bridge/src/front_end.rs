//! Where front-ends connect: a listening socket, or one that a parent process has connected already.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::net::sockopt::socket_acceptconn;

/// Source of front-ends.
#[derive(Debug)]
pub enum FrontEnds {
    /// A listening socket, and the path to remove at the end if this process has made it.
    Listening(tokio::net::UnixListener, Option<PathBuf>),
    /// One connected socket; `None` once it was used.
    Connected(Option<UnixStream>),
}

impl FrontEnds {
    /// Listens at `path`. A socket there that nobody listens at any more is replaced.
    ///
    /// # Errors
    /// If another process listens there, if something else is there, or if the directory cannot be written.
    pub fn bind(path: &Path) -> anyhow::Result<Self> {
        remove_stale_socket(path)?;
        let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
        Self::listening(listener, Some(path.to_owned()))
    }

    /// Takes over a socket by its number, as QEMU's conventions for back-end programs have it.
    ///
    /// # Errors
    /// If the number is no open unix socket.
    pub fn inherit(number: RawFd) -> anyhow::Result<Self> {
        let descriptor = inherited(number)?;
        if socket_acceptconn(&descriptor).with_context(|| format!("file descriptor {number} is no socket"))? {
            return Self::listening(UnixListener::from(descriptor), None);
        }
        Ok(Self::Connected(Some(UnixStream::from(descriptor))))
    }

    fn listening(listener: UnixListener, path: Option<PathBuf>) -> anyhow::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self::Listening(tokio::net::UnixListener::from_std(listener)?, path))
    }

    /// The next front-end, or `None` if there will be none.
    ///
    /// # Errors
    /// If the listening socket fails.
    pub async fn next(&mut self) -> anyhow::Result<Option<UnixStream>> {
        match self {
            Self::Listening(listener, _) => {
                let (stream, _) = listener.accept().await.context("cannot accept a front-end")?;
                Ok(Some(stream.into_std()?))
            }
            Self::Connected(stream) => Ok(stream.take()),
        }
    }

    /// Whether there will be no further front-end.
    #[must_use]
    pub fn are_used_up(&self) -> bool {
        matches!(self, Self::Connected(None))
    }

    /// Closes every connection that is made while another front-end has the device. Never ends.
    ///
    /// # Errors
    /// If the listening socket fails.
    pub async fn turn_away(&mut self) -> anyhow::Result<()> {
        loop {
            match self {
                Self::Listening(listener, _) => drop(listener.accept().await.context("cannot accept a front-end")?),
                Self::Connected(_) => std::future::pending().await,
            }
            tracing::debug!("turned a front-end away: another one has the device");
        }
    }
}

impl Drop for FrontEnds {
    fn drop(&mut self) {
        if let Self::Listening(_, Some(path)) = self {
            // The path may be gone already; there is nobody to tell.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Removes a socket file that nobody listens at.
///
/// # Errors
/// If somebody does, or if the path is something else.
pub fn remove_stale_socket(path: &Path) -> anyhow::Result<()> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        bail!("{} exists and is no socket; choose another path", path.display());
    }
    // A datagram socket can tell whether a stream socket is there without being taken for a peer of it (connect(2): EPROTOTYPE).
    let probe = UnixDatagram::unbound().and_then(|probe| probe.connect(path));
    if !probe.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
        bail!("another process listens at {}; end it or choose another path", path.display());
    }
    std::fs::remove_file(path).with_context(|| format!("cannot remove the stale socket {}", path.display()))
}

#[expect(unsafe_code, reason = "a descriptor's number on the command line is a promise of the parent process")]
fn inherited(number: RawFd) -> anyhow::Result<OwnedFd> {
    if number <= 2 || std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_err() {
        bail!("--fd {number} is not open; pass the number of a socket that the program inherits");
    }
    // SAFETY: the descriptor is open, as just seen, and nothing in this process has opened it: it was inherited for us.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
