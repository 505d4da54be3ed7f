//! The life of the bridge: it makes its sockets, waits for the appliance's VMM, then takes one front-end after the other.
//!
//! ```text
//! listening ──VMM connects──► booting ──BACK_END_UP──► ready ──front-end connects──► connected
//!                                                        ▲                               │ front-end or back-end ends
//!                                                        └── BACK_END_UP, unmapped ◄── clearing
//! ```
//!
//! The bridge ends when it is told to (success), or when the appliance's VMM goes away or breaks the protocol (failure).

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use sd_notify::NotifyState;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinSet, LocalSet};
use uuid::Uuid;
use vvu_protocol::window::Layout;
use vvu_socket::MessageSocket;

use crate::appliance::control::Control;
use crate::appliance::doorbell::Doorbell;
use crate::appliance::window::{Window, header_file};
use crate::appliance::{ApplianceError, file_identity};
use crate::cli::Options;
use crate::doorbells::Doorbells;
use crate::front_end::{FrontEnds, remove_stale_socket};
use crate::session::{Appliance, Interrupted, Session, SessionError};

/// How long the agent may take to clear a session away and have a back-end ready again.
const CLEAR_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs the bridge to its end.
///
/// # Errors
/// What the user did wrong, or what ended the appliance.
pub fn run(options: Options) -> anyhow::Result<()> {
    if options.exit_with_parent {
        let term = rustix::process::Signal::TERM;
        rustix::process::set_parent_process_death_signal(Some(term)).context("cannot ask for the parent's end")?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    LocalSet::new().block_on(&runtime, serve_until_told(options))
}

async fn serve_until_told(options: Options) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        result = serve(options) => result,
        _ = terminate.recv() => { tracing::info!("ends: SIGTERM"); Ok(()) }
        _ = interrupt.recv() => { tracing::info!("ends: SIGINT"); Ok(()) }
    }
}

async fn serve(options: Options) -> anyhow::Result<()> {
    let directory = options.appliance_dir.context("--appliance-dir is missing")?;
    let uuid = options.uuid.unwrap_or_else(Uuid::new_v4);
    let layout = Layout::new(options.window)?;
    let doorbells = Doorbells::new(options.queues)?;
    let mut front_ends = match (options.socket_path, options.fd) {
        (Some(path), _) => FrontEnds::bind(&path)?,
        (None, Some(number)) => FrontEnds::inherit(number)?,
        (None, None) => bail!("--socket-path or --fd is missing"),
    };
    let sockets = ApplianceSockets::bind(&directory)?;
    tracing::info!(%uuid, directory = %directory.display(), window = layout.len(), queues = options.queues, "listening");
    notify(&[NotifyState::Custom("X_VVU_LISTENING=1"), NotifyState::Status("waiting for the appliance's VMM")]);

    let mut tasks = JoinSet::new();
    let appliance = sockets.accept(&mut tasks, *uuid.as_bytes(), options.queues, layout, doorbells).await?;
    notify(&[NotifyState::Status("appliance boots")]);
    tokio::select! {
        // What ended a device says more than what the session noticed of it.
        biased;
        ended = tasks.join_next() => match ended {
            Some(Ok(Err(error))) => Err(error.into()),
            Some(Err(error)) => Err(error).context("a task of the bridge failed"),
            Some(Ok(Ok(()))) | None => bail!("a task of the bridge ended early"),
        },
        result = serve_front_ends(&mut front_ends, appliance) => result,
    }
}

/// The listening sockets of the device set. Each takes one connection; the files are removed at the end.
struct ApplianceSockets {
    control: (UnixListener, RemovedAtEnd),
    window: (UnixListener, RemovedAtEnd),
    doorbell: (UnixListener, RemovedAtEnd),
}

struct RemovedAtEnd(PathBuf);

impl Drop for RemovedAtEnd {
    fn drop(&mut self) {
        // The directory may have been removed already; there is nobody to tell.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl ApplianceSockets {
    fn bind(directory: &Path) -> anyhow::Result<Self> {
        let listen = |name: &str| -> anyhow::Result<(UnixListener, RemovedAtEnd)> {
            let path = directory.join(name);
            remove_stale_socket(&path)?;
            let listener = UnixListener::bind(&path).with_context(|| {
                format!(
                    "cannot listen at {}: create the directory of --appliance-dir and make it writable",
                    path.display()
                )
            })?;
            Ok((listener, RemovedAtEnd(path)))
        };
        Ok(Self {
            control: listen("control.sock")?,
            window: listen("window.sock")?,
            doorbell: listen("doorbell.sock")?,
        })
    }

    /// Waits for the VMM at all three sockets, in whatever order it connects, and starts the task of each as it comes: the
    /// VMM waits for answers on one before it connects to the next.
    async fn accept(
        self,
        tasks: &mut JoinSet<Result<(), ApplianceError>>,
        uuid: [u8; 16],
        queues: u16,
        layout: Layout,
        doorbells: Doorbells,
    ) -> anyhow::Result<Appliance> {
        let (mut control, mut window, mut doorbell) = (None, None, false);
        let mut announcement = Some(doorbells.announce()?);
        let header = header_file(uuid, layout.len())?;
        let (header_id, _) = file_identity(&header)?;
        while control.is_none() || window.is_none() || !doorbell {
            tokio::select! {
                accepted = self.control.0.accept(), if control.is_none() => {
                    let (task, port) = Control::new(accepted?.0.into_std()?, uuid, queues, header_id)?;
                    tasks.spawn_local(task.run());
                    control = Some(port);
                }
                accepted = self.window.0.accept(), if window.is_none() => {
                    let (task, port) = Window::new(accepted?.0.into_std()?, header.try_clone()?, &layout)?;
                    tasks.spawn_local(task.run());
                    window = Some(port);
                }
                accepted = self.doorbell.0.accept(), if !doorbell => {
                    let task = Doorbell::new(accepted?.0.into_std()?, uuid)?;
                    let announcement = announcement.take().context("the doorbell device connected twice")?;
                    tasks.spawn_local(task.run(announcement));
                    doorbell = true;
                }
                Some(ended) = tasks.join_next() => ended.context("a task of the bridge failed")??,
            }
        }
        match (control, window) {
            (Some(control), Some(window)) => {
                // It ends with either device, whose own task says why.
                tokio::task::spawn_local(announce_window(window.state(), control.commands.clone(), layout.len()));
                Ok(Appliance { control, window, doorbells, layout })
            }
            _ => bail!("the appliance's VMM connected to no device"),
        }
    }
}

/// Shows the agent whether the window's header is mapped.
async fn announce_window(
    mut state: tokio::sync::watch::Receiver<crate::appliance::window::WindowState>,
    control: crate::appliance::control::ControlCommands,
    len: u64,
) {
    loop {
        let ready = state.borrow_and_update().ready;
        let shown = control.set_window_len(if ready { len } else { 0 }).await;
        if shown.is_err() || state.changed().await.is_err() {
            return;
        }
    }
}

async fn serve_front_ends(front_ends: &mut FrontEnds, mut appliance: Appliance) -> anyhow::Result<()> {
    wait_ready(&appliance).await?;
    notify(&[NotifyState::Ready]);
    for number in 1_u32.. {
        let Some(stream) = next_front_end(number, front_ends, &appliance).await? else { break };
        serve_session(number, stream, front_ends, &mut appliance).await?;
    }
    Ok(())
}

/// Waits for the next front-end. It is taken on only while the appliance is ready; until then it waits in the socket.
async fn next_front_end(
    number: u32,
    front_ends: &mut FrontEnds,
    appliance: &Appliance,
) -> anyhow::Result<Option<UnixStream>> {
    loop {
        wait_ready(appliance).await?;
        notify(&[NotifyState::Status("ready for a front-end")]);
        tracing::info!(next = number, "ready for a front-end");
        tokio::select! {
            biased;
            unready = wait_unready(appliance) => unready?,
            stream = front_ends.next() => return stream,
        }
        notify(&[NotifyState::Status("waiting for the appliance")]);
        tracing::info!(next = number, "the appliance is not ready for a front-end");
    }
}

async fn serve_session(
    number: u32,
    stream: UnixStream,
    front_ends: &mut FrontEnds,
    appliance: &mut Appliance,
) -> anyhow::Result<()> {
    tracing::info!(session = number, "front-end connected");
    notify(&[NotifyState::Status("front-end connected")]);
    let mut session = Session::new(number, MessageSocket::new(stream)?);
    let serve = async {
        session.attach(number, appliance).await?;
        session.serve(appliance, std::future::pending()).await
    };
    let ended = tokio::select! {
        ended = serve => ended,
        failed = front_ends.turn_away() => return failed,
    };
    match ended {
        Ok(Interrupted) | Err(SessionError::Closed) => tracing::info!(session = number, "front-end disconnected"),
        Err(SessionError::Appliance(error)) => return Err(error.into()),
        Err(error) => {
            let error = anyhow::Error::from(error);
            tracing::warn!(session = number, "session ended: {error:#}");
        }
    }
    clear(number, appliance).await
}

/// Lets the appliance clear a session away, then undoes its mappings.
async fn clear(number: u32, appliance: &mut Appliance) -> anyhow::Result<()> {
    appliance.doorbells.reset().context("eventfds of the session")?;
    appliance.control.commands.disconnect(number).await?;
    if tokio::time::timeout(CLEAR_TIMEOUT, wait_ready(appliance)).await.is_err() {
        let seconds = CLEAR_TIMEOUT.as_secs();
        return Err(ApplianceError::Timeout { what: "the end of a session", seconds }.into());
    }
    // Until now the back-end may have signalled.
    appliance.doorbells.reset().context("eventfds of the session")?;
    appliance.window.unmap_all().await?;
    appliance.layout.clear();
    Ok(())
}

/// Waits until the agent has a back-end and driver memory can be mapped.
async fn wait_ready(appliance: &Appliance) -> Result<(), ApplianceError> {
    let gone = |_| ApplianceError::Gone { device: "control" };
    appliance.window.state().wait_for(|state| state.ready).await.map_err(gone)?;
    appliance.control.state().wait_for(|state| state.back_end_up).await.map_err(gone)?;
    Ok(())
}

/// Waits until one of the two is no longer so.
async fn wait_unready(appliance: &Appliance) -> Result<(), ApplianceError> {
    let gone = |_| ApplianceError::Gone { device: "control" };
    let (mut window, mut control) = (appliance.window.state(), appliance.control.state());
    tokio::select! {
        state = window.wait_for(|state| !state.ready) => state.map(drop).map_err(gone),
        state = control.wait_for(|state| !state.back_end_up) => state.map(drop).map_err(gone),
    }
}

/// Tells whoever has started this process, by systemd's notification protocol. Without such a one nothing happens.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "notification socket");
    }
}
