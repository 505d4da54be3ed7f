//! The device set, from the side of the bridge: three sockets to the appliance's VMM.
//!
//! Two of them speak vhost-user with the bridge as the back-end of QEMU's generic device ([`device`]): the control device
//! ([`control`]) and the window device ([`window`]). The third speaks ivshmem ([`doorbell`]). Each is one task that owns
//! its socket; a port is how the rest of the bridge talks to it. [`sets`] makes an [`Appliance`] of three connections, and says
//! what becomes of it.

pub mod control;
pub mod device;
pub mod doorbell;
mod memory;
mod queue;
pub mod sets;
mod sockets;
pub mod window;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::fs::fstat;
use tokio::time::{Instant, timeout, timeout_at};
use vvu_protocol::DecodeError;
use vvu_protocol::memory::MemoryError;
use vvu_protocol::window::{FileId, Layout};
use vvu_socket::SocketError;
use vvu_socket::event::EventError;

use self::control::ControlPort;
use self::window::WindowPort;
use crate::doorbells::Doorbells;

/// How long the agent may take to clear a session away and have a back-end ready again.
pub const CLEAR_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the appliance's VMM may take to make room in a socket.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// What ends an appliance: its VMM broke the protocol, or went away.
#[derive(Debug, thiserror::Error)]
pub enum ApplianceError {
    /// The VMM closed a socket.
    #[error("the appliance's VMM closed the {device} device's socket")]
    Gone {
        /// Which device.
        device: &'static str,
    },
    /// A socket failed.
    #[error("{device} device of the appliance")]
    Socket {
        /// Which device.
        device: &'static str,
        /// What happened.
        source: SocketError,
    },
    /// A message of the VMM could not be decoded.
    #[error("{device} device of the appliance")]
    Decode {
        /// Which device.
        device: &'static str,
        /// What was wrong.
        source: DecodeError,
    },
    /// A request that the generic device does not send.
    #[error("{device} device of the appliance: request {request} is not expected here")]
    Request {
        /// Which device.
        device: &'static str,
        /// Its name.
        request: &'static str,
    },
    /// A request without which another makes no sense, or with a value out of range.
    #[error("{device} device of the appliance: vring {index}: {problem}")]
    Vring {
        /// Which device.
        device: &'static str,
        /// Index that came.
        index: u32,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A vring's descriptor is no eventfd.
    #[error("{device} device of the appliance")]
    Event {
        /// Which device.
        device: &'static str,
        /// What was wrong.
        source: EventError,
    },
    /// The appliance's memory table breaks a rule.
    #[error("memory of the appliance")]
    Memory(#[from] MemoryError),
    /// The appliance's memory could not be mapped.
    #[error("memory of the appliance: {problem}")]
    Map {
        /// What is wrong with it.
        problem: String,
    },
    /// The agent's queues are broken.
    #[error("control device's queue {queue}: {problem}")]
    Queue {
        /// Which queue.
        queue: u16,
        /// What is wrong with it.
        problem: String,
    },
    /// The VMM refused a mapping.
    #[error("the appliance's VMM refused {operation} of {len:#x} bytes at window offset {offset:#x} (answer {answer})")]
    Refused {
        /// SHMEM_MAP or SHMEM_UNMAP.
        operation: &'static str,
        /// Length in bytes.
        len: u64,
        /// Window offset.
        offset: u64,
        /// The VMM's answer.
        answer: u64,
    },
    /// The VMM does not read a socket.
    #[error("the appliance's VMM takes no messages of the {device} device")]
    Stuck {
        /// Which device.
        device: &'static str,
    },
    /// A task of the bridge failed.
    #[error("the bridge failed to serve the appliance: {problem}")]
    Task {
        /// How.
        problem: String,
    },
    /// The appliance was reset or its VMM stopped the device.
    #[error("the appliance was reset")]
    Reset,
    /// The appliance did not answer in time.
    #[error("the appliance did not answer {what} within {seconds} s")]
    Timeout {
        /// What was asked.
        what: &'static str,
        /// How long was waited.
        seconds: u64,
    },
    /// A system call failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What happened.
        source: io::Error,
    },
}

/// One appliance: the ports to one device set, and what of the driver VM is in its window. Nothing in it is shared with
/// another one.
#[derive(Debug)]
pub struct Appliance {
    /// The control device.
    pub control: ControlPort,
    /// The window device.
    pub window: WindowPort,
    /// The eventfds.
    pub doorbells: Doorbells,
    /// What is mapped.
    pub layout: Layout,
    /// Accepted appliances are counted from 1.
    pub number: u32,
    /// Number of the protocol's session that has begun here last, 0 before the first.
    pub session: u32,
}

impl Appliance {
    /// Tells the agent that its session has ended. From then on no signal is passed on.
    ///
    /// # Errors
    /// [`ApplianceError`] if the appliance is of no use any more.
    pub async fn disconnect(&mut self) -> Result<(), ApplianceError> {
        self.reset_doorbells()?;
        self.control.commands.disconnect(self.session).await
    }

    /// After [`Appliance::disconnect`], waits until `deadline` for the agent to say that it holds nothing of a session any
    /// more, and that a back-end is up. May be cancelled.
    ///
    /// # Errors
    /// [`ApplianceError`] if the appliance is of no use any more.
    pub async fn cleared(&mut self, deadline: Instant) -> Result<(), ApplianceError> {
        match timeout_at(deadline, self.ready()).await {
            // Until now the back-end may have signalled.
            Ok(ready) => ready.and_then(|()| self.reset_doorbells()),
            Err(_) => Err(ApplianceError::Timeout { what: "the end of a session", seconds: CLEAR_TIMEOUT.as_secs() }),
        }
    }

    /// Takes everything of the driver VM out of the window, for a front-end that is gone.
    ///
    /// # Errors
    /// [`ApplianceError`] if the appliance is of no use any more.
    pub async fn unmap(&mut self) -> Result<(), ApplianceError> {
        self.window.unmap_all().await?;
        self.layout.clear();
        self.doorbells.withdraw_peers();
        Ok(())
    }

    /// Waits until the agent has a back-end and driver memory can be mapped.
    async fn ready(&self) -> Result<(), ApplianceError> {
        let (mut window, mut control) = (self.window.state(), self.control.state());
        loop {
            window.wait_for(|state| state.ready).await.map_err(|_| ApplianceError::Gone { device: "window" })?;
            control
                .wait_for(|state| state.back_end_up)
                .await
                .map_err(|_| ApplianceError::Gone { device: "control" })?;
            if window.borrow().ready {
                return Ok(());
            }
        }
    }

    fn reset_doorbells(&mut self) -> Result<(), ApplianceError> {
        self.doorbells.reset().map_err(|source| ApplianceError::Io { what: "eventfds of the session", source })
    }
}

/// Waits for a message to be sent to the appliance's VMM. One that does not read its socket must not hold the device up: its
/// other messages would wait too.
async fn sent(
    device: &'static str,
    sending: impl Future<Output = Result<(), SocketError>>,
) -> Result<(), ApplianceError> {
    match timeout(SEND_TIMEOUT, sending).await {
        Ok(sent) => sent.map_err(|source| ApplianceError::Socket { device, source }),
        Err(_) => Err(ApplianceError::Stuck { device }),
    }
}

/// Identity of a memory file, and its length in bytes.
pub(crate) fn file_identity(file: &OwnedFd) -> Result<(FileId, u64), ApplianceError> {
    let what = "status of a memory file";
    let status = fstat(file).map_err(|errno| ApplianceError::Io { what, source: errno.into() })?;
    let id = FileId { device: status.st_dev, inode: status.st_ino };
    Ok((id, u64::try_from(status.st_size).unwrap_or(0)))
}
