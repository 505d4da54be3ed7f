//! A back-end's surroundings that are not the machine's: storage that fails (a mount namespace of its own, in which the
//! image's file system is small, or vanishes on command), or a network with a TAP. It works for an ordinary user (user
//! namespaces) and ends with the back-end.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;
use vvu_setup::Setup;

use crate::process::{Watched, command_that_dies_with_us};

/// Namespaces in which storage, or the network, is another one.
const STORAGE: &str = "--mount";
const NETWORK: &str = "--net";

/// How long a killed daemon may take to be gone.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// What happens in the namespace before the back-end starts: a shell script that ends with `exec "$@"`.
#[derive(Debug, Clone)]
pub struct Surroundings {
    script: String,
    /// Option of unshare(1): the namespace that is another one, beside the user namespace.
    namespace: &'static str,
}

impl Surroundings {
    /// Mounts a file system of `len` bytes at `mount_point` (an empty directory) and makes a sparse image in it.
    pub fn small_file_system(mount_point: &Path, len: u64, image: &str, image_len: u64) -> Self {
        let mount_point = mount_point.display();
        let script = format!(
            "mount -t tmpfs -o size={len} tmpfs '{mount_point}' && truncate -s {image_len} '{mount_point}/{image}'"
        );
        Self { script, namespace: STORAGE }
    }

    /// Serves the file `backing` at `mount_point` (an empty file) by a FUSE daemon, which [`vanish`] kills. The daemon
    /// dies with the back-end; `pid_file` and a pipe that tells when the daemon is up are made beside each other.
    pub fn served_by_a_daemon(setup: &Setup, mount_point: &Path, backing: &Path, pid_file: &Path) -> Self {
        let script = format!(
            "mkfifo '{pid_file}.pipe' && {{ setpriv --pdeathsig KILL '{daemon}' \
             --blockdev 'driver=file,node-name=disk,filename={backing},locking=off,discard=unmap' \
             --export 'type=fuse,id=export,node-name=disk,mountpoint={mount_point},writable=on,allow-other=off' \
             --pidfile '{pid_file}' --chardev stdio,id=qmp --monitor chardev=qmp < /dev/null > '{pid_file}.pipe' & \
             read -r greeting < '{pid_file}.pipe'; }}",
            pid_file = pid_file.display(),
            daemon = setup.qemu_storage_daemon.display(),
            backing = backing.display(),
            mount_point = mount_point.display(),
        );
        Self { script, namespace: STORAGE }
    }

    /// A network with a TAP, at which this host has the IPv4 address `address` (with the length of its prefix); `server` is a
    /// shell command that runs there until the back-end ends.
    pub fn with_a_tap(name: &str, address: &str, server: &str) -> Self {
        let script = format!("{} && {{ setpriv --pdeathsig KILL {server} < /dev/null & }}", tap(name, address));
        Self { script, namespace: NETWORK }
    }

    /// Why no such network can be had here, if that is so.
    ///
    /// # Errors
    /// If it cannot be found out.
    pub fn no_tap_because() -> Result<Option<String>> {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", NETWORK, "--", "sh", "-c", &tap("probe", "192.0.2.1/32")]);
        let output = command.output().context("cannot run unshare")?;
        let says = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Ok((!output.status.success()).then_some(says))
    }

    /// A command that runs `program` in these surroundings.
    pub(crate) fn command_in(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = command_that_dies_with_us("unshare");
        command.args(["--user", "--map-root-user", self.namespace, "--", "sh", "-c"]);
        command.arg(format!("{} && exec \"$@\"", self.script)).arg("sh").arg(program);
        command
    }
}

/// Kills the daemon of [`Surroundings::served_by_a_daemon`]: every further access to the image fails.
///
/// # Errors
/// If there is no such daemon.
pub fn vanish(pid_file: &PathBuf) -> Result<()> {
    let pid = fs::read_to_string(pid_file).with_context(|| format!("cannot read {}", pid_file.display()))?;
    let daemon = Watched::open("the image's daemon", pid.trim().parse().context("the daemon's pid is no number")?)?;
    daemon.signal(Signal::KILL)?;
    daemon.await_end(END_PATIENCE)
}

/// A shell command that makes a TAP.
fn tap(name: &str, address: &str) -> String {
    format!("ip tuntap add dev {name} mode tap && ip address add {address} dev {name} && ip link set {name} up")
}
