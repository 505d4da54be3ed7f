//! The program under test, and what it has said.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::event::{LIMIT, wait_readable};

/// A running program, killed with the value.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: Arc<Log>,
}

/// Lines of standard error, and whether it was closed.
#[derive(Debug, Default)]
struct Log {
    lines: Mutex<(Vec<String>, bool)>,
    grown: Condvar,
}

impl Process {
    /// Starts a program. What it says is printed with `name` before it.
    #[must_use]
    pub fn spawn(name: &'static str, command: Command) -> Self {
        Self::spawn_heard(command, move |line| eprintln!("[{name}] {line}"))
    }

    /// Starts a program. What it says is not printed.
    #[must_use]
    pub fn spawn_quietly(command: Command) -> Self {
        Self::spawn_heard(command, |_line| {})
    }

    fn spawn_heard(mut command: Command, hear: impl Fn(&str) + Send + 'static) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Log::default());
        let (stderr, writer) = (child.stderr.take().unwrap(), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                hear(&line);
                writer.lines.lock().unwrap().0.push(line);
                writer.grown.notify_all();
            }
            writer.lines.lock().unwrap().1 = true;
            writer.grown.notify_all();
        });
        Self { child, log }
    }

    /// Waits until `pick` makes something of the lines so far; it is told whether more can come.
    pub fn wait_for<T>(&self, mut pick: impl FnMut(&[String], bool) -> Option<T>) -> T {
        let deadline = Instant::now() + LIMIT;
        let mut lines = self.log.lines.lock().unwrap();
        loop {
            if let Some(found) = pick(&lines.0, !lines.1) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!lines.1 && !left.is_zero(), "what was awaited never came; log: {:#?}", lines.0);
            lines = self.log.grown.wait_timeout(lines, left).unwrap().0;
        }
    }

    /// Waits for a line of the log and returns it.
    pub fn wait_for_line(&self, wanted: impl Fn(&str) -> bool) -> String {
        self.wait_for(|lines, _more| lines.iter().find(|line| wanted(line)).cloned())
    }

    /// Lines of the log so far that contain `text`.
    #[must_use]
    pub fn count_lines(&self, text: &str) -> usize {
        self.log.lines.lock().unwrap().0.iter().filter(|line| line.contains(text)).count()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Number of descriptors that the program has open.
    #[must_use]
    pub fn open_descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.id())).unwrap().count()
    }

    /// Number of mappings that the program has.
    #[must_use]
    pub fn mappings(&self) -> usize {
        std::fs::read_to_string(format!("/proc/{}/maps", self.id())).unwrap().lines().count()
    }

    /// Waits for the end.
    pub fn wait(&mut self) -> ExitStatus {
        let ended = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()).unwrap();
        wait_readable(&ended, "end of the program");
        self.child.wait().unwrap()
    }

    /// Kills it, and waits until it is gone.
    pub fn kill(&mut self) {
        // It may have ended already, as some tests want it to.
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
