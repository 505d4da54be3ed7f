//! What a port has done, as numbers that only ever grow.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Defines the counters of a port in one place.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters of one port. They are read while its queues work.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: Counter,)*
        }

        /// Counters at one moment.
        #[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
        pub(crate) struct CounterValues {
            $($(#[$doc])* pub(crate) $name: u64,)*
        }

        impl Counters {
            pub(crate) fn values(&self) -> CounterValues {
                CounterValues { $($name: self.$name.0.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Packets that came from the driver, or from the uplink's interface.
    tx_packets,
    /// Bytes of them.
    tx_bytes,
    /// Packets dropped: a header that is not true of the packet, or a packet too short or too long to be one.
    tx_malformed,
    /// Packets dropped: larger than the MTU.
    tx_oversized,
    /// Packets dropped: not let through by the filter, or meant for the switch itself.
    tx_filtered,
    /// Packets dropped: their source is the address of another port.
    tx_spoofed,
    /// Packets dropped: the link is down.
    tx_link_down,
    /// Times that a sender had to wait for its rate limit.
    tx_waits,
    /// Packets that went to the driver, or to the uplink's interface.
    rx_packets,
    /// Bytes of them.
    rx_bytes,
    /// Packets dropped: the driver had no buffers, or the uplink's interface took no more.
    rx_no_buffers,
    /// Packets dropped: larger than the driver's buffers.
    rx_too_large,
    /// Packets dropped: there is no driver.
    rx_no_driver,
    /// Packets that were not let through by a filter.
    rx_filtered,
    /// Packets dropped: the link is down.
    rx_link_down,
    /// Packets dropped: over the rate limit.
    rx_limited,
    /// Packets that were cut for the driver, which does not do it itself.
    rx_segmented,
    /// Checksums that were completed for the driver, which does not do it itself.
    rx_checksums,
    /// Commands of the control queue.
    commands,
    /// Notifications taken from the driver.
    kicks,
    /// Notifications sent to the driver.
    calls,
    /// Starts of a ring.
    starts,
    /// Times that the driver broke a ring.
    broken,
}

/// One number.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, value: u64) {
        self.0.fetch_add(value, Ordering::Relaxed);
    }

    /// Adds 1.
    pub(crate) fn count(&self) {
        self.add(1);
    }
}
