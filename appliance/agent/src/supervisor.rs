//! The connection of one device set to its back-end: made when the program listens, made anew when it was lost.
//!
//! A back-end is *ready* when it has answered on a fresh connection, and neither maps the window nor has its node open. So
//! a ready back-end holds nothing of an earlier session: the answer shows that it is done with the connection before, as
//! far as it serves one at a time on a socket, and the look at its mappings shows that it has let go of what that connection
//! brought. One that has not is replaced.
//!
//! The process may serve other device sets as well ([`crate::process`]). To end it for one of them is to end it for all; the
//! others see a back-end that was lost.
//!
//! A program may also serve one front-end only, and end, or answer nobody any more, when that has gone. It is started again
//! for the next one, and that is no failure: what counts is a loss that a front-end suffers, and a program that never
//! gets ready.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout;
use tracing::{error, info, warn};
use vvu_protocol::message::FrontEndRequest;
use vvu_socket::{MessageSocket, SocketError};

use crate::back_end::{BackEndLink, LinkError};
use crate::in_one_line;
use crate::listening::connect;
pub use crate::process::GaveUp;
use crate::process::{BackEndProcess, NoProcess, Run};
use crate::reaper::Exit;
use crate::restarts::RestartLimit;

/// How long a program may take from its start to its socket. Programs of others do much before that.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a program may take to clear an old connection away and answer on a new one. The device gives the appliance up
/// after 30 s (control profile, "Sessions", rule 2), and a replacement has to be started within that time.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait for the end of a program whose connection has ended. One that dies closes its connection a moment before
/// its end is seen; one that does not die is connected to again, and a driver VM is waiting for that.
const EXIT_GRACE: Duration = Duration::from_millis(250);

/// What a program did whose connection has ended and that has not.
const HUNG_UP: &str = "closed its connection and lives on";

/// Why a back-end is not ready.
#[derive(Debug, thiserror::Error)]
enum NotReady {
    #[error("ended: {0}")]
    Ended(Exit),
    #[error("ended before it listened: {0}")]
    NeverListened(Exit),
    #[error("did not listen within {} s", START_TIMEOUT.as_secs())]
    NoSocket,
    #[error("cannot be connected to")]
    Connect(#[from] io::Error),
    #[error("did not answer within {} s", READY_TIMEOUT.as_secs())]
    NoAnswer,
    #[error("cannot be talked to")]
    Link(#[from] LinkError),
    #[error("cannot be looked at")]
    Inspect(#[source] io::Error),
    #[error("still holds driver memory of an earlier connection")]
    HoldsMemory,
}

/// What a session needs of the supervisor.
pub trait Supervise {
    /// Waits until the back-end is ready, starting it if need be: a fresh connection to it, on which nothing but GET_FEATURES
    /// was said, and which finds it without anything of an earlier one.
    ///
    /// # Errors
    /// [`GaveUp`]; there is no connection then.
    fn ready(&mut self) -> impl Future<Output = Result<BackEndLink, GaveUp>>;

    /// Takes note of a back-end that has closed a connection which a front-end was using.
    fn lost(&mut self) -> impl Future<Output = ()>;

    /// Ends the back-end without asking it, because it does not do what it should.
    fn end(&mut self) -> impl Future<Output = ()>;
}

/// Keeps the back-end of one device set connected.
#[derive(Debug)]
pub struct Supervisor {
    process: BackEndProcess,
    /// Where the program listens for this device set.
    socket: PathBuf,
    /// Name by which the kernel shows the window's file.
    window_name: PathBuf,
    /// The process that the connection in use leads to.
    connected_to: Option<Rc<Run>>,
    /// Connections that the program has closed without dying.
    hang_ups: RestartLimit,
    /// It has closed too many.
    given_up: bool,
}

impl Supervisor {
    /// A supervisor of the connection to the socket of a program, whose driver memory comes from `window`.
    ///
    /// # Errors
    /// If the window's name cannot be found out.
    pub fn new(process: BackEndProcess, socket: PathBuf, window: &Arc<OwnedFd>) -> io::Result<Self> {
        let window_name = fs::read_link(format!("/proc/self/fd/{}", window.as_raw_fd()))?;
        let hang_ups = RestartLimit::default();
        Ok(Self { process, socket, window_name, connected_to: None, hang_ups, given_up: false })
    }

    /// Waits until the back-end is ready, starting it if need be.
    ///
    /// # Errors
    /// [`GaveUp`]; the device set has no connection then.
    pub async fn ready(&mut self) -> Result<BackEndLink, GaveUp> {
        // Nobody has complained of the connection before: it was closed on this side.
        let released = self.connected_to.take();
        while !self.given_up {
            let run = match self.process.running() {
                Ok(run) => run,
                Err(NoProcess::GaveUp(gave_up)) => return Err(gave_up),
                Err(start) => {
                    warn!("back-end {} {}", self.process.name(), in_one_line(&start));
                    continue;
                }
            };
            let has_served = released.as_ref().is_some_and(|released| Rc::ptr_eq(released, &run));
            match self.try_ready(&run, has_served).await {
                Ok(link) => {
                    run.note_ready();
                    self.connected_to = Some(run);
                    return Ok(link);
                }
                Err(not_ready) => self.replace(&run, &not_ready, has_served).await,
            }
        }
        Err(GaveUp { last: HUNG_UP.to_owned() })
    }

    async fn try_ready(&self, run: &Run, has_served: bool) -> Result<BackEndLink, NotReady> {
        let stream = tokio::select! {
            stream = connect(&self.socket, START_TIMEOUT) => stream?.ok_or(NotReady::NoSocket)?,
            exit = run.exited() => {
                return Err(if run.was_ready() { NotReady::Ended(exit) } else { NotReady::NeverListened(exit) });
            }
        };
        let mut link = BackEndLink::new(MessageSocket::new(stream.into_std()?)?);
        let answer = tokio::select! {
            answer = timeout(READY_TIMEOUT, link.request(FrontEndRequest::GetFeatures)) => answer,
            exit = run.exited() => return Err(NotReady::Ended(exit)),
        };
        match answer.map_err(|_| NotReady::NoAnswer)? {
            Ok(_) => {}
            Err(error) if has_closed(&error) => {
                // One that has served its only front-end may have to tidy up.
                let grace = if has_served { READY_TIMEOUT } else { EXIT_GRACE };
                let exit = timeout(grace, run.exited()).await;
                return Err(exit.map_or(NotReady::Link(error), NotReady::Ended));
            }
            Err(error) => return Err(error.into()),
        }
        match run.holds(&self.window_name) {
            Ok(true) => Err(NotReady::HoldsMemory),
            Ok(false) => Ok(link),
            Err(error) => Err(NotReady::Inspect(error)),
        }
    }

    /// Sees to it that another process takes the place of one that is not ready.
    async fn replace(&self, run: &Run, not_ready: &NotReady, has_served: bool) {
        let (name, reason) = (self.process.name(), in_one_line(not_ready));
        if matches!(not_ready, NotReady::HoldsMemory) || has_served {
            // No failure: the driver VM waits for nothing, and a new process starts with a clean slate.
            info!("back-end {name} {reason}; it is replaced");
            self.process.replace(run).await;
        } else {
            warn!("back-end {name} {reason}");
            self.process.end(run, reason).await;
        }
    }

    /// Takes note of a back-end that has closed a connection which a front-end was using: it has failed, whether or not it
    /// has died of that.
    pub async fn lost(&mut self) {
        let Some(run) = self.connected_to.take() else { return };
        let name = self.process.name();
        if let Ok(exit) = timeout(EXIT_GRACE, run.exited()).await {
            let died = format!("died: {exit}");
            error!("back-end {name} {died}");
            self.process.failed(&run, died);
        } else {
            error!("back-end {name} {HUNG_UP}");
            self.given_up |= !self.hang_ups.may_restart(Instant::now());
        }
    }

    /// Ends the back-end without asking it, because it does not do what it should.
    pub async fn end(&mut self) {
        if let Some(run) = self.connected_to.take() {
            self.process.end(&run, "did what it should not".to_owned()).await;
        }
    }
}

impl Supervise for Supervisor {
    async fn ready(&mut self) -> Result<BackEndLink, GaveUp> {
        Self::ready(self).await
    }

    async fn lost(&mut self) {
        Self::lost(self).await;
    }

    async fn end(&mut self) {
        Self::end(self).await;
    }
}

/// Whether the program has closed the connection, as one does that ends.
const fn has_closed(error: &LinkError) -> bool {
    matches!(error, LinkError::Closed | LinkError::Socket(SocketError::Io(_) | SocketError::Truncated { .. }))
}
