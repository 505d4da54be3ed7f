//! Child processes and their ends.
//!
//! PID 1 also inherits the children of processes that have died, and has to take note of their ends. Who waits for all
//! children takes the exit status of those that somebody else waits for, so there is one place that waits: here.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::process::Command;
use std::rc::Rc;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, wait, waitpid};
use tokio::signal::unix::{Signal as SignalStream, SignalKind, signal};
use tokio::sync::watch;

/// How a process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It ended by itself, with this code.
    Code(i32),
    /// It was ended by this signal.
    Signal(i32),
    /// Nobody knows.
    Unknown,
}

impl Exit {
    fn of(status: WaitStatus) -> Self {
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Self::Code(code),
            (None, Some(number)) => Self::Signal(number),
            (None, None) => Self::Unknown,
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(number) => write!(f, "signal {number}"),
            Self::Unknown => f.write_str("unknown cause"),
        }
    }
}

/// Whose children are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All there are: for PID 1.
    AllChildren,
    /// Only those that were started here: for a process with other parts that start children.
    OwnChildren,
}

type Waiting = Rc<RefCell<BTreeMap<i32, watch::Sender<Option<Exit>>>>>;

/// Starts child processes. [`ReaperTask::run`] has to be running for their ends to be seen.
#[derive(Debug, Clone)]
pub struct Reaper {
    waiting: Waiting,
}

/// Takes note of the ends of child processes.
#[derive(Debug)]
pub struct ReaperTask {
    waiting: Waiting,
    scope: Scope,
    child_signals: SignalStream,
}

impl Reaper {
    /// A reaper and the task to run beside everything else. Needs a tokio runtime with signals.
    ///
    /// # Errors
    /// If SIGCHLD cannot be waited for.
    pub fn new(scope: Scope) -> io::Result<(Self, ReaperTask)> {
        let child_signals = signal(SignalKind::child())?;
        let waiting = Waiting::default();
        Ok((Self { waiting: Rc::clone(&waiting) }, ReaperTask { waiting, scope, child_signals }))
    }

    /// Starts a child process.
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        let process = command.spawn()?;
        // Nothing waits between the start and here, so the end cannot have been taken note of yet.
        let pid = Pid::from_child(&process);
        let (sender, ended) = watch::channel(None);
        self.waiting.borrow_mut().insert(pid.as_raw_nonzero().get(), sender);
        Ok(Child { pid, ended, waiting: Rc::clone(&self.waiting) })
    }
}

impl ReaperTask {
    /// Runs for ever.
    ///
    /// # Errors
    /// If children cannot be waited for.
    pub async fn run(mut self) -> io::Result<()> {
        loop {
            self.collect()?;
            if self.child_signals.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    /// One signal may stand for several ends.
    fn collect(&self) -> io::Result<()> {
        match self.scope {
            Scope::AllChildren => while self.take_note(wait(WaitOptions::NOHANG))? {},
            Scope::OwnChildren => {
                let own = self.waiting.borrow().keys().copied().collect::<Vec<_>>();
                for pid in own.into_iter().filter_map(Pid::from_raw) {
                    self.take_note(waitpid(Some(pid), WaitOptions::NOHANG))?;
                }
            }
        }
        Ok(())
    }

    /// Whether a process had ended. The ends of adopted processes interest nobody.
    fn take_note(&self, found: rustix::io::Result<Option<(Pid, WaitStatus)>>) -> io::Result<bool> {
        match found {
            Ok(Some((pid, status))) => self.tell(pid, Exit::of(status)),
            Ok(None) | Err(Errno::CHILD) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
        Ok(true)
    }

    fn tell(&self, pid: Pid, exit: Exit) {
        if let Some(sender) = self.waiting.borrow_mut().remove(&pid.as_raw_nonzero().get()) {
            let _ = sender.send(Some(exit));
        }
    }
}

/// A child process. Dropping it neither ends it nor stops its end from being taken note of; a clone is the same process.
#[derive(Debug, Clone)]
pub struct Child {
    pid: Pid,
    ended: watch::Receiver<Option<Exit>>,
    waiting: Waiting,
}

impl Child {
    /// Process id.
    #[must_use]
    pub const fn id(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Whether its end has been taken note of.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        !self.waiting.borrow().contains_key(&self.id()) || self.ended.borrow().is_some()
    }

    /// Waits for the end. May be called again, and the future may be dropped at any time.
    pub async fn exited(&self) -> Exit {
        let mut ended = self.ended.clone();
        ended.wait_for(Option::is_some).await.ok().and_then(|exit| *exit).unwrap_or(Exit::Unknown)
    }

    /// Asks the process to end.
    pub fn terminate(&self) {
        self.send(Signal::TERM);
    }

    /// Ends the process without asking it.
    pub fn kill(&self) {
        self.send(Signal::KILL);
    }

    fn send(&self, signal: Signal) {
        // As long as its end has not been taken note of, the process id belongs to no other process.
        if !self.has_ended() {
            let _ = kill_process(self.pid, signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_end_reaches_its_own_child() {
        let (reaper, task) = Reaper::new(Scope::OwnChildren).unwrap();
        let shell = |script: &str| reaper.spawn(Command::new("/bin/sh").args(["-c", script])).unwrap();
        let children = [shell("exit 3"), shell("kill -9 $$"), shell("exec sleep 1000"), shell("true")];
        children[2].kill();
        let all = async {
            let mut exits = Vec::new();
            for child in &children {
                exits.push(child.exited().await);
                assert_eq!(child.exited().await, exits[exits.len() - 1]);
            }
            exits
        };
        let exits = tokio::select! {
            exits = all => exits,
            ended = task.run() => panic!("reaper ended: {ended:?}"),
        };
        assert_eq!(exits, [Exit::Code(3), Exit::Signal(9), Exit::Signal(9), Exit::Code(0)]);
        assert_eq!(Exit::Code(3).to_string(), "exit code 3");
    }
}
