//! Starts the back-end program, connects to it, and starts it again when it dies: up to a limit.
//!
//! A back-end is *ready* when it has answered on a fresh connection, and neither maps the window nor has its node open. So
//! a ready back-end holds nothing of an earlier session: the answer shows that it is done with the connection before, as
//! far as it serves one at a time, and the look at its mappings shows that it has let go of what that connection brought.
//! One that has not is replaced.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, future};

use tokio::net::UnixStream;
use tokio::time::timeout;
use tracing::{error, info, warn};
use vvu_protocol::message::FrontEndRequest;
use vvu_socket::MessageSocket;

use crate::back_end::{BackEndLink, LinkError};
use crate::in_one_line;
use crate::reaper::{Child, Exit, Reaper};
use crate::restarts::{MAX_RESTARTS, PERIOD, RestartLimit};
use crate::watch::wait_for;

/// How long a program may take from its start to its socket.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a program may take to clear an old connection away and answer on a new one. The device gives the appliance up
/// after 30 s (control profile, "Sessions", rule 2), and a replacement has to be started within that time.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait for the end of a program whose connection has ended. One that dies closes its connection a moment before
/// its end is seen; one that does not die is connected to again, and a driver VM is waiting for that.
const EXIT_GRACE: Duration = Duration::from_millis(250);

/// Between `bind` and `listen` of the program, its socket is there but refuses connections; no event tells of the latter.
const LISTEN_RETRY: Duration = Duration::from_millis(5);

/// A back-end program and how it is started.
#[derive(Debug, Clone)]
pub struct BackEndProgram {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Its environment: nothing is inherited.
    pub environment: Vec<(OsString, OsString)>,
    /// Where it listens. The directory exists, and the program may write to it.
    pub socket: PathBuf,
    /// User and group id to run it as, or `None` for the agent's own.
    pub user: Option<u32>,
}

/// The back-end has failed too often.
#[derive(Debug, thiserror::Error)]
#[error("back-end has failed more than {MAX_RESTARTS} times within {} s, it is given up", PERIOD.as_secs())]
pub struct GaveUp;

/// Why a back-end is not ready.
#[derive(Debug, thiserror::Error)]
enum NotReady {
    #[error("cannot be started")]
    Start(#[source] io::Error),
    #[error("ended: {0}")]
    Ended(Exit),
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
    /// [`GaveUp`]; the back-end does not run then.
    fn ready(&mut self) -> impl Future<Output = Result<BackEndLink, GaveUp>>;

    /// Takes note of a back-end that has closed a connection which a front-end was using.
    fn lost(&mut self) -> impl Future<Output = ()>;

    /// Ends the back-end without asking it, because it does not do what it should.
    fn end(&mut self) -> impl Future<Output = ()>;
}

/// Keeps one back-end running.
#[derive(Debug)]
pub struct Supervisor {
    program: BackEndProgram,
    reaper: Reaper,
    /// Name by which the kernel shows the window's file.
    window_name: PathBuf,
    child: Option<Child>,
    restarts: RestartLimit,
    given_up: bool,
}

impl Supervisor {
    /// A supervisor of a program that has not been started yet, whose driver memory comes from `window`.
    ///
    /// # Errors
    /// If the window's name cannot be found out.
    pub fn new(program: BackEndProgram, reaper: Reaper, window: &Arc<OwnedFd>) -> io::Result<Self> {
        let window_name = fs::read_link(format!("/proc/self/fd/{}", window.as_raw_fd()))?;
        Ok(Self { program, reaper, window_name, child: None, restarts: RestartLimit::default(), given_up: false })
    }

    /// Waits until the back-end is ready, starting it if need be.
    ///
    /// # Errors
    /// [`GaveUp`]; the back-end does not run then.
    pub async fn ready(&mut self) -> Result<BackEndLink, GaveUp> {
        while !self.given_up {
            match self.try_ready().await {
                Ok(link) => return Ok(link),
                Err(NotReady::HoldsMemory) => {
                    // No failure: the driver VM waits for nothing, and a new process starts with a clean slate.
                    info!("back-end {}: it is replaced", NotReady::HoldsMemory);
                    self.stop().await;
                }
                Err(not_ready) => {
                    warn!("back-end {}", in_one_line(&not_ready));
                    self.end().await;
                }
            }
        }
        Err(GaveUp)
    }

    async fn try_ready(&mut self) -> Result<BackEndLink, NotReady> {
        if self.child.is_none() {
            self.start()?;
        }
        let connect = connect(&self.program.socket);
        let stream = tokio::select! {
            stream = connect => stream?.ok_or(NotReady::NoSocket)?,
            exit = exited(&mut self.child) => return Err(NotReady::Ended(exit)),
        };
        let mut link = BackEndLink::new(MessageSocket::new(stream.into_std()?)?);
        let answer = tokio::select! {
            answer = timeout(READY_TIMEOUT, link.request(FrontEndRequest::GetFeatures)) => answer,
            exit = exited(&mut self.child) => return Err(NotReady::Ended(exit)),
        };
        answer.map_err(|_| NotReady::NoAnswer)??;
        match self.child.as_ref().map(|child| holds(child.id(), &self.window_name)) {
            Some(Ok(true)) => Err(NotReady::HoldsMemory),
            Some(Err(error)) => Err(NotReady::Inspect(error)),
            Some(Ok(false)) | None => Ok(link),
        }
    }

    fn start(&mut self) -> Result<(), NotReady> {
        let program = &self.program;
        match fs::remove_file(&program.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(NotReady::Start(error)),
            _ => {}
        }
        let mut command = Command::new(&program.program);
        command.args(&program.arguments).env_clear().envs(program.environment.iter().cloned()).stdin(Stdio::null());
        if let Some(user) = program.user {
            // Setting the user also clears the supplementary groups.
            command.uid(user).gid(user);
        }
        let child = self.reaper.spawn(&mut command).map_err(NotReady::Start)?;
        info!(pid = child.id(), program = %program.program.display(), "back-end started");
        self.child = Some(child);
        Ok(())
    }

    /// Takes note of a back-end that has closed a connection which a front-end was using: it has failed, whether or not it
    /// has died of that.
    pub async fn lost(&mut self) {
        match timeout(EXIT_GRACE, exited(&mut self.child)).await {
            Ok(exit) => {
                error!("back-end died: {exit}");
                self.child = None;
            }
            Err(_) => error!("back-end closed its connection and lives on"),
        }
        self.failed();
    }

    /// Ends the back-end without asking it, because it does not do what it should.
    pub async fn end(&mut self) {
        self.stop().await;
        self.failed();
    }

    fn failed(&mut self) {
        self.given_up |= !self.restarts.may_restart(Instant::now());
    }

    async fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill();
            child.exited().await;
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

impl Drop for Supervisor {
    /// A device set that has ended leaves no back-end behind.
    fn drop(&mut self) {
        if let Some(child) = &self.child {
            child.kill();
        }
    }
}

/// Waits for the end of a child; for ever if there is none.
async fn exited(child: &mut Option<Child>) -> Exit {
    match child {
        Some(child) => child.exited().await,
        None => future::pending().await,
    }
}

/// Connects as soon as the socket is there and listens; `None` if that takes too long.
async fn connect(socket: &Path) -> io::Result<Option<UnixStream>> {
    let directory = socket.parent().unwrap_or(Path::new("/"));
    let connected = async {
        let there = || Ok::<_, io::Error>(socket.exists().then_some(()));
        if wait_for(directory, START_TIMEOUT, there).await?.is_none() {
            return Ok(None);
        }
        loop {
            match UnixStream::connect(socket).await {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    tokio::time::sleep(LISTEN_RETRY).await;
                }
                other => return other.map(Some),
            }
        }
    };
    timeout(START_TIMEOUT, connected).await.unwrap_or(Ok(None))
}

/// Whether a process maps a file of this name or has it open.
fn holds(pid: i32, name: &Path) -> io::Result<bool> {
    let process = Path::new("/proc").join(pid.to_string());
    Ok(maps(&process, name)? || has_open(&process, name)?)
}

fn maps(process: &Path, name: &Path) -> io::Result<bool> {
    let maps = fs::read_to_string(process.join("maps"))?;
    Ok(maps.lines().any(|line| line.ends_with(&*name.to_string_lossy())))
}

fn has_open(process: &Path, name: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(process.join("fd"))? {
        // A descriptor may be closed while the directory is read.
        if fs::read_link(entry?.path()).is_ok_and(|target| target == name) {
            return Ok(true);
        }
    }
    Ok(false)
}
