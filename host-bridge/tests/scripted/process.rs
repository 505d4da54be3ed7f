//! The bridge as a process: how it is started, told, watched and found ended.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixDatagram;
use tokio::process::{Child, Command};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::{PATIENCE, QUEUES, WINDOW_LEN, within, within_limit};

/// Identity of the device set in every scene.
pub(crate) const UUID: &str = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";

/// How a bridge has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) log: String,
}

impl Ended {
    /// It failed, and its last line says why.
    pub(crate) fn failed_with(&self, expected: &str) {
        assert_eq!(self.code, Some(1), "exit code");
        let last = self.log.lines().last().unwrap_or_default();
        assert!(last.starts_with("vvu-bridge: "), "the last line is no error: {last}");
        assert!(last.contains(expected), "\"{last}\" does not say \"{expected}\"");
    }
}

/// A running bridge, and the directory with all its sockets.
#[derive(Debug)]
pub(crate) struct Bridge {
    child: Child,
    directory: TempDir,
    notifications: UnixDatagram,
    log: Log,
    log_reader: JoinHandle<()>,
}

/// What the bridge has written to its standard error so far.
#[derive(Debug, Clone, Default)]
struct Log {
    text: Arc<Mutex<String>>,
    grown: Arc<Notify>,
}

impl Bridge {
    /// A bridge with [`QUEUES`] queues that listens at [`Bridge::front_end_path`], and relays all signals.
    pub(crate) async fn start() -> Self {
        Self::start_where(&["--relay"]).await
    }

    /// A bridge that does with signals what `doorbell` says.
    pub(crate) async fn start_where(doorbell: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("front-end.sock");
        let arguments: Vec<&OsStr> = doorbell.iter().map(AsRef::as_ref).collect();
        let arguments = [&["--socket-path".as_ref(), path.as_os_str()], &*arguments].concat();
        let mut bridge = Self::start_with(directory, &arguments);
        bridge.notified("X_VVU_LISTENING=1").await;
        bridge
    }

    /// A bridge that takes its front-ends from where `front_ends` says.
    pub(crate) fn start_with(directory: TempDir, front_ends: &[&OsStr]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vvu-bridge"));
        command.args(front_ends).args(["--uuid", UUID]);
        command.arg("--queues").arg(QUEUES.to_string()).arg("--window").arg(WINDOW_LEN.to_string());
        command.arg("--appliance-dir").arg(directory.path());
        Self::spawn(directory, command)
    }

    /// Runs `command` in place of the bridge's own command line.
    pub(crate) fn spawn(directory: TempDir, mut command: Command) -> Self {
        let notify_path = directory.path().join("notify.sock");
        let notifications = UnixDatagram::bind(&notify_path).unwrap();
        command.env("NOTIFY_SOCKET", &notify_path).env("RUST_LOG", "vvu_bridge=debug");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let log = Log::default();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log_reader = tokio::spawn({
            let log = log.clone();
            async move {
                while let Ok(Some(line)) = lines.next_line().await {
                    eprintln!("{line}");
                    *log.text.lock().unwrap() += &(line + "\n");
                    log.grown.notify_waiters();
                }
            }
        });
        Self { child, directory, notifications, log, log_reader }
    }

    /// The next notification.
    pub(crate) async fn notification(&mut self) -> String {
        let mut buffer = [0; 4096];
        let len = within("a notification", self.notifications.recv(&mut buffer)).await.unwrap();
        String::from_utf8(buffer[..len].to_vec()).unwrap()
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn front_end_path(&self) -> PathBuf {
        self.directory.path().join("front-end.sock")
    }

    /// Waits until the bridge notifies its parent of exactly this line. Lines before it are gone then.
    pub(crate) async fn notified(&mut self, line: &str) {
        let mut buffer = [0; 4096];
        within(&format!("the notification {line}"), async {
            loop {
                let len = self.notifications.recv(&mut buffer).await.unwrap();
                if String::from_utf8_lossy(&buffer[..len]).lines().any(|found| found == line) {
                    return;
                }
            }
        })
        .await;
    }

    /// Waits for its end.
    pub(crate) async fn ended(self) -> Ended {
        self.ended_with_directory().await.0
    }

    /// Waits for its end, and answers what is left of its directory, too.
    pub(crate) async fn ended_with_directory(self) -> (Ended, TempDir) {
        self.ended_within(PATIENCE).await
    }

    /// The same with a limit of its own.
    pub(crate) async fn ended_within(self, limit: Duration) -> (Ended, TempDir) {
        let Self { mut child, directory, log, log_reader, .. } = self;
        let status = within_limit(limit, "the end of the bridge", child.wait()).await.unwrap();
        within("the end of its log", log_reader).await.unwrap();
        let log = log.text.lock().unwrap().clone();
        (Ended { code: status.code(), log }, directory)
    }

    /// Waits until a line of the log has all of these texts.
    pub(crate) async fn says(&self, texts: &[&str]) {
        self.says_within(PATIENCE, texts).await;
    }

    /// The same with a limit of its own.
    pub(crate) async fn says_within(&self, limit: Duration, texts: &[&str]) {
        within_limit(limit, &format!("the bridge to say {texts:?}"), async {
            loop {
                let grown = self.log.grown.notified();
                tokio::pin!(grown);
                grown.as_mut().enable();
                if self.log.text.lock().unwrap().lines().any(|line| texts.iter().all(|text| line.contains(text))) {
                    return;
                }
                grown.await;
            }
        })
        .await;
    }

    /// Waits until the bridge has dropped appliance `number`, and says why.
    pub(crate) async fn drops(&mut self, number: u32, reason: &str) {
        self.notified(&format!("X_VVU_APPLIANCE_LOST={number}")).await;
        self.says(&["appliance dropped", reason, &format!("appliance={number}")]).await;
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(i32::try_from(self.pid()).unwrap()).unwrap(), signal).unwrap();
    }

    fn pid(&self) -> u32 {
        self.child.id().expect("the bridge has ended early")
    }

    /// How many descriptors it has open.
    pub(crate) fn descriptor_count(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Device and inode of every file that it has mapped.
    pub(crate) fn mapped_files(&self) -> Vec<(u64, u64)> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        maps.lines().map(mapped_file).collect()
    }

    /// Names in its directory, sorted.
    pub(crate) fn files(directory: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }
}

/// A line of /proc/PID/maps (proc_pid_maps(5)): address, perms, offset, major:minor of the device, inode, path.
fn mapped_file(line: &str) -> (u64, u64) {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (major, minor) = fields[3].split_once(':').unwrap();
    let number = |hex: &str| u32::from_str_radix(hex, 16).unwrap();
    (rustix::fs::makedev(number(major), number(minor)), fields[4].parse().unwrap())
}
