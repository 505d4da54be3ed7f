//! Where the eventfds of kicks, calls and errors are chosen, and relayed if need be.
//!
//! There are two ways from one VM to the other. *Handed over* (module `hand_over`), an eventfd of the front-end is one of the appliance's
//! doorbell device itself: a kick is a vector's interrupt, a call is what the doorbell register signals, and no thread of the
//! bridge runs for either. *Relayed*, the doorbell device has an eventfd of the bridge, which passes each signal on. Each queue
//! has one vector (kick) and two peers (call and error) for that, and the dirty log has one peer, all of which live as long as
//! the appliance.
//!
//! Kicks and calls are handed over whenever they can be; errors and updates of the dirty log, which are rare, are relayed.
//! Nothing else in the bridge knows which way a signal goes. No signal is lost on the way from one to the other, nor between
//! two eventfds: whoever gets a new one gets a signal with it, for those that went elsewhere before.

mod hand_over;
mod readers;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::sleep;
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_socket::event::{self, Event, EventError, check_kind};

use self::hand_over::HandOver;
use self::readers::ReaderId;
pub use self::readers::Readers;
use crate::appliance::ApplianceError;
use crate::appliance::doorbell::DoorbellPort;

/// How often a kick is repeated that another VMM may have taken. Each costs who gets it a look at a queue.
const REPEAT_INTERVAL: Duration = Duration::from_millis(5);

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
        self.descriptor.iter().for_each(|descriptor| signal(descriptor));
    }
}

/// Signals an eventfd of the front-end. One that takes no signal is its own loss.
fn signal(descriptor: &OwnedFd) {
    if let Err(error) = event::signal(descriptor) {
        tracing::debug!(%error, "front-end's eventfd takes no signal");
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
    kick: Rc<OwnedFd>,
    kick_source: Option<KickSource>,
    call: Outward,
    /// The front-end's call eventfd, and the peer that it is, if it was handed over and is in use.
    direct_call: Option<(PeerId, Rc<OwnedFd>)>,
    error: Outward,
}

/// For each queue that is kicked, the eventfd that makes the appliance look at it: the front-end's, or the bridge's.
type Kicks = Rc<RefCell<BTreeMap<u8, Rc<OwnedFd>>>>;

/// All eventfds of the device. Needs a tokio `LocalSet`.
#[derive(Debug)]
pub struct Doorbells {
    queues: Vec<QueueDoorbells>,
    log: Outward,
    hand_over: Option<HandOver>,
    kicks: Kicks,
    repeat: Option<JoinHandle<()>>,
}

impl Drop for Doorbells {
    fn drop(&mut self) {
        self.repeat_no_more();
    }
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
                let kick = Rc::new(event::create()?);
                Ok(QueueDoorbells { kick, kick_source: None, call, direct_call: None, error })
            })
            .collect::<Result<_, EventError>>()?;
        let log = Outward::new(PeerId(1 + 2 * queue_count))?;
        Ok(Self { queues, log, hand_over: None, kicks: Kicks::default(), repeat: None })
    }

    /// From now on eventfds of the front-end are handed over to the doorbell device on this port, which has `vector_count`
    /// vectors.
    pub fn hand_over(&mut self, port: DoorbellPort, readers: Rc<Readers>, vector_count: u16) {
        let queue_count = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        let next_peer = PeerId(self.log.peer.0 + 1);
        self.hand_over = Some(HandOver::new(port, readers, queue_count, vector_count, next_peer));
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

    /// The vector that stands for this kick eventfd of queue `index`, or `None` if there is no such queue. The appliance may
    /// hear of it after [`Doorbells::all_known`].
    pub(crate) fn vector(&mut self, index: u8, descriptor: Option<&Rc<OwnedFd>>) -> Option<Vector> {
        self.queues.get(usize::from(index))?;
        let direct = self.hand_over.as_mut().zip(descriptor).and_then(|(it, descriptor)| it.vector(descriptor));
        Some(direct.unwrap_or(Vector(u16::from(index))))
    }

    /// The peer that stands for this eventfd of queue `index`, or `None` if there is no such queue. The appliance may hear of
    /// it after [`Doorbells::all_known`].
    pub(crate) fn peer(
        &mut self,
        index: u8,
        signal: OutwardSignal,
        descriptor: Option<&Rc<OwnedFd>>,
    ) -> Option<PeerId> {
        let relayed = self.outward(usize::from(index), signal)?.peer;
        let in_use: Vec<_> = self.queues.iter().filter_map(|queue| Some(queue.direct_call.as_ref()?.0)).collect();
        let direct = match (&mut self.hand_over, signal, descriptor) {
            (Some(hand_over), OutwardSignal::Call, Some(descriptor)) => hand_over.peer(descriptor, &in_use),
            _ => None,
        };
        Some(direct.unwrap_or(relayed))
    }

    /// Waits until the appliance's VMM knows all vectors and peers that were named until now. May be cancelled.
    pub(crate) fn all_known(&self) -> impl Future<Output = Result<(), ApplianceError>> + use<> {
        let known = self.hand_over.as_ref().map(|hand_over| hand_over.port().all_read());
        async move {
            match known {
                Some(known) => known.await,
                None => Ok(()),
            }
        }
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

    /// Kicks of the front-end reach the appliance by this vector from now on, or no longer.
    pub(crate) fn set_kick(
        &mut self,
        index: u8,
        vector: Vector,
        descriptor: Option<Rc<OwnedFd>>,
    ) -> Result<(), EventError> {
        let Some(queue) = self.queues.get_mut(usize::from(index)) else { return Ok(()) };
        let mut kicks = self.kicks.borrow_mut();
        kicks.remove(&index);
        // A kick that was made at the eventfd before and not passed on yet.
        if let Some(source) = queue.kick_source.take()
            && event::take(source.descriptor.as_fd())?.is_some()
        {
            event::signal(&queue.kick)?;
        }
        let Some(descriptor) = descriptor else { return Ok(()) };
        if vector.0 == u16::from(index) {
            let source = Event::new(descriptor.as_fd().try_clone_to_owned()?)?;
            let relay = tokio::task::spawn_local(relay_kicks(index, source, queue.kick.try_clone()?));
            queue.kick_source = Some(KickSource { descriptor, relay });
            kicks.insert(index, Rc::clone(&queue.kick));
        } else {
            // For a kick that went elsewhere: to the eventfd before, or to this one while nobody listened at the vector.
            signal(&descriptor);
            kicks.insert(index, descriptor);
        }
        Ok(())
    }

    /// The appliance is about to hear that its signals reach this eventfd of the front-end by this peer. Until there is
    /// one, they are kept.
    pub(crate) fn set_target(
        &self,
        index: u8,
        signal: OutwardSignal,
        peer: PeerId,
        descriptor: Option<Rc<OwnedFd>>,
    ) -> Result<(), EventError> {
        check_eventfd(descriptor.as_deref())?;
        if let Some(outward) = self.outward(usize::from(index), signal).filter(|outward| outward.peer == peer) {
            outward.set_target(descriptor);
        }
        Ok(())
    }

    /// The appliance has heard of it: no call goes to the eventfd before any more. Some may have gone there after the front-end
    /// had looked for the last time.
    pub(crate) fn call_was_set(
        &mut self,
        index: u8,
        peer: PeerId,
        descriptor: Option<Rc<OwnedFd>>,
    ) -> Result<(), EventError> {
        let Some(queue) = self.queues.get_mut(usize::from(index)) else { return Ok(()) };
        let before = queue.direct_call.take();
        match descriptor {
            Some(descriptor) if peer != queue.call.peer => {
                queue.call.reset()?;
                signal(&descriptor);
                queue.direct_call = Some((peer, descriptor));
            }
            _ if before.is_some() => queue.call.target.borrow_mut().deliver(),
            _ => {}
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
    /// If another VMM may still take kicks, they are repeated until it has ended.
    pub(crate) fn signal_all(&mut self) {
        self.kicks.borrow().values().for_each(|kick| signal(kick));
        for queue in &self.queues {
            match &queue.direct_call {
                Some((_, descriptor)) => signal(descriptor),
                None => queue.call.signal(),
            }
        }
        self.repeat_no_more();
        if let Some(hand_over) = self.hand_over.as_ref().filter(|hand_over| hand_over.has_rivals()) {
            let (readers, own) = hand_over.readers();
            self.repeat = Some(tokio::task::spawn_local(repeat_kicks(readers, own, Rc::clone(&self.kicks))));
        }
    }

    fn repeat_no_more(&mut self) {
        self.repeat.take().iter().for_each(JoinHandle::abort);
    }

    /// A vring has stopped: no kick is passed on any more, and every call that was made before has come: one that is
    /// relayed is passed on now.
    pub(crate) fn stop(&mut self, index: u32) -> io::Result<()> {
        let Ok(index) = u8::try_from(index) else { return Ok(()) };
        let Some(queue) = self.queues.get_mut(usize::from(index)) else { return Ok(()) };
        self.kicks.borrow_mut().remove(&index);
        queue.kick_source = None;
        queue.call.flush()
    }

    /// The front-end is gone, and the appliance has let go of all that it had set.
    pub(crate) fn withdraw_peers(&mut self) {
        self.hand_over.iter_mut().for_each(HandOver::withdraw_peers);
    }

    /// The session has ended: nothing of its front-end is kept.
    pub(crate) fn reset(&mut self) -> io::Result<()> {
        self.repeat_no_more();
        self.kicks.borrow_mut().clear();
        for queue in &mut self.queues {
            queue.kick_source = None;
            queue.direct_call = None;
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

/// Repeats kicks as long as another VMM than `own` may take them, and once more after that.
async fn repeat_kicks(readers: Rc<Readers>, own: Option<ReaderId>, kicks: Kicks) {
    while readers.has_others(own) {
        tokio::select! {
            () = readers.one_ended() => {}
            () = sleep(REPEAT_INTERVAL) => {}
        }
        kicks.borrow().values().for_each(|kick| signal(kick));
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
mod tests;
