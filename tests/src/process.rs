//! Processes that die with the test that started them, and whose end can be awaited.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Lines of a process's output that an error text repeats.
const REPEATED_LINES: usize = 15;

/// Waits until `fd` is readable; false if `patience` ran out first.
///
/// # Errors
/// If the system refuses to poll the descriptor.
pub fn readable_within(fd: impl AsFd, patience: Duration) -> Result<bool> {
    let timeout = Timespec::try_from(patience).context("a time limit is out of range")?;
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let ready = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&timeout))).context("cannot poll")?;
    Ok(ready > 0)
}

/// A running process, child or not, by a descriptor that stays with it when its id is used again.
#[derive(Debug)]
pub struct Watched {
    name: String,
    pid: Pid,
    pidfd: OwnedFd,
}

impl Watched {
    /// Starts to watch process `pid`; `name` is for error texts.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn open(name: &str, pid: u32) -> Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).with_context(|| format!("{name}: no pid: {pid}"))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).with_context(|| format!("{name} (pid {pid:?}) is gone"))?;
        Ok(Self { name: name.to_owned(), pid, pidfd })
    }

    /// What the process is called in error texts.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends `signal`.
    ///
    /// # Errors
    /// If the process is gone or belongs to someone else.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        pidfd_send_signal(&self.pidfd, signal).with_context(|| format!("cannot send {signal:?} to {}", self.name))
    }

    /// Waits for the process to end.
    ///
    /// # Errors
    /// If it still runs after `patience`.
    pub fn await_end(&self, patience: Duration) -> Result<()> {
        if !readable_within(&self.pidfd, patience)? {
            bail!("{} (pid {}) still runs after {patience:.0?}", self.name, self.pid());
        }
        Ok(())
    }

    /// Waits until `fd` is readable.
    ///
    /// # Errors
    /// If the process ends first, or `patience` runs out.
    pub fn await_before_end(&self, fd: impl AsFd, patience: Duration) -> Result<()> {
        let timeout = Timespec::try_from(patience).context("a time limit is out of range")?;
        let mut fds = [PollFd::new(&fd, PollFlags::IN), PollFd::new(&self.pidfd, PollFlags::IN)];
        let ready = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&timeout))).context("cannot poll")?;
        match fds {
            [fd, _] if fd.revents().contains(PollFlags::IN) => Ok(()),
            _ if ready > 0 => bail!("{} ended", self.name),
            _ => bail!("{} did nothing for {patience:.0?}", self.name),
        }
    }

    /// Whether the process has ended.
    ///
    /// # Errors
    /// If the system refuses to poll the descriptor.
    pub fn has_ended(&self) -> Result<bool> {
        readable_within(&self.pidfd, Duration::ZERO)
    }
}

/// A child process. Its standard error goes to a log file, its standard output to the same file and line by line to
/// whoever awaits one. It is killed when this value is dropped, and by the kernel when the thread that started it ends.
#[derive(Debug)]
pub struct Process {
    child: Child,
    watched: Watched,
    log: PathBuf,
    lines: Receiver<String>,
}

impl Process {
    /// Starts `program` with `arguments`; all that it says goes to `<folder>/<name>.log`.
    ///
    /// # Errors
    /// If the log cannot be written or the program cannot be started.
    pub fn start<I>(name: &str, program: impl AsRef<OsStr>, arguments: I, folder: &Path) -> Result<Self>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let mut command = command_that_dies_with_us(program);
        command.args(arguments);
        Self::spawn(name, command, folder)
    }

    /// As [`Process::start`], for a command made with [`command_that_dies_with_us`].
    ///
    /// # Errors
    /// As [`Process::start`].
    pub fn spawn(name: &str, mut command: Command, folder: &Path) -> Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log);
        let mut file = file.with_context(|| format!("cannot write {}", log.display()))?;
        writeln!(file, "# {command:?}")?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file.try_clone()?);
        let mut child = command.spawn().with_context(|| format!("cannot start {name} ({command:?})"))?;
        let stdout = child.stdout.take().context("a piped child has no standard output")?;
        let (sender, lines) = channel();
        thread::spawn(move || forward_lines(stdout, file, &sender));
        let watched = Watched::open(name, child.id())?;
        Ok(Self { child, watched, log, lines })
    }

    /// The process to signal or to look at.
    pub fn watched(&self) -> &Watched {
        &self.watched
    }

    /// File with all that the process said.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Waits for the first further line of standard output of which `pick` makes something.
    ///
    /// # Errors
    /// If the process closes its output first, or `patience` runs out. The text names `awaited` and the last lines.
    pub fn await_line<T>(
        &mut self,
        awaited: &str,
        patience: Duration,
        mut pick: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            let line = match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{}: no {awaited} within {patience:.0?}\n{}", self.watched.name, self.last_words())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("{} ended before {awaited}\n{}", self.watched.name, self.last_words())
                }
            };
            if let Some(value) = pick(&line) {
                return Ok(value);
            }
        }
    }

    /// Lets the lines go that have come so far: what is awaited next comes later.
    pub fn forget_lines(&mut self) {
        while self.lines.try_recv().is_ok() {}
    }

    /// Waits for the process to end.
    ///
    /// # Errors
    /// If it still runs after `patience`.
    pub fn await_end(&mut self, patience: Duration) -> Result<ExitStatus> {
        self.watched.await_end(patience)?;
        self.child.wait().with_context(|| format!("cannot wait for {}", self.watched.name))
    }

    /// Kills the process at once and waits until it is gone.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().and_then(|()| self.child.wait()).map(drop).map_err(|error| anyhow!(error))
    }

    fn last_words(&self) -> String {
        match last_lines(&self.log, REPEATED_LINES) {
            Ok(lines) => format!("last lines of {}:\n{lines}", self.log.display()),
            Err(error) => format!("{error:#}"),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only if the process has been waited for, and then there is nothing to kill.
        let _ = self.kill();
    }
}

/// A command whose process the kernel kills when the thread that starts it ends, so that a test that is itself killed
/// leaves nothing behind.
pub fn command_that_dies_with_us(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Runs a short program to its end and returns what it wrote to standard output.
///
/// # Errors
/// If it cannot be started or fails; the text has its standard error.
pub fn output_of(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The last `count` lines of a text file.
///
/// # Errors
/// If the file cannot be read.
pub fn last_lines(path: &Path, count: usize) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines.get(lines.len().saturating_sub(count)..).unwrap_or_default().join("\n"))
}

fn forward_lines(stdout: ChildStdout, mut log: File, sender: &Sender<String>) {
    for line in BufReader::new(stdout).split(b'\n') {
        let Ok(line) = line else { break };
        let line = String::from_utf8_lossy(&line).into_owned();
        // The log is a convenience and the receiver may have gone: the pipe is drained in any case, or the child blocks.
        let _ = writeln!(log, "{line}");
        let _ = sender.send(line);
    }
}
