//! What `vvu run` tells, as values; `output.rs` turns them into text or JSON.
//!
//! The shapes of the JSON objects are those of [`Event`] and are listed in the crate's README.

use serde::{Deserialize, Serialize};

use crate::accel::Accel;
use crate::supervisor::ApplianceId;
use crate::vmm_lines::VmmLines;

/// Who wrote a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// An appliance's serial console.
    Appliance(ApplianceId),
    /// The bridge's standard error.
    Bridge,
    /// The standard error of an appliance's QEMU.
    Qemu(ApplianceId),
}

impl Source {
    /// Names of all kinds of sources.
    pub(crate) const NAMES: [&str; 3] = ["appliance", "bridge", "qemu"];

    /// The word for its kind, which names its log file.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Appliance(_) => "appliance",
            Self::Bridge => "bridge",
            Self::Qemu(_) => "qemu",
        }
    }

    /// What tells it from others of its kind: the number of an appliance VM that is not the run's first.
    pub(crate) fn number(self) -> Option<ApplianceId> {
        match self {
            Self::Appliance(id) | Self::Qemu(id) => Some(id).filter(|id| id.0 > 1),
            Self::Bridge => None,
        }
    }

    /// What stands before its lines where several sources are mixed.
    pub(crate) fn prefix(self) -> String {
        let number = self.number().map(|number| format!(" {number}")).unwrap_or_default();
        format!("{}{number}", self.name())
    }
}

/// Process ids of a running device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
        /// Socket for the commands that act on this run.
        control: String,
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
    /// An appliance VM is the one in use.
    Active {
        /// Which one.
        appliance: ApplianceId,
        /// The front-end's pause in microseconds, if there was one.
        pause_us: Option<u64>,
    },
    /// The appliance VM in use, or the one that was to be, is gone.
    ApplianceLost {
        /// Which one.
        appliance: ApplianceId,
        /// What happened, in one line.
        reason: String,
        /// Its last lines, oldest first.
        last_lines: Vec<String>,
        /// Whether another takes its place.
        restart: bool,
    },
    /// The bridge is gone; its appliance VMs are killed.
    BridgeLost {
        /// What happened, in one line.
        reason: String,
        /// Its last lines, oldest first.
        last_lines: Vec<String>,
        /// Whether it is started again.
        restart: bool,
    },
    /// What was lost is in use again.
    Restarted {
        /// `appliance`, or `bridge` for both.
        what: &'static str,
        /// Who runs.
        pids: Pids,
        /// Milliseconds since the loss.
        took_ms: u64,
    },
    /// A line of an appliance's console.
    ApplianceLog {
        /// The line, printable.
        line: String,
        /// Which appliance.
        appliance: ApplianceId,
    },
    /// A line of the bridge's log.
    BridgeLog {
        /// The line, printable.
        line: String,
    },
    /// A line that a QEMU wrote.
    QemuLog {
        /// The line, printable.
        line: String,
        /// Which appliance's.
        appliance: ApplianceId,
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
    /// The event that is a log line.
    pub(crate) fn of_log(source: Source, line: String) -> Self {
        match source {
            Source::Appliance(appliance) => Self::ApplianceLog { line, appliance },
            Source::Bridge => Self::BridgeLog { line },
            Source::Qemu(appliance) => Self::QemuLog { line, appliance },
        }
    }
}
