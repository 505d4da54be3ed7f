//! The program under test.

use std::io::{BufRead, BufReader, Write};
use std::ops::{Deref, DerefMut};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;
pub(crate) use vvu_test_driver::event::LIMIT;
use vvu_test_driver::process::Process;

/// A running `vvu-net`, ended and cleaned up with the value.
pub(crate) struct Program {
    process: Process,
    directory: Arc<tempfile::TempDir>,
    settings: Vec<String>,
    arguments: Vec<String>,
}

impl Deref for Program {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for Program {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
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
        let process = Process::spawn("vvu-net", command);
        process.wait_for_line(|line| line.contains("listening"));
        Self { process, directory, settings, arguments }
    }

    /// Kills the program, and starts it anew at the same sockets.
    pub(crate) fn kill_and_restart(&mut self) {
        self.process.kill();
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
