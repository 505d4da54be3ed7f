//! Talking to a QEMU: the client side of QMP (QEMU documentation, "QEMU Machine Protocol Specification").
//!
//! One command at a time, each answered before the next; events in between are skipped. QEMU is the operator's, but the
//! appliance VM inside it is not trusted and may have broken out: what comes is bounded, and every wait has a limit.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, Lines, Take};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::log_follow::printable;

/// Most bytes that QEMU may answer in one conversation; the list of its types has some 100 KiB.
const MAX_ANSWER_BYTES: u64 = 16 * 1024 * 1024;

/// Longest text of a refusal that is passed on, in characters.
const MAX_REFUSAL_LEN: usize = 400;

/// Longest time for one command over a QMP socket, the greeting included: QEMU finishes the disk's requests first.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    /// QEMU understood and refused.
    #[error("{0}")]
    Refused(String),
    /// QEMU closed the conversation.
    #[error("QEMU ended the conversation")]
    Closed,
    /// What came is not QMP.
    #[error("what answers is no QEMU")]
    NotQmp,
    /// It takes too long: QEMU hangs, or somebody else talks to it, since it listens to one at a time.
    #[error("QEMU does not answer on its QMP socket; is somebody else connected to it?")]
    Overdue,
    /// The socket fails.
    #[error("QEMU's QMP socket fails")]
    System(#[from] std::io::Error),
}

/// A conversation after QEMU's greeting.
#[derive(Debug)]
pub(crate) struct Qmp<W, R> {
    requests: W,
    answers: Lines<BufReader<Take<R>>>,
}

impl<W: AsyncWrite + Unpin, R: AsyncRead + Unpin> Qmp<W, R> {
    /// Reads the greeting, which is returned, and leaves the negotiation mode.
    ///
    /// # Errors
    /// [`QmpError::Closed`] if nothing comes, [`QmpError::NotQmp`] if it is no greeting.
    pub(crate) async fn greet(requests: W, answers: R) -> Result<(Self, Value), QmpError> {
        let mut qmp = Self { requests, answers: BufReader::new(answers.take(MAX_ANSWER_BYTES)).lines() };
        let greeting = qmp.answers.next_line().await.ok().flatten().ok_or(QmpError::Closed)?;
        let greeting: Value = serde_json::from_str(&greeting).map_err(|_| QmpError::NotQmp)?;
        if greeting.get("QMP").is_none() {
            return Err(QmpError::NotQmp);
        }
        qmp.ask("qmp_capabilities", json!({})).await?;
        Ok((qmp, greeting))
    }

    /// Sends one command and waits for its answer.
    ///
    /// # Errors
    /// [`QmpError::Refused`] with QEMU's words, or the conversation is broken.
    pub(crate) async fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let request = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.requests.write_all(request.as_bytes()).await?;
        while let Some(line) = self.answers.next_line().await? {
            let mut answer: Value = serde_json::from_str(&line).map_err(|_| QmpError::NotQmp)?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let text = error.get("desc").and_then(Value::as_str).unwrap_or("refused without a reason");
                return Err(QmpError::Refused(printable(text).chars().take(MAX_REFUSAL_LEN).collect()));
            }
        }
        Err(QmpError::Closed)
    }

    /// Asks QEMU to end, without waiting for an answer.
    pub(crate) async fn quit(&mut self) {
        // A QEMU that is gone already is as good.
        let _ = self.requests.write_all(b"{\"execute\":\"quit\"}\n").await;
    }
}

/// Connects to the QMP socket at `path`, sends one command and returns its answer.
///
/// # Errors
/// [`QmpError`]; at the latest after [`COMMAND_LIMIT`].
pub(crate) async fn command(path: &Path, command: &str, arguments: Value) -> Result<Value, QmpError> {
    let conversation = async {
        let (answers, requests): (OwnedReadHalf, OwnedWriteHalf) = UnixStream::connect(path).await?.into_split();
        let (mut qmp, _) = Qmp::greet(requests, answers).await?;
        qmp.ask(command, arguments).await
    };
    tokio::time::timeout(COMMAND_LIMIT, conversation).await.unwrap_or(Err(QmpError::Overdue))
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    const GREETING: &str = "{\"QMP\":{\"version\":{},\"capabilities\":[]}}\n";

    /// What a conversation of one command comes to if QEMU's side says all of `answers`.
    async fn ask(answers: &str) -> Result<Value, QmpError> {
        let (requests, mut heard) = duplex(1024);
        let (mut qmp, _) = Qmp::greet(requests, std::io::Cursor::new(answers.as_bytes().to_vec())).await?;
        let answer = qmp.ask("block_resize", json!({ "size": 512 })).await?;
        drop(qmp);
        let mut said = String::new();
        heard.read_to_string(&mut said).await.unwrap();
        let last: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        assert_eq!(last, json!({ "execute": "block_resize", "arguments": { "size": 512 } }));
        Ok(answer)
    }

    #[tokio::test]
    async fn events_are_skipped_and_refusals_told() {
        let answer = ask(&format!("{GREETING}{{\"return\":{{}}}}\n{{\"event\":\"RESUME\"}}\n{{\"return\":7}}\n")).await;
        assert_eq!(answer.unwrap(), json!(7));
        let refused =
            ask(&format!("{GREETING}{{\"return\":{{}}}}\n{{\"error\":{{\"desc\":\"no\\u001b[1m\"}}}}\n")).await;
        assert!(matches!(refused, Err(QmpError::Refused(text)) if text == "no"));
    }

    #[tokio::test]
    async fn what_is_no_qmp_is_told_apart() {
        assert!(matches!(ask("").await, Err(QmpError::Closed)));
        assert!(matches!(ask("hello\n").await, Err(QmpError::NotQmp)));
        assert!(matches!(ask("{}\n").await, Err(QmpError::NotQmp)));
        assert!(matches!(ask(GREETING).await, Err(QmpError::Closed)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_qemu_is_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(matches!(command(&path, "stop", json!({})).await, Err(QmpError::Overdue)));
    }
}
