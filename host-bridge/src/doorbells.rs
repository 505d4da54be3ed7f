//! Where the eventfds of kicks, calls and errors are chosen, and relayed.
//!
//! Each queue has one vector (kick) and two peers (call and error), and the dirty log has one peer, all with eventfds of the
//! bridge that live as long as the appliance. A signal is passed on from the front-end's eventfd to the bridge's, or the other
//! way round. Nothing else in the bridge knows that, so that a direct way from one VM to the other replaces this module
//! alone.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use tokio::task::JoinHandle;
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_socket::event::{self, Event, EventError, check_kind};

/// The front-end's end of a signal out of the appliance. A signal that comes while there is none is kept.
#[derive(Debug, Default)]
struct Target {
    descriptor: Option<Rc<OwnedFd>>,
    pending: bool,
}

impl Target {
    /// A front-end that keeps its own eventfd from being signalled has lost the signal; nobody else has.
    fn deliver(&mut self) {
        self.pending = self.descriptor.is_none();
        if let Some(Err(error)) = self.descriptor.as_deref().map(event::signal) {
            tracing::debug!(%error, "front-end's eventfd takes no signal");
        }
    }
}

/// A signal out of the appliance: the peer's eventfd, and the task that passes it on.
#[derive(Debug)]
struct Outward {
    peer: PeerId,
    descriptor: OwnedFd,
    target: Rc<RefCell<Target>>,
    relay: JoinHandle<()>,
}

impl Drop for Outward {
    fn drop(&mut self) {
        self.relay.abort();
    }
}

impl Outward {
    fn new(peer: PeerId) -> Result<Self, EventError> {
        let descriptor = event::create()?;
        let source = Event::new(descriptor.try_clone()?)?;
        let target = Rc::new(RefCell::new(Target::default()));
        let relay = tokio::task::spawn_local(relay_outward(peer, source, Rc::clone(&target)));
        Ok(Self { peer, descriptor, target, relay })
    }

    fn set_target(&self, descriptor: Option<Rc<OwnedFd>>) {
        let mut target = self.target.borrow_mut();
        target.descriptor = descriptor;
        if target.pending {
            target.deliver();
        }
    }

    /// Signals the front-end, if it has an eventfd.
    fn signal(&self) {
        let mut target = self.target.borrow_mut();
        if target.descriptor.is_some() {
            target.deliver();
        }
    }

    /// Passes on at once what has been signalled so far.
    fn flush(&self) -> io::Result<()> {
        if event::take(&self.descriptor)?.is_some() {
            self.target.borrow_mut().deliver();
        }
        Ok(())
    }

    /// Forgets the front-end and what was signalled for it.
    fn reset(&self) -> io::Result<()> {
        event::take(&self.descriptor)?;
        *self.target.borrow_mut() = Target::default();
        Ok(())
    }
}

/// The front-end's end of a signal into the appliance, and the task that passes it on.
#[derive(Debug)]
struct KickSource {
    descriptor: Rc<OwnedFd>,
    relay: JoinHandle<()>,
}

impl Drop for KickSource {
    fn drop(&mut self) {
        self.relay.abort();
    }
}

/// Eventfds of one queue.
#[derive(Debug)]
struct QueueDoorbells {
    kick: OwnedFd,
    kick_source: Option<KickSource>,
    call: Outward,
    error: Outward,
}

/// All eventfds of the device. Needs a tokio `LocalSet`.
#[derive(Debug)]
pub struct Doorbells {
    queues: Vec<QueueDoorbells>,
    log: Outward,
}

/// What the doorbell device is told at its start.
#[derive(Debug)]
pub struct Announcement {
    /// Eventfds of the appliance's own vectors, in order.
    pub vectors: Vec<OwnedFd>,
    /// The peers, each with the eventfd of its only vector.
    pub peers: Vec<(PeerId, OwnedFd)>,
}

/// Which signal out of the appliance is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OutwardSignal {
    /// The used ring has something new.
    Call,
    /// The vring is broken.
    Error,
}

impl Doorbells {
    /// Eventfds for `queue_count` queues.
    ///
    /// # Errors
    /// If the process has too many open files.
    pub fn new(queue_count: u16) -> Result<Self, EventError> {
        let queues = (0..queue_count)
            .map(|index| {
                // Peer 0 is the appliance's own device.
                let call = Outward::new(PeerId(1 + 2 * index))?;
                let error = Outward::new(PeerId(2 + 2 * index))?;
                Ok(QueueDoorbells { kick: event::create()?, kick_source: None, call, error })
            })
            .collect::<Result<_, EventError>>()?;
        Ok(Self { queues, log: Outward::new(PeerId(1 + 2 * queue_count))? })
    }

    /// Number of queues.
    #[must_use]
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// Duplicates of all eventfds for the doorbell device.
    ///
    /// # Errors
    /// If the process has too many open files.
    pub fn announce(&self) -> io::Result<Announcement> {
        let vectors = self.queues.iter().map(|queue| queue.kick.try_clone()).collect::<io::Result<_>>()?;
        let peers = self
            .queues
            .iter()
            .flat_map(|queue| [&queue.call, &queue.error])
            .chain([&self.log])
            .map(|outward| Ok((outward.peer, outward.descriptor.try_clone()?)))
            .collect::<io::Result<_>>()?;
        Ok(Announcement { vectors, peers })
    }

    /// The vector that stands for the kick of queue `index`, or `None` if there is no such queue.
    pub(crate) fn vector(&self, index: u8) -> Option<Vector> {
        self.queues.get(usize::from(index)).map(|_| Vector(u16::from(index)))
    }

    /// The peer that stands for a signal of queue `index`, or `None` if there is no such queue.
    pub(crate) fn peer(&self, index: u8, signal: OutwardSignal) -> Option<PeerId> {
        self.outward(usize::from(index), signal).map(|outward| outward.peer)
    }

    /// The peer that stands for updates of the dirty log.
    pub(crate) fn log_peer(&self) -> PeerId {
        self.log.peer
    }

    fn outward(&self, index: usize, signal: OutwardSignal) -> Option<&Outward> {
        self.queues.get(index).map(|queue| match signal {
            OutwardSignal::Call => &queue.call,
            OutwardSignal::Error => &queue.error,
        })
    }

    /// Passes kicks of the front-end on to the appliance from now on, or no longer.
    pub(crate) fn set_kick(&mut self, index: u8, descriptor: Option<Rc<OwnedFd>>) -> Result<(), EventError> {
        let Some(queue) = self.queues.get_mut(usize::from(index)) else { return Ok(()) };
        // A kick that was made at the eventfd before and not passed on yet.
        if let Some(source) = queue.kick_source.take()
            && event::take(source.descriptor.as_fd())?.is_some()
        {
            event::signal(&queue.kick)?;
        }
        if let Some(descriptor) = descriptor {
            let source = Event::new(descriptor.as_fd().try_clone_to_owned()?)?;
            let relay = tokio::task::spawn_local(relay_kicks(index, source, queue.kick.try_clone()?));
            queue.kick_source = Some(KickSource { descriptor, relay });
        }
        Ok(())
    }

    /// Passes a signal of the appliance on to this eventfd of the front-end from now on, or keeps it until there is one.
    pub(crate) fn set_target(
        &self,
        index: u8,
        signal: OutwardSignal,
        descriptor: Option<Rc<OwnedFd>>,
    ) -> Result<(), EventError> {
        check_eventfd(descriptor.as_deref())?;
        if let Some(outward) = self.outward(usize::from(index), signal) {
            outward.set_target(descriptor);
        }
        Ok(())
    }

    /// The same for updates of the dirty log.
    pub(crate) fn set_log_target(&self, descriptor: Rc<OwnedFd>) -> Result<(), EventError> {
        check_eventfd(Some(&descriptor))?;
        self.log.set_target(Some(descriptor));
        Ok(())
    }

    /// Signals every kick and every call once that has both its ends: a signal may have been lost with the back-end before.
    pub(crate) fn signal_all(&self) -> io::Result<()> {
        for queue in &self.queues {
            if queue.kick_source.is_some() {
                event::signal(&queue.kick)?;
            }
            queue.call.signal();
        }
        Ok(())
    }

    /// A vring has stopped: no kick is passed on any more, and every call that was made before is passed on now.
    pub(crate) fn stop(&mut self, index: u32) -> io::Result<()> {
        let Some(queue) = usize::try_from(index).ok().and_then(|index| self.queues.get_mut(index)) else {
            return Ok(());
        };
        queue.kick_source = None;
        queue.call.flush()
    }

    /// The session has ended: nothing of its front-end is kept.
    pub(crate) fn reset(&mut self) -> io::Result<()> {
        for queue in &mut self.queues {
            queue.kick_source = None;
            queue.call.reset()?;
            queue.error.reset()?;
        }
        self.log.reset()
    }
}

/// Refuses what is no eventfd.
pub(crate) fn check_eventfd(descriptor: Option<&OwnedFd>) -> Result<(), EventError> {
    descriptor.map_or(Ok(()), |descriptor| check_kind(descriptor.as_fd()))
}

async fn relay_kicks(index: u8, source: Event, target: OwnedFd) {
    loop {
        let relayed = match source.signalled().await {
            Ok(_) => event::signal(&target),
            Err(error) => Err(error),
        };
        if let Err(error) = relayed {
            tracing::warn!(queue = index, %error, "kicks are no longer relayed");
            return;
        }
    }
}

async fn relay_outward(peer: PeerId, source: Event, target: Rc<RefCell<Target>>) {
    loop {
        if let Err(error) = source.signalled().await {
            tracing::warn!(peer = peer.0, %error, "signals are no longer relayed");
            return;
        }
        target.borrow_mut().deliver();
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::LocalSet;

    use super::*;

    fn eventfd() -> Rc<OwnedFd> {
        Rc::new(event::create().unwrap())
    }

    /// Doorbells of one queue, and the appliance's ends: vector, call.
    fn doorbells() -> (Doorbells, OwnedFd, OwnedFd) {
        let doorbells = Doorbells::new(1).unwrap();
        let Announcement { mut vectors, mut peers } = doorbells.announce().unwrap();
        (doorbells, vectors.remove(0), peers.remove(0).1)
    }

    #[tokio::test]
    async fn a_kick_that_the_relay_has_not_seen_yet_counts() {
        LocalSet::new()
            .run_until(async {
                let (mut doorbells, vector, _) = doorbells();
                for next in [Some(eventfd()), None] {
                    let kick = eventfd();
                    doorbells.set_kick(0, Some(Rc::clone(&kick))).unwrap();
                    event::signal(kick.as_fd()).unwrap();
                    // Nothing is awaited: the relay has no turn in between.
                    doorbells.set_kick(0, next).unwrap();
                    assert_eq!(event::take(&vector).unwrap(), Some(1));
                }
            })
            .await;
    }

    #[tokio::test]
    async fn a_vring_that_stops_passes_its_calls_on_at_once() {
        LocalSet::new()
            .run_until(async {
                let (mut doorbells, vector, call) = doorbells();
                let (kick, target) = (eventfd(), eventfd());
                doorbells.set_kick(0, Some(Rc::clone(&kick))).unwrap();
                doorbells.set_target(0, OutwardSignal::Call, Some(Rc::clone(&target))).unwrap();
                event::signal(&call).unwrap();
                event::signal(kick.as_fd()).unwrap();
                doorbells.stop(0).unwrap();
                assert_eq!(event::take(target.as_fd()).unwrap(), Some(1));
                assert_eq!(event::take(&vector).unwrap(), None);
            })
            .await;
    }

    #[tokio::test]
    async fn a_reset_forgets_what_was_signalled() {
        LocalSet::new()
            .run_until(async {
                let (mut doorbells, vector, call) = doorbells();
                let (kick, target) = (eventfd(), eventfd());
                doorbells.set_kick(0, Some(Rc::clone(&kick))).unwrap();
                doorbells.set_target(0, OutwardSignal::Call, Some(Rc::clone(&target))).unwrap();
                event::signal(&call).unwrap();
                event::signal(kick.as_fd()).unwrap();
                doorbells.reset().unwrap();
                tokio::task::yield_now().await;
                assert_eq!(event::take(target.as_fd()).unwrap(), None);
                assert_eq!(event::take(&vector).unwrap(), None);
                doorbells.set_target(0, OutwardSignal::Call, Some(Rc::clone(&target))).unwrap();
                assert_eq!(event::take(target.as_fd()).unwrap(), None);
            })
            .await;
    }

    #[tokio::test]
    async fn each_signal_that_has_both_ends_is_made_once() {
        LocalSet::new()
            .run_until(async {
                let (mut doorbells, vector, _) = doorbells();
                doorbells.signal_all().unwrap();
                assert_eq!(event::take(&vector).unwrap(), None, "nobody listens there");
                let (kick, target) = (eventfd(), eventfd());
                doorbells.set_kick(0, Some(kick)).unwrap();
                doorbells.set_target(0, OutwardSignal::Call, Some(Rc::clone(&target))).unwrap();
                assert_eq!(event::take(target.as_fd()).unwrap(), None, "a call was kept that was never made");
                doorbells.signal_all().unwrap();
                assert_eq!(event::take(&vector).unwrap(), Some(1));
                assert_eq!(event::take(target.as_fd()).unwrap(), Some(1));
            })
            .await;
    }
}
