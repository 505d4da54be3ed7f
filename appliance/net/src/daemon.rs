//! The program's life: listen at every port, serve one front-end after the other at each, end on a signal.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use vvu_back_end::control_channel::ControlChannel;
use vvu_back_end::cpus::UnusableCpu;
use vvu_back_end::listener::{Endpoint, FrontEnds, ListenerError};
use vvu_back_end::log_limit::LogLimit;
use vvu_back_end::signals::{Signals, Wish};
use vvu_back_end::threads::Threads;
use vvu_back_end::wakeup::Wakeup;
use vvu_back_end::{Connection, Ending, SessionError, in_one_line, lost_memory};

use crate::bell::Bell;
use crate::control_requests::{Report, carry_out};
use crate::device::PortDevice;
use crate::port::PortSettings;
use crate::switch::Switch;
use crate::tap::Tap;
use crate::uplink::{self, Uplink};

/// Most queues of the uplink; each has a thread.
const MAX_LANES: u16 = 16;

/// What to serve, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The ports, by their numbers.
    pub ports: Vec<PortOptions>,
    /// The interface that is the uplink.
    pub tap: Option<String>,
    /// Largest packet without its Ethernet header, in bytes.
    pub mtu: u16,
    /// Where the control channel is.
    pub control: Option<PathBuf>,
    /// How the queues' threads work.
    pub threads: Threads,
}

/// One port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortOptions {
    /// Where front-ends connect.
    pub endpoint: Endpoint,
    /// What the port is like.
    pub settings: PortSettings,
}

/// Why the program cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A socket is the reason.
    #[error(transparent)]
    Listener(#[from] ListenerError),
    /// The uplink is the reason.
    #[error(
        "cannot use {name} as the uplink; make it with 'ip tuntap add {name} mode tap user USER multi_queue vnet_hdr'"
    )]
    Tap {
        /// Name of the interface.
        name: String,
        /// Cause.
        source: io::Error,
    },
    /// A CPU of the list is the reason.
    #[error(transparent)]
    Cpu(#[from] UnusableCpu),
    /// io_uring does not work here.
    #[error("io_uring cannot be set up; it needs Linux 6.1 with kernel.io_uring_disabled=0")]
    IoUring(#[source] io::Error),
    /// The system refuses what every program needs.
    #[error("system call failed")]
    System(#[from] io::Error),
}

/// Serves until SIGTERM or SIGINT, or until the front-ends of all connected sockets have left.
///
/// # Errors
/// [`DaemonError`] if a socket or the uplink cannot be used. What a front-end or the driver does is never an error.
pub fn run(options: Options) -> Result<(), DaemonError> {
    let Options { ports, tap, mtu, control, threads } = options;
    threads.check()?;
    // First: the descriptors of `fd=` must not be mixed up with ones that are opened here, and threads that are started
    // later inherit the signal mask.
    let front_ends = ports.iter().map(|port| FrontEnds::new(&port.endpoint)).collect::<Result<Vec<_>, _>>()?;
    let signals = Signals::take_over()?;
    lost_memory::install()?;
    drop(Bell::new().map_err(DaemonError::IoUring)?);
    let lanes = ports.iter().map(|port| port.settings.pairs).max().unwrap_or(1).min(MAX_LANES);
    let uplink =
        tap.map(|name| Tap::open(&name, lanes).map(Uplink::new).map_err(|source| DaemonError::Tap { name, source }));
    let settings = ports.into_iter().map(|port| port.settings).collect();
    let switch = Arc::new(Switch::new(settings, uplink.transpose()?, mtu, threads));
    let _control = control.map(|path| {
        let switch = Arc::clone(&switch);
        ControlChannel::open(&path, move |request| carry_out(&switch, request))
    });
    let _control = _control.transpose()?;
    tracing::info!(ports = front_ends.len(), "listening");
    let program =
        Program { switch, end: Wakeup::new().map_err(io::Error::from)?, gone: Wakeup::new().map_err(io::Error::from)? };
    program.serve(front_ends, &signals)?;
    tracing::info!("ended");
    Ok(())
}

struct Program {
    switch: Arc<Switch>,
    /// Fires once, for all threads: it is never taken back.
    end: Wakeup,
    /// Fires when a port's thread ends by itself.
    gone: Wakeup,
}

impl Program {
    fn serve(&self, front_ends: Vec<FrontEnds>, signals: &Signals) -> io::Result<()> {
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (index, front_ends) in front_ends.into_iter().enumerate() {
                let serve = move || self.serve_port(index, front_ends);
                threads.push(std::thread::Builder::new().name(format!("port {index}")).spawn_scoped(scope, serve)?);
            }
            for lane in 0..self.switch.uplink().map_or(0, Uplink::lanes) {
                let serve = move || {
                    if let Err(error) = uplink::serve(&self.switch, lane, &self.end) {
                        tracing::error!(%error, "the uplink is lost");
                    }
                };
                std::thread::Builder::new().name(format!("uplink {lane}")).spawn_scoped(scope, serve)?;
            }
            let outcome =
                self.follow_signals(signals, || threads.iter().all(std::thread::ScopedJoinHandle::is_finished));
            self.end.wake();
            for port in self.switch.ports() {
                if let Some(handle) = port.connection().as_ref() {
                    handle.end();
                }
            }
            outcome
        })
    }

    fn follow_signals(&self, signals: &Signals, all_are_gone: impl Fn() -> bool) -> io::Result<()> {
        loop {
            while let Some(wish) = signals.next() {
                match wish {
                    Wish::Report => Report::of(&self.switch).log(),
                    Wish::LookAgain => {}
                    Wish::End => return Ok(()),
                }
            }
            if all_are_gone() {
                return Ok(());
            }
            wait(signals, &self.gone)?;
            self.gone.consume();
        }
    }

    /// Serves one port's front-ends until the end.
    fn serve_port(&self, index: usize, mut front_ends: FrontEnds) {
        let log = LogLimit::new();
        if let Err(error) = self.serve_front_ends(index, &mut front_ends, &log) {
            tracing::error!(port = index, %error, "the port is lost");
        }
        self.gone.wake();
    }

    fn serve_front_ends(&self, index: usize, front_ends: &mut FrontEnds, log: &LogLimit) -> io::Result<()> {
        while let Some(socket) = front_ends.waiting() {
            if wait(&self.end, &socket)? {
                return Ok(());
            }
            let stream = front_ends.accept()?;
            self.serve_front_end(index, stream, log);
        }
        Ok(())
    }

    fn serve_front_end(&self, index: usize, stream: UnixStream, log: &LogLimit) {
        let Some(port) = self.switch.port(index) else { return };
        let Some(device) = PortDevice::new(&self.switch, index) else { return };
        let suppressed = log.admit(Instant::now());
        if let Some(suppressed) = suppressed {
            tracing::info!(port = index, suppressed, "front-end connected");
        }
        let connection = Connection::new(stream, Arc::new(device));
        *port.connection() = Some(connection.handle());
        // Who asks for the end afterwards finds the handle; who has asked before is seen here.
        if has_fired(&self.end) {
            return;
        }
        let outcome = connection.serve();
        *port.connection() = None;
        self.switch.forget(index);
        if suppressed.is_some() {
            log_outcome(index, outcome);
        }
    }
}

/// Waits until one of the two is readable; true if it is the first.
fn wait(first: &impl AsFd, second: &impl AsFd) -> io::Result<bool> {
    loop {
        let mut polled = [PollFd::new(first, PollFlags::IN), PollFd::new(second, PollFlags::IN)];
        match poll(&mut polled, None) {
            Ok(_) => {
                let [first, _] = polled;
                return Ok(!first.revents().is_empty());
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn has_fired(event: &Wakeup) -> bool {
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&now)).is_ok_and(|count| count > 0)
}

fn log_outcome(port: usize, outcome: Result<Ending, SessionError>) {
    match outcome {
        Ok(Ending::Closed) => tracing::info!(port, "front-end disconnected"),
        Ok(Ending::Ended) => tracing::info!(port, "front-end was disconnected on request"),
        Err(error) => {
            tracing::warn!(port, error = in_one_line(&error), "front-end was disconnected for an error");
        }
    }
}
