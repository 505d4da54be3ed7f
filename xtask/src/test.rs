//! Every check, in the order in which they are cheap. Nothing stops at the first failure.

use std::io::{self, BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use vvu_guest_image::KernelFlavour;

use crate::cli::Test;
use crate::report::{Outcome, Report, TestLines};
use crate::workspace::{Profile, Workspace, run as run_command};
use crate::{dependencies, image, instructions, simulate};

/// Steps that others need.
const SETUP: &str = "set-up";
const IMAGE: &str = "image";
const PROGRAMS: &str = "programs";

/// Unit tests that run at the same time, however many cores there are: the longest ones wait for a peer that says nothing.
const UNIT_TESTS_AT_ONCE: usize = 8;

/// Whole-machine tests that run at the same time: a machine that boots keeps one core busy.
const MACHINE_TESTS_AT_ONCE: usize = 2;

/// How often the end of a silent `cargo test` is looked for.
const EXIT_CHECK: Duration = Duration::from_millis(500);

/// Runs all checks, prints the report, and says whether all passed.
pub(crate) fn run(workspace: &Workspace, options: &Test) -> anyhow::Result<bool> {
    let mut report = Report::default();
    let cargo = |arguments: &[&str]| workspace.cargo(arguments);

    check(&mut report, "format", || run_command(&mut cargo(&["fmt", "--all", "--check"])));
    check(&mut report, "dependency direction", || dependencies::check(workspace));
    let clippy = ["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    check(&mut report, "lints", || run_command(&mut cargo(&clippy)));
    check(&mut report, "documents", || {
        run_command(cargo(&["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "--deny warnings"))
    });
    // Before the unit tests: those of the launcher ask the real QEMU what it can do.
    check(&mut report, SETUP, || image::ensure_setup().map(drop));
    check(&mut report, PROGRAMS, || workspace.build_programs(Profile::Dev));
    let unit = ["test", "--workspace", "--exclude", "vvu-tests", "--exclude", "vvu-simulation", "--no-fail-fast"];
    let threads = format!("--test-threads={UNIT_TESTS_AT_ONCE}");
    tests(&mut report, "unit and property tests", cargo(&unit).arg("--").arg(threads));
    tests(&mut report, "simulation", &mut simulate::command(workspace, None));
    let harness = ["test", "--package", "vvu-tests", "--lib", "--no-fail-fast"];
    tests(&mut report, "unit tests of the machine harness", &mut cargo(&harness));
    if !options.no_machines {
        machines(&mut report, workspace, options.machine_filter.as_deref());
    }
    println!("\n{report}");
    Ok(report.all_passed())
}

fn machines(report: &mut Report, workspace: &Workspace, filter: Option<&str>) {
    if report.has_passed(SETUP) {
        check(report, IMAGE, || image::build(workspace, KernelFlavour::Stock).map(drop));
        check(report, "image is reproducible", || image::check_reproducible(workspace));
    }
    // Its kernel takes too long to build to be a part of this; where it was built once, its image is kept up with the stock one.
    if report.has_passed(IMAGE) && workspace.target.join(KernelFlavour::Minimal.directory()).exists() {
        check(report, "image with the minimal kernel", || image::build(workspace, KernelFlavour::Minimal).map(drop));
    }
    if report.has_passed(IMAGE) {
        check(report, "instructions per request", || instructions::check(workspace));
    }
    const STEP: &str = "whole machines";
    match [SETUP, IMAGE, PROGRAMS].into_iter().find(|step| !report.has_passed(step)) {
        Some(missing) => check(report, STEP, || anyhow::bail!("not run: it needs the step \"{missing}\"")),
        None => {
            let mut command =
                workspace.cargo(&["test", "--package", "vvu-tests", "--test", "machines", "--no-fail-fast", "--"]);
            command.arg(format!("--test-threads={MACHINE_TESTS_AT_ONCE}")).args(filter);
            tests(report, STEP, &mut command);
        }
    }
}

/// A step that passes or fails as a whole.
fn check(report: &mut Report, step: &'static str, body: impl FnOnce() -> anyhow::Result<()>) {
    eprintln!("\n==== {step}");
    let start = Instant::now();
    let outcome = match body() {
        Ok(()) => Outcome { passed: 1, failures: Vec::new() },
        Err(error) => {
            eprintln!("{error:#}");
            Outcome { passed: 0, failures: vec![format!("{error:#}")] }
        }
    };
    report.add(step, start.elapsed(), outcome);
}

/// A step of many tests, each of which counts. Their output is passed on as it comes.
fn tests(report: &mut Report, step: &'static str, command: &mut Command) {
    eprintln!("\n==== {step}");
    let start = Instant::now();
    let outcome =
        run_tests(command).unwrap_or_else(|error| Outcome { passed: 0, failures: vec![format!("{error:#}")] });
    report.add(step, start.elapsed(), outcome);
}

fn run_tests(command: &mut Command) -> anyhow::Result<Outcome> {
    let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start cargo test")?;
    let mut lines = TestLines::default();
    let stdout = child.stdout.take().context("cargo test has no output")?;
    let (sender, printed) = mpsc::channel();
    // A process that a test leaves behind keeps the pipe open: the end of cargo test counts, not the end of its output.
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines() {
            let received = line.is_ok();
            if sender.send(line).is_err() || !received {
                return;
            }
        }
    });
    let status = loop {
        match printed.recv_timeout(EXIT_CHECK) {
            Ok(line) => take_line(&mut lines, line)?,
            Err(RecvTimeoutError::Disconnected) => break child.wait(),
            Err(RecvTimeoutError::Timeout) => match child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => break Ok(status),
                Err(error) => break Err(error),
            },
        }
    };
    let status = status.context("cannot wait for cargo test")?;
    // What was printed last may still be in the pipe.
    while let Ok(line) = printed.recv_timeout(EXIT_CHECK) {
        take_line(&mut lines, line)?;
    }
    Ok(lines.finish(status.success()))
}

fn take_line(lines: &mut TestLines, line: io::Result<String>) -> anyhow::Result<()> {
    let line = line.context("cannot read the output of cargo test")?;
    println!("{line}");
    lines.handle_line(&line);
    Ok(())
}
