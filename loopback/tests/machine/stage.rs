//! The programs, each started and killed as a test wants it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vvu_test_driver::process::Process;

/// Bytes of the disk.
pub(crate) const DISK_LEN: usize = 4 << 20;

/// A directory with the disk and all sockets, and the programs in it.
pub(crate) struct Stage {
    pub(crate) bridge: Process,
    pub(crate) back_end: Process,
    pub(crate) appliance: Process,
    directory: tempfile::TempDir,
}

impl Stage {
    /// Bridge, appliance and back-end with further arguments for bridge and back-end.
    pub(crate) fn start(bridge: &[&str], back_end: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("disk"), vec![0; DISK_LEN]).unwrap();
        Self::start_in(directory, bridge, back_end)
    }

    /// The same with a disk that is there.
    pub(crate) fn start_in(directory: tempfile::TempDir, bridge: &[&str], back_end: &[&str]) -> Self {
        let path = directory.path();
        let back_end = start_back_end(path, "blk.sock", back_end);
        let mut command = program("vvu-bridge");
        command.arg("--socket-path").arg(path.join("front-end.sock")).arg("--appliance-dir").arg(path);
        command.args(["--window", "67108864"]).args(bridge);
        let bridge = Process::spawn("vvu-bridge", command);
        bridge.wait_for_line(|line| line.contains("listening"));
        let appliance = start_appliance(path, "blk.sock");
        Self { bridge, back_end, appliance, directory }
    }

    /// Where front-ends connect.
    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("front-end.sock")
    }

    /// What is on the disk.
    pub(crate) fn disk(&self) -> Vec<u8> {
        std::fs::read(self.directory.path().join("disk")).unwrap()
    }

    /// The back-end is killed, and another one started.
    pub(crate) fn replace_back_end(&mut self) {
        self.back_end.kill();
        self.back_end = start_back_end(self.directory.path(), "blk.sock", &[]);
    }

    /// The appliance is killed, and another one started.
    pub(crate) fn replace_appliance(&mut self) {
        self.appliance.kill();
        self.appliance = start_appliance(self.directory.path(), "blk.sock");
    }

    /// A second appliance comes, with a back-end of its own.
    pub(crate) fn start_second(&self, back_end: &[&str]) -> (Process, Process) {
        let path = self.directory.path();
        (start_back_end(path, "second.sock", back_end), start_appliance(path, "second.sock"))
    }
}

fn start_back_end(directory: &Path, socket: &str, arguments: &[&str]) -> Process {
    let mut command = program("vvu-blk");
    command.arg("--socket-path").arg(directory.join(socket)).arg("--image").arg(directory.join("disk"));
    let back_end = Process::spawn("vvu-blk", with(command, arguments));
    back_end.wait_for_line(|line| line.contains("listening"));
    back_end
}

fn start_appliance(directory: &Path, back_end: &str) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vvu-loopback"));
    command.arg("--bridge").arg(directory).arg("--back-end").arg(directory.join(back_end));
    Process::spawn("vvu-loopback", with(command, &[]))
}

fn with(mut command: Command, arguments: &[&str]) -> Command {
    command.args(arguments).stdin(Stdio::null());
    command
}

/// A program of another package: next to the one of this.
fn program(name: &str) -> Command {
    let path = Path::new(env!("CARGO_BIN_EXE_vvu-loopback")).with_file_name(name);
    assert!(path.is_file(), "{name} is not built: run `cargo build -p {name}`");
    Command::new(path)
}
