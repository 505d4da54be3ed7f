//! What serves a disk to the driver VM: the appliance VM, or for comparison a vhost-user back-end on the host.
//!
//! The same tests can run against each, so a failure that all of them show is the driver VM's or the harness's.

use std::ffi::OsStr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{env, fmt};

use anyhow::{Context, Result, bail};
use rustix::io::{FdFlags, fcntl_setfd};

use crate::process::{Process, command_that_dies_with_us};
use crate::surroundings::Surroundings;
use crate::testbed::{Testbed, workspace_program};
use crate::vvu_run::VvuRun;

/// How long a host-side back-end may take to listen.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// Names the back-end of the tests that do not insist on one: `vvu` (default), `qemu-storage-daemon` or `vvu-blk`.
pub const BACKEND_VARIABLE: &str = "VVU_TEST_BACKEND";

/// Who serves the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// `vvu run blk`: bridge and appliance VM.
    Vvu,
    /// `qemu-storage-daemon` on the host.
    QemuStorageDaemon,
    /// The appliance's own back-end program, on the host.
    VvuBlkOnHost,
}

impl fmt::Display for Backend {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Vvu => "vvu",
            Self::QemuStorageDaemon => "qemu-storage-daemon",
            Self::VvuBlkOnHost => "vvu-blk",
        })
    }
}

/// A disk to be served.
#[derive(Debug, Clone)]
pub struct ServedImage {
    /// The raw image.
    pub image: PathBuf,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Request queues offered.
    pub queues: u16,
    /// Whether another back-end has the image open at the same time, as it is with a migration.
    pub shared: bool,
    /// What the back-end finds around it, unless it runs as the test does.
    pub surroundings: Option<Surroundings>,
}

impl ServedImage {
    /// The whole image, to be read and written, with one queue.
    pub fn writable(image: &Path) -> Self {
        Self { image: image.to_owned(), read_only: false, queues: 1, shared: false, surroundings: None }
    }

    /// Refuses writes.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Shares the image with other back-ends.
    #[must_use]
    pub fn shared(mut self) -> Self {
        self.shared = true;
        self
    }

    /// Starts the back-end in surroundings of its own.
    #[must_use]
    pub fn in_surroundings(mut self, surroundings: Surroundings) -> Self {
        self.surroundings = Some(surroundings);
        self
    }

    /// The command that runs back-end `program` for this image.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        match &self.surroundings {
            Some(surroundings) => surroundings.command_in(program),
            None => command_that_dies_with_us(program),
        }
    }

    /// Offers `queues` queues.
    #[must_use]
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }
}

/// A disk that is being served.
#[derive(Debug)]
pub enum Served {
    /// By `vvu run`.
    Vvu(Box<VvuRun>),
    /// By one process on the host.
    OnHost {
        /// The process.
        process: Process,
        /// Where it listens.
        socket: PathBuf,
    },
}

impl Served {
    /// Where the disk's vhost-user socket is.
    pub fn socket(&self) -> &Path {
        match self {
            Self::Vvu(run) => run.socket(),
            Self::OnHost { socket, .. } => socket,
        }
    }

    /// Ends the back-end; `vvu run` is ended in order and leaves nothing behind.
    ///
    /// # Errors
    /// If it does not end as it should.
    pub fn stop(self) -> Result<()> {
        match self {
            Self::Vvu(run) => run.stop().map(drop),
            Self::OnHost { mut process, .. } => process.kill(),
        }
    }
}

impl Backend {
    /// The back-end that [`BACKEND_VARIABLE`] names.
    ///
    /// # Errors
    /// If it names none of the three.
    pub fn chosen() -> Result<Self> {
        let name = env::var(BACKEND_VARIABLE).unwrap_or_default();
        match name.as_str() {
            "" | "vvu" => Ok(Self::Vvu),
            "qemu-storage-daemon" => Ok(Self::QemuStorageDaemon),
            "vvu-blk" => Ok(Self::VvuBlkOnHost),
            _ => bail!("{BACKEND_VARIABLE}={name}: expected vvu, qemu-storage-daemon or vvu-blk"),
        }
    }

    /// Serves an image; `name` is for logs and the socket.
    ///
    /// # Errors
    /// If the back-end does not come up.
    pub fn serve(self, testbed: &Testbed, name: &str, image: &ServedImage) -> Result<Served> {
        match self {
            Self::Vvu => Ok(Served::Vvu(Box::new(VvuRun::start(testbed, name, image)?))),
            Self::QemuStorageDaemon => serve_by_storage_daemon(testbed, name, image),
            Self::VvuBlkOnHost => serve_by_vvu_blk(testbed, name, image),
        }
    }
}

/// Image locking is off, because the benchmark serves one image twice (and loads one of the two at a time).
fn serve_by_storage_daemon(testbed: &Testbed, name: &str, image: &ServedImage) -> Result<Served> {
    let socket = testbed.socket(&format!("{name}.sock"));
    let read_only = if image.read_only { "on" } else { "off" };
    let writable = if image.read_only { "off" } else { "on" };
    let arguments = [
        "--blockdev".to_owned(),
        format!(
            "driver=file,node-name=disk,filename={},cache.direct=on,aio=io_uring,discard=unmap,locking=off,\
             read-only={read_only}",
            image.image.display()
        ),
        "--export".to_owned(),
        format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable={writable},\
             num-queues={}",
            socket.display(),
            image.queues
        ),
        // Options are acted upon in their order: once the monitor greets, the export is there.
        "--chardev".to_owned(),
        "stdio,id=qmp".to_owned(),
        "--monitor".to_owned(),
        "chardev=qmp".to_owned(),
    ];
    let program = &testbed.setup().qemu_storage_daemon;
    let mut command = image.command(program);
    command.args(arguments);
    let mut process = Process::spawn(name, command, testbed.folder())?;
    process.await_line("QMP greeting", START_PATIENCE, |line| line.contains("\"QMP\"").then_some(()))?;
    Ok(Served::OnHost { process, socket })
}

/// The socket listens before the program starts and is inherited, so there is nothing to wait for.
fn serve_by_vvu_blk(testbed: &Testbed, name: &str, image: &ServedImage) -> Result<Served> {
    let socket = testbed.socket(&format!("{name}.sock"));
    let listener = UnixListener::bind(&socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
    fcntl_setfd(&listener, FdFlags::empty()).context("cannot pass a socket on")?;
    let mut command = image.command(workspace_program("vvu-blk", "VVU_BLK_BIN")?);
    command.args(["--fd", &listener.as_raw_fd().to_string(), "--queues", &image.queues.to_string(), "--image"]);
    command.arg(&image.image);
    if image.read_only {
        command.arg("--read-only");
    }
    let process = Process::spawn(name, command, testbed.folder())?;
    Ok(Served::OnHost { process, socket })
}
