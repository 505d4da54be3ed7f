//! The program's life: open the image, listen, serve one front-end after the other, end on a signal.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use vvu_back_end::cpus::UnusableCpu;
use vvu_back_end::listener::{Endpoint, FrontEnds, ListenerError};
use vvu_back_end::log_limit::LogLimit;
use vvu_back_end::rate_limit::Limits;
use vvu_back_end::signals::{Signals, Wish};
use vvu_back_end::threads::Threads;
use vvu_back_end::wakeup::Wakeup;
use vvu_back_end::{Connection, Ending, SessionError, lost_memory};

use crate::control;
use crate::device::Device;
use crate::engine::{Engine, SETUPS};
use crate::image::{Format, Image, ImageError};
use crate::qcow2::disk::{Layer, LayerError, Qcow2Disk};
use crate::qcow2::pool::Pool;
use crate::size_events::SizeEvents;

/// Most queues of a device; each has a thread.
pub const MAX_QUEUES: u16 = 64;

/// What to serve, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Where front-ends connect.
    pub endpoint: Endpoint,
    /// Where the disk is.
    pub storage: Storage,
    /// Format of the image.
    pub format: Format,
    /// The backing file of the image, that of the backing file, and so on.
    pub backing: Vec<BackingFile>,
    /// Open the image read-only and refuse every change.
    pub read_only: bool,
    /// Number of request queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Serial number that the driver sees: up to 20 bytes of ASCII.
    pub serial: String,
    /// Least alignment of direct I/O in bytes, for storage that needs more than it says: a power of two.
    pub io_alignment: Option<u32>,
    /// What the driver may ask for at the most, to begin with.
    pub limits: Limits,
    /// Where the control channel listens.
    pub control: Option<PathBuf>,
    /// How the queues' threads work.
    pub threads: Threads,
}

/// Where the disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Storage {
    /// File or block device with the image.
    Image(PathBuf),
    /// Nowhere, with so many bytes: nothing is read or written. For measuring.
    Null(u64),
}

/// A file that the image builds on; it is never written to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingFile {
    /// Its format.
    pub format: Format,
    /// File or block device.
    pub path: PathBuf,
}

/// Why the program cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The image is the reason.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The files of the disk do not fit together.
    #[error(transparent)]
    Layers(#[from] LayerError),
    /// The socket is the reason.
    #[error(transparent)]
    Listener(#[from] ListenerError),
    /// A CPU of the list is the reason.
    #[error(transparent)]
    Cpu(#[from] UnusableCpu),
    /// io_uring does not work here.
    #[error("requests cannot be served")]
    Engine(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The system refuses what every program needs.
    #[error("system call failed")]
    System(#[from] io::Error),
}

/// Serves until SIGTERM or SIGINT, or until the one front-end of a connected socket has left.
///
/// # Errors
/// [`DaemonError`] if image or socket cannot be used. What a front-end or the driver does is never an error.
pub fn run(options: &Options) -> Result<(), DaemonError> {
    // First: the descriptor of `--fd` must not be mixed up with one that is opened here, and threads that are started
    // later inherit the signal mask.
    let mut front_ends = FrontEnds::new(&options.endpoint)?;
    let signals = Signals::take_over()?;
    lost_memory::install()?;
    options.threads.check()?;
    let image = Arc::new(match &options.storage {
        Storage::Image(path) => Image::open(path, options.read_only, options.io_alignment)?,
        Storage::Null(len) => Image::null(*len, options.read_only)?,
    });
    let wishes = Wishes::new(signals, &image);
    let formatted = open_formatted(&image, options)?;
    let ring_setup = Engine::find_setup(&image, &SETUPS).map_err(|error| DaemonError::Engine(error.into()))?;
    let device = Arc::new(Device::new(image, formatted, ring_setup, options));
    // What has changed before there was somebody to see it.
    look_again(&device);
    let _control = options.control.as_ref().map(|path| control::open(path, &device)).transpose()?;
    tracing::info!(endpoint = ?options.endpoint, queues = options.queues, "listening");

    let connections = LogLimit::default();
    while let Some(socket) = front_ends.waiting() {
        match wishes.wait(&socket)? {
            Event::Wish(Wish::Report) => device.counters.log(),
            Event::Wish(Wish::LookAgain) => {
                look_again(&device);
            }
            Event::Wish(Wish::End) => break,
            Event::Other => {
                if serve_front_end(&device, front_ends.accept()?, &wishes, &connections)? {
                    break;
                }
            }
        }
    }
    tracing::info!("ended");
    Ok(())
}

/// The disk that the image is, if it is not one byte for byte.
fn open_formatted(image: &Arc<Image>, options: &Options) -> Result<Option<Pool>, DaemonError> {
    if options.format == Format::Raw {
        return Ok(None);
    }
    let mut layers = vec![Layer { format: options.format, image: Arc::clone(image) }];
    for backing in &options.backing {
        let image = Arc::new(Image::open(&backing.path, true, None)?);
        layers.push(Layer { format: backing.format, image });
    }
    Ok(Some(Pool::new(Qcow2Disk::new(layers, options.read_only)?)?))
}

/// Serves one front-end until it leaves. True if the program is to end.
fn serve_front_end(
    device: &Arc<Device>,
    stream: UnixStream,
    wishes: &Wishes,
    connections: &LogLimit,
) -> Result<bool, DaemonError> {
    let suppressed = connections.admit(Instant::now());
    if let Some(suppressed) = suppressed {
        tracing::info!(suppressed, "front-end connected");
    }
    device.forget_lost_memory();
    let connection = Connection::new(stream, Arc::clone(device));
    let handle = connection.handle();
    let gone = Wakeup::new().map_err(io::Error::from)?;
    let mut end = false;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let outcome = connection.serve();
            if suppressed.is_some() {
                log_outcome(outcome);
            }
            gone.wake();
        });
        loop {
            match wishes.wait(&gone)? {
                Event::Wish(Wish::Report) => device.counters.log(),
                Event::Wish(Wish::LookAgain) => {
                    if look_again(device) {
                        handle.config_changed();
                    }
                }
                Event::Wish(Wish::End) => {
                    end = true;
                    handle.end();
                }
                Event::Other => return Ok::<_, io::Error>(()),
            }
        }
    })?;
    if suppressed.is_some() {
        device.counters.log();
    }
    Ok(end)
}

/// Looks whether the image has another size now. True if the driver has to be told. The size of a disk in a format is
/// that of its start.
fn look_again(device: &Device) -> bool {
    if device.formatted.is_some() {
        return false;
    }
    device.image.look_again().unwrap_or_else(|error| {
        tracing::warn!(error = vvu_back_end::in_one_line(&error), "image cannot be looked at again");
        false
    })
}

fn log_outcome(outcome: Result<Ending, SessionError>) {
    match outcome {
        Ok(Ending::Closed) => tracing::info!("front-end disconnected"),
        Ok(Ending::Ended) => tracing::info!("front-end was disconnected on request"),
        Err(error) => {
            tracing::warn!(error = vvu_back_end::in_one_line(&error), "front-end was disconnected for an error");
        }
    }
}

enum Event {
    /// Of the operator, or of the kernel: that of a block device that has another size.
    Wish(Wish),
    /// The other descriptor is readable.
    Other,
}

/// What the program follows, with or without a front-end.
struct Wishes {
    signals: Signals,
    /// None for a regular file.
    size_events: Option<SizeEvents>,
}

impl Wishes {
    fn new(signals: Signals, image: &Image) -> Self {
        let size_events = image.is_block_device().then(|| SizeEvents::of(image.file())).and_then(|events| {
            let hint = "a new size of the image is noticed on SIGHUP only";
            events.inspect_err(|error| tracing::warn!(%error, hint, "no events of the kernel")).ok()
        });
        Self { signals, size_events }
    }

    /// Waits for a wish, or until `other` is readable.
    fn wait(&self, other: &impl AsFd) -> io::Result<Event> {
        loop {
            if let Some(wish) = self.signals.next() {
                return Ok(Event::Wish(wish));
            }
            if self.size_events.as_ref().is_some_and(SizeEvents::take) {
                return Ok(Event::Wish(Wish::LookAgain));
            }
            let mut polled = vec![PollFd::new(other, PollFlags::IN), PollFd::new(&self.signals, PollFlags::IN)];
            polled.extend(self.size_events.iter().map(|events| PollFd::new(events, PollFlags::IN)));
            match poll(&mut polled, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if polled.first().is_some_and(|other| !other.revents().is_empty()) {
                return Ok(Event::Other);
            }
        }
    }
}
