//! fio in the driver VM: one job on one disk, its result as numbers.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::driver_vm::{COMMAND_PATIENCE, DriverVm};

/// One job on the raw disk, with O_DIRECT through libaio.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// fio's name of the pattern: `randread`, `randwrite`, `read`, `write`.
    pub pattern: &'static str,
    /// Bytes of one request, in fio's notation.
    pub block_size: &'static str,
    /// Requests in flight.
    pub depth: u16,
}

impl Job {
    /// The job's name in tables, such as `4k randread, depth 32`.
    pub fn title(&self) -> String {
        format!("{} {}, depth {}", self.block_size, self.pattern, self.depth)
    }

    fn reads(&self) -> bool {
        self.pattern.ends_with("read")
    }

    /// Runs the job on `device` for `runtime` after a ramp of one second.
    ///
    /// # Errors
    /// If fio fails or reports an I/O error.
    pub fn run(&self, vm: &mut DriverVm, device: &str, runtime: Duration) -> Result<Figures> {
        let command = format!(
            "fio --name=job --filename={device} --direct=1 --ioengine=libaio --rw={} --bs={} --iodepth={} \
             --time_based --ramp_time=1 --runtime={} --randrepeat=0 --norandommap --output-format=json \
             --output=/tmp/fio.json && cat /tmp/fio.json",
            self.pattern,
            self.block_size,
            self.depth,
            runtime.as_secs()
        );
        let text = vm.run_within(COMMAND_PATIENCE + runtime, &command)?;
        parse(&text, self.reads())
    }
}

/// Result of one run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Figures {
    /// Requests per second.
    pub iops: f64,
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// Mean completion latency in microseconds.
    pub latency_us: f64,
}

#[derive(Deserialize)]
struct Report {
    jobs: Vec<ReportedJob>,
}

#[derive(Deserialize)]
struct ReportedJob {
    read: Direction,
    write: Direction,
}

#[derive(Deserialize)]
struct Direction {
    iops: f64,
    bw_bytes: f64,
    clat_ns: Latency,
}

#[derive(Deserialize)]
struct Latency {
    mean: f64,
}

/// Reads fio's JSON report, which notes of fio may precede.
fn parse(text: &str, reads: bool) -> Result<Figures> {
    let json = text.find('{').and_then(|start| text.get(start..)).context("fio printed no report")?;
    let report: Report = serde_json::from_str(json).context("fio's report is not as expected")?;
    let job = report.jobs.into_iter().next().context("fio reports no job")?;
    let direction = if reads { job.read } else { job.write };
    Ok(Figures {
        iops: direction.iops,
        bytes_per_second: direction.bw_bytes,
        latency_us: direction.clat_ns.mean / 1000.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_after_a_note() {
        let text = r#"note: both iodepth >= 1 and synchronous I/O engine are selected
            {"fio version": "fio-3.39", "jobs": [{"error": 0,
              "read": {"iops": 1000.5, "bw_bytes": 4098048, "clat_ns": {"mean": 2500.0}},
              "write": {"iops": 0.0, "bw_bytes": 0, "clat_ns": {"mean": 0.0}}}]}"#;
        let figures = parse(text, true).unwrap();
        assert_eq!(figures, Figures { iops: 1000.5, bytes_per_second: 4_098_048.0, latency_us: 2.5 });
    }
}
