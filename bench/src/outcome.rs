//! What came of a load, as it is written to JSON.

use serde::{Deserialize, Serialize};

use crate::latency::Summary;
use crate::processes::{Process, Usage};

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Requests, or packets, that were measured: those of the warm-up are not among them.
    pub requests: u64,
    /// Length of the measurement.
    pub seconds: f64,
    /// Requests in a second.
    pub iops: f64,
    /// MiB in a second.
    pub mib_per_second: f64,
    /// From the moment when a request is offered to the moment when its end is seen, in microseconds.
    pub latency_us: Summary,
    /// What counts the warm-up, too.
    pub whole: Whole,
    /// Device features in force.
    pub features: u64,
}

/// Counts over the warm-up and the measurement together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Whole {
    /// Requests, or packets.
    pub requests: u64,
    /// Kicks that the driver sent.
    pub kicks: u64,
    /// Calls that the device sent.
    pub calls: u64,
    /// Times that the driver waited for a call.
    pub waits: u64,
    /// What the threads of the load took.
    pub load: Usage,
    /// What the processes took that were watched.
    pub processes: Vec<Process>,
}

impl Whole {
    /// Adds the counts of another queue.
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.kicks += other.kicks;
        self.calls += other.calls;
        self.waits += other.waits;
        self.load = self.load.plus(&other.load);
    }
}
