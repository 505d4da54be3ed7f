//! Connecting to a unix socket of a program that may not listen yet.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use crate::watch::wait_for;

/// Between `bind` and `listen` of a program its socket is there but refuses connections; no event tells of the latter. Nor
/// does one tell that a full queue of connections has room again.
const FIRST_RETRY: Duration = Duration::from_millis(5);

/// Retries become rarer up to this, for a socket whose program has gone.
const LAST_RETRY: Duration = Duration::from_millis(250);

/// Connects as soon as the socket is there and its program listens; `None` if that takes longer than `limit`.
///
/// # Errors
/// If the directory of the socket cannot be watched, or it is no socket that can be connected to.
pub async fn connect(socket: &Path, limit: Duration) -> io::Result<Option<UnixStream>> {
    let directory = socket.parent().unwrap_or(Path::new("/"));
    let connected = async {
        let mut retry = FIRST_RETRY;
        loop {
            let there = || Ok::<_, io::Error>(socket.exists().then_some(()));
            if wait_for(directory, limit, there).await?.is_none() {
                return Ok(None);
            }
            match UnixStream::connect(socket).await {
                // It was removed since, for a new start.
                Err(error) if error.kind() == io::ErrorKind::NotFound => tokio::task::yield_now().await,
                Err(error) if may_pass(error.kind()) => {
                    sleep(retry).await;
                    retry = (retry * 2).min(LAST_RETRY);
                }
                other => return other.map(Some),
            }
        }
    };
    timeout(limit, connected).await.unwrap_or(Ok(None))
}

const fn may_pass(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_socket_that_is_bound_first_and_listens_later_is_connected_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("late.sock");
        let late = async {
            tokio::task::yield_now().await;
            let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
            bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
            sleep(FIRST_RETRY * 3).await;
            listen(&listener, 1).unwrap();
            listener
        };
        let (stream, _listener) = tokio::join!(connect(&path, LIMIT), late);
        assert!(stream.unwrap().is_some());
    }

    #[tokio::test]
    async fn a_full_queue_of_connections_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("full.sock");
        let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 0).unwrap();
        let _first = connect(&path, LIMIT).await.unwrap().unwrap();
        let accepted = async {
            sleep(FIRST_RETRY * 3).await;
            rustix::net::accept(&listener).unwrap()
        };
        let (second, _accepted) = tokio::join!(connect(&path, LIMIT), accepted);
        assert!(second.unwrap().is_some());
    }

    #[tokio::test]
    async fn who_never_listens_is_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let limit = Duration::from_millis(30);
        assert!(connect(&directory.path().join("none"), limit).await.unwrap().is_none());
        let path = directory.path().join("deaf.sock");
        let deaf = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        bind(&deaf, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        assert!(connect(&path, limit).await.unwrap().is_none());
    }
}
