//! The life of a ring between the two threads that it has.
//!
//! # Theory of operation
//! The *control thread* (the session's) applies messages. The *queue's thread* waits for the ring to be started (it has a
//! kick) and enabled, and then runs [`crate::Device::serve`] with a [`Service`], the right to work on the ring. It keeps it
//! until [`Service::should_stop`]. A ring that is stopped, disabled or closed while in service stays so for the control
//! thread only after the queue's thread has given its `Service` back. Hence GET_VRING_BASE, SET_VRING_ENABLE 0, RESET_DEVICE
//! and the end of a connection are answered when no request is in flight and each one is in the used ring (vhost-user,
//! "Ring states").
//!
//! ```text
//!            begin                    stop
//!   Idle ─────────────► Serving ─────────────► Stopping
//!    ▲                     │                       │
//!    └─────────────────────┴───────────────────────┘
//!                    Service dropped
//! ```
//!
//! All ring parameters are latched when the service begins; what the front-end sets later counts from the next start. What
//! does change under a ring in service is its [`View`]: memory, dirty log, IOMMU. The control thread puts a new one beside
//! the ring and waits until the queue's thread works on it ([`Service::update`]). So the answer to a message says that
//! the former view is used no more.
//!
//! The queue's thread never waits for the control thread with a `Service` in its hands: where it needs a mapping of the
//! IOMMU it leaves a note ([`Service::pause`]) and goes on. That keeps both waits above free of deadlock.

mod service;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::FileType;
use vvu_protocol::features::Features;

pub use self::service::{Changes, RingSignals, Service};
use crate::inflight::InflightBuffer;
use crate::iotlb::Miss;
use crate::notices::Notices;
use crate::ring::{RingAddresses, RingParameters};
use crate::view::View;
use crate::wakeup::Wakeup;

/// See the module's text. A clone is the same ring.
#[derive(Debug, Clone)]
pub(crate) struct Vring {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    max_size: u16,
    state: Mutex<State>,
    /// The phase is `Stopping`. Beside the state, as the queue's thread asks for it all the time.
    stopping: AtomicBool,
    /// Number of times that the call was replaced.
    call_changes: AtomicU64,
    /// Fires when the ring may start, when a service ends, when a view is taken, and at the close.
    changed: Condvar,
    wakeup: Arc<Wakeup>,
    notices: Arc<Notices>,
}

/// Where a ring is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    Serving,
    Stopping,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// The connection is over.
    closed: bool,
    /// Something has happened that may start the ring.
    may_start: bool,
    enabled: bool,
    parameters: RingParameters,
    /// Address of the used ring for the log, if it is to be logged.
    used_ring_log: Option<u64>,
    view: View,
    /// The queue's thread works on an older view.
    view_changed: bool,
    mapping: Mapping,
    kick: Option<Arc<OwnedFd>>,
    /// The kick was replaced while in service.
    kick_changed: bool,
    call: Option<Arc<OwnedFd>>,
    /// The call was replaced while in service: signals may have gone to the old one after the front-end had looked at it
    /// for the last time.
    call_changed: bool,
    error: Option<Arc<OwnedFd>>,
}

/// How often the front-end is asked for the same mapping. Its answer comes on another socket than the mapping and may
/// overtake it, but not the answer to the next question.
const QUESTIONS: u8 = 2;

/// How far the question for a mapping of the IOMMU has come. A ring waits for one at a time. With it, how often it was asked
/// and answered before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mapping {
    Known,
    Wanted(Miss, u8),
    Asked(Miss, u8),
    /// The front-end has done what it could.
    Answered(Miss, u8),
}

impl State {
    fn can_begin(&self) -> bool {
        let enabled = self.enabled || !self.parameters.features.contains(Features::PROTOCOL_FEATURES);
        self.phase == Phase::Idle && !self.closed && self.may_start && enabled && self.kick.is_some()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one door for transitions.
    fn enter(&self, state: &mut State, next: Phase) {
        tracing::trace!(vring = state.parameters.index, from = ?state.phase, to = ?next, "ring");
        state.phase = next;
        self.stopping.store(next == Phase::Stopping, Ordering::Release);
    }

    fn replace_call(&self, state: &mut State, call: Option<Arc<OwnedFd>>) {
        state.call = call;
        self.call_changes.fetch_add(1, Ordering::Release);
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the control thread does.
impl Vring {
    pub(crate) fn new(index: u16, max_size: u16, view: View, notices: &Arc<Notices>) -> std::io::Result<Self> {
        let parameters = RingParameters {
            index,
            size: max_size,
            max_size,
            addresses: None,
            base: 0,
            features: Features::empty(),
            inflight: None,
        };
        let state = State {
            phase: Phase::Idle,
            closed: false,
            may_start: false,
            enabled: false,
            parameters,
            used_ring_log: None,
            view,
            view_changed: false,
            mapping: Mapping::Known,
            kick: None,
            kick_changed: false,
            call: None,
            call_changed: false,
            error: None,
        };
        let shared = Shared {
            max_size,
            state: Mutex::new(state),
            stopping: AtomicBool::new(false),
            call_changes: AtomicU64::new(0),
            changed: Condvar::new(),
            wakeup: Arc::new(Wakeup::new()?),
            notices: Arc::clone(notices),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    pub(crate) fn max_size(&self) -> u16 {
        self.shared.max_size
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.shared.lock().phase == Phase::Idle
    }

    pub(crate) fn set_size(&self, size: u16) {
        self.shared.lock().parameters.size = size;
    }

    /// The log of the used ring is taken over at once, the place from the next start on.
    pub(crate) fn set_addresses(&self, addresses: RingAddresses, used_ring_log: Option<u64>) {
        let mut state = self.shared.lock();
        state.parameters.addresses = Some(addresses);
        if state.used_ring_log != used_ring_log {
            state.used_ring_log = used_ring_log;
            let view = state.view.clone();
            self.put_view(&mut state, view);
        }
    }

    /// Where the used ring lies and how many entries it has, in the addresses that the front-end gave.
    pub(crate) fn addresses(&self) -> Option<(RingAddresses, u16)> {
        let state = self.shared.lock();
        state.parameters.addresses.map(|addresses| (addresses, state.parameters.size))
    }

    pub(crate) fn set_base(&self, base: u16) {
        self.shared.lock().parameters.base = base;
    }

    pub(crate) fn set_features(&self, features: Features) {
        self.shared.lock().parameters.features = features;
    }

    pub(crate) fn set_inflight(&self, inflight: Option<Arc<InflightBuffer>>) {
        self.shared.lock().parameters.inflight = inflight;
    }

    pub(crate) fn set_kick(&self, kick: Option<OwnedFd>) {
        let kick = kick.map(Arc::new);
        let mut state = self.shared.lock();
        state.kick_changed = state.phase != Phase::Idle;
        state.may_start |= kick.is_some();
        state.kick = kick;
        self.shared.wakeup.wake();
        self.shared.changed.notify_all();
    }

    pub(crate) fn set_call(&self, call: Option<OwnedFd>) {
        let mut state = self.shared.lock();
        state.call_changed = state.phase != Phase::Idle && call.is_some();
        self.shared.replace_call(&mut state, call.map(Arc::new));
        self.shared.wakeup.wake();
    }

    pub(crate) fn set_error(&self, error: Option<OwnedFd>) {
        self.shared.lock().error = error.map(Arc::new);
    }

    /// SET_VRING_ENABLE. Disabling waits for the requests in flight.
    pub(crate) fn set_enabled(&self, enabled: bool) {
        let mut state = self.shared.lock();
        state.enabled = enabled;
        if enabled {
            state.may_start = true;
            self.shared.changed.notify_all();
        } else {
            drop(self.stop(state));
        }
    }

    /// GET_VRING_BASE: stops the ring, and tells where it is to go on. Waits for the requests in flight.
    pub(crate) fn take_base(&self) -> u16 {
        let mut state = self.shared.lock();
        state.may_start = false;
        let mut state = self.stop(state);
        state.kick = None;
        self.shared.replace_call(&mut state, None);
        state.parameters.base
    }

    /// Ends the ring for good, and waits for the requests in flight.
    pub(crate) fn close(&self) {
        let mut state = self.shared.lock();
        state.closed = true;
        self.shared.changed.notify_all();
        drop(self.stop(state));
    }

    fn stop<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while state.phase != Phase::Idle {
            if state.phase == Phase::Serving {
                self.shared.enter(&mut state, Phase::Stopping);
                self.shared.wakeup.wake();
            }
            state = self.shared.wait(state);
        }
        state
    }

    /// Puts a view beside the ring; [`Vring::wait_for_view`] comes next.
    pub(crate) fn set_view(&self, view: View) {
        let mut state = self.shared.lock();
        self.put_view(&mut state, view);
    }

    fn put_view(&self, state: &mut State, view: View) {
        state.view = View { used_ring_log: state.used_ring_log, ..view };
        state.view_changed = true;
        self.shared.wakeup.wake();
    }

    /// Waits until nobody works on an older view.
    pub(crate) fn wait_for_view(&self) {
        let mut state = self.shared.lock();
        while state.phase != Phase::Idle && state.view_changed {
            state = self.shared.wait(state);
        }
    }

    /// Takes the question for a mapping, to be sent to the front-end.
    pub(crate) fn take_miss(&self) -> Option<Miss> {
        let mut state = self.shared.lock();
        let Mapping::Wanted(miss, answers) = state.mapping else { return None };
        state.mapping = Mapping::Asked(miss, answers);
        Some(miss)
    }

    /// The front-end has answered the question.
    pub(crate) fn answer_miss(&self, miss: Miss) {
        let mut state = self.shared.lock();
        if let Mapping::Asked(asked, answers) = state.mapping
            && asked == miss
        {
            state.mapping = Mapping::Answered(miss, answers + 1);
            self.shared.wakeup.wake();
        }
    }

    /// A new channel to the front-end: what was asked over the former one is asked again.
    pub(crate) fn ask_again(&self) {
        let mut state = self.shared.lock();
        if let Mapping::Asked(miss, answers) = state.mapping {
            state.mapping = Mapping::Wanted(miss, answers);
        }
    }

    /// Lets a ring that waits for a mapping look again.
    pub(crate) fn look_again(&self) {
        if self.shared.lock().mapping != Mapping::Known {
            self.shared.wakeup.wake();
        }
    }
}

/// What the queue's thread does.
impl Vring {
    /// Waits until the ring can be served. None when it is closed.
    pub(crate) fn next_service(&self) -> Option<Service<'_>> {
        let mut state = self.shared.lock();
        loop {
            if state.closed {
                return None;
            }
            if let (true, Some(kick)) = (state.can_begin(), state.kick.clone()) {
                state.may_start = false;
                self.shared.enter(&mut state, Phase::Serving);
                state.kick_changed = false;
                state.call_changed = false;
                state.mapping = Mapping::Known;
                let parameters = state.parameters.clone();
                return Some(Service::new(self, parameters, kick));
            }
            state = self.shared.wait(state);
        }
    }
}

/// An event's descriptor, if it is an anonymous inode, as eventfds are. Reads and writes of files, pipes and sockets would be
/// at the mercy of whoever is behind them.
pub(crate) fn is_event(descriptor: &OwnedFd) -> bool {
    rustix::fs::fstat(descriptor).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Unknown)
}
