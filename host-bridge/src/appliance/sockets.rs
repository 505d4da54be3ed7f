//! The three listening sockets, one for each device of a set.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use tokio::net::{UnixListener, UnixStream};

use crate::front_end::remove_stale_socket;

/// One of the three devices.
#[derive(Debug, Clone, Copy)]
pub(super) enum Device {
    Control,
    Window,
    Doorbell,
}

/// The listening sockets. The files are removed at the end.
#[derive(Debug)]
pub(super) struct Sockets {
    control: (UnixListener, RemovedAtEnd),
    window: (UnixListener, RemovedAtEnd),
    doorbell: (UnixListener, RemovedAtEnd),
}

#[derive(Debug)]
struct RemovedAtEnd(PathBuf);

impl Drop for RemovedAtEnd {
    fn drop(&mut self) {
        // The directory may have been removed already; there is nobody to tell.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Sockets {
    /// Makes the sockets in `directory`.
    pub(super) fn bind(directory: &Path) -> anyhow::Result<Self> {
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

    /// The next connection. May be cancelled.
    pub(super) async fn accept(&self) -> io::Result<(Device, UnixStream)> {
        tokio::select! {
            accepted = self.control.0.accept() => Ok((Device::Control, accepted?.0)),
            accepted = self.window.0.accept() => Ok((Device::Window, accepted?.0)),
            accepted = self.doorbell.0.accept() => Ok((Device::Doorbell, accepted?.0)),
        }
    }
}
