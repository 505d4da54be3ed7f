//! Counts what passed and failed, from the exit of a step or from what libtest prints.

use std::fmt;
use std::time::Duration;

/// A failure that no test stands for: a test binary that does not build, or dies.
const ENDED: &str = "cargo test ended before its tests did (see above)";

/// What one step came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) passed: u32,
    pub(crate) failures: Vec<String>,
}

/// Reads the output of `cargo test` line by line.
///
/// A test may start its own binary again as the process under test, and that one's report is among the lines. It is not
/// counted: the report that counts is as long as the binary's first line said.
#[derive(Debug, Default)]
pub(crate) struct TestLines {
    passed: u32,
    failures: Vec<String>,
    /// Number of tests of the binary that is running.
    running: Option<u32>,
    /// Names below the last "failures:", while its lines come.
    names: Option<Vec<String>>,
}

impl TestLines {
    /// Takes the next line.
    pub(crate) fn handle_line(&mut self, line: &str) {
        if let Some(tests) = line.strip_prefix("running ").and_then(|rest| rest.split(' ').next()?.parse().ok()) {
            self.running.get_or_insert(tests);
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.handle_result(result);
        } else if line == "failures:" {
            // libtest has two such blocks: outputs, then names. The second one replaces what looked like names.
            self.names = Some(Vec::new());
        } else if let Some(names) = &mut self.names
            && let Some(name) = line.strip_prefix("    ")
            && !name.contains(' ')
        {
            names.push(name.to_owned());
        }
    }

    fn handle_result(&mut self, result: &str) {
        let names = self.names.take().unwrap_or_default();
        let tests: u32 = ["passed", "failed", "ignored", "measured"].map(|word| count(result, word)).iter().sum();
        if self.running == Some(tests) {
            self.running = None;
            self.passed += count(result, "passed");
            self.failures.extend(names);
        }
    }

    /// What it came to, given whether cargo ended well.
    pub(crate) fn finish(mut self, success: bool) -> Outcome {
        if !success && (self.failures.is_empty() || self.running.is_some()) {
            self.failures.push(ENDED.to_owned());
        }
        Outcome { passed: self.passed, failures: self.failures }
    }
}

/// The number before a word: `3 passed; 1 failed; …`.
fn count(result: &str, word: &str) -> u32 {
    let mut parts = result.split([';', '.']).map(str::trim);
    parts.find_map(|part| part.strip_suffix(word)?.trim().parse().ok()).unwrap_or(0)
}

/// All steps so far.
#[derive(Debug, Default)]
pub(crate) struct Report {
    steps: Vec<(&'static str, Duration, Outcome)>,
}

impl Report {
    /// Adds a step.
    pub(crate) fn add(&mut self, step: &'static str, took: Duration, outcome: Outcome) {
        self.steps.push((step, took, outcome));
    }

    /// Whether a step was run and nothing of it failed.
    pub(crate) fn has_passed(&self, step: &str) -> bool {
        self.steps.iter().any(|(name, _, outcome)| *name == step && outcome.failures.is_empty())
    }

    /// Whether nothing failed at all.
    pub(crate) fn all_passed(&self) -> bool {
        self.steps.iter().all(|(.., outcome)| outcome.failures.is_empty())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut passed, mut failed) = (0, 0);
        for (step, took, outcome) in &self.steps {
            passed += outcome.passed;
            failed += outcome.failures.len();
            let verdict = if outcome.failures.is_empty() { "ok" } else { "FAILED" };
            writeln!(f, "{:>8.1} s  {verdict:<6}  {step}", took.as_secs_f64())?;
        }
        for (step, _, outcome) in &self.steps {
            for failure in &outcome.failures {
                writeln!(f, "failed: {step}: {failure}")?;
            }
        }
        write!(f, "{passed} passed, {failed} failed")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, success: bool) -> Outcome {
        let mut lines = TestLines::default();
        text.lines().for_each(|line| lines.handle_line(line));
        lines.finish(success)
    }

    const TWO_BINARIES: &str = "
running 2 tests
test a::one ... ok
test a::two ... FAILED

failures:

---- a::two stdout ----
thread panicked

failures:
    a::two

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s

running 3 tests
test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s
";

    #[test]
    fn tests_of_several_binaries_are_added_up_and_failures_named() {
        assert_eq!(read(TWO_BINARIES, false), Outcome { passed: 4, failures: vec!["a::two".into()] });
    }

    #[test]
    fn a_build_that_fails_and_a_test_that_dies_count_as_failures() {
        assert_eq!(read("", false), Outcome { passed: 0, failures: vec![ENDED.into()] });
        let dies = "running 3 tests\ntest result: ok. 3 passed; 0 failed; 0 ignored\nrunning 1 test\n";
        assert_eq!(read(dies, false), Outcome { passed: 3, failures: vec![ENDED.into()] });
    }

    #[test]
    fn the_report_of_a_binary_that_a_test_started_is_not_counted() {
        let nested = "
running 3 tests
test child ... ignored

running 1 test
failures:
    child

test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 2 filtered out; finished in 0.00s
running 1 test
test parent ... ok
test other ... ok

test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.10s
";
        assert_eq!(read(nested, true), Outcome { passed: 2, failures: vec![] });
    }

    #[test]
    fn the_last_line_counts_everything() {
        let mut report = Report::default();
        report.add("format", Duration::from_millis(1500), Outcome { passed: 1, failures: vec![] });
        report.add("unit tests", Duration::from_secs(9), read(TWO_BINARIES, false));
        let text = report.to_string();
        assert!(text.contains("     1.5 s  ok      format\n"), "{text}");
        assert!(text.contains("\nfailed: unit tests: a::two\n"), "{text}");
        assert_eq!(text.lines().last(), Some("5 passed, 1 failed"));
        assert!(report.has_passed("format") && !report.has_passed("unit tests") && !report.has_passed("image"));
        assert!(!report.all_passed());
    }
}
