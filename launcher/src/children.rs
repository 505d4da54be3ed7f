//! A child of a run: spawned, watched, ended in bounded time.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use vvu_appliance_config::{BootTimes, END_GRACE, END_REQUEST};

use crate::ending::Death;
use crate::events::Source;
use crate::log_follow::Log;
use crate::output::Output;
use crate::parent_death::die_with_parent;

/// Longest wait for the rest of a dead child's output.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// Longest time until an agent's channel takes a request.
const ASK_LIMIT: Duration = Duration::from_secs(2);

/// How long an appliance VM whose programs have ended may take to switch itself off, under TCG on a loaded machine.
const SWITCH_OFF_LIMIT: Duration = Duration::from_secs(5);

/// A child process whose output is followed.
#[derive(Debug)]
pub(crate) struct Child {
    name: &'static str,
    process: tokio::process::Child,
    pid: u32,
    logs: Vec<Log>,
    status: Option<ExitStatus>,
    /// Who ends it from inside.
    inside: Option<PathBuf>,
    /// What asks that one, and does without if need be.
    asking: Option<JoinHandle<()>>,
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
        Ok(Self { name, process, pid, logs, status: None, inside: None, asking: None })
    }

    /// The child's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// What an appliance told of its boot on its console, and when that came.
    pub(crate) fn boot(&self) -> Option<(Instant, BootTimes)> {
        self.logs.iter().find_map(Log::boot)
    }

    /// Waits for the child's end. May be dropped and called again.
    ///
    /// # Errors
    /// The system does not tell the child's state.
    pub(crate) async fn exited(&mut self) -> anyhow::Result<ExitStatus> {
        let status = self.process.wait().await.with_context(|| format!("cannot wait for {}", self.name))?;
        self.status = Some(status);
        self.stop_asking();
        Ok(status)
    }

    /// From now on the child is an appliance VM whose agent listens on this socket, and ends it in order.
    pub(crate) fn ends_from_inside(&mut self, socket: PathBuf) {
        self.inside = Some(socket);
    }

    /// Asks the child to end: from inside if it can be, and with SIGTERM if that is not so or takes too long.
    pub(crate) fn terminate(&mut self) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let Some(pid) = pid.filter(|_| self.status.is_none()) else { return };
        match &self.inside {
            None => send_sigterm(pid),
            Some(socket) => {
                let socket = socket.clone();
                self.asking.get_or_insert_with(|| {
                    tokio::spawn(async move {
                        let _asked = ask_to_end(&socket).await;
                        // Only while nobody has waited for the child: this task ends with the wait.
                        send_sigterm(pid);
                    })
                });
            }
        }
    }

    fn stop_asking(&mut self) {
        if let Some(asking) = self.asking.take() {
            asking.abort();
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

impl Drop for Child {
    fn drop(&mut self) {
        self.stop_asking();
    }
}

/// Asks the agent at `socket` to end its appliance VM, and gives it time for that.
///
/// # Errors
/// It cannot be asked.
async fn ask_to_end(socket: &Path) -> io::Result<()> {
    let asked = timeout(ASK_LIMIT, async {
        let mut stream = UnixStream::connect(socket).await?;
        stream.write_all(END_REQUEST.as_bytes()).await?;
        Ok::<_, io::Error>(stream)
    });
    // The agent may not have read it yet when the connection ends, so it is kept.
    let _stream = asked.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    sleep(END_GRACE + SWITCH_OFF_LIMIT).await;
    Ok(())
}

/// Only for a child that has not been waited for, so that the id is still its own; a failure means that it has just ended.
fn send_sigterm(pid: Pid) {
    let _ = kill_process(pid, Signal::TERM);
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
    /// A child that ends when its script sees the file `end`, and what was said to it.
    #[tokio::test]
    async fn a_child_is_asked_to_end_from_inside() {
        let directory = tempfile::tempdir().unwrap();
        let (socket, end) = (directory.path().join("agent.sock"), directory.path().join("end"));
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let mut child = shell(&format!("trap 'exit 9' TERM; until test -e {}; do sleep 0.01; done", end.display()));
        child.ends_from_inside(socket);
        child.terminate();
        // A second wish changes nothing.
        child.terminate();
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = vec![0; END_REQUEST.len()];
        tokio::io::AsyncReadExt::read_exact(&mut stream, &mut request).await.unwrap();
        assert_eq!(request, END_REQUEST.as_bytes());
        std::fs::write(&end, "").unwrap();
        assert_eq!(child.exited().await.unwrap().code(), Some(0));
    }

    #[tokio::test]
    async fn a_child_that_cannot_be_asked_inside_gets_sigterm() {
        let mut child = shell("exec sleep 1000");
        child.ends_from_inside("/nowhere/agent.sock".into());
        child.terminate();
        assert_eq!(child.exited().await.unwrap().signal(), Some(15));
    }

    #[tokio::test]
    async fn a_child_that_does_not_end_from_inside_gets_sigterm() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let _deaf = tokio::net::UnixListener::bind(&socket).unwrap();
        let mut child = shell("exec sleep 1000");
        child.ends_from_inside(socket);
        // Real time passes for the process alone.
        tokio::time::pause();
        child.terminate();
        assert_eq!(child.exited().await.unwrap().signal(), Some(15));
    }
}
