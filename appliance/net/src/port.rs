//! One port of the switch: a virtio-net device, what its driver has set, and what the operator has set for it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Instant;

use vvu_back_end::log_limit::LogLimit;
use vvu_back_end::rate_limit::{Limits, RateLimit};
use vvu_back_end::{Handle, RingError, Service, in_one_line};

use crate::bell::{Bell, Target};
use crate::config_space::ConfigSpace;
use crate::counters::Counters;
use crate::driver_state::{DriverState, Negotiated};
use crate::ethernet::{Ethernet, MacAddress};
use crate::fault::{Condition, Fault};
use crate::features;
use crate::filter::PortFilter;
use crate::offloads::Offloads;
use crate::packet::{Packet, PacketError};
use crate::receiver::Receiver;

/// Most queue pairs of a port; each queue has a thread.
pub(crate) const MAX_PAIRS: u16 = 64;

/// Longest chain of a driver whose queue is shorter: header, and 64 KiB in pages that lie anywhere.
pub(crate) const MAX_INDIRECT_CHAIN: u16 = 64;

/// Queues of a port have numbers less than this among those that are signalled.
const TARGETS_PER_PORT: Target = 256;

/// What a port is made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortSettings {
    /// Address of its device.
    pub mac: MacAddress,
    /// Queue pairs, 1 to 64.
    pub pairs: u16,
    /// The link is up from the start.
    pub link_up: bool,
    /// What passes.
    pub filter: PortFilter,
    /// How much passes, in both directions together.
    pub limits: Limits,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) index: usize,
    pub(crate) max_pairs: u16,
    pub(crate) mtu: u16,
    pub(crate) limit: RateLimit,
    pub(crate) counters: Counters,
    mac: MacAddress,
    link_up: AtomicBool,
    filter: RwLock<PortFilter>,
    /// There is more in the filter than nothing: else no packet asks for the lock.
    is_filtered: AtomicBool,
    driver: RwLock<DriverState>,
    /// Address of the driver, for those who ask for each packet.
    mac_bits: AtomicU64,
    /// Features that the driver has accepted.
    features: AtomicU64,
    receivers: Vec<Receiver>,
    /// Receive queues in service, a bit each.
    receiving: AtomicU64,
    /// Those of them that the driver has given a buffer to.
    supplied: AtomicU64,
    /// The connection of the front-end, to be told of changes.
    connection: Mutex<Option<Handle>>,
    peer_log: LogLimit,
}

impl Port {
    pub(crate) fn new(index: usize, settings: PortSettings, mtu: u16) -> Self {
        let PortSettings { mac, pairs, link_up, filter, limits } = settings;
        let first = Target::try_from(index).unwrap_or(0) * TARGETS_PER_PORT;
        Self {
            index,
            max_pairs: pairs,
            mtu,
            limit: RateLimit::new(limits, Instant::now()),
            counters: Counters::default(),
            mac,
            link_up: AtomicBool::new(link_up),
            is_filtered: AtomicBool::new(filter != PortFilter::default()),
            filter: RwLock::new(filter),
            driver: RwLock::new(DriverState::new(mac)),
            mac_bits: AtomicU64::new(mac.bits()),
            features: AtomicU64::new(0),
            receivers: (0..pairs).map(|pair| Receiver::new(first + 2 * Target::from(pair))).collect(),
            receiving: AtomicU64::new(0),
            supplied: AtomicU64::new(0),
            connection: Mutex::new(None),
            peer_log: LogLimit::new(),
        }
    }

    fn driver(&self) -> RwLockReadGuard<'_, DriverState> {
        self.driver.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one door for changes of what the driver has set.
    pub(crate) fn change_driver<R>(&self, change: impl FnOnce(&mut DriverState) -> R) -> R {
        let mut driver = self.driver.write().unwrap_or_else(PoisonError::into_inner);
        let outcome = change(&mut driver);
        self.mac_bits.store(driver.mac.bits(), Ordering::Relaxed);
        outcome
    }

    pub(crate) fn negotiated(&self) -> Negotiated {
        Negotiated { features: self.features.load(Ordering::Relaxed), max_pairs: self.max_pairs }
    }

    /// The driver has accepted these features.
    pub(crate) fn negotiate(&self, features: u64) {
        // They come again with each queue pair, and when a migration begins.
        if self.features.swap(features, Ordering::Relaxed) != features {
            self.change_driver(|driver| driver.offloads = Offloads::of_receiver(features));
        }
    }

    /// The driver's control queue starts, at this position of its ring.
    pub(crate) fn start_control(&self, position: u16) {
        let negotiated = self.negotiated();
        if self.change_driver(|driver| driver.start_control(position, self.mac, negotiated)) {
            self.config_changed();
        }
    }

    /// Forgets the driver.
    pub(crate) fn reset(&self) {
        self.features.store(0, Ordering::Relaxed);
        self.change_driver(|driver| *driver = DriverState::new(self.mac));
    }

    pub(crate) fn config(&self) -> ConfigSpace {
        let driver = self.driver();
        ConfigSpace {
            mac: driver.mac,
            link_up: self.link_up(),
            announce: driver.announce,
            max_pairs: self.max_pairs,
            mtu: self.mtu,
        }
    }

    /// The driver's address.
    pub(crate) fn mac(&self) -> MacAddress {
        MacAddress::from_bits(self.mac_bits.load(Ordering::Relaxed))
    }

    pub(crate) fn link_up(&self) -> bool {
        self.link_up.load(Ordering::Relaxed)
    }

    /// Pulls the cable, or puts it in again.
    pub(crate) fn set_link(&self, up: bool) {
        if self.link_up.swap(up, Ordering::Relaxed) != up {
            self.config_changed();
        }
        // Who waits for buffers behind a link that is down would wait in vain.
        self.receivers.iter().for_each(Receiver::wake_waiters);
    }

    /// None if everything passes.
    pub(crate) fn filter(&self) -> Option<RwLockReadGuard<'_, PortFilter>> {
        self.is_filtered.load(Ordering::Acquire).then(|| self.filter.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn set_filter(&self, filter: PortFilter) {
        let mut current = self.filter.write().unwrap_or_else(PoisonError::into_inner);
        // Before the lock is given back: of two who set it, the last one says both.
        self.is_filtered.store(filter != PortFilter::default(), Ordering::Release);
        *current = filter;
    }

    /// What may be left to the driver for this frame, and its queue pairs; None if it does not want the frame.
    pub(crate) fn reception(&self, ethernet: &Ethernet) -> Option<(Offloads, Option<u16>)> {
        let driver = self.driver();
        driver.filter.admits(ethernet, driver.mac).then_some((driver.offloads, driver.pairs))
    }

    /// Which receive queue a packet goes to: the same for all packets of a connection, among those in service. While it is not
    /// known which of them the driver uses, those with buffers count.
    pub(crate) fn choose_receiver(&self, packet: &Packet<'_>, pairs: Option<u16>) -> Option<(u16, &Receiver)> {
        let in_use = pairs.map_or(u64::MAX, |pairs| u64::MAX.checked_shr(64 - u32::from(pairs.min(64))).unwrap_or(0));
        let mut candidates = self.receiving.load(Ordering::Acquire) & in_use;
        let supplied = candidates & self.supplied.load(Ordering::Relaxed);
        if pairs.is_none() && supplied != 0 {
            candidates = supplied;
        }
        let pair = match candidates.count_ones() {
            0 => return None,
            1 => candidates.trailing_zeros(),
            count => nth_bit(candidates, packet.flow_hash() % u64::from(count)),
        };
        let pair = u16::try_from(pair).ok()?;
        Some((pair, self.receiver(pair)?))
    }

    pub(crate) fn receiver(&self, pair: u16) -> Option<&Receiver> {
        self.receivers.get(usize::from(pair))
    }

    /// A receive queue begins to be in service, or ceases to.
    pub(crate) fn set_receiving(&self, pair: u16, receives: bool) {
        let bit = 1 << (pair % MAX_PAIRS);
        if receives {
            self.receiving.fetch_or(bit, Ordering::AcqRel);
        } else {
            self.receiving.fetch_and(!bit, Ordering::AcqRel);
            self.supplied.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    /// The driver has given a receive queue a buffer.
    pub(crate) fn set_supplied(&self, pair: u16) {
        self.supplied.fetch_or(1 << (pair % MAX_PAIRS), Ordering::Relaxed);
    }

    /// Number of receive queues in service.
    pub(crate) fn receiving(&self) -> u32 {
        self.receiving.load(Ordering::Relaxed).count_ones()
    }

    /// Somebody is behind the port.
    pub(crate) fn has_driver(&self) -> bool {
        self.receiving() > 0
    }

    /// What stands for a queue among those that are signalled.
    pub(crate) fn target(&self, queue: u16) -> Target {
        Target::try_from(self.index).unwrap_or(0) * TARGETS_PER_PORT + Target::from(queue)
    }

    /// Lets the driver look at what was returned on a ring.
    pub(crate) fn signal_driver(&self, service: &Service<'_>, bell: &mut Bell) {
        if let Some(call) = service.call() {
            self.counters.calls.count();
            bell.signal(self.target(service.index()), call);
        }
    }

    /// Which queue is the control queue: the one behind all others that the driver knows of (virtio 1.3, section 5.1.2).
    pub(crate) fn control_queue(&self, bits: u64) -> Option<u16> {
        let pairs = if bits & features::MQ != 0 { self.max_pairs } else { 1 };
        (bits & features::CTRL_VQ != 0).then_some(2 * pairs)
    }

    pub(crate) fn connection(&self) -> MutexGuard<'_, Option<Handle>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The front-end is to tell the driver that the configuration space is another.
    pub(crate) fn config_changed(&self) {
        if let Some(handle) = self.connection().as_ref() {
            handle.config_changed();
        }
    }
}

/// What goes wrong.
impl Port {
    /// A bell for a queue's thread.
    pub(crate) fn new_bell(&self) -> Option<Bell> {
        let failed = |error: &std::io::Error| tracing::error!(port = self.index, %error, "queue cannot be served");
        Bell::new().inspect_err(failed).ok()
    }

    pub(crate) fn note_malformed(&self, error: &PacketError) {
        self.counters.tx_malformed.count();
        if let Some(suppressed) = self.peer_log.admit(Instant::now()) {
            tracing::info!(port = self.index, error = in_one_line(error), suppressed, "packet dropped");
        }
    }

    pub(crate) fn note_broken(&self, target: Target, fault: &Fault) {
        self.counters.broken.count();
        if let Some(suppressed) = self.peer_log.admit(Instant::now()) {
            let queue = target % TARGETS_PER_PORT;
            tracing::error!(port = self.index, queue, error = in_one_line(fault), suppressed, "ring is broken");
        }
    }

    /// The driver broke a ring. The front-end learns it by the err event; vhost-user has no message for it.
    pub(crate) fn break_ring(&self, fault: &Fault, service: &Service<'_>, bell: &mut Bell) {
        let target = self.target(service.index());
        self.note_broken(target, fault);
        if let Some(event) = service.error() {
            bell.signal(target, event);
        }
    }

    /// A ring that could not be opened waits if it is for the front-end to give something; else it is broken.
    pub(crate) fn pause_or_break(&self, error: RingError, service: &Service<'_>, bell: &mut Bell) -> Condition {
        let outcome = match error.pause() {
            Some(pause) => service.pause(pause),
            None => Err(error),
        };
        match outcome {
            Ok(()) => Condition::Waiting,
            Err(error) => {
                self.break_ring(&error.into(), service, bell);
                Condition::Broken
            }
        }
    }
}

/// The position of the bit that is set as the `n`-th one; there are more than `n`.
fn nth_bit(mut bits: u64, n: u64) -> u32 {
    for _ in 0..n {
        bits &= bits.wrapping_sub(1);
    }
    bits.trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_counted_from_below() {
        assert_eq!([0, 1, 2].map(|n| nth_bit(0b1101_0000, n)), [4, 6, 7]);
        assert_eq!(nth_bit(1 << 63, 0), 63);
    }
}
