//! A child of a run: spawned, watched, ended in bounded time.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Command;

use crate::ending::Death;
use crate::events::Source;
use crate::log_follow::Log;
use crate::output::Output;
use crate::parent_death::die_with_parent;

/// Longest wait for the rest of a dead child's output.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// A child process whose output is followed.
#[derive(Debug)]
pub(crate) struct Child {
    name: &'static str,
    process: tokio::process::Child,
    pid: u32,
    logs: Vec<Log>,
    status: Option<ExitStatus>,
}

impl Child {
    /// Starts `command` in a process group of its own, so that a Ctrl-C reaches `vvu` alone, which then ends its
    /// children in order. Standard error is followed as `stderr`, standard output as `stdout` if it has a source. Standard
    /// input is what `command` says.
    ///
    /// # Errors
    /// The program cannot be started.
    pub(crate) fn spawn(
        name: &'static str,
        mut command: Command,
        stderr: Source,
        stdout: Option<Source>,
        output: &Output,
    ) -> anyhow::Result<Self> {
        command.stderr(Stdio::piped()).process_group(0).kill_on_drop(true);
        command.stdout(if stdout.is_some() { Stdio::piped() } else { Stdio::null() });
        die_with_parent(&mut command);
        let program = command.as_std().get_program().to_owned();
        let mut process =
            command.spawn().with_context(|| format!("cannot start {name} ({})", program.to_string_lossy()))?;
        let pid = process.id().with_context(|| format!("{name} has no process id"))?;
        let mut logs = Vec::new();
        if let (Some(stream), Some(source)) = (process.stdout.take(), stdout) {
            logs.push(Log::follow(stream, source, output.clone()));
        }
        if let Some(stream) = process.stderr.take() {
            logs.push(Log::follow(stream, stderr, output.clone()));
        }
        Ok(Self { name, process, pid, logs, status: None })
    }

    /// The child's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for the child's end. May be dropped and called again.
    ///
    /// # Errors
    /// The system does not tell the child's state.
    pub(crate) async fn exited(&mut self) -> anyhow::Result<ExitStatus> {
        let status = self.process.wait().await.with_context(|| format!("cannot wait for {}", self.name))?;
        self.status = Some(status);
        Ok(status)
    }

    /// Asks the child to end with SIGTERM.
    pub(crate) fn terminate(&self) {
        if self.status.is_some() {
            return;
        }
        if let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) {
            // The child has not been waited for, so the id is still its own; a failure means that it has just ended.
            let _ = kill_process(pid, Signal::TERM);
        }
    }

    /// Kills the child; that it has gone is told by [`Child::exited`].
    pub(crate) fn start_kill(&mut self) {
        // Fails only if the child was waited for already.
        let _ = self.process.start_kill();
    }

    /// Waits for the child's end and kills it if it has not ended after `grace`.
    ///
    /// # Errors
    /// The system does not tell the child's state.
    pub(crate) async fn ended_within(&mut self, grace: Duration) -> anyhow::Result<ExitStatus> {
        match tokio::time::timeout(grace, self.exited()).await {
            Ok(result) => result,
            Err(_) => self.kill().await,
        }
    }

    /// Kills the child and returns how it ended: by this, or by itself a moment earlier.
    ///
    /// # Errors
    /// The system does not tell the child's state.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<ExitStatus> {
        self.start_kill();
        self.exited().await
    }

    /// How the child went, once it has; waits for the rest of its output.
    pub(crate) async fn death(&mut self, status: ExitStatus) -> Death {
        Death::Ended { status, last_lines: self.last_lines().await }
    }

    /// The child's last lines once it has ended, oldest first.
    pub(crate) async fn last_lines(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        for log in &mut self.logs {
            log.drain(DRAIN_LIMIT).await;
            lines.extend(log.tail());
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;
    use crate::supervisor::PortId;

    fn shell(script: &str) -> Child {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        Child::spawn("shell", command, Source::Bridge(PortId(0)), Some(Source::Bridge(PortId(0))), &Output::discard())
            .unwrap()
    }

    #[tokio::test]
    async fn both_streams_are_followed_to_the_end() {
        let mut child = shell("echo out; echo err >&2; exit 3");
        assert_eq!(child.exited().await.unwrap().code(), Some(3));
        assert_eq!(child.last_lines().await, ["out", "err"]);
        child.terminate();
        assert_eq!(child.ended_within(Duration::ZERO).await.unwrap().code(), Some(3));
    }

    #[tokio::test]
    async fn a_child_that_ignores_sigterm_is_killed() {
        let mut child = shell("trap '' TERM; echo armed; while :; do sleep 1; done");
        while child.logs[0].tail().is_empty() {
            tokio::task::yield_now().await;
        }
        child.terminate();
        let status = child.ended_within(Duration::from_millis(50)).await.unwrap();
        assert_eq!(status.signal(), Some(9));
    }
}
