//! The blk back-end's own counters, as it writes them to the appliance's log when a front-end leaves.

use serde::{Deserialize, Serialize};

/// Sums over all queues of a device; the back-end's log has more counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkCounters {
    /// READ requests.
    pub reads: u64,
    /// WRITE requests.
    pub writes: u64,
    /// FLUSH requests.
    pub flushes: u64,
    /// Bytes that the driver VM read.
    pub bytes_read: u64,
    /// Bytes that the driver VM wrote.
    pub bytes_written: u64,
    /// Bytes that went between storage and driver VM memory without a copy.
    pub zero_copy_bytes: u64,
    /// Bytes that took the way over a bounce buffer.
    pub bounced_bytes: u64,
    /// Bytes that the appliance's kernel copied between its page cache and driver VM memory.
    pub page_cache_bytes: u64,
    /// Bytes of these two kinds whose pages the appliance's kernel had at hand.
    pub registered_bytes: u64,
    /// Notifications from the driver VM.
    pub kicks: u64,
    /// Notifications to the driver VM.
    pub calls: u64,
}

impl BlkCounters {
    /// The counters on a line of the appliance's log, if it has them: the word `counters`, then JSON.
    pub fn on_line(line: &str) -> Option<Self> {
        let (_, json) = line.split_once("counters ")?;
        // The log may put more on the line: only the first value is the report.
        serde_json::Deserializer::from_str(json).into_iter().next()?.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_behind_a_log_prefix() {
        let line = r#"INFO vvu_blk: counters {"reads":3,"writes":2,"flushes":1,"get_ids":0,"discards":0,"write_zeroes":0,"unknown":0,"io_errors":0,"unsupported":0,"bytes_read":4096,"bytes_written":512,"zero_copy_bytes":4608,"bounced_bytes":0,"page_cache_bytes":0,"registered_bytes":512,"kicks":5,"calls":4,"starts":1,"broken":0}"#;
        let counters = BlkCounters::on_line(line).unwrap();
        assert_eq!((counters.reads, counters.zero_copy_bytes, counters.calls), (3, 4608, 4));
        assert!(BlkCounters::on_line("counters").is_none());
        assert!(BlkCounters::on_line("counters {broken").is_none());
    }
}
