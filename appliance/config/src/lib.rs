//! What the operator's command tells the agent about the appliance it is to be.
//!
//! The launcher writes an [`ApplianceConfig`] as JSON into QEMU's fw_cfg under [`FW_CFG_NAME`]; the agent reads it at
//! boot and checks it with [`ApplianceConfig::from_json`] before it acts on any of it. This crate knows the document and
//! its rules; it opens no file and starts nothing.

mod boot_times;

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use boot_times::{BootTimes, NoBootTimes};

/// Name of the fw_cfg item that carries the document.
pub const FW_CFG_NAME: &str = "opt/org.vvu/appliance.json";

/// Version of the document that this crate reads and writes.
pub const CONFIG_VERSION: u32 = 3;

/// Longest document that is read, in bytes; far above any real one.
pub const MAX_CONFIG_LEN: usize = 64 * 1024;

/// Most device sets of one appliance; a PCI root bus without bridges holds three devices of each.
pub const MAX_DEVICE_SETS: usize = 8;

/// Longest time in microseconds that a queue's thread may look for work before it sleeps.
pub const MAX_POLL_WINDOW_US: u32 = 1_000_000;

/// Highest number of a CPU of the appliance that can be named.
pub const MAX_CPU: u16 = 1023;

/// Most queues of one device, or queue pairs of a network device.
pub const MAX_QUEUES: u16 = 64;

/// Longest serial number of a virtio block device in bytes (virtio 1.3, section 5.2.6: 20 bytes, padded with NUL).
pub const MAX_SERIAL_LEN: usize = 20;

/// Longest name of a disk or a channel in bytes: a virtio serial number.
pub const MAX_NAME_LEN: usize = MAX_SERIAL_LEN;

/// What a virtio-serial port that carries a [`BackEnd`]'s channel is called: this, and the channel's name.
pub const CHANNEL_PORT_PREFIX: &str = "org.vvu.";

/// Name of the channel on which our own back-ends are told to change something while they run. For [`Device::Exec`] the agent
/// listens on it.
pub const CONTROL_CHANNEL: &str = "control";

/// What ends the programs and then the whole appliance in order: a line on [`CONTROL_CHANNEL`] of a [`Device::Exec`]. There
/// is no answer but that the virtual machine switches itself off.
pub const END_REQUEST: &str = "{\"end\":{}}\n";

/// How long programs may take to end after [`END_REQUEST`], until they are killed.
pub const END_GRACE: Duration = Duration::from_secs(5);

/// Least and largest MTU of a network device in bytes (virtio 1.3, section 5.1.4; the largest is that of Linux's TAP).
pub const MTU_RANGE: std::ops::RangeInclusive<u16> = 68..=65521;

/// Why a document was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The document is longer than [`MAX_CONFIG_LEN`].
    #[error("appliance configuration has {len} bytes, at most {MAX_CONFIG_LEN} are read")]
    TooLong {
        /// Bytes that came.
        len: usize,
    },
    /// The document is no JSON of the expected shape.
    #[error("appliance configuration is not valid")]
    Json(#[from] serde_json::Error),
    /// The document has a version that this agent does not know.
    #[error("appliance configuration has version {found}, this agent reads version {CONFIG_VERSION}")]
    Version {
        /// Version that came.
        found: u32,
    },
    /// No device set, or more than [`MAX_DEVICE_SETS`].
    #[error("appliance configuration has {found} device sets, expected 1 to {MAX_DEVICE_SETS}")]
    DeviceSetCount {
        /// Number that came.
        found: usize,
    },
    /// A back-end that serves another number of device sets than its class can.
    #[error("a {class} back-end is to serve {found} device sets, expected {expected}")]
    SetsOfBackEnd {
        /// Class of the back-end.
        class: &'static str,
        /// Number that came.
        found: usize,
        /// Number that is expected.
        expected: usize,
    },
    /// Two device sets have the same uuid.
    #[error("appliance configuration names device set {uuid} twice")]
    DuplicateUuid {
        /// The uuid that stands twice.
        uuid: String,
    },
    /// A uuid is not 32 lower-case hexadecimal digits in the usual groups.
    #[error("'{found}' is not a uuid in its lower-case text form")]
    Uuid {
        /// Text that came.
        found: String,
    },
    /// Queue count out of range.
    #[error("a device has {found} queues, expected 1 to {MAX_QUEUES}")]
    Queues {
        /// Number that came.
        found: u16,
    },
    /// A serial number is empty, too long or not printable ASCII.
    #[error("'{found}' is not a disk serial number of 1 to {MAX_SERIAL_LEN} printable ASCII characters")]
    Serial {
        /// Text that came.
        found: String,
    },
    /// A name cannot be part of a file name and of a virtio-serial port's name.
    #[error("'{found}' is not a name of 1 to {MAX_NAME_LEN} lower-case letters, digits and hyphens")]
    Name {
        /// Text that came.
        found: String,
    },
    /// A name is used twice.
    #[error("'{found}' is named twice")]
    DuplicateName {
        /// The name.
        found: String,
    },
    /// A time to look for work is longer than [`MAX_POLL_WINDOW_US`].
    #[error("queues look for work for {found} us, expected up to {MAX_POLL_WINDOW_US}")]
    PollWindow {
        /// Number that came.
        found: u32,
    },
    /// A CPU is above [`MAX_CPU`].
    #[error("queues run on CPU {found}, expected one up to {MAX_CPU}")]
    Cpu {
        /// Number that came.
        found: u16,
    },
    /// An MTU is not in [`MTU_RANGE`].
    #[error("MTU {found}, expected {} to {}", MTU_RANGE.start(), MTU_RANGE.end())]
    Mtu {
        /// Number that came.
        found: u16,
    },
    /// A MAC address is not one of a single network card.
    #[error("'{found}' is not the MAC address of a network card in its lower-case form, as 52:54:00:12:34:56")]
    Mac {
        /// Text that came.
        found: String,
    },
    /// There is nothing to run.
    #[error("the back-end's command is empty")]
    NoCommand,
}

/// The whole document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApplianceConfig {
    /// [`CONFIG_VERSION`].
    pub version: u32,
    /// Filter of the agent's and the back-ends' logs, in the syntax of `tracing_subscriber::EnvFilter`.
    pub log: String,
    /// The programs that emulate this appliance's devices.
    pub back_ends: Vec<BackEnd>,
}

/// One program, and the devices that it emulates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackEnd {
    /// Uuid of each device set (control, window and doorbell device), as in the control device's configuration space. The
    /// program has one vhost-user socket for each.
    pub device_sets: Vec<String>,
    /// Byte streams between the host and the program, by name: the virtio-serial port [`CHANNEL_PORT_PREFIX`] plus name is
    /// connected to a unix socket on which the program listens. Our own programs have [`CONTROL_CHANNEL`] and no other; with
    /// others it is the agent's.
    pub channels: Vec<String>,
    /// What the program is.
    pub device: Device,
}

/// Device class and its options.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "class", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Device {
    /// A virtio block device backed by the appliance's own disks. One device set.
    Blk(BlkOptions),
    /// Virtio network devices on a switch. One device set for each port.
    Net(NetOptions),
    /// A program of an overlay. One device set.
    Exec(ExecOptions),
}

/// Options of [`Device::Blk`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkOptions {
    /// The image.
    pub image: Layer,
    /// What the image does not hold is read from the first of these, what that does not hold from the second, and so on.
    /// They are never written to. Needs a format with backing files.
    pub backing: Vec<Layer>,
    /// Refuse every write, and open the disk read-only.
    pub read_only: bool,
    /// Number of request queues offered to the driver VM, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Serial number that the driver VM sees (GET_ID).
    pub serial: String,
    /// How the queues' threads work.
    pub threads: Threads,
    /// What the driver VM may ask for at the most.
    pub limits: Limits,
}

/// One of the appliance's virtio disks, and how what is on it is to be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// Serial number of the disk (`/sys/block/*/serial`).
    pub disk_serial: String,
    /// Its format; the image itself is never asked.
    pub format: Format,
}

/// Format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// The bytes are those of the disk.
    Raw,
    /// QEMU's format, version 2 or 3.
    Qcow2,
}

/// Most that a driver VM may ask of a device; 0 is no limit. A token bucket each, which holds a tenth of a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Requests, or packets in both directions, in a second.
    pub operations_per_second: u64,
    /// Bytes of data in a second.
    pub bytes_per_second: u64,
}

/// How the threads of a back-end's queues work, one for each queue or queue pair.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Threads {
    /// When they look for work by themselves, instead of being notified of it.
    pub poll: Poll,
    /// Longest time that [`Poll::Auto`] looks before it sleeps, in microseconds, up to [`MAX_POLL_WINDOW_US`].
    pub poll_window_us: u32,
    /// CPUs of the appliance that they run on, one after the other; where the kernel wants if there are none.
    pub cpus: Vec<u16>,
}

/// When threads look for work by themselves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Poll {
    /// Never.
    Off,
    /// For a while that adapts to what they find.
    #[default]
    Auto,
    /// Without end.
    Always,
}

/// Options of [`Device::Net`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetOptions {
    /// The ports of the switch, in the order of the device sets.
    pub ports: Vec<PortOptions>,
    /// MAC address of the appliance's own network card, to which the switch is connected.
    pub uplink: Option<String>,
    /// Largest packet without its Ethernet header, in bytes.
    pub mtu: u16,
    /// How the queues' threads work.
    pub threads: Threads,
}

/// One network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortOptions {
    /// Its MAC address, as `52:54:00:12:34:56`.
    pub mac: String,
    /// Number of queue pairs offered to the driver VM, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Whether the link is up from the start.
    pub link: bool,
    /// Who may be behind it.
    pub filter: PortFilter,
    /// What the driver VM may send and receive at the most.
    pub limits: Limits,
}

/// What a port lets pass.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortFilter {
    /// Source addresses of the frames that the driver VM sends; all if there are none.
    pub macs: Vec<String>,
    /// VLANs of the frames in both directions, 0 being frames without a tag; all if there are none.
    pub vlans: Vec<u16>,
}

/// Options of [`Device::Exec`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecOptions {
    /// Program and arguments. In an argument `{socket}` stands for the path of the vhost-user socket on which the program shall
    /// listen, `{socket-stem}` for the same without the `0` at its end, for programs that number their sockets themselves,
    /// `{channel:NAME}` for that of a channel's socket, `{disk:NAME}` for a disk's device node.
    pub command: Vec<String>,
    /// The appliance's virtio disks that it may use; their serial numbers are their names.
    pub disks: Vec<ExecDisk>,
}

/// A disk of [`Device::Exec`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecDisk {
    /// Name and serial number.
    pub name: String,
    /// It cannot be written to.
    pub read_only: bool,
}

impl ApplianceConfig {
    /// Reads and checks a document.
    ///
    /// # Errors
    /// [`ConfigError`] says what was expected and what came.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ConfigError> {
        if bytes.len() > MAX_CONFIG_LEN {
            return Err(ConfigError::TooLong { len: bytes.len() });
        }
        let config: Self = serde_json::from_slice(bytes)?;
        config.check()?;
        Ok(config)
    }

    /// Checks and writes a document.
    ///
    /// # Errors
    /// [`ConfigError`] if the document breaks one of its own rules.
    pub fn to_json(&self) -> Result<Vec<u8>, ConfigError> {
        self.check()?;
        Ok(serde_json::to_vec_pretty(self)?)
    }

    fn check(&self) -> Result<(), ConfigError> {
        if self.version != CONFIG_VERSION {
            return Err(ConfigError::Version { found: self.version });
        }
        let sets: Vec<&String> = self.back_ends.iter().flat_map(|back_end| &back_end.device_sets).collect();
        if sets.is_empty() || sets.len() > MAX_DEVICE_SETS {
            return Err(ConfigError::DeviceSetCount { found: sets.len() });
        }
        let mut seen = BTreeSet::new();
        for uuid in sets {
            check_uuid(uuid)?;
            if !seen.insert(uuid) {
                return Err(ConfigError::DuplicateUuid { uuid: uuid.clone() });
            }
        }
        // Ports belong to the whole virtual machine.
        check_names(self.back_ends.iter().flat_map(|back_end| &back_end.channels))?;
        self.back_ends.iter().try_for_each(BackEnd::check)
    }
}

impl BackEnd {
    fn check(&self) -> Result<(), ConfigError> {
        let (class, expected) = match &self.device {
            Device::Blk(_) => ("blk", 1),
            Device::Net(options) => ("net", options.ports.len().max(1)),
            Device::Exec(_) => ("exec", 1),
        };
        let found = self.device_sets.len();
        if found != expected {
            return Err(ConfigError::SetsOfBackEnd { class, found, expected });
        }
        match &self.device {
            Device::Blk(options) => options.check(),
            Device::Net(options) => options.check(),
            Device::Exec(options) => options.check(),
        }
    }
}

impl BlkOptions {
    fn check(&self) -> Result<(), ConfigError> {
        check_queues(self.queues)?;
        self.threads.check()?;
        let disks = std::iter::once(&self.image).chain(&self.backing).map(|layer| &layer.disk_serial);
        disks.chain(std::iter::once(&self.serial)).try_for_each(|serial| check_serial(serial))
    }
}

impl NetOptions {
    fn check(&self) -> Result<(), ConfigError> {
        if !MTU_RANGE.contains(&self.mtu) {
            return Err(ConfigError::Mtu { found: self.mtu });
        }
        self.threads.check()?;
        for port in &self.ports {
            check_queues(port.queues)?;
            std::iter::once(&port.mac).chain(&port.filter.macs).try_for_each(|mac| check_mac(mac))?;
        }
        self.uplink.iter().try_for_each(|mac| check_mac(mac))
    }
}

impl Threads {
    fn check(&self) -> Result<(), ConfigError> {
        if self.poll_window_us > MAX_POLL_WINDOW_US {
            return Err(ConfigError::PollWindow { found: self.poll_window_us });
        }
        self.cpus.iter().find(|cpu| **cpu > MAX_CPU).map_or(Ok(()), |cpu| Err(ConfigError::Cpu { found: *cpu }))
    }
}

impl ExecOptions {
    fn check(&self) -> Result<(), ConfigError> {
        if self.command.is_empty() {
            return Err(ConfigError::NoCommand);
        }
        check_names(self.disks.iter().map(|disk| &disk.name))
    }
}

fn check_queues(found: u16) -> Result<(), ConfigError> {
    if (1..=MAX_QUEUES).contains(&found) { Ok(()) } else { Err(ConfigError::Queues { found }) }
}

fn check_serial(serial: &str) -> Result<(), ConfigError> {
    let printable = serial.bytes().all(|byte| byte.is_ascii_graphic());
    if serial.is_empty() || serial.len() > MAX_SERIAL_LEN || !printable {
        return Err(ConfigError::Serial { found: serial.to_owned() });
    }
    Ok(())
}

fn check_names<'a>(names: impl Iterator<Item = &'a String>) -> Result<(), ConfigError> {
    let mut seen = BTreeSet::new();
    for name in names {
        let plain = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        if name.is_empty() || name.len() > MAX_NAME_LEN || !plain {
            return Err(ConfigError::Name { found: name.clone() });
        }
        if !seen.insert(name) {
            return Err(ConfigError::DuplicateName { found: name.clone() });
        }
    }
    Ok(())
}

/// Six pairs of lower-case hexadecimal digits. An address with the lowest bit of its first byte set is one of a group.
fn check_mac(text: &str) -> Result<(), ConfigError> {
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    let well_formed = text.len() == 17
        && text.bytes().enumerate().all(|(position, byte)| if position % 3 == 2 { byte == b':' } else { digit(byte) });
    let first = text.get(..2).and_then(|pair| u8::from_str_radix(pair, 16).ok()).unwrap_or(1);
    if well_formed && first & 1 == 0 { Ok(()) } else { Err(ConfigError::Mac { found: text.to_owned() }) }
}

fn check_uuid(text: &str) -> Result<(), ConfigError> {
    let well_formed = text.len() == 36
        && text.bytes().enumerate().all(|(position, byte)| match position {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte),
        });
    if well_formed { Ok(()) } else { Err(ConfigError::Uuid { found: text.to_owned() }) }
}

#[cfg(test)]
mod tests;
