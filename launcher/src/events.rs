//! What `vvu run` tells, as values; `output.rs` turns them into text or JSON.
//!
//! The shapes of the JSON objects are those of [`Event`] and are listed in the crate's README.

use serde::{Deserialize, Serialize};
use vvu_appliance_config::BootTimes;

use crate::accel::Accel;
use crate::supervisor::{ApplianceId, PortId};
use crate::vmm_lines::VmmLines;

/// Who wrote a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// An appliance's serial console.
    Appliance(ApplianceId),
    /// The standard error of a port's bridge.
    Bridge(PortId),
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
            Self::Bridge(_) => "bridge",
            Self::Qemu(_) => "qemu",
        }
    }

    /// What tells it from others of its kind, if it is not the first: the appliance VM's number or the port's.
    pub(crate) fn owner(self) -> Option<String> {
        match self {
            Self::Appliance(id) | Self::Qemu(id) => (id.0 > 1).then(|| format!("appliance {id}")),
            Self::Bridge(port) => (port.0 > 0).then(|| format!("port {port}")),
        }
    }

    /// What stands before its lines where several sources are mixed.
    pub(crate) fn prefix(self) -> String {
        match self {
            Self::Appliance(id) | Self::Qemu(id) if id.0 > 1 => format!("{} {id}", self.name()),
            Self::Bridge(port) if port.0 > 0 => format!("{} {port}", self.name()),
            _ => self.name().to_owned(),
        }
    }
}

/// Process ids of a running device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pids {
    /// This process.
    pub(crate) vvu: u32,
    /// The first port's bridge.
    pub(crate) bridge: u32,
    /// The appliance VM's QEMU.
    pub(crate) qemu: u32,
}

/// A port of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct PortFacts {
    /// Its number, from 0.
    pub(crate) port: PortId,
    /// Absolute path of the vhost-user socket.
    pub(crate) socket: String,
    /// Identity of the device set.
    pub(crate) uuid: String,
    /// Queues, or queue pairs of a network device.
    pub(crate) queues: u16,
    /// MAC address of a network device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mac: Option<String>,
}

/// A byte stream between the host and the back-end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub(crate) struct ChannelFacts {
    /// Its name.
    pub(crate) name: String,
    /// Absolute path of the socket, or of a link to it.
    pub(crate) path: String,
}

/// A disk of the appliance VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct DiskFacts {
    /// Absolute path of the image.
    pub(crate) image: String,
    /// Its size in bytes.
    pub(crate) image_bytes: u64,
    /// Whether writes are refused.
    pub(crate) read_only: bool,
    /// How QEMU submits the disk's requests.
    pub(crate) disk_io: String,
}

/// When each step was reached, in milliseconds since `vvu` started.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct TimingsMs {
    /// The last bridge's sockets accept connections.
    pub(crate) bridge_listening: u64,
    /// QEMU was started.
    pub(crate) qemu_started: u64,
    /// The steps of the appliance's boot, if it told them in time.
    #[serde(flatten)]
    pub(crate) boot: Option<BootMs>,
    /// The device can serve a driver VM.
    pub(crate) ready: u64,
}

/// When the appliance reached each step, by what it says, in milliseconds since `vvu` started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct BootMs {
    /// QEMU and its firmware were done, and the kernel had started its clock.
    pub(crate) kernel_started: u64,
    /// The kernel was done.
    pub(crate) agent_started: u64,
    /// The modules of the devices were loaded.
    pub(crate) modules_loaded: u64,
    /// The control devices were started.
    pub(crate) controls_started: u64,
    /// The windows were there. What is left until the device is ready is the back-end's start.
    pub(crate) windows_open: u64,
}

impl BootMs {
    /// Puts what an appliance told, and what came at `told_ms`, on the time of the run. Its clock is the time since its kernel
    /// started; it may say what it likes.
    pub(crate) fn new(told_ms: u64, times: BootTimes) -> Self {
        let at = |own: u64| told_ms.saturating_sub(times.windows.saturating_sub(own));
        Self {
            kernel_started: at(0),
            agent_started: at(times.agent),
            modules_loaded: at(times.modules),
            controls_started: at(times.controls),
            windows_open: told_ms,
        }
    }
}

/// What a run serves, and how.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Starting {
    /// What is served.
    pub(crate) class: &'static str,
    /// The disk that is served, if it is one: the first of `disks`.
    #[serde(flatten)]
    pub(crate) disk: Option<DiskFacts>,
    /// Disks of the appliance VM.
    pub(crate) disks: Vec<DiskFacts>,
    /// The first of `ports`.
    #[serde(flatten)]
    pub(crate) first: Option<PortFacts>,
    /// Where it is served.
    pub(crate) ports: Vec<PortFacts>,
    /// Size of each window in bytes.
    pub(crate) window_bytes: u64,
    /// The appliance's own memory in bytes.
    pub(crate) memory_bytes: u64,
    /// The appliance's CPUs.
    pub(crate) cpus: u16,
    /// How the appliance is run.
    pub(crate) accel: Accel,
    /// Why so.
    pub(crate) accel_reason: String,
    /// QEMU's version.
    pub(crate) qemu_version: String,
    /// Private directory of this run.
    pub(crate) runtime_dir: String,
    /// Socket for the commands that act on this run.
    pub(crate) control: String,
}

/// One event of a run; the `event` field of its JSON form is the variant's name in kebab case.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum Event {
    /// All checks passed; the children are started next.
    Starting(Box<Starting>),
    /// A bridge told its state.
    Status {
        /// Whose bridge.
        port: PortId,
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
        /// Where it is served.
        ports: Vec<PortFacts>,
        /// Byte streams to the back-end.
        channels: Vec<ChannelFacts>,
        /// Ready-to-paste configuration for each VMM.
        vmms: Vec<VmmLines>,
    },
    /// An appliance VM is the one in use.
    Active {
        /// Which one.
        appliance: ApplianceId,
        /// The front-end's pause in microseconds, if there was one; the longest if there are several ports.
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
    /// A bridge is gone; its appliance VMs are killed.
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
    /// A line of a bridge's log.
    BridgeLog {
        /// The line, printable.
        line: String,
        /// Whose bridge.
        port: PortId,
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
            Source::Bridge(port) => Self::BridgeLog { line, port },
            Source::Qemu(appliance) => Self::QemuLog { line, appliance },
        }
    }
}
