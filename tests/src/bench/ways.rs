//! The ways from a front-end to vvu-blk: straight, through bridge and loopback (both without any VM), and through bridge and
//! appliance VM; the latter two with signals handed over, or relayed by the bridge.

use std::fs;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::back_ends::{Storage, serve_vvu_blk};
use super::side_by_side::Way;
use crate::backend::ServedImage;
use crate::process::{Process, command_that_dies_with_us};
use crate::testbed::{Testbed, workspace_program};
use crate::vvu_run::VvuRun;

/// How long the bridge may take to listen and to have a back-end.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// Vectors of the loopback's doorbell device: each run of a load is a front-end with kicks of its own, and none is given back.
const VECTORS: &str = "2048";

/// Driver memory that the bridge can serve, in bytes.
const WINDOW: u64 = 1 << 30;

/// Who carries kicks and calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signals {
    /// Nobody: the eventfds of both ends are the same.
    HandedOver,
    /// The bridge.
    Relayed,
}

impl Signals {
    /// As tables have it.
    fn word(self) -> &'static str {
        match self {
            Self::HandedOver => "handed over",
            Self::Relayed => "relayed",
        }
    }
}

/// A way with its own back-end behind bridge and loopback.
pub(crate) fn through_loopback(
    testbed: &Testbed,
    storage: &Storage<'_>,
    poll: &str,
    signals: Signals,
) -> Result<(Way, Vec<Process>)> {
    let word = if signals == Signals::Relayed { "relay" } else { "hand-over" };
    let (back_end, back_end_process) = serve_vvu_blk(testbed, word, storage, poll)?;
    let directory = testbed.socket(&format!("{word}-set"));
    fs::create_dir(&directory).context("cannot make a directory of sockets")?;
    let socket = testbed.socket(&format!("{word}.sock"));

    let notices = Notices::new(testbed, word)?;
    let mut command = command_that_dies_with_us(workspace_program("vvu-bridge", "VVU_BRIDGE_BIN")?);
    command
        .env("NOTIFY_SOCKET", notices.path())
        .arg("--appliance-dir")
        .arg(&directory)
        .arg("--socket-path")
        .arg(&socket);
    command.args(["--window", &WINDOW.to_string(), "--vectors", VECTORS]);
    if signals == Signals::Relayed {
        command.arg("--relay");
    }
    let bridge = Process::spawn(&format!("bridge-{word}"), command, testbed.folder())?;
    notices.wait_for("X_VVU_LISTENING=1")?;
    let mut command = command_that_dies_with_us(workspace_program("vvu-loopback", "VVU_LOOPBACK_BIN")?);
    command.arg("--bridge").arg(&directory).arg("--back-end").arg(&back_end.socket);
    let loopback = Process::spawn(&format!("loopback-{word}"), command, testbed.folder())?;
    notices.wait_for("READY=1")?;

    let mut processes = back_end.processes;
    processes.push(("bridge", bridge.watched().pid()));
    processes.push(("loopback", loopback.watched().pid()));
    let way = Way { name: format!("loopback, {}", signals.word()), socket, processes, against: None };
    Ok((way, vec![bridge, loopback, back_end_process]))
}

/// A way with an appliance VM that serves an image, which others have open as well.
pub(crate) fn through_appliance(
    testbed: &Testbed,
    image: &ServedImage,
    poll: &str,
    signals: Signals,
) -> Result<(Way, VvuRun)> {
    let word = if signals == Signals::Relayed { "vm-relay" } else { "vm-hand-over" };
    let mut options = vec!["--poll", poll];
    if signals == Signals::Relayed {
        options.push("--relay");
    }
    let run = VvuRun::start_with(testbed, word, image, &options)?;
    let processes = vec![("bridge", run.bridge().pid()), ("appliance's QEMU", run.appliance().pid())];
    let name = format!("appliance VM, {}", signals.word());
    Ok((Way { name, socket: run.socket().to_owned(), processes, against: None }, run))
}

/// Nothing between the front-end and vvu-blk.
pub(crate) fn straight(testbed: &Testbed, storage: &Storage<'_>, poll: &str) -> Result<(Way, Process)> {
    let (way, process) = serve_vvu_blk(testbed, "straight", storage, poll)?;
    Ok((Way { name: "straight".to_owned(), ..way }, process))
}

/// What the bridge says to whoever has started it (sd_notify(3)).
struct Notices {
    socket: UnixDatagram,
    path: std::path::PathBuf,
}

impl Notices {
    fn new(testbed: &Testbed, name: &str) -> Result<Self> {
        let path = testbed.socket(&format!("{name}.notices"));
        let socket = UnixDatagram::bind(&path).context("cannot make a socket for notices")?;
        socket.set_read_timeout(Some(START_PATIENCE)).context("cannot limit a wait")?;
        Ok(Self { socket, path })
    }

    fn path(&self) -> &std::path::Path {
        &self.path
    }

    fn wait_for(&self, line: &str) -> Result<()> {
        loop {
            let mut text = [0; 4096];
            let len = match self.socket.recv(&mut text) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    bail!("the bridge did not say {line} within {START_PATIENCE:?}")
                }
                received => received.context("cannot hear the bridge")?,
            };
            let text = String::from_utf8_lossy(text.get(..len).unwrap_or_default());
            if text.lines().any(|said| said == line) {
                return Ok(());
            }
        }
    }
}
