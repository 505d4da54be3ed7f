//! The run's end of the control socket.
//!
//! Whoever connects is the operator or root: the socket's mode lets nobody else in, and the system is asked who it is all
//! the same. Still a peer may be broken or malicious, and the device must not notice: peers, lines, requests under way and
//! waits are bounded, a line that is no request ends the conversation, and nothing here decides anything: requests go to
//! the run one by one, and what it answers comes back.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::control::{MAX_LINE_BYTES, Reply, Request};
use crate::socket_path::SocketFile;

/// Peers that are served at once; further ones wait.
const MAX_PEERS: usize = 8;

/// Peers that may wait to be served.
const BACKLOG: i32 = 16;

/// Requests that may wait for the run.
const MAX_REQUESTS: usize = MAX_PEERS;

/// Replies that may wait for one peer; a request has a handful.
const MAX_REPLIES: usize = 16;

/// Longest time for a peer to send a request or to take a reply.
const PEER_LIMIT: Duration = Duration::from_secs(10);

/// Wait after a failure to accept: mostly there are too many open files.
const ACCEPT_RETRY: Duration = Duration::from_millis(500);

/// A request and the way back.
#[derive(Debug)]
pub(crate) struct Asked {
    /// What is wanted.
    pub(crate) request: Request,
    /// Where the answer goes.
    pub(crate) replies: Replies,
}

/// The way back to whoever asked. Dropping it without a last reply ends the conversation.
#[derive(Debug)]
pub(crate) struct Replies(mpsc::Sender<Reply>);

impl Replies {
    /// Sends one reply; a peer that is gone or does not read gets none.
    pub(crate) fn send(&self, reply: Reply) {
        let _ = self.0.try_send(reply);
    }

    /// Waits until the peer is gone.
    pub(crate) async fn gone(&self) {
        self.0.closed().await;
    }
}

/// The listening socket; its file and all conversations vanish with the value.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    path: String,
    file: Option<SocketFile>,
    asked: mpsc::Receiver<Asked>,
    _listening: JoinSet<()>,
}

impl ControlSocket {
    /// Binds `path`, which is free, for this user alone.
    ///
    /// # Errors
    /// The system refuses it.
    pub(crate) fn bind(path: &str) -> anyhow::Result<Self> {
        let listener = listener(Path::new(path)).with_context(|| format!("cannot bind the control socket {path}"))?;
        let file = SocketFile::at(path);
        let (sender, asked) = mpsc::channel(MAX_REQUESTS);
        let mut listening = JoinSet::new();
        listening.spawn(accept(listener, sender));
        Ok(Self { path: path.to_owned(), file, asked, _listening: listening })
    }

    /// Waits for the next request. May be dropped at any time without losing one.
    pub(crate) async fn next(&mut self) -> Asked {
        match self.asked.recv().await {
            Some(asked) => asked,
            // Nobody accepts any more; that is no reason to end the device.
            None => std::future::pending().await,
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if let Some(file) = self.file {
            file.remove(&self.path);
        }
    }
}

fn listener(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // The file takes the socket's mode at bind, so it is never open to others, not even for a moment.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    UnixListener::from_std(socket.into())
}

async fn accept(listener: UnixListener, asked: mpsc::Sender<Asked>) {
    let places = Arc::new(Semaphore::new(MAX_PEERS));
    let mut conversations = JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) if is_operator(&stream) => {
                conversations.spawn(converse(stream, asked.clone(), place));
            }
            Ok(_) => {}
            Err(_) => tokio::time::sleep(ACCEPT_RETRY).await,
        }
        while conversations.try_join_next().is_some() {}
    }
}

fn is_operator(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == own || peer.uid() == 0)
}

/// Serves one peer until it goes, takes too long, or sends what is no request.
async fn converse(stream: UnixStream, asked: mpsc::Sender<Asked>, _place: OwnedSemaphorePermit) {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    while let Ok(Ok(Some(line))) = tokio::time::timeout(PEER_LIMIT, request_line(&mut reader)).await {
        let request = match serde_json::from_slice(&line) {
            Ok(request) => request,
            Err(error) => {
                let _ = write(&mut writer, &Reply::failed(format!("this is no request: {error}"))).await;
                return;
            }
        };
        let (sender, replies) = mpsc::channel(MAX_REPLIES);
        if asked.send(Asked { request, replies: Replies(sender) }).await.is_err() {
            return;
        }
        if pass_on(replies, &mut reader, &mut writer).await.is_err() {
            return;
        }
    }
}

/// Passes on the replies to one request until the last one; fails if the peer is gone before that.
async fn pass_on(
    mut replies: mpsc::Receiver<Reply>,
    reader: &mut BufReader<OwnedReadHalf>,
    writer: &mut OwnedWriteHalf,
) -> io::Result<()> {
    let mut silent = true;
    loop {
        tokio::select! {
            reply = replies.recv() => match reply {
                Some(reply) => write(writer, &reply).await?,
                None => return Ok(()),
            },
            // A peer that sends its next request already is still there; one that is gone is at its end.
            bytes = reader.fill_buf(), if silent => match bytes?.len() {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                _ => silent = false,
            },
        }
    }
}

/// Reads one line; `None` at the end of the stream and for a line that is too long.
async fn request_line(reader: &mut BufReader<OwnedReadHalf>) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    reader.take(MAX_LINE_BYTES as u64 + 1).read_until(b'\n', &mut line).await?;
    Ok((line.pop() == Some(b'\n')).then_some(line))
}

async fn write(writer: &mut OwnedWriteHalf, reply: &Reply) -> io::Result<()> {
    let line = serde_json::to_string(reply)? + "\n";
    tokio::time::timeout(PEER_LIMIT, writer.write_all(line.as_bytes())).await?
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tokio::io::AsyncReadExt;

    use super::*;

    struct Place {
        _directory: tempfile::TempDir,
        path: String,
        socket: ControlSocket,
    }

    fn place() -> Place {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock.ctl").to_str().unwrap().to_owned();
        let socket = ControlSocket::bind(&path).unwrap();
        Place { _directory: directory, path, socket }
    }

    impl Place {
        /// What a peer gets that sends `text`, while the run answers every request with "no".
        async fn answer_to(&mut self, text: &[u8]) -> String {
            let mut stream = UnixStream::connect(&self.path).await.unwrap();
            let conversation = async {
                // The run may have closed already, which is what it is to do with nonsense.
                let _ = stream.write_all(text).await;
                let mut answer = vec![0; 4096];
                let len = stream.read(&mut answer).await.unwrap_or(0);
                String::from_utf8_lossy(&answer[..len]).into_owned()
            };
            tokio::pin!(conversation);
            loop {
                tokio::select! {
                    answer = &mut conversation => return answer,
                    asked = self.socket.next() => asked.replies.send(Reply::failed("no")),
                }
            }
        }
    }

    #[tokio::test]
    async fn the_socket_is_the_users_alone_and_vanishes() {
        let place = place();
        assert_eq!(std::fs::metadata(&place.path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(place.socket);
        assert!(!Path::new(&place.path).exists());
    }

    #[tokio::test]
    async fn nonsense_ends_a_conversation_and_hurts_nobody_else() {
        let mut place = place();
        let silent = UnixStream::connect(&place.path).await.unwrap();
        let no = "{\"reply\":\"failed\",\"message\":\"no\"}\n";
        for nonsense in [b"hello\n".as_slice(), b"{}\n", b"\xff\xfe\n", b"{\"command\":\"status\",\"x\":1}\n"] {
            assert!(place.answer_to(nonsense).await.contains("this is no request"), "{nonsense:?}");
        }
        assert_eq!(place.answer_to(&vec![b'['; MAX_LINE_BYTES + 1]).await, "");
        assert_eq!(
            place.answer_to(&[vec![b'['; MAX_LINE_BYTES], b"\n".to_vec()].concat()).await.matches('\n').count(),
            1
        );
        assert_eq!(place.answer_to(b"{\"command\":\"status\"}\n").await, no);
        drop(silent);
    }

    #[tokio::test(start_paused = true)]
    async fn peers_beyond_the_limit_wait_until_idle_ones_are_shown_out() {
        let mut place = place();
        let mut idle = Vec::new();
        for _ in 0..MAX_PEERS {
            idle.push(UnixStream::connect(&place.path).await.unwrap());
        }
        assert!(place.answer_to(b"{\"command\":\"status\"}\n").await.contains("no"));
    }

    #[tokio::test]
    async fn a_peer_that_leaves_is_noticed() {
        let mut place = place();
        let mut stream = UnixStream::connect(&place.path).await.unwrap();
        stream.write_all(b"{\"command\":\"restart\"}\n").await.unwrap();
        let asked = place.socket.next().await;
        assert!(tokio::time::timeout(Duration::from_millis(20), asked.replies.gone()).await.is_err());
        drop(stream);
        asked.replies.gone().await;
    }
}
