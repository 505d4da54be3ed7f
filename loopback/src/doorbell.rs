//! The doorbell device: which eventfds the bridge has announced. They are what a back-end gets, with nothing in between.
//!
//! In an appliance a vector's eventfd raises an MSI-X interrupt, which signals an eventfd of the agent's; a peer's is signalled
//! by a register that an eventfd of the agent's writes. KVM does both without a thread.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use vvu_agent::doorbell::{Doorbell, DoorbellError, SignalsInUse};
use vvu_agent::uuid::Uuid;
use vvu_protocol::doorbell::{OWN_PEER, PeerId, VERSION, Vector};
use vvu_socket::event::check_kind;
use vvu_socket::ivshmem::ServerStream;

/// The message that carries the shared memory.
const SHARED_MEMORY: i64 = -1;

/// How long a vector or peer may be named before it is announced. The bridge announces first; the two go separate ways to
/// here.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why the doorbell device is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The bridge has closed the connection.
    #[error("bridge has closed the doorbell socket")]
    Closed,
    /// The socket failed, or there is none.
    #[error("doorbell socket")]
    Io(#[from] io::Error),
    /// What the bridge says is not of the protocol, or kills QEMU.
    #[error("doorbell device: expected {expected}, number {found} came")]
    Rule {
        /// What is right.
        expected: &'static str,
        /// What came.
        found: i64,
    },
    /// No eventfd.
    #[error("doorbell device")]
    Event(#[from] vvu_socket::event::EventError),
}

#[derive(Debug, Default)]
struct Known {
    vectors: Vec<Arc<OwnedFd>>,
    /// With nothing if it has gone: an id is never used again.
    peers: BTreeMap<PeerId, Option<Arc<OwnedFd>>>,
}

#[derive(Debug, Default)]
struct Shared {
    known: Mutex<Known>,
    grown: Condvar,
}

/// What was announced. Who takes it and who looks share it.
#[derive(Debug, Clone, Default)]
pub struct Doorbells(Arc<Shared>);

impl Doorbells {
    fn change(&self, change: impl FnOnce(&mut Known)) {
        change(&mut self.0.known.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.grown.notify_all();
    }

    /// Looks until something is found, but not for ever.
    fn look(&self, find: impl Fn(&Known) -> Option<Arc<OwnedFd>>) -> Option<Arc<OwnedFd>> {
        let known = self.0.known.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.0.grown.wait_timeout_while(known, PATIENCE, |known| find(known).is_none());
        let (known, _) = waited.unwrap_or_else(PoisonError::into_inner);
        find(&known)
    }
}

impl Doorbell for Doorbells {
    fn vector(&mut self, vector: Vector) -> Result<Arc<OwnedFd>, DoorbellError> {
        let found = self.look(|known| known.vectors.get(usize::from(vector.0)).cloned());
        found.ok_or_else(|| {
            let count = self.0.known.lock().unwrap_or_else(PoisonError::into_inner).vectors.len();
            DoorbellError::NoVector { vector, count }
        })
    }

    fn peer(&mut self, peer: PeerId) -> Result<Arc<OwnedFd>, DoorbellError> {
        let found = self.look(|known| known.peers.get(&peer).cloned().flatten());
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("peer {} was not announced", peer.0));
        Ok(found.ok_or_else(missing)?)
    }

    /// The announced eventfds are the bridge's to take back.
    fn keep_only(&mut self, _in_use: &SignalsInUse) {}
}

/// The connection to the bridge's ivshmem server.
#[derive(Debug)]
pub struct Server {
    stream: ServerStream,
    doorbells: Doorbells,
}

impl Server {
    /// Connects, and takes the server's first words. Answers the uuid that stands in the shared memory, too.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn connect(path: &Path, doorbells: Doorbells) -> Result<(Self, Uuid), ServerError> {
        let server = Self { stream: ServerStream::connect(path)?, doorbells };
        for (expected, number) in [("the version", VERSION), ("the device's own id", i64::from(OWN_PEER.0))] {
            let (found, _) = server.number().await?;
            if found != number {
                return Err(ServerError::Rule { expected, found });
            }
        }
        let (SHARED_MEMORY, Some(shared)) = server.number().await? else {
            return Err(ServerError::Rule { expected: "the shared memory", found: SHARED_MEMORY });
        };
        let mut uuid = [0; 16];
        rustix::io::pread(&shared, &mut uuid, 0).map_err(io::Error::from)?;
        Ok((server, Uuid(uuid)))
    }

    /// Takes the next announcement, or the end of a peer. May be cancelled.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn take(&self) -> Result<(), ServerError> {
        let (number, descriptor) = self.number().await?;
        let rule = |expected| ServerError::Rule { expected, found: number };
        let peer = PeerId(u16::try_from(number).map_err(|_| rule("an id"))?);
        let Some(descriptor) = descriptor else {
            self.doorbells.change(|known| {
                known.peers.insert(peer, None);
            });
            return Ok(());
        };
        check_kind(descriptor.as_fd())?;
        let (descriptor, mut again) = (Arc::new(descriptor), false);
        self.doorbells.change(|known| {
            if peer == OWN_PEER {
                known.vectors.push(descriptor);
            } else {
                again = known.peers.insert(peer, Some(descriptor)).is_some();
            }
        });
        // QEMU dies of it.
        if again { Err(rule("a peer that was not announced before")) } else { Ok(()) }
    }

    async fn number(&self) -> Result<(i64, Option<OwnedFd>), ServerError> {
        self.stream.recv().await?.ok_or(ServerError::Closed)
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::mem::MaybeUninit;
    use std::os::unix::net::{UnixListener, UnixStream};

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use vvu_socket::event;

    use super::*;

    fn say(stream: &UnixStream, number: i64, descriptor: Option<&OwnedFd>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.map(AsFd::as_fd);
        if let Some(descriptor) = &descriptors {
            assert!(control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(descriptor))));
        }
        sendmsg(stream, &[IoSlice::new(&number.to_le_bytes())], &mut control, SendFlags::empty()).unwrap();
    }

    fn file() -> OwnedFd {
        let file = rustix::fs::memfd_create("shared", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&file, &[7; 16]).unwrap();
        file
    }

    /// A server that has said its first words, and its client.
    async fn pair() -> (UnixStream, Server, Doorbells) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("doorbell.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let doorbells = Doorbells::default();
        let client = tokio::spawn({
            let doorbells = doorbells.clone();
            async move { Server::connect(&path, doorbells).await.unwrap() }
        });
        tokio::task::yield_now().await;
        let (theirs, _) = listener.accept().unwrap();
        say(&theirs, VERSION, None);
        say(&theirs, i64::from(OWN_PEER.0), None);
        say(&theirs, SHARED_MEMORY, Some(&file()));
        let (server, uuid) = client.await.unwrap();
        assert_eq!(uuid, Uuid([7; 16]));
        (theirs, server, doorbells)
    }

    #[tokio::test]
    async fn what_is_named_before_it_is_announced_is_waited_for() {
        let (theirs, server, mut doorbells) = pair().await;
        let eventfd = event::create().unwrap();
        let looks =
            std::thread::spawn(move || (doorbells.peer(PeerId(5)).unwrap(), doorbells.vector(Vector(0)).unwrap()));
        say(&theirs, 5, Some(&eventfd));
        say(&theirs, i64::from(OWN_PEER.0), Some(&eventfd));
        server.take().await.unwrap();
        server.take().await.unwrap();
        let (peer, vector) = looks.join().unwrap();
        event::signal(&*peer).unwrap();
        event::signal(&*vector).unwrap();
        assert_eq!(event::take(&eventfd).unwrap(), Some(2));
    }

    #[tokio::test]
    async fn what_kills_qemu_ends_it() {
        let eventfd = event::create().unwrap();
        let (theirs, server, _) = pair().await;
        say(&theirs, 5, Some(&eventfd));
        say(&theirs, 5, None);
        say(&theirs, 5, Some(&eventfd));
        server.take().await.unwrap();
        server.take().await.unwrap();
        assert!(matches!(server.take().await, Err(ServerError::Rule { found: 5, .. })));
        say(&theirs, 6, Some(&file()));
        assert!(matches!(server.take().await, Err(ServerError::Event(_))));
        drop(theirs);
        assert!(matches!(server.take().await, Err(ServerError::Closed)));
    }
}
