//! Writing what `vvu run` tells: events, as text for a person or as JSON lines for a program.
//!
//! A person gets progress and logs on standard error and the ready-to-paste lines on standard output. With `--json`
//! standard output carries one JSON object per line, told apart by its `event` field.
//!
//! Writing happens in a thread of its own: a terminal that is held or a pipe that nobody reads must not keep `vvu` from
//! noticing that a child died. Log lines are dropped (and counted) while more than [`MAX_PENDING`] wait; events are not,
//! since a run has only a handful.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anyhow::Context;

use crate::accel::Accel;
use crate::events::{ChannelFacts, DiskFacts, Event, Pids, PortFacts, Source, Starting, TimingsMs};
use crate::log_files::LogFiles;
use crate::size::Size;
use crate::supervisor::ApplianceId;
use crate::vmm_lines::VmmLines;

/// Log lines that may wait for a slow reader.
const MAX_PENDING: usize = 4096;

/// Last lines of a dead child that are repeated to a person, who saw them go by; programs get all that are kept.
const MAX_LINES_SHOWN: usize = 10;

/// Longest wait for the reader of our output when all is over.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

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
        Record { stderr: format!("{}: {line}\n", source.prefix()), log, ..Record::default() }
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
        Event::Starting(starting) => (String::new(), starting_text(starting)),
        Event::Status { port, text, at_ms } => {
            let which = if port.0 > 0 { format!("port {port}: ") } else { String::new() };
            (String::new(), format!("vvu: {:>6.2} s  {which}{text}\n", seconds(*at_ms)))
        }
        Event::Ready { ports, channels, pids, timings_ms, vmms, .. } => {
            (ready_text(ports, channels, pids, timings_ms, vmms), String::new())
        }
        Event::Active { appliance, pause_us } => (String::new(), active_text(*appliance, *pause_us)),
        Event::ApplianceLost { reason, last_lines, restart, .. }
        | Event::BridgeLost { reason, last_lines, restart } => {
            // Without a restart the end says the same in a moment.
            let text = if *restart { lost_text(reason, "restarting", last_lines) } else { String::new() };
            (String::new(), text)
        }
        Event::Restarted { what, pids, took_ms } => {
            let text = format!("vvu: {what} restarted in {:.2} s (QEMU pid {})\n", seconds(*took_ms), pids.qemu);
            (String::new(), text)
        }
        Event::ApplianceLog { line, .. } | Event::BridgeLog { line, .. } | Event::QemuLog { line, .. } => {
            (String::new(), format!("{line}\n"))
        }
        Event::Ended { message, exit_code, last_lines, .. } => {
            let lines = if *exit_code == 0 { &[] } else { last_lines.as_slice() };
            (String::new(), lost_text(message, "", lines))
        }
    }
}

/// What is served where, and how.
fn starting_text(starting: &Starting) -> String {
    let disk = |disk: &DiskFacts| format!("vvu: image {}, disk I/O {}\n", disk.image, disk.disk_io);
    let port = |port: &PortFacts| format!("vvu: {} -> {}\n", starting.class, port.socket);
    let mut text: String = starting.disks.iter().map(disk).chain(starting.ports.iter().map(port)).collect();
    let accel = if starting.accel == Accel::Kvm { "KVM" } else { "TCG" };
    text.push_str(&format!(
        "vvu: appliance VM under {accel} ({}), QEMU {}, memory {}, window {}\n",
        starting.accel_reason,
        starting.qemu_version,
        Size(starting.memory_bytes),
        Size(starting.window_bytes)
    ));
    text
}

fn active_text(appliance: ApplianceId, pause_us: Option<u64>) -> String {
    match pause_us {
        Some(pause_us) => {
            format!("vvu: appliance {appliance} is in use, the driver VM paused {:.1} ms\n", in_milliseconds(pause_us))
        }
        None => format!("vvu: appliance {appliance} is in use\n"),
    }
}

/// What happened, what follows from it, and the last lines of whoever died.
fn lost_text(message: &str, consequence: &str, last_lines: &[String]) -> String {
    let separator = if consequence.is_empty() { "" } else { "; " };
    let mut text = format!("vvu: {message}{separator}{consequence}\n");
    if !last_lines.is_empty() {
        text.push_str("vvu: its last lines were:\n");
        let from = last_lines.len().saturating_sub(MAX_LINES_SHOWN);
        text.extend(last_lines.iter().skip(from).map(|line| format!("  | {line}\n")));
    }
    text
}

fn ready_text(
    ports: &[PortFacts],
    channels: &[ChannelFacts],
    pids: &Pids,
    timings: &TimingsMs,
    vmms: &[VmmLines],
) -> String {
    let sockets: Vec<_> = ports.iter().map(|port| port.socket.as_str()).collect();
    let mut text = format!(
        "ready in {:.2} s: {}\n  bridge listening at {:.2} s (pid {}), QEMU started at {:.2} s (pid {})\n",
        seconds(timings.ready),
        sockets.join(", "),
        seconds(timings.bridge_listening),
        pids.bridge,
        seconds(timings.qemu_started),
        pids.qemu,
    );
    if let Some(boot) = &timings.boot {
        text.push_str(&format!(
            "  kernel started at {:.2} s, agent at {:.2} s; modules loaded at {:.2} s, control devices started at {:.2} s, \
             windows open at {:.2} s\n",
            seconds(boot.kernel_started),
            seconds(boot.agent_started),
            seconds(boot.modules_loaded),
            seconds(boot.controls_started),
            seconds(boot.windows_open),
        ));
    }
    for ChannelFacts { name, path } in channels {
        text.push_str(&format!("  channel {name}: {path}\n"));
    }
    for entry in vmms {
        let port = if ports.len() > 1 { format!(", port {}", entry.port) } else { String::new() };
        text.push_str(&format!("\n{}{port} (shared memory: {}):\n", entry.vmm, entry.memory));
        text.extend(entry.lines.lines().map(|line| format!("  {line}\n")));
    }
    text.push_str("\nCtrl-C ends the device.\n");
    text
}

/// Milliseconds as seconds for a person; a run is far shorter than what an `f64` counts exactly.
fn seconds(milliseconds: u64) -> f64 {
    Duration::from_millis(milliseconds).as_secs_f64()
}

/// Microseconds as milliseconds for a person.
pub(crate) fn in_milliseconds(microseconds: u64) -> f64 {
    Duration::from_micros(microseconds).as_secs_f64() * 1000.0
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

#[cfg(test)]
mod tests {
    use vvu_appliance_config::BootTimes;

    use super::*;
    use crate::events::BootMs;
    use crate::supervisor::PortId;

    #[test]
    fn the_json_names_are_those_of_the_documentation() {
        let log = json_line(&Event::of_log(Source::Appliance(ApplianceId(1)), "up".into()));
        assert_eq!(log, "{\"event\":\"appliance-log\",\"line\":\"up\",\"appliance\":1}\n");
        let ended = Event::Ended { reason: "signal", message: "ended".into(), exit_code: 0, last_lines: vec![] };
        let value: serde_json::Value = serde_json::from_str(&json_line(&ended)).unwrap();
        assert_eq!((&value["event"], &value["reason"]), (&"ended".into(), &"signal".into()));
    }

    #[test]
    fn only_the_lines_to_paste_go_to_standard_output() {
        let line = |vmm| VmmLines { port: PortId(0), vmm, memory: "shared", lines: "-m 2G".into() };
        let socket = "/run/d.sock".to_owned();
        let port = PortFacts { port: PortId(0), socket: socket.clone(), uuid: String::new(), queues: 1, mac: None };
        let channel = ChannelFacts { name: "qmp".into(), path: "/run/d.sock.qmp".into() };
        let ready = Event::Ready {
            socket,
            ports: vec![port],
            channels: vec![channel],
            pids: Pids { vvu: 1, bridge: 2, qemu: 3 },
            timings_ms: TimingsMs {
                bridge_listening: 30,
                qemu_started: 40,
                boot: Some(BootMs::new(2000, BootTimes { agent: 700, modules: 800, controls: 900, windows: 1000 })),
                ready: 2500,
            },
            vmms: ["QEMU", "Firecracker"].map(line).to_vec(),
        };
        let (stdout, stderr) = text_of(&ready);
        assert!(stdout.starts_with("ready in 2.50 s: /run/d.sock\n"), "{stdout}");
        let steps = "kernel started at 1.00 s, agent at 1.70 s; modules loaded at 1.80 s, control devices started at 1.90 s, \
                     windows open at 2.00 s\n";
        assert!(stdout.contains(steps), "{stdout}");
        assert!(stdout.contains("channel qmp: /run/d.sock.qmp\n"), "{stdout}");
        for vmm in ["QEMU", "Firecracker"] {
            assert!(stdout.contains(vmm), "{vmm}");
        }
        assert_eq!(stderr, "");
    }

    #[test]
    fn logs_are_dropped_and_counted_while_nobody_reads() {
        let (records, receiver) = channel();
        let output = Output { json: false, records, pending: Arc::default(), dropped: Arc::default() };
        for number in 0..MAX_PENDING + 10 {
            output.log(Source::Bridge(PortId(0)), number.to_string());
        }
        assert_eq!(receiver.try_iter().count(), MAX_PENDING);
        output.pending.store(0, Ordering::Relaxed);
        output.log(Source::Bridge(PortId(0)), "late".into());
        let texts: Vec<_> = receiver.try_iter().map(|record| record.stderr).collect();
        assert_eq!(texts, ["bridge: [10 lines dropped: the reader is too slow]\n", "bridge: late\n"]);
    }
}
