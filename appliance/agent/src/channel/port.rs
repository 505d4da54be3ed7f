//! A virtio-serial port: a device node whose other end, on the host, comes and goes.
//!
//! As Linux' driver `virtio_console` has it: while nobody is connected on the host, the node is hung up (POLLHUP), reads give
//! what is left and then nothing, and writes would block. Whether anything is left only a read tells. A connection wakes who
//! waits for room to write.

use std::cell::RefCell;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, retry_on_intr};

use crate::watch::{Changes, look_until};

/// Ports of virtio-serial devices, each with an attribute `name`.
const PORTS: &str = "/sys/class/virtio-ports";

/// How long the kernel may take to show a port: it asks the device for its name.
const PORT_TIMEOUT: Duration = Duration::from_secs(10);

/// A port, open.
#[derive(Debug)]
pub struct Port {
    node: OwnedFd,
    readable: Changes,
    writable: Changes,
    /// What was read to see whether there is anything, or was put back.
    tasted: RefCell<Vec<u8>>,
}

/// Bytes that are read to see whether there are any.
const TASTE_LEN: usize = 4096;

impl Port {
    /// Waits for the port with this name, and opens it. `None` if there is none.
    ///
    /// # Errors
    /// If it cannot be looked for, or opened.
    pub async fn find(name: &str) -> io::Result<Option<Self>> {
        let found = look_until(PORT_TIMEOUT, || port_with_name(Path::new(PORTS), name)).await?;
        let Some(node) = found else { return Ok(None) };
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Self::new(open(Path::new("/dev").join(node), flags, Mode::empty())?).map(Some)
    }

    /// A port that is open; its reads and writes do not block.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub fn new(node: OwnedFd) -> io::Result<Self> {
        let readable = Changes::new(&node, EventFlags::IN)?;
        let writable = Changes::new(&node, EventFlags::IN | EventFlags::OUT)?;
        Ok(Self { node, readable, writable, tasted: RefCell::default() })
    }

    /// Waits for a client: one that is connected, or has been and has left something to read.
    pub(crate) async fn client(&self) -> io::Result<()> {
        while self.is_hung_up()? && !self.taste()? {
            self.writable.next().await?;
        }
        Ok(())
    }

    /// Waits until no client is connected.
    pub(super) async fn gone(&self) -> io::Result<()> {
        while !self.is_hung_up()? {
            self.writable.next().await?;
        }
        Ok(())
    }

    /// Waits until there is something to read, or the client has gone; whether there is something.
    pub(super) async fn speaks(&self) -> io::Result<bool> {
        while !self.taste()? {
            if self.is_hung_up()? {
                // It may have spoken between the two looks.
                return self.taste();
            }
            self.readable.next().await?;
        }
        Ok(true)
    }

    /// Reads what is there, or waits for it; nothing if the client has gone.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let tasted = self.take_tasted(buffer);
        if tasted > 0 {
            return Ok(tasted);
        }
        loop {
            match retry_on_intr(|| rustix::io::read(&self.node, &mut *buffer)) {
                Err(Errno::AGAIN) => self.readable.next().await?,
                read => return Ok(read?),
            }
        }
    }

    /// Writes as much as there is room for, or waits for room; nothing if the client has gone.
    pub(super) async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match retry_on_intr(|| rustix::io::write(&self.node, bytes)) {
                Err(Errno::AGAIN) => {
                    if self.is_hung_up()? {
                        return Ok(0);
                    }
                    self.writable.next().await?;
                }
                Err(Errno::PIPE) => return Ok(0),
                written => return Ok(written?),
            }
        }
    }

    /// Reads what a client has left behind and throws it away, unless another one has come.
    pub(super) fn forget(&self) -> io::Result<()> {
        while self.is_hung_up()? && self.taste()? {
            self.tasted.borrow_mut().clear();
        }
        Ok(())
    }

    /// Has these bytes read once more.
    pub(super) fn put_back(&self, bytes: &[u8]) {
        let mut tasted = self.tasted.borrow_mut();
        tasted.splice(..0, bytes.iter().copied());
    }

    /// Whether there is something to read.
    fn taste(&self) -> io::Result<bool> {
        let mut tasted = self.tasted.borrow_mut();
        if tasted.is_empty() {
            let mut buffer = [0; TASTE_LEN];
            match retry_on_intr(|| rustix::io::read(&self.node, &mut buffer)) {
                Ok(read) => tasted.extend(buffer.iter().take(read)),
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(!tasted.is_empty())
    }

    fn take_tasted(&self, buffer: &mut [u8]) -> usize {
        let mut tasted = self.tasted.borrow_mut();
        let len = tasted.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(tasted.drain(..len)) {
            *to = from;
        }
        len
    }

    fn is_hung_up(&self) -> io::Result<bool> {
        let mut node = [PollFd::new(&self.node, PollFlags::OUT)];
        // It does not wait, but a signal that is pending counts all the same.
        retry_on_intr(|| poll(&mut node, Some(&Timespec::default())))?;
        let [node] = node;
        Ok(node.revents().contains(PollFlags::HUP))
    }
}

/// Name of the node of the port with this name. A port gets its name after its node.
fn port_with_name(ports: &Path, name: &str) -> io::Result<Option<PathBuf>> {
    let entries = match fs::read_dir(ports) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|text| text.trim_end() == name) {
            return Ok(Some(entry.file_name().into()));
        }
    }
    Ok(None)
}
