//! What the queue's thread has of a ring while it works on it.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vvu_protocol::features::Features;

use super::{Mapping, Phase, QUESTIONS, Shared, Vring};
use crate::ring::{Ring, RingParameters};
use crate::ring_error::{Pause, RingError};
use crate::wakeup::Wakeup;

/// Changes that the queue's thread has to follow.
#[derive(Debug, Default)]
pub struct Changes {
    /// Wait for this kick from now on.
    pub kick: Option<Arc<OwnedFd>>,
    /// Signal the driver once, for what the former call eventfd may have swallowed.
    pub signal: bool,
}

/// The right to work on a ring. Dropping it gives the ring back; no request may be in flight then.
#[derive(Debug)]
pub struct Service<'a> {
    vring: &'a Vring,
    parameters: RingParameters,
    kick: Arc<OwnedFd>,
    call: Call,
}

/// The call eventfd of a ring as its thread knows it, so that it takes the lock only for one that is new.
#[derive(Debug)]
struct Call {
    /// [`Shared::call_changes`] when it was looked up, and what was found.
    known: RefCell<Option<(u64, Option<Arc<OwnedFd>>)>>,
    shared: Arc<Shared>,
}

impl Call {
    fn new(shared: &Arc<Shared>) -> Self {
        Self { known: RefCell::new(None), shared: Arc::clone(shared) }
    }

    fn current(&self) -> Option<Arc<OwnedFd>> {
        let mut known = self.known.borrow_mut();
        // Before the look: a change after it is seen the next time.
        let changes = self.shared.call_changes.load(Ordering::Acquire);
        match &*known {
            Some((seen, call)) if *seen == changes => call.clone(),
            _ => {
                let call = self.shared.lock().call.clone();
                *known = Some((changes, call.clone()));
                call
            }
        }
    }
}

impl<'a> Service<'a> {
    pub(super) fn new(vring: &'a Vring, parameters: RingParameters, kick: Arc<OwnedFd>) -> Self {
        Self { vring, parameters, kick, call: Call::new(&vring.shared) }
    }
}

impl Service<'_> {
    /// Index of the queue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.parameters.index
    }

    /// Entries that the front-end has set for the ring. What is no valid size keeps the ring from being opened.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.parameters.size
    }

    /// Features that were negotiated when the ring started.
    #[must_use]
    pub fn features(&self) -> Features {
        self.parameters.features
    }

    /// The driver's notification, as of the start. It belongs to the front-end: reads may block.
    #[must_use]
    pub fn kick(&self) -> &Arc<OwnedFd> {
        &self.kick
    }

    /// Fires when [`Service::should_stop`] and [`Service::update`] have to be asked.
    #[must_use]
    pub fn wakeup(&self) -> &Arc<Wakeup> {
        &self.vring.shared.wakeup
    }

    /// The ring is to be given back, with no request in flight.
    #[must_use]
    pub fn should_stop(&self) -> bool {
        self.vring.shared.stopping.load(Ordering::Acquire)
    }

    /// Begins to work on the ring.
    ///
    /// # Errors
    /// [`RingError`]: the ring is broken, unless it is a [`RingError::pause`]; then this is to be tried again after
    /// [`Service::update`].
    pub fn open_ring(&self) -> Result<Ring, RingError> {
        let view = {
            let mut state = self.vring.shared.lock();
            state.view_changed = false;
            self.vring.shared.changed.notify_all();
            state.view.clone()
        };
        Ring::open(&self.parameters, view)
    }

    /// Follows what the front-end has changed since the last call. `ring` is what [`Service::open_ring`] has given, if it
    /// has; it works on what the front-end has set last from now on.
    pub fn update(&self, ring: Option<&mut Ring>) -> Changes {
        let mut state = self.vring.shared.lock();
        if state.view_changed {
            if let Some(ring) = ring {
                ring.set_view(state.view.clone());
            }
            state.view_changed = false;
            self.vring.shared.changed.notify_all();
        }
        let kick = if std::mem::take(&mut state.kick_changed) { state.kick.clone() } else { None };
        Changes { kick, signal: std::mem::take(&mut state.call_changed) }
    }

    /// The ring has to wait. Has the front-end asked for what is missing; the wakeup fires when it is worth another look.
    ///
    /// # Errors
    /// [`RingError::NoMapping`] if it was asked before and has none.
    pub fn pause(&self, pause: Pause) -> Result<(), RingError> {
        let Pause::Mapping(miss) = pause else { return Ok(()) };
        let mut state = self.vring.shared.lock();
        let answers = match state.mapping {
            Mapping::Answered(answered, answers) if answered == miss => answers,
            Mapping::Wanted(wanted, _) | Mapping::Asked(wanted, _) if wanted == miss => return Ok(()),
            _ => 0,
        };
        if answers == QUESTIONS {
            state.mapping = Mapping::Known;
            return Err(RingError::NoMapping(miss));
        }
        state.mapping = Mapping::Wanted(miss, answers);
        drop(state);
        self.vring.shared.notices.notify();
        Ok(())
    }

    /// The ring waits no longer: the mapping has come. A later miss of the same address is asked for anew.
    pub fn resume(&self) {
        self.vring.shared.lock().mapping = Mapping::Known;
    }

    /// Where to signal used buffers. Asked anew each time: front-ends replace it to mask interrupts.
    #[must_use]
    pub fn call(&self) -> Option<Arc<OwnedFd>> {
        self.call.current()
    }

    /// Where to signal a broken ring.
    #[must_use]
    pub fn error(&self) -> Option<Arc<OwnedFd>> {
        self.vring.shared.lock().error.clone()
    }

    /// For other threads that return requests of this ring.
    #[must_use]
    pub fn signals(&self) -> RingSignals {
        RingSignals { call: Call::new(&self.vring.shared) }
    }

    /// Notes how far the ring was worked off, for the answer to GET_VRING_BASE and the next start.
    pub fn save_position(&self, ring: &Ring) {
        self.vring.shared.lock().parameters.base = ring.next_avail();
    }
}

/// Where to signal the driver of a ring that several threads work on. Says nothing of whether the ring is in service.
#[derive(Debug)]
pub struct RingSignals {
    call: Call,
}

impl RingSignals {
    /// As [`Service::call`].
    #[must_use]
    pub fn call(&self) -> Option<Arc<OwnedFd>> {
        self.call.current()
    }

    /// As [`Service::error`].
    #[must_use]
    pub fn error(&self) -> Option<Arc<OwnedFd>> {
        self.call.shared.lock().error.clone()
    }

    /// Fires [`Service::wakeup`]: the thread that has the service is to look at what was left for it.
    pub fn wake(&self) {
        self.call.shared.wakeup.wake();
    }
}

impl Drop for Service<'_> {
    fn drop(&mut self) {
        let mut state = self.vring.shared.lock();
        self.vring.shared.enter(&mut state, Phase::Idle);
        drop(state);
        self.vring.shared.changed.notify_all();
    }
}
