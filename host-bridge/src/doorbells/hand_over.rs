//! Eventfds of the front-end that the appliance's VMM is given as they are, so that nobody relays their signals.
//!
//! A kick eventfd becomes the next vector of the appliance's own device, a call eventfd a peer with a fresh id. Rules of QEMU
//! that stand behind it:
//! - Vectors can be added and not be taken back. The same eventfd under two of them would lose kicks, since QEMU reads all
//!   that it was ever given: so an eventfd keeps its vector, and every one is remembered. Nothing but its number is held here
//!   for that: QEMU has it open for as long as it lives, so no other eventfd gets the number.
//! - A peer's id is never used again. A driver that masks and unmasks an interrupt makes its VMM swap two eventfds all the time:
//!   so they are remembered, too, and what was not used for long is withdrawn.
//! - A descriptor that QEMU receives gets O_NONBLOCK taken away, and set again a moment later in the same turn of its main
//!   loop. One that had it not would be changed for good: it is not handed over. One that had it has a signal at
//!   that moment, so that a read of the front-end finds it and does not wait; a signal too many is harmless.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use vvu_protocol::doorbell::{OWN_PEER, PeerId, ServerMessage, Vector};
use vvu_socket::event::{self, Identity};

use super::readers::{Given, ReaderId, Readers};
use crate::appliance::doorbell::DoorbellPort;

/// Call eventfds that are remembered for each queue: QEMU has two at a time, and new ones with the next start of the device.
const PEERS_PER_QUEUE: usize = 4;

/// A call eventfd, and the peer that it is.
#[derive(Debug)]
struct KnownPeer {
    identity: Identity,
    id: PeerId,
}

/// What one appliance's VMM was given.
#[derive(Debug)]
pub(super) struct HandOver {
    port: DoorbellPort,
    readers: Rc<Readers>,
    own: Option<ReaderId>,
    given: Given,
    vectors: BTreeMap<Identity, Vector>,
    next_vector: u16,
    vector_count: u16,
    /// In the order in which they were used last.
    peers: Vec<KnownPeer>,
    /// Larger than every id so far; ids end at `u16::MAX`.
    next_peer: u32,
    peers_max: usize,
    /// Somebody was told that nothing more can be handed over.
    told: bool,
}

impl HandOver {
    /// Vectors from `next_vector` on, and peers from `next_peer` on, are free.
    pub(super) fn new(
        port: DoorbellPort,
        readers: Rc<Readers>,
        queue_count: u16,
        vector_count: u16,
        next_peer: PeerId,
    ) -> Self {
        Self {
            port,
            readers,
            own: None,
            given: Given::default(),
            vectors: BTreeMap::new(),
            next_vector: queue_count,
            vector_count,
            peers: Vec::new(),
            next_peer: u32::from(next_peer.0),
            peers_max: PEERS_PER_QUEUE * usize::from(queue_count),
            told: false,
        }
    }

    pub(super) const fn port(&self) -> &DoorbellPort {
        &self.port
    }

    /// Whether another VMM than this one may take kicks.
    pub(super) fn has_rivals(&self) -> bool {
        self.readers.has_others(self.own)
    }

    /// The VMMs that may take kicks, and which of them this one is.
    pub(super) fn readers(&self) -> (Rc<Readers>, Option<ReaderId>) {
        (Rc::clone(&self.readers), self.own)
    }

    /// The vector that a kick eventfd is, or `None` if it cannot be one.
    pub(super) fn vector(&mut self, descriptor: &Rc<OwnedFd>) -> Option<Vector> {
        let identity = identity(descriptor)?;
        if let Some(known) = self.vectors.get(&identity) {
            return Some(*known);
        }
        check_flags(descriptor)?;
        if self.next_vector >= self.vector_count {
            self.tell("vectors of the doorbell device are used up; a restart of the appliance frees them");
            return None;
        }
        let vector = Vector(self.next_vector);
        self.give(OWN_PEER, descriptor)?;
        self.next_vector += 1;
        self.vectors.insert(identity, vector);
        Some(vector)
    }

    /// The peer that a call eventfd is, or `None` if it cannot be one. Those of `in_use` are not withdrawn.
    pub(super) fn peer(&mut self, descriptor: &Rc<OwnedFd>, in_use: &[PeerId]) -> Option<PeerId> {
        let identity = identity(descriptor)?;
        if let Some(index) = self.peers.iter().position(|known| known.identity == identity) {
            let known = self.peers.remove(index);
            let id = known.id;
            self.peers.push(known);
            return Some(id);
        }
        check_flags(descriptor)?;
        let Ok(id) = u16::try_from(self.next_peer).map(PeerId) else {
            self.tell("peer ids of the doorbell device are used up; a restart of the appliance frees them");
            return None;
        };
        self.give(id, descriptor)?;
        self.next_peer += 1;
        self.peers.push(KnownPeer { identity, id });
        self.withdraw_surplus(in_use);
        Some(id)
    }

    fn withdraw_surplus(&mut self, in_use: &[PeerId]) {
        // The newest one is about to be used.
        let older = self.peers.len().saturating_sub(1);
        let unused = self.peers.iter().take(older).position(|known| !in_use.contains(&known.id));
        if let Some(index) = unused.filter(|_| self.peers.len() > self.peers_max) {
            let KnownPeer { id, .. } = self.peers.remove(index);
            self.port.send(ServerMessage::Gone(id));
        }
    }

    /// The front-end is gone, and the appliance uses none of its eventfds.
    pub(super) fn withdraw_peers(&mut self) {
        for KnownPeer { id, .. } in self.peers.drain(..) {
            self.port.send(ServerMessage::Gone(id));
        }
    }

    fn give(&mut self, id: PeerId, descriptor: &Rc<OwnedFd>) -> Option<()> {
        let prepared = event::signal(descriptor).and_then(|()| descriptor.try_clone());
        let duplicate = prepared.inspect_err(|error| tracing::warn!(%error, "eventfd is relayed")).ok()?;
        let mut given = self.given.borrow_mut();
        given.retain(|earlier| earlier.strong_count() > 0);
        given.push(Rc::downgrade(descriptor));
        drop(given);
        if self.own.is_none()
            && let Some(hang_up) = self.port.take_hang_up()
        {
            self.own = Some(self.readers.add(hang_up, &self.given));
        }
        self.port.send(ServerMessage::Vector(id, duplicate));
        Some(())
    }

    fn tell(&mut self, problem: &str) {
        if !std::mem::replace(&mut self.told, true) {
            tracing::warn!("signals are relayed from now on: {problem}");
        }
    }
}

/// A kernel that does not tell eventfds apart leaves only the relay.
fn identity(descriptor: &OwnedFd) -> Option<Identity> {
    event::identity(descriptor).inspect_err(|error| tracing::debug!(%error, "eventfd is relayed")).ok()
}

/// An eventfd without O_NONBLOCK would be changed by QEMU.
fn check_flags(descriptor: &OwnedFd) -> Option<()> {
    let nonblocking = event::is_nonblocking(descriptor).unwrap_or(false);
    if !nonblocking {
        tracing::debug!("eventfd without O_NONBLOCK is relayed");
    }
    nonblocking.then_some(())
}
