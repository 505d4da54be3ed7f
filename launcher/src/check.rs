//! `vvu check`: whether this host can serve devices.
//!
//! One line for each check, or with `--json` one object: `{"usable": bool, "checks": [{"id", "status": "ok" | "warning" |
//! "failed", "found", "remedy": text or null}]}`. The exit code is 0 if no check failed.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;

use crate::accel::KvmState;
use crate::cli::{CheckArgs, DEFAULT_WINDOW};
use crate::host_checks::{self, Check, Status};
use crate::plan::default_memory;
use crate::probe;
use crate::programs;

/// All checks together.
#[derive(Debug, Serialize)]
struct Report {
    /// Whether a device could be served.
    usable: bool,
    /// The checks, in the order in which they are printed.
    checks: Vec<Check>,
}

impl Report {
    fn of(checks: Vec<Check>) -> Self {
        Self { usable: checks.iter().all(|check| check.status != Status::Failed), checks }
    }

    /// The report for a person: a line for each check and a last one for all of them.
    fn text(&self) -> String {
        let mut text: String = self.checks.iter().map(line).collect();
        text.push_str(if self.usable {
            "This host can serve devices.\n"
        } else {
            "This host cannot serve devices yet.\n"
        });
        text
    }
}

fn line(check: &Check) -> String {
    let remedy = check.remedy.as_ref().map(|remedy| format!("; {remedy}")).unwrap_or_default();
    format!("{:<8} {:<22} {}{remedy}\n", check.status.word(), check.id, check.found)
}

/// Runs all checks and prints them.
///
/// # Errors
/// The report cannot be written.
pub(crate) async fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let memory = default_memory(DEFAULT_WINDOW, 1, None);
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mut checks = vec![host_checks::kvm(&KvmState::of_this_host())];
    checks.extend(qemu(programs::find_qemu(args.qemu.as_deref())).await);
    checks.extend([
        host_checks::memory(&meminfo, memory),
        host_checks::shared_memory(memory),
        host_checks::runtime_dir(),
        host_checks::bridge(&programs::find_bridge(args.bridge.as_deref())),
        host_checks::appliance(&programs::find_appliance(args.appliance.as_deref())),
    ]);
    let report = Report::of(checks);
    let text = if args.json { serde_json::to_string(&report)? + "\n" } else { report.text() };
    std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes()).context("cannot write the report")?;
    Ok(if report.usable { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn qemu(found: anyhow::Result<PathBuf>) -> Vec<Check> {
    let path = match found {
        Ok(path) => path,
        Err(error) => return host_checks::qemu(&Err(error), &PathBuf::new()),
    };
    let facts = match host_checks::scratch_image() {
        // The file lives until QEMU has tried to open it.
        Ok((_file, image)) => probe::probe(&path, &[&image]).await,
        Err(error) => return vec![Check::failed("disk-io", format!("{error:#}"), "make room in it")],
    };
    host_checks::qemu(&facts, &path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_of(status: Status) -> Check {
        Check { id: "memory", status, found: "1G free".into(), remedy: Some("buy more".into()) }
    }

    #[test]
    fn one_failure_makes_the_host_unusable_and_a_warning_does_not() {
        assert!(Report::of(vec![check_of(Status::Ok), check_of(Status::Warning)]).usable);
        let report = Report::of(vec![check_of(Status::Ok), check_of(Status::Failed)]);
        assert!(!report.usable);
        assert!(
            report
                .text()
                .ends_with("failed   memory                 1G free; buy more\nThis host cannot serve devices yet.\n")
        );
    }
}
