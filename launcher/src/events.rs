//! What `vvu run` tells: events, as text for a person or as JSON lines for a program.
//!
//! A person gets progress and logs on standard error and the ready-to-paste lines on standard output. With `--json`
//! standard output carries one JSON object per line, told apart by its `event` field; the shapes are those of [`Event`]
//! and are listed in the crate's README.
//!
//! Writing happens in a thread of its own: a terminal that is held or a pipe that nobody reads must not keep `vvu` from
//! noticing that a child died. Log lines are dropped (and counted) while more than [`MAX_PENDING`] wait; events are not,
//! since a run has only a handful.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;

use crate::accel::Accel;
use crate::vmm_lines::VmmLines;

/// Log lines that may wait for a slow reader.
const MAX_PENDING: usize = 4096;

/// Size at which a log file is set aside as `NAME.1` (replacing the last one) and begun anew, in bytes.
const MAX_LOG_FILE_BYTES: u64 = 16 * 1024 * 1024;

/// Last lines of a dead child that are repeated to a person, who saw them go by; programs get all that are kept.
const MAX_LINES_SHOWN: usize = 10;

/// Longest wait for the reader of our output when all is over.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// Who wrote a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Source {
    /// The appliance's serial console.
    Appliance,
    /// The bridge's standard error.
    Bridge,
    /// QEMU's standard error.
    Qemu,
}

impl Source {
    /// All of them.
    const ALL: [Self; 3] = [Self::Appliance, Self::Bridge, Self::Qemu];

    /// The word that prefixes its lines and names its file.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Appliance => "appliance",
            Self::Bridge => "bridge",
            Self::Qemu => "qemu",
        }
    }
}

/// Process ids of a running device.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Pids {
    /// This process.
    pub(crate) vvu: u32,
    /// The bridge.
    pub(crate) bridge: u32,
    /// The appliance VM's QEMU.
    pub(crate) qemu: u32,
}

/// When each step was reached, in milliseconds since `vvu` started.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct TimingsMs {
    /// The bridge's sockets accept connections.
    pub(crate) bridge_listening: u64,
    /// QEMU was started.
    pub(crate) qemu_started: u64,
    /// The device can serve a driver VM.
    pub(crate) ready: u64,
}

/// One event of a run; the `event` field of its JSON form is the variant's name in kebab case.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum Event {
    /// All checks passed; the children are started next.
    Starting {
        /// Absolute path of the image.
        image: String,
        /// Its size in bytes.
        image_bytes: u64,
        /// Whether writes are refused.
        read_only: bool,
        /// Absolute path of the socket for the driver VM's VMM.
        socket: String,
        /// Identity of the device set.
        uuid: String,
        /// Request queues.
        queues: u16,
        /// Size of the window in bytes.
        window_bytes: u64,
        /// The appliance's own memory in bytes.
        memory_bytes: u64,
        /// The appliance's CPUs.
        cpus: u16,
        /// How the appliance is run.
        accel: Accel,
        /// Why so.
        accel_reason: String,
        /// QEMU's version.
        qemu_version: String,
        /// How QEMU submits the disk's requests.
        disk_io: String,
        /// Private directory of this run.
        runtime_dir: String,
    },
    /// The bridge told its state.
    Status {
        /// The state in words.
        text: String,
        /// Milliseconds since `vvu` started.
        at_ms: u64,
    },
    /// The device can serve a driver VM.
    Ready {
        /// Absolute path of the socket.
        socket: String,
        /// Who runs.
        pids: Pids,
        /// When each step was reached.
        timings_ms: TimingsMs,
        /// Ready-to-paste configuration for each VMM.
        vmms: Vec<VmmLines>,
    },
    /// A line of the appliance's console.
    ApplianceLog {
        /// The line, printable.
        line: String,
    },
    /// A line of the bridge's log.
    BridgeLog {
        /// The line, printable.
        line: String,
    },
    /// A line that QEMU wrote.
    QemuLog {
        /// The line, printable.
        line: String,
    },
    /// The run is over; always the last event.
    Ended {
        /// `signal`, `refused`, `not-ready`, `bridge-ended`, `appliance-ended` or `failed`.
        reason: &'static str,
        /// What happened, in one line.
        message: String,
        /// Exit code of `vvu`.
        exit_code: u8,
        /// The last lines of whoever died, oldest first.
        last_lines: Vec<String>,
    },
}

impl Event {
    fn of_log(source: Source, line: String) -> Self {
        match source {
            Source::Appliance => Self::ApplianceLog { line },
            Source::Bridge => Self::BridgeLog { line },
            Source::Qemu => Self::QemuLog { line },
        }
    }
}

/// What goes where; either text may be empty.
#[derive(Debug, Default)]
struct Record {
    stdout: String,
    stderr: String,
    log: Option<(Source, String)>,
}

/// Where events and logs are sent. Clones share one writer.
#[derive(Debug, Clone)]
pub(crate) struct Output {
    json: bool,
    records: Sender<Record>,
    pending: Arc<AtomicUsize>,
    dropped: Arc<AtomicU64>,
}

/// The writing thread; kept by `main` to wait for it.
#[derive(Debug)]
pub(crate) struct Writer {
    finished: Receiver<()>,
}

impl Writer {
    /// Waits until everything is written; gives up on a reader that does not read. All [`Output`]s must be gone.
    pub(crate) fn finish(self) {
        // Disconnected means that the thread is gone, which is as good as its message.
        let _ = self.finished.recv_timeout(FLUSH_LIMIT);
    }
}

impl Output {
    /// Starts the writer. Log lines also go to `files` if there are any.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub(crate) fn start(json: bool, files: Option<LogFiles>) -> anyhow::Result<(Self, Writer)> {
        let (records, receiver) = channel();
        let (done, finished) = channel();
        let output = Self { json, records, pending: Arc::default(), dropped: Arc::default() };
        let pending = Arc::clone(&output.pending);
        std::thread::Builder::new()
            .name("writer".to_owned())
            .spawn(move || {
                write_records(&receiver, &pending, files);
                let _ = done.send(());
            })
            .context("cannot start the thread that writes the output")?;
        Ok((output, Writer { finished }))
    }

    /// An output that nobody reads.
    #[cfg(test)]
    pub(crate) fn discard() -> Self {
        Self { json: false, records: channel().0, pending: Arc::default(), dropped: Arc::default() }
    }

    /// Tells an event.
    pub(crate) fn event(&self, event: &Event) {
        let record = if self.json {
            Record { stdout: json_line(event), ..Record::default() }
        } else {
            let (stdout, stderr) = text_of(event);
            Record { stdout, stderr, log: None }
        };
        self.send(record);
    }

    /// Passes on a log line; drops it while too many wait.
    pub(crate) fn log(&self, source: Source, line: String) {
        if self.pending.load(Ordering::Relaxed) >= MAX_PENDING {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            self.send(self.log_record(source, format!("[{dropped} lines dropped: the reader is too slow]")));
        }
        self.send(self.log_record(source, line));
    }

    fn log_record(&self, source: Source, line: String) -> Record {
        let log = Some((source, line.clone()));
        if self.json {
            return Record { stdout: json_line(&Event::of_log(source, line)), log, ..Record::default() };
        }
        Record { stderr: format!("{}: {line}\n", source.name()), log, ..Record::default() }
    }

    fn send(&self, record: Record) {
        self.pending.fetch_add(1, Ordering::Relaxed);
        // The writer lives as long as any sender; without it nobody reads.
        let _ = self.records.send(record);
    }
}

fn json_line(event: &Event) -> String {
    // An event holds strings and numbers only, which always serialise.
    serde_json::to_string(event).map(|line| line + "\n").unwrap_or_default()
}

/// The event for a person: standard output, standard error.
fn text_of(event: &Event) -> (String, String) {
    match event {
        Event::Starting {
            image,
            socket,
            accel,
            accel_reason,
            qemu_version,
            disk_io,
            memory_bytes,
            window_bytes,
            ..
        } => {
            let accel = if *accel == Accel::Kvm { "KVM" } else { "TCG" };
            let memory = crate::size::Size(*memory_bytes);
            let window = crate::size::Size(*window_bytes);
            let text = format!(
                "vvu: {image} -> {socket}\nvvu: appliance VM under {accel} ({accel_reason}), QEMU {qemu_version}, \
                 memory {memory}, window {window}, disk I/O {disk_io}\n"
            );
            (String::new(), text)
        }
        Event::Status { text, at_ms } => (String::new(), format!("vvu: {:>6.2} s  {text}\n", seconds(*at_ms))),
        Event::Ready { socket, pids, timings_ms, vmms } => (ready_text(socket, pids, timings_ms, vmms), String::new()),
        Event::ApplianceLog { line } | Event::BridgeLog { line } | Event::QemuLog { line } => {
            (String::new(), format!("{line}\n"))
        }
        Event::Ended { message, exit_code, last_lines, .. } => {
            let mut text = format!("vvu: {message}\n");
            if *exit_code != 0 && !last_lines.is_empty() {
                text.push_str("vvu: its last lines were:\n");
                let from = last_lines.len().saturating_sub(MAX_LINES_SHOWN);
                text.extend(last_lines.iter().skip(from).map(|line| format!("  | {line}\n")));
            }
            (String::new(), text)
        }
    }
}

fn ready_text(socket: &str, pids: &Pids, timings: &TimingsMs, vmms: &[VmmLines]) -> String {
    let mut text = format!(
        "ready in {:.2} s: {socket}\n  bridge listening at {:.2} s (pid {}), QEMU started at {:.2} s (pid {})\n",
        seconds(timings.ready),
        seconds(timings.bridge_listening),
        pids.bridge,
        seconds(timings.qemu_started),
        pids.qemu,
    );
    for entry in vmms {
        text.push_str(&format!("\n{} (shared memory: {}):\n", entry.vmm, entry.memory));
        text.extend(entry.lines.lines().map(|line| format!("  {line}\n")));
    }
    text.push_str("\nCtrl-C ends the device.\n");
    text
}

/// Milliseconds as seconds for a person; a run is far shorter than what an `f64` counts exactly.
fn seconds(milliseconds: u64) -> f64 {
    Duration::from_millis(milliseconds).as_secs_f64()
}

/// Writes until all senders are gone. A stream that was closed by its reader is no reason to end the device.
fn write_records(records: &Receiver<Record>, pending: &AtomicUsize, mut files: Option<LogFiles>) {
    for record in records {
        let _ = io::stdout().write_all(record.stdout.as_bytes()).and_then(|()| io::stdout().flush());
        let _ = io::stderr().write_all(record.stderr.as_bytes());
        if let (Some(files), Some((source, line))) = (files.as_mut(), record.log) {
            // A full disk costs the log, not the device.
            let _ = files.write(source, &line);
        }
        pending.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The files of `--log-dir`, one for each source.
#[derive(Debug)]
pub(crate) struct LogFiles {
    started: Instant,
    files: BTreeMap<Source, LogFile>,
}

#[derive(Debug)]
struct LogFile {
    path: PathBuf,
    file: File,
    len_bytes: u64,
}

impl LogFiles {
    /// Creates the directory and empty files in it. Lines are stamped with the seconds since `started`.
    ///
    /// # Errors
    /// The directory or a file in it cannot be created.
    pub(crate) fn open(directory: &Path, started: Instant) -> anyhow::Result<Self> {
        let context = || format!("cannot write logs to {}; name another --log-dir", directory.display());
        std::fs::create_dir_all(directory).with_context(context)?;
        let mut files = BTreeMap::new();
        for source in Source::ALL {
            let path = directory.join(format!("{}.log", source.name()));
            let file = File::create(&path).with_context(context)?;
            files.insert(source, LogFile { path, file, len_bytes: 0 });
        }
        Ok(Self { started, files })
    }

    /// Writes one line with the seconds since the start before it.
    fn write(&mut self, source: Source, line: &str) -> io::Result<()> {
        let Some(log) = self.files.get_mut(&source) else { return Ok(()) };
        let text = format!("[{:>10.3}] {line}\n", self.started.elapsed().as_secs_f64());
        if log.len_bytes >= MAX_LOG_FILE_BYTES {
            std::fs::rename(&log.path, log.path.with_extension("log.1"))?;
            log.file = File::create(&log.path)?;
            log.len_bytes = 0;
        }
        log.file.write_all(text.as_bytes())?;
        log.len_bytes += text.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_names_are_those_of_the_documentation() {
        let log = json_line(&Event::of_log(Source::Appliance, "up".into()));
        assert_eq!(log, "{\"event\":\"appliance-log\",\"line\":\"up\"}\n");
        let ended = Event::Ended { reason: "signal", message: "ended".into(), exit_code: 0, last_lines: vec![] };
        let value: serde_json::Value = serde_json::from_str(&json_line(&ended)).unwrap();
        assert_eq!((&value["event"], &value["reason"]), (&"ended".into(), &"signal".into()));
    }

    #[test]
    fn only_the_lines_to_paste_go_to_standard_output() {
        let address = crate::vmm_lines::DeviceAddress { socket: "/run/d.sock", queues: 1 };
        let ready = Event::Ready {
            socket: "/run/d.sock".into(),
            pids: Pids { vvu: 1, bridge: 2, qemu: 3 },
            timings_ms: TimingsMs { bridge_listening: 30, qemu_started: 40, ready: 2500 },
            vmms: crate::vmm_lines::all(address),
        };
        let (stdout, stderr) = text_of(&ready);
        assert!(stdout.starts_with("ready in 2.50 s: /run/d.sock\n"), "{stdout}");
        for vmm in ["QEMU", "Cloud Hypervisor", "libvirt", "Firecracker"] {
            assert!(stdout.contains(vmm), "{vmm}");
        }
        assert_eq!(stderr, "");
    }

    #[test]
    fn logs_are_dropped_and_counted_while_nobody_reads() {
        let (records, receiver) = channel();
        let output = Output { json: false, records, pending: Arc::default(), dropped: Arc::default() };
        for number in 0..MAX_PENDING + 10 {
            output.log(Source::Bridge, number.to_string());
        }
        assert_eq!(receiver.try_iter().count(), MAX_PENDING);
        output.pending.store(0, Ordering::Relaxed);
        output.log(Source::Bridge, "late".into());
        let texts: Vec<_> = receiver.try_iter().map(|record| record.stderr).collect();
        assert_eq!(texts, ["bridge: [10 lines dropped: the reader is too slow]\n", "bridge: late\n"]);
    }

    #[test]
    fn a_log_file_is_set_aside_when_it_is_full() {
        let directory = tempfile::tempdir().unwrap();
        let mut files = LogFiles::open(&directory.path().join("new/logs"), Instant::now()).unwrap();
        files.write(Source::Appliance, "old").unwrap();
        files.files.get_mut(&Source::Appliance).unwrap().len_bytes = MAX_LOG_FILE_BYTES;
        files.write(Source::Appliance, "fresh").unwrap();
        let read = |name: &str| std::fs::read_to_string(directory.path().join("new/logs").join(name)).unwrap();
        assert!(read("appliance.log.1").ends_with("] old\n"));
        assert!(read("appliance.log").ends_with("] fresh\n"));
    }
}
