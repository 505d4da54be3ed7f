//! What programs of others print: into the log, line by line, with the program's name.
//!
//! They may print as much as they like, and anything. All of it is read, so that no program waits for its output; the log gets
//! lines of printable characters, of bounded length, and a bounded number of them in a time.

use std::time::Instant;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tracing::{info, warn};

/// Longest line that is logged in bytes; the rest of a longer one is left out.
const MAX_LINE_LEN: usize = 512;

/// Lines that are logged at once.
const BURST: u32 = 64;

/// Lines that are logged in a second, in the long run: a serial console takes a few hundred.
const LINES_PER_SECOND: u32 = 10;

/// Logs what comes through a pipe, until its other end is closed.
pub(crate) async fn log_lines(name: String, mut pipe: pipe::Receiver) {
    let mut lines = Lines::default();
    let mut limit = LineLimit::new(Instant::now());
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = pipe.read(&mut buffer).await {
        for line in lines.take(buffer.get(..read).unwrap_or_default()) {
            log(&name, &mut limit, &line);
        }
        // One that prints without a pause does not hold everything else up.
        tokio::task::consume_budget().await;
    }
    if let Some(line) = lines.rest() {
        log(&name, &mut limit, &line);
    }
    limit.tell(&name);
}

fn log(name: &str, limit: &mut LineLimit, line: &str) {
    if limit.may_log(Instant::now()) {
        limit.tell(name);
        info!("{name}: {line}");
    }
}

/// Makes lines of what a program prints.
#[derive(Debug, Default)]
struct Lines {
    /// The line that has no end yet, up to [`MAX_LINE_LEN`].
    begun: Vec<u8>,
}

impl Lines {
    /// The lines that end in these bytes, but for empty ones.
    fn take(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let room = MAX_LINE_LEN.saturating_sub(self.begun.len());
            let text = piece.strip_suffix(b"\n").unwrap_or(piece);
            self.begun.extend(text.iter().take(room));
            if piece.ends_with(b"\n") {
                lines.extend(self.rest());
            }
        }
        lines
    }

    /// The line that has no end.
    fn rest(&mut self) -> Option<String> {
        let line = printable(&std::mem::take(&mut self.begun));
        (!line.is_empty()).then_some(line)
    }
}

/// Text for a console: nothing in it moves the cursor or changes colours.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes.trim_ascii_end());
    let shown = text.chars().map(|character| match character {
        '\t' => ' ',
        control if control.is_control() => char::REPLACEMENT_CHARACTER,
        other => other,
    });
    shown.collect()
}

/// A token bucket of lines.
#[derive(Debug)]
struct LineLimit {
    left: u32,
    filled: Instant,
    left_out: u64,
}

impl LineLimit {
    const fn new(now: Instant) -> Self {
        Self { left: BURST, filled: now, left_out: 0 }
    }

    fn may_log(&mut self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.filled);
        let earned = u32::try_from(since.as_millis() * u128::from(LINES_PER_SECOND) / 1000).unwrap_or(BURST);
        if earned > 0 {
            self.left = self.left.saturating_add(earned).min(BURST);
            self.filled = now;
        }
        if let Some(left) = self.left.checked_sub(1) {
            self.left = left;
            return true;
        }
        self.left_out += 1;
        false
    }

    /// Says once how many lines were left out.
    fn tell(&mut self, name: &str) {
        match std::mem::take(&mut self.left_out) {
            0 => {}
            count => warn!("{name} has printed {count} lines more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn lines_are_put_together_and_made_printable() {
        let mut lines = Lines::default();
        assert_eq!(lines.take(b"one\ntw"), ["one"]);
        assert_eq!(lines.take(b"o\n\n\r\nth\tree\x1b[31m\xff\r\n"), ["two", "th ree\u{fffd}[31m\u{fffd}"]);
        assert_eq!(lines.take(b"four"), Vec::<String>::new());
        assert_eq!(lines.rest().as_deref(), Some("four"));
        assert_eq!(lines.rest(), None);
    }

    #[test]
    fn a_line_without_end_takes_no_memory() {
        let mut lines = Lines::default();
        for _ in 0..1000 {
            assert!(lines.take(&[b'a'; 4096]).is_empty());
        }
        assert_eq!(lines.begun.len(), MAX_LINE_LEN);
        assert_eq!(lines.take(b"b\nnext\n"), ["a".repeat(MAX_LINE_LEN), "next".to_owned()]);
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let start = Instant::now();
        let mut limit = LineLimit::new(start);
        let logged = (0..1000).filter(|_| limit.may_log(start)).count();
        assert_eq!(logged, BURST as usize);
        assert_eq!(limit.left_out, 1000 - u64::from(BURST));
        limit.tell("flood");
        // A little at a time is not lost, and a long pause fills no more than the burst.
        let later = |milliseconds| start + Duration::from_millis(milliseconds);
        assert!(!limit.may_log(later(50)));
        assert!(limit.may_log(later(100)) && !limit.may_log(later(100)));
        let logged = (0..1000).filter(|_| limit.may_log(later(1_000_000))).count();
        assert_eq!(logged, BURST as usize);
    }

    #[tokio::test]
    async fn a_pipe_is_read_to_its_end() {
        let (mut sender, receiver) = pipe::pipe().unwrap();
        let write = async move {
            // More than the pipe holds.
            for _ in 0..100 {
                tokio::io::AsyncWriteExt::write_all(&mut sender, &[b'x'; 4096]).await.unwrap();
            }
        };
        tokio::join!(log_lines("test".to_owned(), receiver), write);
    }
}
