//! What the system itself takes for a signal: an eventfd from one thread that waits to another one.

use std::thread;
use std::time::{Duration, Instant};

use crate::connection::Signals;
use crate::disk::PATIENCE;
use crate::error::Error;
use crate::latency::{Latencies, Summary};

/// There and back between two threads for a while; half of each round trip.
///
/// # Errors
/// If the system has no more descriptors, or a thread was not woken.
pub fn run(time: Duration) -> Result<Summary, Error> {
    let (near, far) = (Signals::new()?, Signals::new()?);
    let mut latencies = Latencies::new()?;
    thread::scope(|scope| {
        let echo = scope.spawn(|| {
            // The near side stops calling when its time is over.
            while far.wait(time + PATIENCE)? {
                near.call();
                if far.has_kick() {
                    break;
                }
            }
            Ok::<_, Error>(())
        });
        let begin = Instant::now();
        let mut last = begin;
        while last - begin < time {
            far.call();
            if !near.wait(PATIENCE)? {
                return Err(Error::Silent(PATIENCE));
            }
            let now = Instant::now();
            latencies.record((now - last) / 2);
            last = now;
        }
        far.kick();
        far.call();
        echo.join().map_err(|_| Error::Panicked)?
    })?;
    Ok(latencies.summary())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hop_takes_some_time_and_the_other_thread_ends() {
        let summary = run(Duration::from_millis(5)).unwrap();
        assert!(summary.p50 > 0.0 && summary.max < 5e6, "{summary:?}");
    }
}
