//! What the device has done, counted per queue and told as one JSON line.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Defines the counters of a queue and their sum in one place.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters of one queue. Each only ever grows; they are read while the queue works.
        #[derive(Debug, Default)]
        pub(crate) struct QueueCounters {
            $($(#[$doc])* pub(crate) $name: Counter,)*
        }

        /// Counters at one moment, as they appear in the log.
        #[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
        pub(crate) struct CounterValues {
            $($(#[$doc])* pub(crate) $name: u64,)*
        }

        impl QueueCounters {
            fn values(&self) -> CounterValues {
                CounterValues { $($name: self.$name.0.load(Ordering::Relaxed),)* }
            }
        }

        impl CounterValues {
            fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)*
            }
        }
    };
}

counters! {
    /// READ requests completed, with whatever status.
    reads,
    /// WRITE requests completed.
    writes,
    /// FLUSH requests completed.
    flushes,
    /// GET_ID requests completed.
    get_ids,
    /// DISCARD requests completed.
    discards,
    /// WRITE_ZEROES requests completed.
    write_zeroes,
    /// Requests of a type that this device does not know.
    unknown,
    /// Requests answered with IOERR.
    io_errors,
    /// Requests answered with UNSUPP.
    unsupported,
    /// Data bytes read for the driver.
    bytes_read,
    /// Data bytes written for the driver.
    bytes_written,
    /// Data bytes that went between storage and driver memory without a copy (direct I/O).
    zero_copy_bytes,
    /// Data bytes that took the way over a bounce buffer.
    bounced_bytes,
    /// Data bytes that the kernel copied between its page cache and driver memory (storage without direct I/O).
    page_cache_bytes,
    /// Data bytes of these two kinds whose pages in driver memory the kernel had at hand (registered buffers).
    registered_bytes,
    /// Notifications taken from the driver.
    kicks,
    /// Notifications sent to the driver.
    calls,
    /// Starts of the ring.
    starts,
    /// Times that the driver broke the ring.
    broken,
    /// Times that the ring waited for the rate limit.
    throttled,
}

/// One number, to which one thread adds.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, value: u64) {
        // A load and a store: nobody else stores, and an addition that is one would cost each request several times as much.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(value), Ordering::Relaxed);
    }
}

/// Counters of a device.
#[derive(Debug)]
pub(crate) struct DeviceCounters {
    queues: Vec<QueueCounters>,
}

/// All counters of a device at one moment.
#[derive(Debug, Serialize)]
pub(crate) struct CounterReport {
    /// Sum over all queues.
    pub(crate) total: CounterValues,
    /// Each queue by its index.
    pub(crate) queues: Vec<CounterValues>,
}

impl DeviceCounters {
    pub(crate) fn new(queues: u16) -> Self {
        let mut counters = Vec::new();
        counters.resize_with(usize::from(queues), QueueCounters::default);
        Self { queues: counters }
    }

    pub(crate) fn queue(&self, index: usize) -> Option<&QueueCounters> {
        self.queues.get(index)
    }

    pub(crate) fn report(&self) -> CounterReport {
        let queues: Vec<_> = self.queues.iter().map(QueueCounters::values).collect();
        let mut total = CounterValues::default();
        for queue in &queues {
            total.add(queue);
        }
        CounterReport { total, queues }
    }

    /// Writes the counters to the log: the words `counters` and, where there are several queues, `counters of queue N`, each with
    /// JSON on a line. All on one line are more than a launcher passes on.
    pub(crate) fn log(&self) {
        let CounterReport { total, queues } = self.report();
        log_line("counters", &total);
        if queues.len() > 1 {
            queues
                .iter()
                .enumerate()
                .for_each(|(index, values)| log_line(&format!("counters of queue {index}"), values));
        }
    }
}

fn log_line(of: &str, values: &CounterValues) {
    match serde_json::to_string(values) {
        Ok(json) => tracing::info!("{of} {json}"),
        Err(error) => tracing::error!(%error, "counters cannot be written"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_sums_up_the_queues() {
        let counters = DeviceCounters::new(2);
        counters.queue(0).unwrap().reads.add(3);
        counters.queue(1).unwrap().reads.add(4);
        counters.queue(1).unwrap().zero_copy_bytes.add(512);
        assert!(counters.queue(2).is_none());
        let report = counters.report();
        assert_eq!(report.total.reads, 7);
        assert_eq!(report.queues[1].zero_copy_bytes, 512);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["total"]["zero_copy_bytes"], 512);
        assert_eq!(json["queues"][0]["reads"], 3);
    }
}
