//! What the operator's command tells the agent about the appliance it is to be.
//!
//! The launcher writes an [`ApplianceConfig`] as JSON into QEMU's fw_cfg under [`FW_CFG_NAME`]; the agent reads it at
//! boot and checks it with [`ApplianceConfig::from_json`] before it acts on any of it. This crate knows the document and
//! its rules; it opens no file and starts nothing.

use serde::{Deserialize, Serialize};

/// Name of the fw_cfg item that carries the document.
pub const FW_CFG_NAME: &str = "opt/org.vvu/appliance.json";

/// Version of the document that this crate reads and writes.
pub const CONFIG_VERSION: u32 = 1;

/// Longest document that is read, in bytes; far above any real one.
pub const MAX_CONFIG_LEN: usize = 64 * 1024;

/// Most device sets of one appliance; a PCI root bus without bridges holds three devices of each.
pub const MAX_DEVICE_SETS: usize = 8;

/// Most queues of one device (limit of the `vhost-user-backend` crate, whose queue mask has 64 bits).
pub const MAX_QUEUES: u16 = 64;

/// Longest serial number of a virtio block device in bytes (virtio 1.3, section 5.2.6: 20 bytes, padded with NUL).
pub const MAX_SERIAL_LEN: usize = 20;

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
    #[error("device set {uuid} asks for {found} queues, expected 1 to {MAX_QUEUES}")]
    Queues {
        /// The device set.
        uuid: String,
        /// Number that came.
        found: u16,
    },
    /// A serial number is empty, too long or not printable ASCII.
    #[error("'{found}' is not a disk serial number of 1 to {MAX_SERIAL_LEN} printable ASCII characters")]
    Serial {
        /// Text that came.
        found: String,
    },
}

/// The whole document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApplianceConfig {
    /// [`CONFIG_VERSION`].
    pub version: u32,
    /// Filter of the agent's and the back-ends' logs, in the syntax of `tracing_subscriber::EnvFilter`.
    pub log: String,
    /// The devices that this appliance emulates.
    pub device_sets: Vec<DeviceSet>,
}

/// One emulated device: control, window and doorbell device with one uuid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSet {
    /// Identity of the set, as in the control device's configuration space.
    pub uuid: String,
    /// What the set emulates.
    pub device: Device,
}

/// Device class and its options.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "class", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Device {
    /// A virtio block device backed by one of the appliance's own disks.
    Blk(BlkOptions),
}

/// Options of [`Device::Blk`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkOptions {
    /// Serial number of the appliance's virtio disk that holds the data (`/sys/block/*/serial`).
    pub disk_serial: String,
    /// Refuse every write, and open the disk read-only.
    pub read_only: bool,
    /// Number of request queues offered to the driver VM, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Serial number that the driver VM sees (GET_ID).
    pub serial: String,
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
        if self.device_sets.is_empty() || self.device_sets.len() > MAX_DEVICE_SETS {
            return Err(ConfigError::DeviceSetCount { found: self.device_sets.len() });
        }
        let mut seen = std::collections::BTreeSet::new();
        for set in &self.device_sets {
            check_uuid(&set.uuid)?;
            if !seen.insert(&set.uuid) {
                return Err(ConfigError::DuplicateUuid { uuid: set.uuid.clone() });
            }
            match &set.device {
                Device::Blk(blk) => blk.check(&set.uuid)?,
            }
        }
        Ok(())
    }
}

impl BlkOptions {
    fn check(&self, uuid: &str) -> Result<(), ConfigError> {
        if self.queues == 0 || self.queues > MAX_QUEUES {
            return Err(ConfigError::Queues { uuid: uuid.to_owned(), found: self.queues });
        }
        for serial in [&self.disk_serial, &self.serial] {
            let printable = serial.bytes().all(|byte| byte.is_ascii_graphic());
            if serial.is_empty() || serial.len() > MAX_SERIAL_LEN || !printable {
                return Err(ConfigError::Serial { found: serial.clone() });
            }
        }
        Ok(())
    }
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
mod tests {
    use super::*;

    fn example() -> ApplianceConfig {
        ApplianceConfig {
            version: CONFIG_VERSION,
            log: "info".into(),
            device_sets: vec![DeviceSet {
                uuid: "6f1c1c0e-2b57-4a55-9d0f-0d6d1f7f3a11".into(),
                device: Device::Blk(BlkOptions {
                    disk_serial: "vvu-disk-0".into(),
                    read_only: false,
                    queues: 4,
                    serial: "vvu-0".into(),
                }),
            }],
        }
    }

    #[test]
    fn a_document_survives_the_round_trip() {
        let config = example();
        assert_eq!(ApplianceConfig::from_json(&config.to_json().unwrap()).unwrap(), config);
    }

    #[test]
    fn each_broken_rule_is_named() {
        type Breakage = fn(&mut ApplianceConfig);
        let cases: [(Breakage, &str); 7] = [
            (|c| c.version = 2, "version 2"),
            (|c| c.device_sets.clear(), "0 device sets"),
            (|c| c.device_sets.push(c.device_sets[0].clone()), "twice"),
            (|c| c.device_sets[0].uuid = "6F1C".into(), "not a uuid"),
            (|c| blk(c).queues = 0, "0 queues"),
            (|c| blk(c).serial = "with space".into(), "serial number"),
            (|c| blk(c).disk_serial = "x".repeat(21), "serial number"),
        ];
        for (breakage, expected) in cases {
            let mut config = example();
            breakage(&mut config);
            let message = config.to_json().unwrap_err().to_string();
            assert!(message.contains(expected), "{message} does not say {expected}");
        }
    }

    #[test]
    fn unknown_fields_and_oversize_are_refused() {
        let text = String::from_utf8(example().to_json().unwrap()).unwrap();
        let extended = text.replacen('{', "{\"surprise\": 1,", 1);
        assert!(matches!(ApplianceConfig::from_json(extended.as_bytes()), Err(ConfigError::Json(_))));
        let long = vec![b' '; MAX_CONFIG_LEN + 1];
        assert!(matches!(ApplianceConfig::from_json(&long), Err(ConfigError::TooLong { .. })));
    }

    fn blk(config: &mut ApplianceConfig) -> &mut BlkOptions {
        let Device::Blk(options) = &mut config.device_sets[0].device;
        options
    }
}
