//! The ring as the control messages see it: starting hands it to the queue's thread, stopping waits until that thread has
//! completed every request in flight.
//!
//! # Theory of operation
//! Two threads meet here. The *control thread* (`vhost-user-backend`'s) applies messages through [`VringT`]. The *queue's
//! thread* calls [`QueueVring::begin`] when there may be something to serve; it gets a [`Service`] if the ring is started
//! (it has a kick) and enabled, and keeps it until [`Service::should_stop`]. A ring that is stopped, disabled or closed
//! while in service stays so for the control thread only after the queue's thread has given its `Service` back. Hence
//! GET_VRING_BASE, SET_VRING_ENABLE 0, RESET_DEVICE and the end of a connection are answered when no request is in flight
//! and each one is in the used ring (vhost-user, "Ring states").
//!
//! All ring parameters are latched by [`QueueVring::begin`]; what the front-end sets later counts from the next start.
//!
//! The front-end's kick is never given to the crate, whose event loop would read it in a way that can block, and stops for
//! good if the read fails. It gets an eventfd of ours that nobody signals: it only marks that there is a kick.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLockReadGuard, RwLockWriteGuard};

use vhost_user_backend::{VringRwLock, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::{GuestAddress, GuestMemoryAtomic};

use crate::DriverMemory;
use crate::wakeup::Wakeup;

/// Driver memory as the front-end has announced it last.
pub(crate) type MemoryTable = GuestMemoryAtomic<DriverMemory>;

/// See the module's text. A clone is the same ring.
#[derive(Clone)]
pub(crate) struct QueueVring {
    /// Ring parameters as the messages set them.
    parameters: VringRwLock<MemoryTable>,
    shared: Arc<Shared>,
}

struct Shared {
    memory: MemoryTable,
    state: Mutex<State>,
    /// Fires when a service ends.
    idle: Condvar,
    wakeup: Arc<Wakeup>,
}

#[derive(Default)]
struct State {
    in_service: bool,
    stop: bool,
    /// The connection is over.
    closed: bool,
    queue_size: u16,
    kick: Option<Arc<File>>,
    /// The kick was replaced while in service.
    kick_changed: bool,
    call: Option<Arc<File>>,
    /// The call was replaced while in service: signals may have gone to the old one after the front-end had looked at it
    /// for the last time.
    call_changed: bool,
    error: Option<Arc<File>>,
}

/// Ring parameters, latched at the start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RingParameters {
    pub(crate) size: u16,
    pub(crate) descriptor_table: GuestAddress,
    pub(crate) avail_ring: GuestAddress,
    pub(crate) used_ring: GuestAddress,
    pub(crate) next_avail: u16,
    pub(crate) next_used: u16,
}

/// Changes that the queue's thread has to follow.
#[derive(Default)]
pub(crate) struct Changes {
    pub(crate) kick: Option<Arc<File>>,
    /// Signal the driver once, for what the former call eventfd may have swallowed.
    pub(crate) signal: bool,
}

/// The right to work on the ring. Dropping it gives the ring back; no request may be in flight then.
pub(crate) struct Service<'a> {
    vring: &'a QueueVring,
    pub(crate) parameters: RingParameters,
    pub(crate) kick: Arc<File>,
}

impl QueueVring {
    /// Takes the ring into service, if it is started, enabled and not in service.
    pub(crate) fn begin(&self) -> Option<Service<'_>> {
        let mut state = self.shared.lock();
        let kick = Arc::clone(state.kick.as_ref()?);
        let parameters = self.parameters.get_ref();
        let queue = parameters.get_queue();
        if state.closed || state.in_service || !queue.ready() || !parameters.is_enabled() {
            return None;
        }
        let parameters = RingParameters {
            size: state.queue_size,
            descriptor_table: GuestAddress(queue.desc_table()),
            avail_ring: GuestAddress(queue.avail_ring()),
            used_ring: GuestAddress(queue.used_ring()),
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
        };
        state.in_service = true;
        state.stop = false;
        state.kick_changed = false;
        state.call_changed = false;
        Some(Service { vring: self, parameters, kick })
    }

    /// Ends the service for good and waits for it: the connection is over.
    pub(crate) fn close(&self) {
        let mut state = self.shared.lock();
        state.closed = true;
        self.stop(state);
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    pub(crate) fn memory(&self) -> &MemoryTable {
        &self.shared.memory
    }

    pub(crate) fn wakeup(&self) -> &Arc<Wakeup> {
        &self.shared.wakeup
    }

    fn stop(&self, mut state: MutexGuard<'_, State>) {
        while state.in_service {
            state.stop = true;
            self.shared.wakeup.wake();
            state = self.shared.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Service<'_> {
    /// The ring is to be given back, with no request in flight.
    pub(crate) fn should_stop(&self) -> bool {
        self.vring.shared.lock().stop
    }

    /// What has been changed since the last call.
    pub(crate) fn take_changes(&self) -> Changes {
        let mut state = self.vring.shared.lock();
        let kick = if std::mem::take(&mut state.kick_changed) { state.kick.clone() } else { None };
        Changes { kick, signal: std::mem::take(&mut state.call_changed) }
    }

    /// Where to signal used buffers. Asked anew each time: front-ends replace it to mask interrupts.
    pub(crate) fn call(&self) -> Option<Arc<File>> {
        self.vring.shared.lock().call.clone()
    }

    /// Where to signal a broken ring.
    pub(crate) fn error(&self) -> Option<Arc<File>> {
        self.vring.shared.lock().error.clone()
    }

    /// Notes how far the ring was worked off, for the answer to GET_VRING_BASE and the next start.
    pub(crate) fn save_position(&self, next_avail: u16, next_used: u16) {
        self.vring.parameters.set_queue_next_avail(next_avail);
        self.vring.parameters.set_queue_next_used(next_used);
    }
}

impl Drop for Service<'_> {
    fn drop(&mut self) {
        self.vring.shared.lock().in_service = false;
        self.vring.shared.idle.notify_all();
    }
}

/// Accepts an event's descriptor if it is an anonymous inode, as eventfds are. Reads and writes of files, pipes and
/// sockets would be at the mercy of whoever is behind them.
fn accept_event(what: &str, file: Option<File>) -> Option<Arc<File>> {
    let file = file?;
    match rustix::fs::fstat(&file) {
        Ok(stat) if stat.st_mode & libc::S_IFMT == 0 => Some(Arc::new(file)),
        Ok(_) => {
            tracing::warn!("front-end gave a {what} that is no eventfd; ignored");
            None
        }
        Err(error) => {
            tracing::warn!(%error, "{what} cannot be examined; ignored");
            None
        }
    }
}

/// What the crate gets in place of the front-end's kick.
fn kick_marker() -> io::Result<File> {
    Ok(OwnedFd::from(Wakeup::new()?).into())
}

impl<'a> VringStateGuard<'a, MemoryTable> for QueueVring {
    type G = RwLockReadGuard<'a, VringState<MemoryTable>>;
}

impl<'a> VringStateMutGuard<'a, MemoryTable> for QueueVring {
    type G = RwLockWriteGuard<'a, VringState<MemoryTable>>;
}

impl VringT<MemoryTable> for QueueVring {
    fn new(memory: MemoryTable, max_queue_size: u16) -> Result<Self, QueueError> {
        let wakeup = Wakeup::new().map_err(|_out_of_descriptors| QueueError::QueueNotReady)?;
        let shared = Shared {
            memory: memory.clone(),
            state: Mutex::new(State { queue_size: max_queue_size, ..State::default() }),
            idle: Condvar::new(),
            wakeup: Arc::new(wakeup),
        };
        Ok(Self { parameters: VringRwLock::new(memory, max_queue_size)?, shared: Arc::new(shared) })
    }

    fn get_ref(&self) -> RwLockReadGuard<'_, VringState<MemoryTable>> {
        self.parameters.get_ref()
    }

    fn get_mut(&self) -> RwLockWriteGuard<'_, VringState<MemoryTable>> {
        self.parameters.get_mut()
    }

    fn add_used(&self, head: u16, len: u32) -> Result<(), QueueError> {
        self.parameters.add_used(head, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.parameters.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.parameters.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.parameters.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.parameters.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        let state = self.shared.lock();
        self.parameters.set_enabled(enabled);
        if !enabled {
            self.stop(state);
        }
    }

    fn set_queue_info(&self, descriptor_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), QueueError> {
        self.parameters.set_queue_info(descriptor_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.parameters.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.parameters.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        self.parameters.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.parameters.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        // The crate's queue would keep its former size in place of a wrong one. Kept here, a wrong one breaks the start.
        self.shared.lock().queue_size = size;
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.parameters.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        let state = self.shared.lock();
        self.parameters.set_queue_ready(ready);
        if !ready {
            self.stop(state);
        }
    }

    fn set_kick(&self, file: Option<File>) {
        let kick = accept_event("kick", file);
        let mut state = self.shared.lock();
        let marker = match (&kick, self.parameters.get_ref().get_kick()) {
            // The marker stays what it is while the ring is registered with it.
            (Some(_), Some(_)) => None,
            (Some(_), None) => {
                Some(kick_marker().inspect_err(|error| tracing::error!(%error, "no descriptor left")).ok())
            }
            (None, _) => Some(None),
        };
        if let Some(marker) = marker {
            self.parameters.set_kick(marker);
        }
        state.kick_changed = state.in_service;
        state.kick = kick;
        self.shared.wakeup.wake();
    }

    fn read_kick(&self) -> io::Result<bool> {
        // The event that woke the crate's thread is a marker's, which has nothing to read.
        Ok(true)
    }

    fn set_call(&self, file: Option<File>) {
        let call = accept_event("call", file);
        let mut state = self.shared.lock();
        state.call_changed = state.in_service && call.is_some();
        state.call = call;
        self.shared.wakeup.wake();
    }

    fn set_err(&self, file: Option<File>) {
        self.shared.lock().error = accept_event("err", file);
    }
}
