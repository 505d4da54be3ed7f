//! A split ring in service (virtio 1.3, section 2.7), as its thread works on it: takes heads, returns used ones.
//!
//! # Theory of operation
//! Addresses, size and features are those of the start. The driver's indices are read once per look and are checked before
//! anything is taken. A request goes through these steps, in this order:
//!
//! | step | effect |
//! | --- | --- |
//! | [`Ring::place`] | the ring follows what the front-end has changed since |
//! | [`Ring::available`], [`Ring::peek`], [`Ring::walk`] | none: a chain that misses an IOMMU mapping can be looked at again later |
//! | [`Ring::take`] | the request is in flight: noted in the inflight buffer, and its head cannot come a second time |
//! | [`Ring::put_used`] | its element is in the used ring, behind what the driver looks at |
//! | [`Ring::publish`] | the driver sees all that was put: `idx` is stored, and the inflight buffer forgets them |
//!
//! Requests that a back-end before this one has left in flight come first, in the order in which it had taken them.
//!
//! Each store to the used ring is marked in the dirty log after it was made, if the log is on for it. A back-end that was
//! killed between the two may have left a mark out, so a ring that starts with a log marks its used ring once.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use vm_memory::{AtomicAccess, GuestMemoryError, Permissions};
use vvu_protocol::features::Features;

use crate::chain::{Chain, DESCRIPTOR_LEN};
use crate::inflight::{InflightBuffer, InflightQueue};
use crate::log_limit::LogLimit;
use crate::place::Place;
use crate::ring_error::RingError;
use crate::view::{AccessError, View};

/// What a front-end can cause to be logged in this module, over all connections.
static LOG: LogLimit = LogLimit::new();

/// Most entries of a split ring (virtio 1.3, section 2.7).
const MAX_SIZE: u16 = 32768;

/// Offset of `idx` in the available and the used ring; flags come before it.
const INDEX: u32 = 2;

/// Offset of the first entry in the available and the used ring.
const ENTRIES: u32 = 4;

/// Length of an entry of the available ring in bytes.
const AVAILABLE_LEN: u32 = 2;

/// Length of an entry of the used ring in bytes: head and written length, 4 each.
const USED_LEN: u32 = 8;

/// Ring parameters, latched at the start.
#[derive(Debug, Clone)]
pub(crate) struct RingParameters {
    pub(crate) index: u16,
    pub(crate) size: u16,
    pub(crate) max_size: u16,
    pub(crate) addresses: Option<RingAddresses>,
    /// Next entry of the available ring, as SET_VRING_BASE has said.
    pub(crate) base: u16,
    pub(crate) features: Features,
    pub(crate) inflight: Option<Arc<InflightBuffer>>,
}

/// Where the ring's parts are, in the front-end's addresses or, with an IOMMU, in I/O addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RingAddresses {
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// See the module's text.
#[derive(Debug)]
pub struct Ring {
    size: u16,
    addresses: RingAddresses,
    event_idx: bool,
    indirect: bool,
    view: View,
    /// None while the ring waits for its place.
    parts: Option<Parts>,
    /// Position up to which heads were taken.
    next_avail: u16,
    /// Position up to which elements were put.
    next_used: u16,
    /// Position up to which the driver sees them: `idx` of the used ring.
    published: u16,
    /// `published` when the driver's wish for a signal was looked at last.
    signalled: u16,
    /// A signal may have died with the back-end before.
    owes_signal: bool,
    /// Heads in flight that a back-end before has left.
    recovered: VecDeque<u16>,
    /// Heads in flight.
    taken: Vec<bool>,
    inflight: Option<InflightQueue>,
}

/// The ring's three parts, in guest-physical pieces.
#[derive(Debug)]
struct Parts {
    descriptors: Place,
    available: Place,
    used: Place,
    /// State of the IOMMU that the pieces come from.
    invalidations: u64,
}

impl Parts {
    fn resolve(view: &View, addresses: &RingAddresses, size: u16) -> Result<Self, RingError> {
        let size = u32::from(size);
        // Before the pieces are resolved: an invalidation that comes later is seen later.
        let invalidations = view.invalidations();
        let part = |part, address, len, alignment: u64, access| {
            let pieces = view.resolve_ring(address, len, access).map_err(|source| match source {
                AccessError::OutsideMemory { .. } if view.memory.is_between_changes() => RingError::BetweenTables,
                source => RingError::Place { part, source },
            })?;
            if pieces.first().is_some_and(|piece| !piece.address.0.is_multiple_of(alignment)) {
                return Err(RingError::Unaligned { part });
            }
            Ok(Place::new(pieces))
        };
        Ok(Self {
            descriptors: part("descriptor table", addresses.descriptors, DESCRIPTOR_LEN * size, 16, Permissions::Read)?,
            available: part("available ring", addresses.available, available_len(size), 2, Permissions::Read)?,
            used: part("used ring", addresses.used, used_len(size), 4, Permissions::ReadWrite)?,
            invalidations,
        })
    }

    fn available<T: AtomicAccess>(&self, view: &View, offset: u32) -> Result<T, GuestMemoryError> {
        view.memory.load(self.available.address(offset, width::<T>())?, Ordering::Relaxed)
    }
}

/// Bytes of an available ring, `used_event` at its end included.
const fn available_len(size: u32) -> u32 {
    ENTRIES + AVAILABLE_LEN * size + 2
}

/// Bytes of a used ring, `avail_event` at its end included.
pub(crate) const fn used_len(size: u32) -> u32 {
    ENTRIES + USED_LEN * size + 2
}

/// Bytes of a number.
fn width<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

impl Ring {
    /// Starts to work on a ring at what was latched.
    pub(crate) fn open(parameters: &RingParameters, view: View) -> Result<Self, RingError> {
        let RingParameters { index, size, max_size, base, features, .. } = *parameters;
        if size == 0 || !size.is_power_of_two() || size > max_size.min(MAX_SIZE) {
            return Err(RingError::Size { size, max: max_size });
        }
        let addresses = parameters.addresses.ok_or(RingError::NoAddresses)?;
        let parts = Parts::resolve(&view, &addresses, size)?;
        let used_idx = u16::from_le(view.memory.load(parts.used.address(INDEX, 2)?, Ordering::Acquire)?);
        let mut ring = Self {
            size,
            addresses,
            event_idx: features.contains(Features::EVENT_IDX),
            indirect: features.contains(Features::INDIRECT_DESC),
            view,
            parts: Some(parts),
            next_avail: base,
            next_used: used_idx,
            published: used_idx,
            signalled: used_idx,
            owes_signal: parameters.inflight.is_some(),
            recovered: VecDeque::new(),
            taken: vec![false; usize::from(size)],
            inflight: None,
        };
        if let Some(buffer) = &parameters.inflight {
            ring.recover(buffer.queue(index, size)?)?;
        }
        ring.mark_used_ring()?;
        Ok(ring)
    }

    /// Finds what the back-end before has left in flight.
    fn recover(&mut self, mut inflight: InflightQueue) -> Result<(), RingError> {
        let recovered = inflight.recover(self.published);
        let outstanding = self.available_idx()?.wrapping_sub(self.published);
        if recovered.heads.len() > usize::from(outstanding) {
            if let Some(suppressed) = LOG.admit(Instant::now()) {
                let in_flight = recovered.heads.len();
                tracing::warn!(
                    in_flight,
                    outstanding,
                    suppressed,
                    "inflight buffer of another ring; content is dropped"
                );
            }
            inflight.discard();
        } else {
            if !recovered.heads.is_empty()
                && let Some(suppressed) = LOG.admit(Instant::now())
            {
                let in_flight = recovered.heads.len();
                tracing::info!(in_flight, suppressed, "requests of the former back-end are submitted again");
            }
            self.next_avail = recovered.next_avail;
            self.recovered = recovered.heads.into();
        }
        self.inflight = Some(inflight);
        Ok(())
    }

    /// What the ring sees of the driver VM.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Position up to which heads were taken: where the ring is to be started again when nothing is in flight.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Works on another view from now on. Requests in flight keep what they have.
    pub(crate) fn set_view(&mut self, view: View) {
        self.view = view;
        self.parts = None;
    }

    /// Finds the ring's place, if the view is new or the IOMMU has taken mappings back. To be called before a round of
    /// other calls; costs nothing if nothing has changed.
    ///
    /// # Errors
    /// [`RingError`]: the ring is broken, unless it is a [`RingError::pause`].
    pub fn place(&mut self) -> Result<(), RingError> {
        let invalidations = self.view.invalidations();
        if self.parts.as_ref().is_some_and(|parts| parts.invalidations == invalidations) {
            return Ok(());
        }
        self.parts = None;
        self.parts = Some(Parts::resolve(&self.view, &self.addresses, self.size)?);
        self.mark_used_ring()
    }

    /// The ring has a place: what is done can be returned.
    #[must_use]
    pub fn is_placed(&self) -> bool {
        self.parts.is_some()
    }

    fn parts(&self) -> Result<&Parts, RingError> {
        // An error that is made for nothing has to be dropped, which costs each request.
        match &self.parts {
            Some(parts) => Ok(parts),
            None => Err(RingError::BetweenTables),
        }
    }

    fn available_idx(&self) -> Result<u16, RingError> {
        let address = self.parts()?.available.address(INDEX, 2)?;
        Ok(u16::from_le(self.view.memory.load(address, Ordering::Acquire)?))
    }

    /// How many heads can be taken. Asks the driver not to notify until [`Ring::listen`]: by a flag, or with EVENT_IDX by
    /// leaving the event at what is past.
    ///
    /// # Errors
    /// [`RingError`]: the ring is broken.
    pub fn available(&self) -> Result<u16, RingError> {
        if !self.event_idx {
            let flag = u16::try_from(VRING_USED_F_NO_NOTIFY).unwrap_or(1);
            self.store_used(0, flag.to_le(), Ordering::Relaxed)?;
        }
        let (avail, next, size) = (self.available_idx()?, self.next_avail, self.size);
        let count = avail.wrapping_sub(next);
        if count > size {
            return Err(RingError::AvailIndex { avail, next, size });
        }
        let recovered = u16::try_from(self.recovered.len()).unwrap_or(size);
        Ok(count.saturating_add(recovered))
    }

    /// Whether there are heads to take. Asks nothing of the driver, and is cheap: for those who look again and again.
    ///
    /// # Errors
    /// [`RingError`]: the ring is broken.
    pub fn has_heads(&self) -> Result<bool, RingError> {
        Ok(self.available_idx()? != self.next_avail || !self.recovered.is_empty())
    }

    /// The next head; [`Ring::available`] says whether there is one.
    ///
    /// # Errors
    /// [`RingError`]: the ring is broken.
    pub fn peek(&self) -> Result<u16, RingError> {
        self.peek_ahead(0)
    }

    /// The head that lies `ahead` heads behind the next one: what needs several buffers takes none before it has seen enough
    /// of them. Heads that are peeked at together may be the same one; each is in flight only after its [`Ring::take`].
    ///
    /// # Errors
    /// [`RingError`]: the ring is broken.
    pub fn peek_ahead(&self, ahead: u16) -> Result<u16, RingError> {
        let size = self.size;
        let head = match self.recovered.get(usize::from(ahead)) {
            Some(head) => *head,
            None => {
                // Not negative, and no more than 16 bits: it is less than `ahead`.
                let beyond = usize::from(ahead).saturating_sub(self.recovered.len());
                let position = self.next_avail.wrapping_add(u16::try_from(beyond).unwrap_or(0));
                let entry = ENTRIES + AVAILABLE_LEN * u32::from(position % size);
                u16::from_le(self.parts()?.available(&self.view, entry)?)
            }
        };
        match self.taken.get(usize::from(head)) {
            Some(false) => Ok(head),
            Some(true) => Err(RingError::DuplicateHead { head }),
            None => Err(RingError::Head { head, size }),
        }
    }

    /// Reads the chain that starts at `head` into `chain`.
    ///
    /// # Errors
    /// [`RingError`]: the ring is broken, unless it is a [`RingError::pause`].
    pub fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain
            .walk(&self.view, &self.parts()?.descriptors, self.size, self.indirect, head)
            .map_err(|source| RingError::Chain { head, source })
    }

    /// Takes the head that [`Ring::peek`] has shown: its request is in flight until [`Ring::put_used`].
    pub fn take(&mut self, head: u16) {
        if let Some(taken) = self.taken.get_mut(usize::from(head)) {
            *taken = true;
        }
        if self.recovered.pop_front().is_some() {
            return;
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.start(head);
        }
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Asks the driver to notify from now on. True if there are heads to take that it will not notify about.
    ///
    /// # Errors
    /// [`RingError`]: the ring is broken.
    pub fn listen(&mut self) -> Result<bool, RingError> {
        self.listen_beyond(0)
    }

    /// Asks the driver to notify of more than the first `seen` heads, which are known but do not suffice for what is to be
    /// done. True if there are more already.
    ///
    /// # Errors
    /// [`RingError`]: the ring is broken.
    pub fn listen_beyond(&mut self, seen: u16) -> Result<bool, RingError> {
        // Not negative, and no more than 16 bits: it is not more than `seen`.
        let unrecovered = usize::from(seen).saturating_sub(self.recovered.len());
        let position = self.next_avail.wrapping_add(u16::try_from(unrecovered).unwrap_or(0));
        if self.event_idx {
            let event = ENTRIES + USED_LEN * u32::from(self.size);
            self.store_used(event, position.to_le(), Ordering::Relaxed)?;
        } else {
            self.store_used(0, 0u16, Ordering::Relaxed)?;
        }
        // The driver looks at what was stored after it has stored its index; we the other way round.
        fence(Ordering::SeqCst);
        Ok(self.available_idx()? != position || self.recovered.len() > usize::from(seen))
    }

    /// Returns a head with the number of bytes that were written for it. The driver sees it after [`Ring::publish`].
    /// Whatever was written is to be marked before ([`View::mark_written`]).
    ///
    /// # Errors
    /// [`RingError`]: the ring is broken.
    pub fn put_used(&mut self, head: u16, len: u32) -> Result<(), RingError> {
        let entry = ENTRIES + USED_LEN * u32::from(self.next_used % self.size);
        // Two numbers, for they may lie in two pages.
        self.store_used(entry, u32::from(head).to_le(), Ordering::Relaxed)?;
        self.store_used(entry + 4, len.to_le(), Ordering::Relaxed)?;
        if let Some(inflight) = &mut self.inflight {
            inflight.begin_batch(head);
        }
        if let Some(taken) = self.taken.get_mut(usize::from(head)) {
            *taken = false;
        }
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Lets the driver see all that was put. True if it wants to be notified of it.
    ///
    /// # Errors
    /// [`RingError`]: the ring is broken.
    pub fn publish(&mut self) -> Result<bool, RingError> {
        if self.next_used != self.published {
            self.store_used(INDEX, self.next_used.to_le(), Ordering::Release)?;
            self.published = self.next_used;
            if let Some(inflight) = &mut self.inflight {
                inflight.end_batch(self.published);
            }
        }
        let former = std::mem::replace(&mut self.signalled, self.published);
        if std::mem::take(&mut self.owes_signal) {
            return Ok(true);
        }
        if former == self.published {
            return Ok(false);
        }
        // The driver stores its wish before it looks at the index; we the other way round.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let offset = ENTRIES + AVAILABLE_LEN * u32::from(self.size);
            let event = u16::from_le(self.parts()?.available(&self.view, offset)?);
            return Ok(is_event_passed(event, self.published, former));
        }
        let flags = u16::from_le(self.parts()?.available(&self.view, 0)?);
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    fn store_used<T: AtomicAccess>(&self, offset: u32, value: T, order: Ordering) -> Result<(), RingError> {
        let address = self.parts()?.used.address(offset, width::<T>())?;
        self.view.memory.store(value, address, order)?;
        if let Some(log) = &self.view.log
            && let Some(start) = self.view.used_ring_log
        {
            // With an IOMMU the log's address is an I/O address, and what counts is the page that was written.
            let page = if self.view.iommu.is_some() { address.0 } else { start.saturating_add(u64::from(offset)) };
            log.mark(page, u64::from(width::<T>()));
        }
        Ok(())
    }

    /// Marks the whole used ring, if it is logged; and so finds out whether the log covers it.
    fn mark_used_ring(&self) -> Result<(), RingError> {
        let (Some(log), Some(address)) = (&self.view.log, self.view.used_ring_log) else { return Ok(()) };
        if self.view.iommu.is_some() {
            for piece in self.parts()?.used.pieces() {
                self.view.mark_written(*piece);
            }
            return Ok(());
        }
        let len = u64::from(used_len(u32::from(self.size)));
        if !log.covers(address, len) {
            return Err(RingError::Log { address });
        }
        log.mark(address, len);
        Ok(())
    }
}

/// Whether the index went past `event` on its way from `former` to `now` (virtio 1.3, section 2.7.7.2).
fn is_event_passed(event: u16, now: u16, former: u16) -> bool {
    now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(former)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_passed_once_and_over_the_end_of_numbers() {
        assert!(is_event_passed(4, 5, 4));
        assert!(is_event_passed(4, 9, 3));
        assert!(!is_event_passed(5, 5, 4));
        assert!(!is_event_passed(3, 5, 4));
        assert!(is_event_passed(u16::MAX, 1, u16::MAX - 2));
        assert!(!is_event_passed(1, 1, u16::MAX));
    }
}
