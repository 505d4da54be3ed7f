//! Following what the children write: the appliance's serial console, the bridge's and QEMU's standard error.
//!
//! The console is written by a VM that is not trusted: a line may be endless, carry terminal commands, or come a million
//! times a second. So lines are cut ([`MAX_LINE_BYTES`]), stripped of everything that is not text ([`printable`]) and
//! passed on at a bounded rate ([`RateLimit`]). The reader always reads on, so a child never blocks on its output.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::task::JoinHandle;
use vvu_appliance_config::BootTimes;

use crate::events::Source;
use crate::output::Output;

/// Longest line that is passed on, in bytes; what follows up to the line's end is dropped.
const MAX_LINE_BYTES: usize = 1024;

/// What stands where a line was cut.
const CUT_MARK: &str = " [cut]";

/// Lines that may come at once: a kernel's whole boot log.
const BURST_LINES: u32 = 2000;

/// Lines per second that are passed on after a burst.
const LINES_PER_SECOND: u32 = 100;

/// Lines kept to explain a death: a kernel's last words with their call trace.
const TAIL_LINES: usize = 60;

/// Bytes read from a child at once.
const READ_BYTES: usize = 8192;

/// What QEMU says of its devices whenever there are more than 8 regions of memory in its machine, and every mapping in a window is
/// one: that it cannot tell them. They keep what they were told before, the appliance's own memory, and need no more. A
/// device that cannot start for this reason has further words for it.
const HARMLESS_WORDS_OF_QEMU: [&str; 2] =
    ["Failed preparing vhost-user memory table msg", "vhost_set_mem_table failed: No buffer space available"];

/// Whether a line would only alarm who reads it.
fn is_harmless(source: Source, line: &str) -> bool {
    matches!(source, Source::Qemu(_)) && HARMLESS_WORDS_OF_QEMU.iter().any(|words| line.contains(words))
}

/// The text without control characters, terminal sequences (ECMA-48, section 5.4 and 8.3) and the invisible characters
/// that reorder or hide text (Unicode Standard Annex 9).
pub(crate) fn printable(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(character) = chars.next() {
        match character {
            '\u{1b}' => skip_escape(&mut chars),
            '\t' => plain.push(' '),
            '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}' => {}
            control if control.is_control() => {}
            other => plain.push(other),
        }
    }
    plain
}

fn skip_escape(chars: &mut std::str::Chars<'_>) {
    match chars.next() {
        // Control sequence: parameters up to a final byte.
        Some('[') => drop(chars.find(|character| ('@'..='~').contains(character))),
        // Operating system command: up to BEL or the string terminator, whose '\' is skipped with it.
        Some(']') => {
            let end = chars.find(|character| matches!(character, '\u{7}' | '\u{1b}'));
            if end == Some('\u{1b}') {
                chars.next();
            }
        }
        _ => {}
    }
}

/// Cuts a stream of bytes into lines of bounded length. Feed it with [`LineSplitter::push`].
#[derive(Debug, Default)]
pub(crate) struct LineSplitter {
    line: Vec<u8>,
    cut: bool,
}

impl LineSplitter {
    /// Takes the next bytes and returns the lines that they complete; empty lines are left out.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for &byte in bytes {
            if byte == b'\n' {
                lines.extend(self.finish());
            } else if self.line.len() < MAX_LINE_BYTES {
                self.line.push(byte);
            } else {
                self.cut = true;
            }
        }
        lines
    }

    /// Returns what came after the last line's end, at the end of the stream.
    pub(crate) fn finish(&mut self) -> Option<String> {
        let bytes = std::mem::take(&mut self.line);
        let cut = std::mem::take(&mut self.cut);
        let mut line = printable(&String::from_utf8_lossy(&bytes));
        line.truncate(line.trim_end().len());
        if cut {
            line.push_str(CUT_MARK);
        }
        (!line.is_empty()).then_some(line)
    }
}

/// What may happen with a line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Pass it on; so many lines before it were not.
    Yes {
        /// Lines left out since the last line that passed.
        left_out: u64,
    },
    /// Leave it out.
    No,
}

/// A token bucket: [`BURST_LINES`] at once, [`LINES_PER_SECOND`] on average.
#[derive(Debug)]
pub(crate) struct RateLimit {
    tokens: f64,
    last: Instant,
    left_out: u64,
}

impl RateLimit {
    /// A full bucket.
    pub(crate) fn new(now: Instant) -> Self {
        Self { tokens: f64::from(BURST_LINES), last: now, left_out: 0 }
    }

    /// Decides on one line.
    pub(crate) fn pass(&mut self, now: Instant) -> Pass {
        let gained = now.saturating_duration_since(self.last).as_secs_f64() * f64::from(LINES_PER_SECOND);
        self.last = now;
        self.tokens = (self.tokens + gained).min(f64::from(BURST_LINES));
        if self.tokens < 1.0 {
            self.left_out += 1;
            return Pass::No;
        }
        self.tokens -= 1.0;
        Pass::Yes { left_out: std::mem::take(&mut self.left_out) }
    }
}

/// What is remembered of a stream.
#[derive(Debug, Default)]
struct Heard {
    /// The last lines, oldest first.
    tail: VecDeque<String>,
    /// What an appliance told of its boot, and when that came.
    boot: Option<(Instant, BootTimes)>,
}

/// One stream that is being followed.
#[derive(Debug)]
pub(crate) struct Log {
    heard: Arc<Mutex<Heard>>,
    /// `None` once the stream has ended: a finished task must not be awaited again.
    task: Option<JoinHandle<()>>,
}

impl Log {
    /// Follows `reader` to its end in a task of its own.
    pub(crate) fn follow(reader: impl AsyncRead + Send + Unpin + 'static, source: Source, output: Output) -> Self {
        let heard = Arc::<Mutex<Heard>>::default();
        let task = tokio::spawn(follow(reader, source, output, Arc::clone(&heard)));
        Self { heard, task: Some(task) }
    }

    /// Waits until the stream has ended and all of it has been passed on, at most `limit`: a grandchild may keep the
    /// stream open for ever.
    pub(crate) async fn drain(&mut self, limit: Duration) {
        let Some(mut task) = self.task.take() else { return };
        if tokio::time::timeout(limit, &mut task).await.is_err() {
            task.abort();
        }
    }

    /// The last lines, oldest first.
    pub(crate) fn tail(&self) -> Vec<String> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).tail.iter().cloned().collect()
    }

    /// What the appliance behind it told of its boot, and when that came.
    pub(crate) fn boot(&self) -> Option<(Instant, BootTimes)> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).boot
    }
}

async fn follow(mut reader: impl AsyncRead + Unpin, source: Source, output: Output, heard: Arc<Mutex<Heard>>) {
    let mut splitter = LineSplitter::default();
    let mut limit = RateLimit::new(Instant::now());
    let mut buffer = vec![0; READ_BYTES];
    loop {
        // A stream that cannot be read is at its end: the child's exit tells the rest.
        let len = reader.read(&mut buffer).await.unwrap_or(0);
        let bytes = buffer.get(..len).unwrap_or_default();
        let lines = if len == 0 { splitter.finish().into_iter().collect() } else { splitter.push(bytes) };
        for line in lines.into_iter().filter(|line| !is_harmless(source, line)) {
            keep(&heard, source, &line);
            match limit.pass(Instant::now()) {
                Pass::No => {}
                Pass::Yes { left_out: 0 } => output.log(source, line),
                Pass::Yes { left_out } => {
                    output.log(source, format!("[{left_out} lines left out: more than {LINES_PER_SECOND} per second]"));
                    output.log(source, line);
                }
            }
        }
        if len == 0 {
            return;
        }
    }
}

fn keep(heard: &Mutex<Heard>, source: Source, line: &str) {
    let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
    if heard.tail.len() == TAIL_LINES {
        heard.tail.pop_front();
    }
    heard.tail.push_back(line.to_owned());
    if let (Source::Appliance(_), None, Ok(times)) = (source, heard.boot, line.parse()) {
        heard.boot = Some((Instant::now(), times));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::ApplianceId;

    #[test]
    fn terminal_commands_do_not_survive() {
        let cases = [
            ("\x1b[31mred\x1b[0m text", "red text"),
            ("\x1b]0;title\x07after", "after"),
            ("\x1b]0;title\x1b\\after", "after"),
            ("a\x1bcb", "ab"),
            ("bell\x07 null\0 back\x08 del\x7f", "bell null back del"),
            ("\u{9b}31mc1", "31mc1"),
            ("evil\u{202e}gpj.exe", "evilgpj.exe"),
            ("tab\tand \u{fc}ml\u{e4}ut", "tab and \u{fc}ml\u{e4}ut"),
            ("\x1b[", ""),
            ("\x1b", ""),
        ];
        for (text, plain) in cases {
            assert_eq!(printable(text), plain, "{text:?}");
        }
    }

    #[test]
    fn lines_survive_any_split_of_the_stream() {
        let stream = "first\r\nsecond \u{2014} line\n\n\nthird".as_bytes();
        for at in 0..=stream.len() {
            let mut splitter = LineSplitter::default();
            let mut lines = splitter.push(&stream[..at]);
            lines.extend(splitter.push(&stream[at..]));
            lines.extend(splitter.finish());
            assert_eq!(lines, ["first", "second \u{2014} line", "third"]);
        }
    }

    #[test]
    fn an_endless_line_is_cut_and_the_next_is_whole() {
        let mut splitter = LineSplitter::default();
        for _ in 0..100 {
            assert!(splitter.push(&[b'x'; 4096]).is_empty());
            assert!(splitter.line.len() <= MAX_LINE_BYTES);
        }
        let lines = splitter.push(b"\nnext\n");
        assert_eq!(lines[0].len(), MAX_LINE_BYTES + CUT_MARK.len());
        assert_eq!(lines[1], "next");
    }

    #[test]
    fn a_flood_is_held_back_and_counted() {
        let start = Instant::now();
        let mut limit = RateLimit::new(start);
        for _ in 0..BURST_LINES {
            assert_eq!(limit.pass(start), Pass::Yes { left_out: 0 });
        }
        for _ in 0..500 {
            assert_eq!(limit.pass(start), Pass::No);
        }
        let later = start + Duration::from_secs(1);
        assert_eq!(limit.pass(later), Pass::Yes { left_out: 500 });
        let passed = (0..1000).filter(|_| limit.pass(later) != Pass::No).count();
        assert_eq!(passed, LINES_PER_SECOND as usize - 1);
    }

    #[test]
    fn harmless_words_are_left_out_if_they_are_qemus() {
        let (qemu, appliance) = (Source::Qemu(ApplianceId(1)), Source::Appliance(ApplianceId(1)));
        for line in [
            "qemu: Failed preparing vhost-user memory table msg",
            "qemu-system-x86_64: vhost_set_mem_table failed: No buffer space available (105)",
        ] {
            assert!(is_harmless(qemu, line) && !is_harmless(appliance, line), "{line}");
        }
        for line in ["qemu: vhost_set_mem_table failed: Broken pipe (32)", "qemu: Error starting vhost-user-base: 105"]
        {
            assert!(!is_harmless(qemu, line), "{line}");
        }
    }

    #[tokio::test]
    async fn the_tail_holds_the_last_lines_also_of_a_flood() {
        let text = (0..BURST_LINES + 100).map(|number| format!("line {number}\n")).collect::<String>();
        let output = Output::discard();
        let mut log =
            Log::follow(std::io::Cursor::new(text.into_bytes()), Source::Bridge(crate::supervisor::PortId(0)), output);
        log.drain(Duration::from_secs(10)).await;
        let tail = log.tail();
        assert_eq!(tail.len(), TAIL_LINES);
        assert_eq!(tail.last().unwrap(), &format!("line {}", BURST_LINES + 99));
    }

    #[tokio::test]
    async fn an_appliance_tells_once_how_it_booted() {
        let first = BootTimes { agent: 1, modules: 2, controls: 3, windows: 4 };
        let second = BootTimes { windows: 5, ..first };
        let text = format!("kernel\n{first}\r\n{second}\n").into_bytes();
        let told = async |source| {
            let mut log = Log::follow(std::io::Cursor::new(text.clone()), source, Output::discard());
            log.drain(Duration::from_secs(10)).await;
            log.boot().map(|(_, times)| times)
        };
        assert_eq!(told(Source::Appliance(ApplianceId(1))).await, Some(first));
        assert_eq!(told(Source::Qemu(ApplianceId(1))).await, None);
    }
}
