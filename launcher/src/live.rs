//! Changes of a device's settings while it runs.
//!
//! A change goes to the back-end in the appliance over its control channel, JSON lines through a virtio-serial port. Only
//! when the back-end has agreed it is taken over into the configuration, with which later appliance VMs start. The appliance
//! is hostile: what it answers is bounded, waited for with a limit, and decides no more than whether the change counts.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use vvu_appliance_config::{ApplianceConfig, Device, Limits, PortFilter, PortOptions};

use crate::live_counters::AllCounters;
use crate::log_follow::printable;
use crate::supervisor::PortId;

/// Longest answer of a back-end in bytes.
const MAX_ANSWER_BYTES: u64 = 64 * 1024;

/// Longest time for a back-end to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Longest text of a refusal that is passed on, in characters.
const MAX_REFUSAL_LEN: usize = 400;

/// What is to be changed; what is not named stays as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// What a driver VM may ask for.
    Limits {
        /// Requests or packets in a second; 0 is no limit.
        operations_per_second: Option<u64>,
        /// Bytes in a second; 0 is no limit.
        bytes_per_second: Option<u64>,
    },
    /// The state of a network device's link.
    Link {
        /// Whether frames pass.
        up: bool,
    },
    /// What a network device lets pass.
    Filter {
        /// Source addresses; all if there are none.
        macs: Option<Vec<String>>,
        /// VLANs; all if there are none.
        vlans: Option<Vec<u16>>,
    },
}

/// The settings of a port that can be changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// What the driver VM may ask for; 0 is no limit.
    pub(crate) limits: Limits,
    /// Whether the link of a network device is up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) link: Option<bool>,
    /// What a network device lets pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) filter: Option<PortFilter>,
}

/// A change that fits the device.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Prepared {
    /// What the back-end is asked.
    pub(crate) request: Value,
    /// The configuration, if it agrees.
    pub(crate) config: ApplianceConfig,
}

impl Change {
    /// Fits the change into the configuration.
    ///
    /// # Errors
    /// One line that says why this device cannot be changed so.
    pub(crate) fn prepare(self, config: &ApplianceConfig, port: PortId) -> Result<Prepared, String> {
        let mut config = config.clone();
        let device = config.back_ends.first_mut().map(|back_end| &mut back_end.device);
        let request = match device {
            Some(Device::Blk(options)) if port.0 == 0 => self.of_disk(&mut options.limits)?,
            Some(Device::Net(options)) => match options.ports.get_mut(port.index()) {
                Some(options) => self.of_port(options, port),
                None => return Err(no_port(port)),
            },
            Some(Device::Exec(_)) => {
                return Err("the settings of a program are its own; reach it through a --channel of its run".to_owned());
            }
            Some(Device::Blk(_)) | None => return Err(no_port(port)),
        };
        config.to_json().map_err(|error| error.to_string())?;
        Ok(Prepared { request, config })
    }

    fn of_disk(self, limits: &mut Limits) -> Result<Value, String> {
        match self {
            Self::Limits { operations_per_second, bytes_per_second } => {
                Ok(set_limits(limits, operations_per_second, bytes_per_second, PortId(0)))
            }
            Self::Link { .. } => Err("a disk has no link".to_owned()),
            Self::Filter { .. } => Err("a disk has no filter".to_owned()),
        }
    }

    fn of_port(self, options: &mut PortOptions, port: PortId) -> Value {
        match self {
            Self::Limits { operations_per_second, bytes_per_second } => {
                set_limits(&mut options.limits, operations_per_second, bytes_per_second, port)
            }
            Self::Link { up } => {
                options.link = up;
                json!({ "set-link": { "port": port, "up": up } })
            }
            Self::Filter { macs, vlans } => {
                let PortFilter { macs: now_macs, vlans: now_vlans } = &options.filter;
                let macs = macs.unwrap_or_else(|| now_macs.clone());
                let vlans = vlans.unwrap_or_else(|| now_vlans.clone());
                options.filter = PortFilter { macs, vlans };
                json!({ "set-filter": { "port": port, "macs": options.filter.macs, "vlans": options.filter.vlans } })
            }
        }
    }
}

fn no_port(port: PortId) -> String {
    format!("there is no port {port}; vvu status lists them")
}

fn set_limits(limits: &mut Limits, operations: Option<u64>, bytes: Option<u64>, port: PortId) -> Value {
    *limits = Limits {
        operations_per_second: operations.unwrap_or(limits.operations_per_second),
        bytes_per_second: bytes.unwrap_or(limits.bytes_per_second),
    };
    json!({ "set-limits": {
        "port": port,
        "operations_per_second": limits.operations_per_second,
        "bytes_per_second": limits.bytes_per_second,
    } })
}

/// The settings of a port; none for a device whose settings are its program's own.
pub(crate) fn settings(config: &ApplianceConfig, port: PortId) -> Option<Settings> {
    match &config.back_ends.first()?.device {
        Device::Blk(options) => Some(Settings { limits: options.limits, link: None, filter: None }),
        Device::Net(options) => {
            let port = options.ports.get(port.index())?;
            Some(Settings { limits: port.limits, link: Some(port.link), filter: Some(port.filter.clone()) })
        }
        Device::Exec(_) => None,
    }
}

/// Sends one request over the control channel at `socket` and waits for the back-end's consent.
///
/// # Errors
/// The back-end refuses, answers nonsense, or does not answer in time; one line.
pub(crate) async fn ask(socket: &Path, request: &Value) -> anyhow::Result<()> {
    answer_to(socket, request).await.map(drop)
}

/// Asks the back-end behind the control channel at `socket` what it has counted.
///
/// # Errors
/// As of [`ask`].
pub(crate) async fn counters(socket: &Path) -> anyhow::Result<AllCounters> {
    Ok(AllCounters::read(&answer_to(socket, &json!({ "query": {} })).await?))
}

async fn answer_to(socket: &Path, request: &Value) -> anyhow::Result<Value> {
    let conversation = async {
        let mut stream =
            UnixStream::connect(socket).await.context("the appliance VM's channel cannot be connected to")?;
        stream.write_all(format!("{request}\n").as_bytes()).await.context("the back-end does not take the request")?;
        let mut answer = Vec::new();
        let mut reader = BufReader::new(stream.take(MAX_ANSWER_BYTES));
        reader.read_until(b'\n', &mut answer).await.context("the back-end's answer cannot be read")?;
        Ok(answer)
    };
    let answer: anyhow::Result<Vec<u8>> = tokio::time::timeout(ANSWER_LIMIT, conversation)
        .await
        .unwrap_or_else(|_| bail!("the back-end does not answer within {} s", ANSWER_LIMIT.as_secs()));
    judge(&answer?)
}

fn judge(answer: &[u8]) -> anyhow::Result<Value> {
    let mut answer: Value = serde_json::from_slice(answer).context("the back-end's answer is not understood")?;
    let said = answer.get_mut("return").map(Value::take);
    match (said, answer.get("error").and_then(Value::as_str)) {
        (Some(said), None) => Ok(said),
        (None, Some(text)) => {
            let text: String = printable(text).chars().take(MAX_REFUSAL_LEN).collect();
            bail!("the back-end refuses: {text}")
        }
        _ => bail!("the back-end's answer is not understood"),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;
    use vvu_appliance_config::{BackEnd, BlkOptions, CONFIG_VERSION, Format, Layer, NetOptions, Threads};

    use super::*;

    fn config(device: Device, sets: usize) -> ApplianceConfig {
        let uuid = |number| format!("6f1c1c0e-2b57-4a55-9d0f-0d6d1f7f3a1{number}");
        let back_end = BackEnd { device_sets: (0..sets).map(uuid).collect(), channels: Vec::new(), device };
        ApplianceConfig { version: CONFIG_VERSION, log: "info".to_owned(), back_ends: vec![back_end] }
    }

    fn disk() -> ApplianceConfig {
        let image = Layer { disk_serial: "vvu-disk-0".into(), format: Format::Raw };
        let limits = Limits { operations_per_second: 100, bytes_per_second: 0 };
        let (backing, serial) = (Vec::new(), "disk".to_owned());
        config(
            Device::Blk(BlkOptions {
                image,
                backing,
                read_only: false,
                queues: 1,
                serial,
                limits,
                threads: Threads::default(),
            }),
            1,
        )
    }

    fn switch() -> ApplianceConfig {
        let port = |mac: &str| PortOptions {
            mac: mac.to_owned(),
            queues: 1,
            link: true,
            filter: PortFilter { macs: vec![mac.to_owned()], vlans: vec![7] },
            limits: Limits::default(),
        };
        let ports = vec![port("52:54:00:00:00:01"), port("52:54:00:00:00:02")];
        config(Device::Net(NetOptions { ports, uplink: None, mtu: 1500, threads: Threads::default() }), 2)
    }

    #[test]
    fn what_is_not_named_stays_as_it_is() {
        let change = Change::Limits { operations_per_second: None, bytes_per_second: Some(4096) };
        let prepared = change.prepare(&disk(), PortId(0)).unwrap();
        let limits = json!({ "port": 0, "operations_per_second": 100, "bytes_per_second": 4096 });
        assert_eq!(prepared.request, json!({ "set-limits": limits }));
        let now = settings(&prepared.config, PortId(0)).unwrap();
        assert_eq!(now.limits, Limits { operations_per_second: 100, bytes_per_second: 4096 });
        let change = Change::Filter { macs: Some(Vec::new()), vlans: None };
        let prepared = change.prepare(&switch(), PortId(1)).unwrap();
        assert_eq!(prepared.request, json!({ "set-filter": { "port": 1, "macs": [], "vlans": [7] } }));
        assert_eq!(
            settings(&prepared.config, PortId(0)),
            settings(&switch(), PortId(0)),
            "the other port keeps its own"
        );
        let prepared = Change::Link { up: false }.prepare(&switch(), PortId(1)).unwrap();
        assert_eq!(prepared.request, json!({ "set-link": { "port": 1, "up": false } }));
        assert_eq!(settings(&prepared.config, PortId(1)).unwrap().link, Some(false));
    }

    #[test]
    fn what_a_device_does_not_have_is_refused() {
        assert!(Change::Link { up: true }.prepare(&disk(), PortId(0)).unwrap_err().contains("no link"));
        for config in [disk(), switch()] {
            assert!(Change::Link { up: true }.prepare(&config, PortId(2)).unwrap_err().contains("no port 2"));
        }
        let change = Change::Filter { macs: Some(vec!["nonsense".into()]), vlans: None };
        assert!(change.prepare(&switch(), PortId(0)).unwrap_err().contains("nonsense"));
    }

    /// What asking a back-end comes to that answers every request like this.
    async fn asked(answer: &[u8]) -> Result<(), String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ch0-1.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let back_end = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut line = String::new();
            BufReader::new(&mut stream).read_line(&mut line).await.unwrap();
            assert_eq!(line, "{\"query\":{}}\n");
            // The run hangs up when it has heard enough.
            let _ = stream.write_all(answer).await;
            if answer.is_empty() {
                std::future::pending().await
            }
        };
        let request = json!({ "query": {} });
        tokio::select! {
            result = ask(&path, &request) => result,
            () = async { back_end.await; std::future::pending().await } => unreachable!(),
        }
        .map_err(|error| format!("{error:#}"))
    }

    #[tokio::test(start_paused = true)]
    async fn only_consent_is_taken_for_consent() {
        assert_eq!(asked(b"{\"return\":{}}\n").await, Ok(()));
        assert_eq!(asked(b"{\"error\":\"no\\u001b[1m\"}\n").await, Err("the back-end refuses: no".to_owned()));
        assert_eq!(asked(b"").await, Err("the back-end does not answer within 10 s".to_owned()));
        for nonsense in [&b"\n"[..], b"hello\n", b"{}\n", b"{\"return\":1,\"error\":\"x\"}\n", &[b'['; 100_000]] {
            assert!(asked(nonsense).await.unwrap_err().contains("not understood"));
        }
    }
}
