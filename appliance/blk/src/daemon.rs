//! The program's life: open the image, listen, serve one front-end after the other, end on a signal.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use vhost::vhost_user::Error as ProtocolError;
use vhost_user_backend::{Error as BackendError, VhostUserDaemon};
use vm_memory::GuestMemoryAtomic;

use crate::DriverMemory;
use crate::backend::Backend;
use crate::device::{Device, SERIAL_LEN};
use crate::engine::Engine;
use crate::image::{Image, ImageError};
use crate::listener::{Endpoint, Listener, ListenerError};
use crate::log_limit::LogLimit;
use crate::lost_memory;
use crate::signals::{Signals, Wish};
use crate::wakeup::Wakeup;

/// Most queues of a device: the crate keeps sets of queues in 64 bits.
pub const MAX_QUEUES: u16 = 64;

/// What to serve, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Where front-ends connect.
    pub endpoint: Endpoint,
    /// Raw file or block device.
    pub image: PathBuf,
    /// Open the image read-only and refuse every change.
    pub read_only: bool,
    /// Number of request queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Serial number that the driver sees: up to 20 bytes of ASCII.
    pub serial: String,
    /// Least alignment of direct I/O in bytes, for storage that needs more than it says: a power of two.
    pub io_alignment: Option<u32>,
}

/// Why the program cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The image is the reason.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The socket is the reason.
    #[error(transparent)]
    Listener(#[from] ListenerError),
    /// io_uring does not work here.
    #[error("requests cannot be served")]
    Engine(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The system refuses what every program needs.
    #[error("system call failed")]
    System(#[from] io::Error),
    /// No thread or descriptor for another connection.
    #[error("cannot prepare for a front-end")]
    Prepare(#[source] io::Error),
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// [`DaemonError`] if image or socket cannot be used. What a front-end or the driver does is never an error.
pub fn run(options: &Options) -> Result<(), DaemonError> {
    // First: the descriptor of `--fd` must not be mixed up with one that is opened here, and threads that are started
    // later inherit the signal mask.
    let listener = Listener::new(&options.endpoint)?;
    let signals = Signals::take_over()?;
    lost_memory::install()?;
    let image = Image::open(&options.image, options.read_only, options.io_alignment)?;
    let device = Arc::new(Device::new(image, serial_bytes(&options.serial), options.queues));
    Engine::probe(&device.image).map_err(|error| DaemonError::Engine(error.into()))?;
    tracing::info!(endpoint = ?options.endpoint, queues = options.queues, "listening");

    let connections = LogLimit::default();
    loop {
        match wait(&signals, &listener)? {
            Event::Signal(Wish::Report) => device.counters.log(),
            Event::Signal(Wish::End) => break,
            Event::Other => {
                let end = serve_front_end(&device, &listener, &signals, &connections)?;
                if end {
                    break;
                }
            }
        }
    }
    tracing::info!("ended");
    Ok(())
}

fn serial_bytes(serial: &str) -> [u8; SERIAL_LEN] {
    let mut bytes = [0; SERIAL_LEN];
    for (to, from) in bytes.iter_mut().zip(serial.bytes()) {
        *to = from;
    }
    bytes
}

/// Serves one front-end until it leaves. True if the program is to end.
fn serve_front_end(
    device: &Arc<Device>,
    listener: &Listener,
    signals: &Signals,
    connections: &LogLimit,
) -> Result<bool, DaemonError> {
    let suppressed = connections.admit(Instant::now());
    let backend = Arc::new(Backend::new(device)?);
    let memory = GuestMemoryAtomic::new(DriverMemory::new());
    let mut daemon = VhostUserDaemon::new("vhost-user".to_owned(), Arc::clone(&backend), memory)
        .map_err(|error| DaemonError::Prepare(io::Error::other(error.to_string())))?;
    if let Err(error) = daemon.start(&mut listener.acceptor()?) {
        // The front-end left before it was taken.
        tracing::debug!(%error, "connection failed");
        return Ok(false);
    }
    if let Some(suppressed) = suppressed {
        tracing::info!(suppressed, "front-end connected");
    }
    let end = wait_for_front_end(&mut daemon, device, signals, suppressed.is_some())?;
    backend.close();
    // Joins the queues' threads.
    drop(daemon);
    if suppressed.is_some() {
        device.counters.log();
    }
    Ok(end)
}

fn wait_for_front_end(
    daemon: &mut VhostUserDaemon<Arc<Backend>>,
    device: &Device,
    signals: &Signals,
    log: bool,
) -> Result<bool, DaemonError> {
    let shutdown = daemon.shutdown_handle();
    let gone = Wakeup::new().map_err(io::Error::from)?;
    let mut end = false;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let outcome = daemon.wait();
            if log {
                log_outcome(outcome);
            }
            gone.wake();
        });
        loop {
            match wait(signals, &gone)? {
                Event::Signal(Wish::Report) => device.counters.log(),
                Event::Signal(Wish::End) => {
                    end = true;
                    if let Some(shutdown) = &shutdown {
                        shutdown.shutdown();
                    }
                }
                Event::Other => return Ok(end),
            }
        }
    })
}

fn log_outcome(outcome: Result<(), BackendError>) {
    match outcome {
        Ok(()) | Err(BackendError::HandleRequest(ProtocolError::Disconnected | ProtocolError::PartialMessage)) => {
            tracing::info!("front-end disconnected");
        }
        Err(error) => tracing::warn!(%error, "front-end was disconnected for an error"),
    }
}

enum Event {
    Signal(Wish),
    /// The other descriptor is readable.
    Other,
}

fn wait(signals: &Signals, other: &impl std::os::fd::AsFd) -> io::Result<Event> {
    loop {
        if let Some(wish) = signals.next() {
            return Ok(Event::Signal(wish));
        }
        let mut polled = [PollFd::new(signals, PollFlags::IN), PollFd::new(other, PollFlags::IN)];
        match poll(&mut polled, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [_, other] = &polled;
        if !other.revents().is_empty() {
            return Ok(Event::Other);
        }
    }
}
