//! The appliance's doorbell device, as QEMU's client of an ivshmem server behaves, and the guest's kernel behind it.
//!
//! QEMU without KVM reads the eventfd of every vector for as long as it lives; what comes while the guest has the vector
//! switched off is kept for when it is switched on. With KVM an eventfd is only read while its vector is switched on. Of several
//! VMMs that read the same eventfd, any may be the one that takes what was signalled. QEMU
//! dies of a peer that is announced twice, and with KVM of a vector that is switched on before it was announced, and so does
//! the schedule. A peer that is signalled before it was announced, or after it went, is signalled in vain: that is one, too.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use tokio::sync::Notify;
use tokio::task::yield_now;
use vvu_agent::doorbell::{DoorbellError, SignalsInUse};
use vvu_protocol::doorbell::{OWN_PEER, PeerId, VERSION, Vector};
use vvu_socket::event::{self, Event};
use vvu_socket::ivshmem::ServerStream;

use super::task::OwnedTask;
use super::world::{QUEUES, UUID, World};

/// A vector of the device.
#[derive(Debug)]
struct Line {
    /// What the server has announced.
    announced: OwnedFd,
    /// What the guest's kernel signals.
    interrupt: Arc<OwnedFd>,
    is_on: bool,
    is_pending: bool,
    /// Reads what was announced.
    reader: Option<OwnedTask>,
}

#[derive(Debug, Default)]
struct Known {
    vectors: Vec<Line>,
    peers: BTreeMap<PeerId, Arc<OwnedFd>>,
    /// All peers that were ever announced.
    ever: BTreeSet<PeerId>,
    in_use: SignalsInUse,
}

/// The doorbell device of appliance `number`.
#[derive(Debug)]
pub(crate) struct Doorbell {
    number: u32,
    world: Rc<World>,
    has_kvm: bool,
    known: RefCell<Known>,
    grown: Notify,
}

impl Doorbell {
    pub(crate) fn new(number: u32, world: &Rc<World>) -> Rc<Self> {
        let has_kvm = world.random.percent(50);
        Rc::new(Self { number, world: Rc::clone(world), has_kvm, known: RefCell::default(), grown: Notify::new() })
    }

    /// What the server says first. Answers whether it is there.
    pub(crate) async fn set_up(&self, stream: &ServerStream) -> io::Result<()> {
        let next = async || stream.recv().await?.ok_or(io::Error::from(io::ErrorKind::UnexpectedEof));
        let (version, _) = next().await?;
        let (own, _) = next().await?;
        let (shared, file) = next().await?;
        assert_eq!((version, own, shared), (VERSION, i64::from(OWN_PEER.0), -1), "the doorbell server's first words");
        let mut uuid = [0; 16];
        rustix::io::pread(file.expect("the shared memory"), &mut uuid, 0)?;
        assert_eq!(uuid, UUID, "the doorbell device's uuid");
        Ok(())
    }

    /// Takes what the server announces, until it closes the connection.
    pub(crate) async fn serve(self: Rc<Self>, stream: ServerStream) {
        while stream.readable().await.is_ok() {
            self.world.hesitate().await;
            let Ok(Some((id, file))) = stream.recv().await else { return };
            let id = PeerId(u16::try_from(id).unwrap());
            match file {
                Some(file) if id == OWN_PEER => self.add_vector(file),
                Some(file) => self.add_peer(id, file),
                None => self.remove_peer(id),
            }
            self.grown.notify_waiters();
        }
    }

    fn add_vector(self: &Rc<Self>, announced: OwnedFd) {
        self.world.own_eventfd(event::identity(&announced).unwrap(), self.number);
        let mut known = self.known.borrow_mut();
        let index = known.vectors.len();
        assert!(index < usize::from(self.world.vectors), "more vectors than the device has");
        let interrupt = Arc::new(event::create().unwrap());
        let mut line = Line { announced, interrupt, is_on: false, is_pending: false, reader: None };
        if !self.has_kvm {
            line.read(index, Rc::downgrade(self));
        }
        known.vectors.push(line);
    }

    fn add_peer(&self, id: PeerId, file: OwnedFd) {
        self.world.own_eventfd(event::identity(&file).unwrap(), self.number);
        let mut known = self.known.borrow_mut();
        assert!(known.ever.insert(id), "peer {} is announced a second time", id.0);
        known.peers.insert(id, Arc::new(file));
    }

    fn remove_peer(&self, id: PeerId) {
        let mut known = self.known.borrow_mut();
        assert!(!known.in_use.peers.contains(&id), "peer {} goes, and is in use", id.0);
        let file = known.peers.remove(&id).unwrap_or_else(|| panic!("peer {} goes that is not there", id.0));
        self.world.disown_eventfd(event::identity(&file).unwrap(), self.number);
    }

    /// Something was signalled at a vector.
    fn interrupt(&self, index: usize) {
        let mut known = self.known.borrow_mut();
        let line = &mut known.vectors[index];
        if line.is_on {
            event::signal(&line.interrupt).unwrap();
        } else {
            line.is_pending = true;
        }
    }

    /// The guest's kernel switches a vector on, if need be.
    pub(crate) fn vector(self: &Rc<Self>, vector: Vector) -> Result<Arc<OwnedFd>, DoorbellError> {
        let (index, count) = (usize::from(vector.0), usize::from(self.world.vectors));
        if index >= count {
            return Err(DoorbellError::NoVector { vector, count });
        }
        let mut known = self.known.borrow_mut();
        known.in_use.vectors.insert(vector);
        let line = known.vectors.get_mut(index);
        let line = line.unwrap_or_else(|| panic!("vector {index} is switched on and was not announced"));
        line.is_on = true;
        if std::mem::take(&mut line.is_pending) {
            event::signal(&line.interrupt).unwrap();
        }
        if line.reader.is_none() {
            line.read(index, Rc::downgrade(self));
        }
        Ok(Arc::clone(&line.interrupt))
    }

    pub(crate) fn peer(&self, peer: PeerId) -> Arc<OwnedFd> {
        let mut known = self.known.borrow_mut();
        known.in_use.peers.insert(peer);
        let file = known.peers.get(&peer);
        Arc::clone(file.unwrap_or_else(|| panic!("peer {} is named and was not announced", peer.0)))
    }

    /// The guest gives all others up.
    pub(crate) fn keep_only(&self, in_use: &SignalsInUse) {
        let mut known = self.known.borrow_mut();
        for (index, line) in (0..).zip(&mut known.vectors) {
            if !in_use.vectors.contains(&Vector(index)) {
                line.switch_off(self.has_kvm);
            }
        }
        known.in_use.clone_from(in_use);
    }

    /// The machine is reset.
    pub(crate) fn reset(&self) {
        self.keep_only(&SignalsInUse::default());
        self.known.borrow_mut().vectors.iter_mut().for_each(|line| line.is_pending = false);
    }

    /// The process is gone, and reads no more.
    pub(crate) fn kill(&self) {
        self.known.borrow_mut().vectors.iter_mut().for_each(|line| line.reader = None);
    }

    /// Waits until all that belongs to a device was announced, as a guest finds it that boots.
    pub(crate) async fn complete(&self) {
        while self.known.borrow().vectors.len() < usize::from(QUEUES) {
            self.grown.notified().await;
        }
    }
}

impl Line {
    fn read(&mut self, index: usize, doorbell: Weak<Doorbell>) {
        let event = Event::new(self.announced.try_clone().unwrap()).unwrap();
        let id = event::identity(&self.announced).unwrap();
        self.reader = Some(OwnedTask::spawn(async move {
            loop {
                event.signalled().await.unwrap();
                let Some(doorbell) = doorbell.upgrade() else { return };
                if doorbell.world.is_shared(id) && doorbell.world.random.percent(50) {
                    // It is there for another one that reads it.
                    event::signal(&event).unwrap();
                    yield_now().await;
                } else {
                    doorbell.interrupt(index);
                }
            }
        }));
    }

    fn switch_off(&mut self, has_kvm: bool) {
        self.is_on = false;
        if has_kvm {
            self.reader = None;
        }
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        self.world.forget_eventfds(self.number);
    }
}
