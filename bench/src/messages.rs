//! What control messages take: one that changes nothing, and one that has driver memory mapped anew.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::connection::Connection;
use crate::error::Error;
use crate::latency::{Latencies, Summary};
use crate::memory::Memory;

/// A load of messages, one at a time.
#[derive(Debug, Clone)]
pub struct Messages {
    /// Where the back-end listens.
    pub socket: PathBuf,
    /// How long each kind of message is sent.
    pub time: Duration,
    /// Driver memory that is mapped, in bytes.
    pub memory: usize,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Messages in a second.
    pub per_second: f64,
    /// From sending it to its answer.
    pub latency_us: Summary,
}

/// What came of both kinds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// GET_FEATURES and its answer.
    pub message: Latency,
    /// SET_MEM_TABLE with other memory than before, and its acknowledgement.
    pub memory_map: Latency,
}

impl Messages {
    /// Runs it.
    ///
    /// # Errors
    /// If the back-end refuses something, or does not acknowledge requests.
    pub fn run(&self) -> Result<Outcome, Error> {
        let connection = Connection::open(&self.socket, 0)?;
        if !connection.acknowledges() {
            return Err(Error::NotOffered("acknowledgements (REPLY_ACK)"));
        }
        let message = self.repeat(|_| connection.ask_features().map(drop))?;
        let (one, other) = (Memory::new(self.memory)?, Memory::new(self.memory)?);
        let memory_map =
            self.repeat(|number| connection.announce_memory(if number % 2 == 0 { &one } else { &other }))?;
        Ok(Outcome { message, memory_map })
    }

    fn repeat(&self, send: impl Fn(u64) -> Result<(), Error>) -> Result<Latency, Error> {
        let mut latencies = Latencies::new()?;
        let begin = Instant::now();
        let mut last = begin;
        let mut count = 0;
        while last - begin < self.time {
            send(count)?;
            let now = Instant::now();
            latencies.record(now - last);
            last = now;
            count += 1;
        }
        Ok(Latency { per_second: count as f64 / (last - begin).as_secs_f64(), latency_us: latencies.summary() })
    }
}
