//! The words of the control socket, by which `vvu status`, `upgrade`, `restart` and the others reach a run.
//!
//! Both sides send JSON objects, one a line. The operator's side sends a [`Request`] and gets any number of
//! [`Reply::Progress`] and then one other [`Reply`]; then it may send the next one. Closing the connection before that
//! abandons an upgrade or restart.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::events::ChannelFacts;
use crate::live::Settings;
use crate::live_counters::{AllCounters, Counters};
use crate::supervisor::{ApplianceId, PortId};

/// Longest line of either side in bytes, without its end: a path of 4096 bytes that is all escapes fits.
pub(crate) const MAX_LINE_BYTES: usize = 32 * 1024;

/// The control socket of the run that serves `socket`, unless the operator chose another.
pub(crate) fn beside(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".ctl");
    path.into()
}

/// What the operator wants; told apart by `command`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// The state.
    Status {},
    /// Another appliance VM in the place of the one in use.
    Upgrade {
        /// Directory of its image, an absolute path; none: that of the one in use.
        appliance: Option<PathBuf>,
    },
    /// The same from the same image.
    Restart {},
    /// Another size of the disk.
    Resize {
        /// The size in bytes.
        size_bytes: u64,
        /// Whether it may be smaller than now.
        shrink: bool,
    },
    /// Other limits of a port; what is not named stays as it is.
    Limit {
        /// The port.
        #[serde(default)]
        port: PortId,
        /// Requests, or packets both ways, in a second; 0 is no limit.
        operations_per_second: Option<u64>,
        /// Bytes in a second; 0 is no limit.
        bytes_per_second: Option<u64>,
    },
    /// Another state of a network device's link.
    Link {
        /// The port.
        #[serde(default)]
        port: PortId,
        /// Whether frames pass.
        up: bool,
    },
    /// Another filter of a network device; what is not named stays as it is.
    Filter {
        /// The port.
        #[serde(default)]
        port: PortId,
        /// Source addresses that pass; all if there are none.
        macs: Option<Vec<String>>,
        /// VLANs that pass; all if there are none.
        vlans: Option<Vec<u16>>,
    },
}

/// What a run answers; told apart by `reply`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// A step on the way; more follows.
    Progress {
        /// `booting`, `active` or `active-lost`.
        step: String,
        /// The step in words.
        text: String,
    },
    /// The state.
    Status(Box<Status>),
    /// Another appliance VM is in use, and nothing is left of the one before.
    Replaced {
        /// The one in use.
        appliance: ApplianceId,
        /// How long the driver VM's requests had to wait, in microseconds; none if no driver VM is connected.
        pause_us: Option<u64>,
        /// Milliseconds from the request until the new one was in use.
        took_ms: u64,
    },
    /// The disk has the size.
    Resized {
        /// Its size before, in bytes.
        old_bytes: u64,
        /// Its size now, in bytes.
        new_bytes: u64,
    },
    /// The settings of a port have changed, also for later appliance VMs.
    Changed {
        /// The port.
        port: PortId,
        /// All its settings now.
        settings: Settings,
    },
    /// It was not done.
    Failed {
        /// Why, in one line.
        message: String,
    },
}

impl Status {
    /// Adds what the back-end has counted.
    pub(crate) fn add_counters(&mut self, counters: AllCounters) {
        for (port, counters) in self.ports.iter_mut().zip(counters.ports) {
            port.counters = Some(counters);
        }
        self.uplink_counters = counters.uplink;
    }
}

impl Reply {
    /// A refusal or failure.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::Failed { message: message.into() }
    }
}

/// The state of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// `starting`, `serving`, `replacing`, `restarting` or `ending`.
    pub(crate) state: String,
    /// What is served: `blk`, `net` or `exec`.
    pub(crate) class: String,
    /// The state of the first port's bridge in words.
    pub(crate) text: String,
    /// Who runs.
    pub(crate) pids: LivePids,
    /// The appliance VM in use.
    pub(crate) appliance: Option<ApplianceStatus>,
    /// The appliance VM that boots to be the next one.
    pub(crate) standby: Option<ApplianceStatus>,
    /// Restarts of appliance VM or bridge after a death.
    pub(crate) restarts: u64,
    /// How long the driver VM's requests had to wait the last time that an appliance VM changed, in microseconds.
    pub(crate) last_pause_us: Option<u64>,
    /// Milliseconds since the start of the run.
    pub(crate) uptime_ms: u64,
    /// The disk that is served, if it is one: the first of `disks`.
    pub(crate) image: Option<ImageStatus>,
    /// Disks of the appliance VM.
    pub(crate) disks: Vec<ImageStatus>,
    /// Absolute path of the first port's vhost-user socket.
    pub(crate) socket: String,
    /// Where it is served.
    pub(crate) ports: Vec<PortStatus>,
    /// What the uplink of a switch has counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) uplink_counters: Option<Counters>,
    /// Why there are no counters, though the device has some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) counters_missing: Option<String>,
    /// Byte streams between the host and the program.
    pub(crate) channels: Vec<ChannelFacts>,
    /// Absolute path of the appliance image's directory.
    pub(crate) appliance_dir: PathBuf,
    /// Private directory of the run.
    pub(crate) runtime_dir: String,
}

/// Process ids of a run; what does not live at the moment has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LivePids {
    /// The run itself.
    pub(crate) vvu: u32,
    /// The first port's bridge.
    pub(crate) bridge: Option<u32>,
    /// The QEMU of the appliance VM in use.
    pub(crate) qemu: Option<u32>,
}

/// An appliance VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ApplianceStatus {
    /// Its number in the run.
    pub(crate) number: ApplianceId,
    /// Process id of its QEMU.
    pub(crate) pid: u32,
    /// QEMU's QMP socket.
    pub(crate) qmp: PathBuf,
    /// A FIFO: what is written to it comes in on the serial console, the chardev `console`.
    pub(crate) console: PathBuf,
}

/// A port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PortStatus {
    /// Its number, from 0.
    pub(crate) port: PortId,
    /// Absolute path of the vhost-user socket.
    pub(crate) socket: String,
    /// Queues, or queue pairs of a network device.
    pub(crate) queues: u16,
    /// MAC address of a network device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mac: Option<String>,
    /// What can be changed while it runs; none for a program's device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) settings: Option<Settings>,
    /// What the back-end has counted since the appliance VM in use serves; none for a program's device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) counters: Option<Counters>,
    /// Process id of its bridge.
    pub(crate) bridge: Option<u32>,
    /// The bridge's state in words.
    pub(crate) text: String,
}

/// A disk image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageStatus {
    /// Absolute path.
    pub(crate) path: String,
    /// Size in bytes.
    pub(crate) size_bytes: u64,
    /// Whether writes are refused.
    pub(crate) read_only: bool,
    /// Whether it is not locked (`--share-image`).
    pub(crate) shared: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_documented_form() {
        let cases = [
            (r#"{"command":"status"}"#, Request::Status {}),
            (r#"{"command":"upgrade","appliance":"/a"}"#, Request::Upgrade { appliance: Some("/a".into()) }),
            (r#"{"command":"upgrade"}"#, Request::Upgrade { appliance: None }),
            (r#"{"command":"restart"}"#, Request::Restart {}),
            (
                r#"{"command":"resize","size_bytes":512,"shrink":true}"#,
                Request::Resize { size_bytes: 512, shrink: true },
            ),
            (
                r#"{"command":"limit","operations_per_second":100}"#,
                Request::Limit { port: PortId(0), operations_per_second: Some(100), bytes_per_second: None },
            ),
            (r#"{"command":"link","port":1,"up":false}"#, Request::Link { port: PortId(1), up: false }),
            (
                r#"{"command":"filter","macs":[],"vlans":[0,7]}"#,
                Request::Filter { port: PortId(0), macs: Some(vec![]), vlans: Some(vec![0, 7]) },
            ),
        ];
        for (text, request) in cases {
            assert_eq!(serde_json::from_str::<Request>(text).unwrap(), request);
        }
        for text in ["{}", "[]", r#"{"command":"stop"}"#, r#"{"command":"status","more":1}"#, r#"{"command":"resize"}"#]
        {
            assert!(serde_json::from_str::<Request>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_longest_request_fits_on_a_line() {
        let path: PathBuf = "\u{1}".repeat(4096).into();
        let line = serde_json::to_string(&Request::Upgrade { appliance: Some(path) }).unwrap();
        assert!(line.len() <= MAX_LINE_BYTES);
    }
}
