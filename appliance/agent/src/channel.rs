//! A channel: a byte stream between the host and the back-end program, by way of a virtio-serial port.
//!
//! ```text
//!   host's client ◄──► socket of QEMU ◄──► port org.vvu.NAME ◄──► agent ◄──► unix socket on which the program listens
//! ```
//!
//! When a client comes on the host, the agent connects to the program; when the client goes, what it has sent is handed over
//! and the connection is closed. Bytes are never looked at, and never more than a buffer of them is kept for each direction: who
//! does not read holds up who sends.
//!
//! A guest cannot make QEMU hang up. So a program that closes the connection, or dies, is connected to again: at the next byte
//! that the client sends or that the program before did not take, so that a program that hangs up at once is not connected to without end. And a port shows states, no
//! events: a client that comes in the very moment in which another goes may be taken for the same.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

mod port;

pub use port::Port;

use crate::listening::connect;

/// Bytes that are kept for each direction.
const BUFFER_LEN: usize = 16 * 1024;

/// How long a client's last words may take to the program when the client has gone already.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long the program is waited for before the wait begins anew.
const CONNECT_LIMIT: Duration = Duration::from_secs(600);

/// Who ended a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    Client,
    Program,
}

/// One channel.
#[derive(Debug)]
pub struct Channel {
    port: Port,
    socket: PathBuf,
}

impl Channel {
    /// A channel between a port and the socket on which the program listens, now or later.
    #[must_use]
    pub const fn new(port: Port, socket: PathBuf) -> Self {
        Self { port, socket }
    }

    /// Serves one client after the other, for ever.
    ///
    /// # Errors
    /// If the port fails.
    pub async fn run(&self) -> io::Result<Infallible> {
        loop {
            self.port.client().await?;
            debug!(socket = %self.socket.display(), "client of the channel has come");
            self.serve_client().await?;
            debug!(socket = %self.socket.display(), "client of the channel has gone");
        }
    }

    /// Until the client goes.
    async fn serve_client(&self) -> io::Result<()> {
        let mut once_more = true;
        loop {
            let program = tokio::select! {
                program = connect_to(&self.socket) => program,
                gone = self.gone_for_good() => return gone,
            };
            let ended = self.relay(program, &mut once_more).await?;
            if ended == Ended::Client || !self.port.speaks().await? {
                return Ok(());
            }
        }
    }

    /// Waits until the client has gone and is not waited for any more; what it has left behind is forgotten.
    async fn gone_for_good(&self) -> io::Result<()> {
        self.port.gone().await?;
        sleep(LAST_WORDS).await;
        self.port.forget()
    }

    async fn relay(&self, program: UnixStream, once_more: &mut bool) -> io::Result<Ended> {
        let (read, write) = program.into_split();
        let to_program = to_program(&self.port, write, once_more);
        tokio::pin!(to_program);
        let ended = tokio::select! {
            ended = &mut to_program => return ended,
            ended = from_program(&self.port, read) => ended?,
        };
        if ended == Ended::Client {
            // It may have spoken before it went.
            timeout(LAST_WORDS, to_program).await.unwrap_or(Ok(ended))?;
        }
        Ok(ended)
    }
}

/// What a program did not take that has closed its connection is for the next one, but `once_more` only: a program that never
/// takes anything is not connected to without end.
async fn to_program(port: &Port, mut program: OwnedWriteHalf, once_more: &mut bool) -> io::Result<Ended> {
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        let read = port.read(&mut buffer).await?;
        let mut bytes = buffer.get(..read).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(Ended::Client);
        }
        while !bytes.is_empty() {
            let Ok(written @ 1..) = program.write(bytes).await else {
                if std::mem::take(once_more) {
                    port.put_back(bytes);
                }
                return Ok(Ended::Program);
            };
            *once_more = true;
            bytes = bytes.get(written..).unwrap_or_default();
        }
    }
}

async fn from_program(port: &Port, mut program: OwnedReadHalf) -> io::Result<Ended> {
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        let Ok(read @ 1..) = program.read(&mut buffer).await else { return Ok(Ended::Program) };
        let mut bytes = buffer.get(..read).unwrap_or_default();
        while !bytes.is_empty() {
            match port.write(bytes).await? {
                0 => return Ok(Ended::Client),
                written => bytes = bytes.get(written..).unwrap_or_default(),
            }
        }
    }
}

/// Connects as soon as the program listens.
async fn connect_to(socket: &Path) -> UnixStream {
    loop {
        match connect(socket, CONNECT_LIMIT).await {
            Ok(Some(stream)) => return stream,
            Ok(None) => {}
            Err(error) => {
                warn!("channel cannot be connected to {}: {error}", socket.display());
                sleep(LAST_WORDS).await;
            }
        }
    }
}
