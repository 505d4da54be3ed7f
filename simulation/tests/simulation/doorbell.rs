//! The appliance's doorbell device, as QEMU's client of an ivshmem server behaves. QEMU dies of a peer that is announced
//! twice, and so does the schedule.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::Interest;
use tokio::sync::Notify;
use vvu_protocol::doorbell::{OWN_PEER, PeerId, VERSION, Vector};

use super::world::{QUEUES, UUID, World};

#[derive(Debug, Default)]
struct Known {
    vectors: Vec<Arc<OwnedFd>>,
    peers: BTreeMap<PeerId, Arc<OwnedFd>>,
    /// All peers that were ever announced.
    ever: BTreeSet<i64>,
}

/// The doorbell device of appliance `number`.
#[derive(Debug)]
pub(crate) struct Doorbell {
    number: u32,
    world: Rc<World>,
    known: RefCell<Known>,
    grown: Notify,
}

impl Doorbell {
    pub(crate) fn new(number: u32, world: &Rc<World>) -> Rc<Self> {
        let (world, known) = (Rc::clone(world), RefCell::default());
        Rc::new(Self { number, world, known, grown: Notify::new() })
    }

    /// What the server says first. Answers whether it is there.
    pub(crate) async fn set_up(&self, stream: &tokio::net::UnixStream) -> io::Result<()> {
        let (version, _) = message(stream).await?;
        let (own, _) = message(stream).await?;
        let (shared, file) = message(stream).await?;
        assert_eq!((version, own, shared), (VERSION, i64::from(OWN_PEER.0), -1), "the doorbell server's first words");
        let mut uuid = [0; 16];
        rustix::io::pread(file.expect("the shared memory"), &mut uuid, 0)?;
        assert_eq!(uuid, UUID, "the doorbell device's uuid");
        Ok(())
    }

    /// Takes what the server announces, until it closes the connection.
    pub(crate) async fn serve(self: Rc<Self>, stream: tokio::net::UnixStream) {
        while let Ok((id, file)) = message(&stream).await {
            let file = file.expect("no peer leaves as long as the appliance is there");
            self.world.own_eventfd(eventfd_id(&file), self.number);
            let mut known = self.known.borrow_mut();
            if id == i64::from(OWN_PEER.0) {
                known.vectors.push(Arc::new(file));
                assert!(known.vectors.len() <= usize::from(QUEUES), "more vectors than the device has");
            } else {
                assert!(known.ever.insert(id), "peer {id} is announced a second time");
                known.peers.insert(PeerId(u16::try_from(id).unwrap()), Arc::new(file));
            }
            self.grown.notify_waiters();
        }
    }

    pub(crate) fn vector(&self, vector: Vector) -> Option<Arc<OwnedFd>> {
        self.known.borrow().vectors.get(usize::from(vector.0)).cloned()
    }

    pub(crate) fn vector_count(&self) -> usize {
        self.known.borrow().vectors.len()
    }

    pub(crate) fn peer(&self, peer: PeerId) -> Arc<OwnedFd> {
        let peers = &self.known.borrow().peers;
        Arc::clone(peers.get(&peer).unwrap_or_else(|| panic!("peer {} is named and was not announced", peer.0)))
    }

    /// Waits until all that belongs to a device was announced, as a guest finds it that boots.
    pub(crate) async fn complete(&self) {
        while self.known.borrow().vectors.len() < usize::from(QUEUES) {
            self.grown.notified().await;
        }
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        self.world.forget_eventfds(self.number);
    }
}

/// The kernel's number of an eventfd, which no other one has as long as it is open.
fn eventfd_id(file: &OwnedFd) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).unwrap();
    let id = text.lines().find_map(|line| line.strip_prefix("eventfd-id:"));
    id.expect("an eventfd").trim().parse().unwrap()
}

pub(crate) fn connect(path: &std::path::Path) -> io::Result<tokio::net::UnixStream> {
    let stream = UnixStream::connect(path)?;
    stream.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(stream)
}

async fn message(stream: &tokio::net::UnixStream) -> io::Result<(i64, Option<OwnedFd>)> {
    stream
        .async_io(Interest::READABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut bytes = [0; 8];
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received = recvmsg(stream.as_fd(), &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
            if received.bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            assert_eq!(received.bytes, 8, "messages of an ivshmem server have 8 bytes");
            let file = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut files) => files.next(),
                _ => None,
            });
            Ok((i64::from_le_bytes(bytes), file))
        })
        .await
}
