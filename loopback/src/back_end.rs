//! The back-end: a program that somebody else starts and ends, and that is connected to whenever it listens.
//!
//! Nobody here can look into it or replace it. One that answers on a fresh connection counts as one that has let go of what
//! the connection before had brought, as far as it serves one front-end at a time.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::time::timeout;
use tracing::{error, info, warn};
use vvu_agent::back_end::{BackEndLink, LinkError};
use vvu_agent::listening::connect;
use vvu_agent::restarts::RestartLimit;
use vvu_agent::supervisor::{GaveUp, Supervise};
use vvu_protocol::message::FrontEndRequest;
use vvu_socket::MessageSocket;

/// After so long it is said again that there is no back-end.
const REMINDER: Duration = Duration::from_secs(20);

/// How long a back-end may take to clear an old connection away and answer on a new one.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a back-end that listens is not ready.
#[derive(Debug, thiserror::Error)]
enum NotReady {
    #[error("cannot be connected to")]
    Io(#[from] std::io::Error),
    #[error("cannot be talked to")]
    Link(#[from] LinkError),
    #[error("did not answer within {} s", READY_TIMEOUT.as_secs())]
    NoAnswer,
}

/// See the module.
#[derive(Debug)]
pub struct OutsideBackEnd {
    socket: PathBuf,
    /// Connections that led to nothing.
    failures: RestartLimit,
}

impl OutsideBackEnd {
    /// A back-end that listens at `socket`, now or later.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, failures: RestartLimit::default() }
    }

    /// `None` if nobody has listened for a while.
    async fn try_ready(&self) -> Result<Option<BackEndLink>, NotReady> {
        let Some(stream) = connect(&self.socket, REMINDER).await? else { return Ok(None) };
        let mut link = BackEndLink::new(MessageSocket::new(stream.into_std()?)?);
        let answer = timeout(READY_TIMEOUT, link.request(FrontEndRequest::GetFeatures)).await;
        answer.map_err(|_| NotReady::NoAnswer)??;
        Ok(Some(link))
    }
}

impl Supervise for OutsideBackEnd {
    async fn ready(&mut self) -> Result<BackEndLink, GaveUp> {
        loop {
            match self.try_ready().await {
                Ok(Some(link)) => return Ok(link),
                Ok(None) => info!("no back-end listens at {}: start one", self.socket.display()),
                Err(not_ready) => {
                    let why = std::error::Error::source(&not_ready).map_or(String::new(), |why| format!(": {why}"));
                    warn!("back-end {not_ready}{why}");
                    if !self.failures.may_restart(Instant::now()) {
                        return Err(GaveUp { last: format!("{not_ready}{why}") });
                    }
                }
            }
        }
    }

    async fn lost(&mut self) {
        warn!("back-end has closed its connection");
    }

    /// Its connection is closed already, which is all that can be done from here.
    async fn end(&mut self) {
        error!("back-end has done what it should not");
    }
}
