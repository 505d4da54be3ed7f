//! The channel on which an operator changes and asks things while the program runs: a unix socket, JSON lines.
//!
//! A request is one line and so is its answer: `{"return": …}` or `{"error": "…"}`. What the requests are is the program's: it
//! gives their type and a function that carries one out.
//!
//! One client is served at a time, and a new one takes the place of the one before: a client that is stuck, or wants to be,
//! holds nobody up. A client that does not read its answer gets no other. It all happens on a thread of its own.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::listener::{Listener, ListenerError};
use crate::log_limit::LogLimit;
use crate::rate_limit::Limits;
use crate::wakeup::Wakeup;

/// Longest request in bytes. A longer one is answered with an error, and its client disconnected.
pub const MAX_LINE_LEN: usize = 64 * 1024;

/// Bytes that are read at a time.
const CHUNK_LEN: usize = 4096;

/// Pause after a client could not be taken for lack of something.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Request that all of our programs have: `{"set-limits": {"port": 0, …}}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetLimits {
    /// Which of the program's devices; a program with a single one calls it 0.
    #[serde(default)]
    pub port: u16,
    /// Requests or packets in a second; 0 is no limit.
    pub operations_per_second: u64,
    /// Bytes of data in a second; 0 is no limit.
    pub bytes_per_second: u64,
}

impl SetLimits {
    /// What is to count from now on.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits { operations_per_second: self.operations_per_second, bytes_per_second: self.bytes_per_second }
    }
}

/// An open channel. It is closed, and its socket removed, when this is dropped.
#[derive(Debug)]
pub struct ControlChannel {
    end: Arc<Wakeup>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
enum Answer<A> {
    Return(A),
    Error(String),
}

impl ControlChannel {
    /// Listens at `path` and has `carry_out` called for each request. It must not wait for anything: the channel is deaf
    /// meanwhile, and so is a program that ends. Its error is one line for the operator.
    ///
    /// # Errors
    /// [`ListenerError`] says what to do.
    pub fn open<R, A>(
        path: &Path,
        mut carry_out: impl FnMut(R) -> Result<A, String> + Send + 'static,
    ) -> Result<Self, ListenerError>
    where
        R: DeserializeOwned,
        A: Serialize,
    {
        let failure = |source| ListenerError::Bind { path: path.to_owned(), source };
        let listener = Listener::bind(path)?;
        let end = Arc::new(Wakeup::new().map_err(|error| failure(error.into()))?);
        let ended = Arc::clone(&end);
        let answer = move |line: &[u8]| {
            let answer = match serde_json::from_slice(line) {
                Ok(request) => carry_out(request).map_or_else(Answer::Error, Answer::Return),
                Err(error) => Answer::Error(format!("not a request: {error}")),
            };
            encode(&answer)
        };
        let serve = move || {
            if let Err(error) = serve(&listener, &ended, answer) {
                tracing::error!(%error, "control channel is closed");
            }
        };
        let thread = std::thread::Builder::new().name("control".to_owned()).spawn(serve).map_err(failure)?;
        Ok(Self { end, thread: Some(thread) })
    }
}

impl Drop for ControlChannel {
    fn drop(&mut self) {
        self.end.wake();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("control channel has failed");
        }
    }
}

/// A line for the client. What is written by a peer may be in an error's text; it stays within its line.
fn encode<A: Serialize>(answer: &Answer<A>) -> Vec<u8> {
    let mut line = serde_json::to_vec(answer)
        .unwrap_or_else(|error| format!("{{\"error\":\"answer cannot be written: {error}\"}}").into_bytes());
    line.push(b'\n');
    line
}

fn serve(listener: &Listener, end: &Wakeup, mut answer: impl FnMut(&[u8]) -> Vec<u8>) -> io::Result<()> {
    let log = LogLimit::new();
    let mut client: Option<Client> = None;
    loop {
        let mut polled = vec![PollFd::new(end, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        polled.extend(client.iter().map(Client::waits_for));
        match poll(&mut polled, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = polled.iter().map(|polled| !polled.revents().is_empty()).collect();
        let is_ready = |index: usize| ready.get(index).copied().unwrap_or(false);
        if is_ready(0) {
            return Ok(());
        }
        if is_ready(2) {
            client = client.and_then(|client| client.proceed(&mut answer));
        }
        if is_ready(1) {
            match listener.accept().and_then(Client::new) {
                Ok(newcomer) => client = Some(newcomer),
                Err(error) => {
                    if let Some(suppressed) = log.admit(Instant::now()) {
                        tracing::warn!(%error, suppressed, "client of the control channel cannot be taken");
                    }
                    let _ended = poll(&mut [PollFd::new(end, PollFlags::IN)], Some(&ACCEPT_PAUSE));
                }
            }
        }
    }
}

struct Client {
    stream: UnixStream,
    /// What has come of requests; at most a longest one and a chunk.
    input: Vec<u8>,
    /// What is left of the answer; while there is something, nothing is read.
    output: Vec<u8>,
    /// It is disconnected after the answer.
    last: bool,
}

impl Client {
    fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, input: Vec::new(), output: Vec::new(), last: false })
    }

    fn waits_for(&self) -> PollFd<'_> {
        let flags = if self.output.is_empty() { PollFlags::IN } else { PollFlags::OUT };
        PollFd::from_borrowed_fd(self.stream.as_fd(), flags)
    }

    /// Does what can be done now. None if the client is done with, or we with it.
    fn proceed(mut self, answer: &mut impl FnMut(&[u8]) -> Vec<u8>) -> Option<Self> {
        if self.output.is_empty() && !self.read()? {
            return Some(self);
        }
        loop {
            if !self.write()? {
                return Some(self);
            }
            if self.last {
                return None;
            }
            if !self.answer_next(answer) {
                return Some(self);
            }
        }
    }

    /// True if something has come.
    fn read(&mut self) -> Option<bool> {
        let mut chunk = [0; CHUNK_LEN];
        match self.stream.read(&mut chunk) {
            Ok(0) => None,
            Ok(len) => {
                self.input.extend_from_slice(chunk.get(..len)?);
                Some(true)
            }
            Err(error) => is_transient(&error).then_some(false),
        }
    }

    /// True if all of the answer is written.
    fn write(&mut self) -> Option<bool> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(len) => drop(self.output.drain(..len)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return is_transient(&error).then_some(false),
            }
        }
        Some(true)
    }

    /// Answers the first of the requests that have come. False if none has come to its end.
    fn answer_next(&mut self, answer: &mut impl FnMut(&[u8]) -> Vec<u8>) -> bool {
        let line_len = self.input.iter().position(|byte| *byte == b'\n');
        if line_len.unwrap_or(self.input.len()) > MAX_LINE_LEN {
            self.output = encode(&Answer::<()>::Error(format!("a request has at most {MAX_LINE_LEN} bytes")));
            self.last = true;
            return true;
        }
        let Some(line_len) = line_len else { return false };
        let line: Vec<u8> = self.input.drain(..=line_len).collect();
        if !line.trim_ascii().is_empty() {
            self.output = answer(&line);
        }
        true
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::time::Duration;

    use super::*;

    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    enum Request {
        SetLimits(SetLimits),
        Repeat { text: String, times: usize },
    }

    fn open(path: &Path) -> ControlChannel {
        ControlChannel::open(path, |request| match request {
            Request::SetLimits(SetLimits { port: 0, .. }) => Ok(String::new()),
            Request::SetLimits(SetLimits { port, .. }) => Err(format!("there is no port {port}")),
            Request::Repeat { text, times } => Ok(text.repeat(times)),
        })
        .unwrap()
    }

    struct Peer(BufReader<UnixStream>);

    impl Peer {
        fn connect(path: &Path) -> Self {
            let stream = UnixStream::connect(path).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            Self(BufReader::new(stream))
        }

        fn send(&mut self, text: &str) {
            self.0.get_mut().write_all(text.as_bytes()).unwrap();
        }

        fn receive(&mut self) -> String {
            let mut line = String::new();
            self.0.read_line(&mut line).unwrap();
            line
        }

        fn ask(&mut self, text: &str) -> String {
            self.send(&format!("{text}\n"));
            self.receive()
        }
    }

    #[test]
    fn requests_are_answered_in_order_however_they_are_cut() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let channel = open(&path);
        let mut peer = Peer::connect(&path);
        let request = r#"{"repeat": {"text": "ab", "times": 2}}"#;
        assert_eq!(peer.ask(request), "{\"return\":\"abab\"}\n");
        for byte in request.bytes() {
            peer.send(&char::from(byte).to_string());
        }
        assert_eq!(peer.ask(""), "{\"return\":\"abab\"}\n");
        let other = r#"{"set-limits": {"port": 3, "operations_per_second": 1, "bytes_per_second": 0}}"#;
        peer.send(&format!("{request}\n \n{other}\n{request}"));
        assert_eq!(peer.receive(), "{\"return\":\"abab\"}\n");
        assert_eq!(peer.receive(), "{\"error\":\"there is no port 3\"}\n");
        assert_eq!(peer.ask(""), "{\"return\":\"abab\"}\n");
        drop(channel);
        assert_eq!(peer.receive(), "", "the channel is closed");
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_request_is_answered_and_what_is_too_long_ends_the_client() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let _channel = open(&path);
        let mut peer = Peer::connect(&path);
        for wrong in ["x", "[]", "{\"format-disk\":{}}", "{\"a\\u000ab\":{}}", &"[".repeat(MAX_LINE_LEN)] {
            let answer = peer.ask(wrong);
            assert!(answer.starts_with("{\"error\":\"not a request: "), "{answer}");
        }
        peer.send(&"x".repeat(MAX_LINE_LEN + 1));
        assert!(peer.receive().contains("at most 65536 bytes"));
        assert_eq!(peer.receive(), "");
    }

    #[test]
    fn a_client_that_is_stuck_holds_nobody_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let channel = open(&path);
        let mut stuck = Peer::connect(&path);
        // More answer than the socket takes, and it is never read.
        let request = r#"{"repeat": {"text": "0123456789abcdef", "times": 1000000}}"#;
        stuck.send(&format!("{request}\n{request}\n"));
        let mut peer = Peer::connect(&path);
        assert_eq!(peer.ask(r#"{"repeat": {"text": "c", "times": 1}}"#), "{\"return\":\"c\"}\n");
        let mut rest = Vec::new();
        // Reset or end: it has no place any more.
        let _reset = stuck.0.read_to_end(&mut rest);
        assert!(rest.len() < 16_000_000);
        let mut half = Peer::connect(&path);
        half.send("{\"rep");
        drop(channel);
        // Reset, for what it sent may not have been read.
        assert_eq!(half.0.read_to_end(&mut rest).unwrap_or(0), 0);
    }
}
