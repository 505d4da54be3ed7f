//! What whoever has started this process is told, by systemd's notification protocol (sd_notify(3)). Without such a one nothing
//! happens.
//!
//! | line | meaning |
//! | --- | --- |
//! | `X_VVU_LISTENING=1` | all sockets are there |
//! | `X_VVU_APPLIANCE_ACTIVE=n` | appliance n is the one in use; appliances are counted from 1 |
//! | `X_VVU_PAUSE_US=t` | in the same message: how long a front-end that was moved there had no back-end, in microseconds |
//! | `X_VVU_APPLIANCE_LOST=n` | appliance n was dropped, whether it has failed or retired; nothing of it is used any more |
//! | `READY=1` | a front-end can be served, the first time |
//! | `STATUS=text` | the state in words |
//!
//! The bridge never waits for the listener: what it has to say goes to a task of its own. A listener that does not listen for
//! [`BACKLOG`] messages loses what comes then.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram as BlockingDatagram};
use std::time::Duration;

use tokio::net::UnixDatagram;
use tokio::sync::mpsc;

/// Messages that wait for the listener.
const BACKLOG: usize = 256;

/// Says each thing when it changes. Needs a tokio `LocalSet`.
#[derive(Debug)]
pub(crate) struct Announcer {
    /// To the task that sends; `None` without a listener.
    messages: Option<mpsc::Sender<String>>,
    ready: bool,
    active: Option<u32>,
    status: &'static str,
    pause: Option<Duration>,
}

impl Announcer {
    /// All sockets are there.
    pub(crate) fn listening(status: &'static str) -> Self {
        let announcer = Self { messages: start_sending(), ready: false, active: None, status, pause: None };
        announcer.say(format!("X_VVU_LISTENING=1\nSTATUS={status}"));
        announcer
    }

    /// A front-end has a back-end again, after this time. It is said with the number of the appliance.
    pub(crate) fn moved(&mut self, pause: Duration) {
        self.pause = Some(pause);
    }

    /// Appliance `number` is in use.
    pub(crate) fn active(&mut self, number: u32) {
        let pause = self.pause.take();
        if pause.is_none() && self.active == Some(number) {
            return;
        }
        self.active = Some(number);
        let active = format!("X_VVU_APPLIANCE_ACTIVE={number}");
        match pause {
            Some(pause) => {
                tracing::info!(appliance = number, pause_us = pause.as_micros(), "front-end moved");
                self.say(format!("{active}\nX_VVU_PAUSE_US={}", pause.as_micros()));
            }
            None => self.say(active),
        }
        if !self.ready {
            self.ready = true;
            self.say("READY=1".to_owned());
        }
    }

    /// Appliance `number` was dropped.
    pub(crate) fn lost(&self, number: u32) {
        self.say(format!("X_VVU_APPLIANCE_LOST={number}"));
    }

    /// The state in words.
    pub(crate) fn status(&mut self, status: &'static str) {
        if self.status != status {
            self.status = status;
            tracing::info!("{status}");
            self.say(format!("STATUS={status}"));
        }
    }

    fn say(&self, mut message: String) {
        message.push('\n');
        if self.messages.as_ref().is_some_and(|messages| messages.try_send(message).is_err()) {
            tracing::debug!("whoever has started this process does not listen");
        }
    }
}

/// Starts the task that sends, if somebody has asked for messages.
fn start_sending() -> Option<mpsc::Sender<String>> {
    let name = env::var_os("NOTIFY_SOCKET")?;
    let socket = connect(&name).inspect_err(|error| tracing::debug!(%error, "notification socket")).ok()?;
    let (sender, mut messages) = mpsc::channel::<String>(BACKLOG);
    tokio::task::spawn_local(async move {
        while let Some(message) = messages.recv().await {
            if let Err(error) = socket.send(message.as_bytes()).await {
                tracing::debug!(%error, "notification socket");
                return;
            }
        }
    });
    Some(sender)
}

/// The listener's socket: a path, or after an `@` a name without a file.
fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = BlockingDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_nonblocking(true)?;
    UnixDatagram::from_std(socket)
}
