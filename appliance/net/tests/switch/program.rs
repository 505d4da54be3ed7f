//! The program under test.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;

/// Longest wait for anything. Only a failure takes this long.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// A running `vvu-net`, ended and cleaned up with the value.
pub(crate) struct Program {
    child: Child,
    directory: Arc<tempfile::TempDir>,
    settings: Vec<String>,
    arguments: Vec<String>,
    log: Arc<Log>,
}

#[derive(Default)]
struct Log {
    lines: Mutex<(Vec<String>, bool)>,
    grown: Condvar,
}

impl Program {
    /// A switch with a port for each of `settings`, which follow socket and address.
    pub(crate) fn start(settings: &[&str], arguments: &[&str]) -> Self {
        let own = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        Self::start_in(Arc::new(tempfile::tempdir().unwrap()), own(settings), own(arguments))
    }

    /// With this many ports and nothing special.
    pub(crate) fn with_ports(count: usize) -> Self {
        Self::start(&vec![""; count], &[])
    }

    fn start_in(directory: Arc<tempfile::TempDir>, settings: Vec<String>, arguments: Vec<String>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vvu-net"));
        for (index, settings) in settings.iter().enumerate() {
            let socket = directory.path().join(format!("port-{index}"));
            let comma = if settings.is_empty() { "" } else { "," };
            command.arg("--port").arg(format!("socket={},mac={}{comma}{settings}", socket.display(), mac_text(index)));
        }
        command.arg("--control").arg(directory.path().join("control")).args(&arguments);
        command.env("RUST_LOG", "vvu_net=debug,vvu_back_end=debug").stdin(Stdio::null());
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let log = Arc::new(Log::default());
        let (stderr, writer) = (child.stderr.take().unwrap(), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                eprintln!("[vvu-net] {line}");
                writer.lines.lock().unwrap().0.push(line);
                writer.grown.notify_all();
            }
            writer.lines.lock().unwrap().1 = true;
            writer.grown.notify_all();
        });
        let program = Self { child, directory, settings, arguments, log };
        program.wait_for_line(|line| line.contains("listening"));
        program
    }

    /// Kills the program, and starts it anew at the same sockets.
    pub(crate) fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let (settings, arguments) = (self.settings.clone(), self.arguments.clone());
        *self = Self::start_in(Arc::clone(&self.directory), settings, arguments);
    }

    pub(crate) fn socket(&self, port: usize) -> PathBuf {
        self.directory.path().join(format!("port-{port}"))
    }

    /// Where the control channel is.
    pub(crate) fn control(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    /// Carries out a request of the control channel.
    pub(crate) fn ask(&self, request: &Value) -> Result<Value, String> {
        ask(&self.control(), request)
    }

    /// Settings and counters of one port.
    pub(crate) fn port(&self, port: usize) -> Value {
        self.ask(&serde_json::json!({ "query": {} })).unwrap()["ports"][port].take()
    }

    pub(crate) fn counter(&self, port: usize, name: &str) -> u64 {
        self.port(port)["counters"][name].as_u64().unwrap_or_else(|| panic!("there is no counter {name}"))
    }

    /// Waits until a counter has this value.
    pub(crate) fn wait_for_counter(&self, port: usize, name: &str, value: u64) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let now = self.counter(port, name);
            if now == value {
                return;
            }
            assert!(Instant::now() < deadline && now < value, "{name} of port {port} is {now}, expected {value}");
            std::thread::yield_now();
        }
    }

    /// Waits for a line of the log and returns it.
    pub(crate) fn wait_for_line(&self, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + LIMIT;
        let mut lines = self.log.lines.lock().unwrap();
        loop {
            if let Some(line) = lines.0.iter().find(|line| wanted(line)) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!lines.1 && !left.is_zero(), "the line never came; log: {:#?}", lines.0);
            lines = self.log.grown.wait_timeout(lines, left).unwrap().0;
        }
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Number of descriptors that the program has open.
    pub(crate) fn open_descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let process = rustix::process::Pid::from_child(&self.child);
        let ended = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty()).unwrap();
        let limit = Timespec { tv_sec: LIMIT.as_secs().cast_signed(), tv_nsec: 0 };
        let count = poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&limit)).unwrap();
        assert_eq!(count, 1, "the program does not end");
        self.child.wait().unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended already, as some tests want it to.
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

/// Carries out a request of a control channel.
pub(crate) fn ask(control: &Path, request: &Value) -> Result<Value, String> {
    let mut stream = UnixStream::connect(control).unwrap();
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    let mut answer: Value = serde_json::from_str(&line).unwrap();
    match answer.get_mut("return") {
        Some(value) => Ok(value.take()),
        None => Err(answer["error"].as_str().unwrap().to_owned()),
    }
}

/// Address of a port's device.
pub(crate) fn mac(port: usize) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, port as u8]
}

fn mac_text(port: usize) -> String {
    format!("52:54:00:00:00:{port:02x}")
}
