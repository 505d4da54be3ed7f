//! TCP throughput between two machines, as `iperf3` sees it.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::driver_vm::DriverVm;

/// Which way the bytes of a measurement go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the machine that runs the client.
    FromClient,
    /// To it.
    ToClient,
}

/// What a measurement says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Throughput {
    /// As the receiver has counted.
    pub bits_per_second: f64,
    /// Segments that were sent again.
    pub retransmits: u64,
}

/// Starts a server in the driver VM, which stays.
///
/// # Errors
/// If it cannot listen.
pub fn serve(vm: &mut DriverVm) -> Result<()> {
    vm.run("iperf3 --server --daemon && until grep -q ':1451 ' /proc/net/tcp6 /proc/net/tcp; do sleep 0.1; done")
        .map(drop)
}

/// Measures for `seconds` over `streams` connections to a server.
///
/// # Errors
/// If the client fails or says something else.
pub fn measure(
    client: &mut DriverVm,
    server: &str,
    direction: Direction,
    streams: u16,
    seconds: u64,
) -> Result<Throughput> {
    let reverse = if direction == Direction::ToClient { "--reverse" } else { "" };
    let text =
        client.run(&format!("iperf3 --client {server} --json --time {seconds} --parallel {streams} {reverse}"))?;
    read(&text).with_context(|| format!("iperf3 says {text}"))
}

fn read(text: &str) -> Result<Throughput> {
    let report: Value = serde_json::from_str(text).context("that is no JSON")?;
    let number = |path: &str| report.pointer(path).with_context(|| format!("it has no {path}"));
    Ok(Throughput {
        bits_per_second: number("/end/sum_received/bits_per_second")?.as_f64().context("a rate is a number")?,
        retransmits: number("/end/sum_sent/retransmits")?.as_u64().context("a count is a whole number")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receivers_rate_counts() {
        let text = r#"{ "end": { "sum_sent": { "bits_per_second": 9e9, "retransmits": 3 },
            "sum_received": { "bits_per_second": 8.5e9 } } }"#;
        assert_eq!(read(text).unwrap(), Throughput { bits_per_second: 8.5e9, retransmits: 3 });
        assert!(read(r#"{ "error": "unable to connect to server" }"#).is_err());
    }
}
