//! The command line.

use std::path::PathBuf;

use clap::Parser;
use vvu_back_end::listener::Endpoint;
use vvu_back_end::rate_limit::Limits;
use vvu_back_end::threads::Threads;

use crate::daemon::{Options, PortOptions};
use crate::filter::PortFilter;
use crate::port::{MAX_PAIRS, PortSettings};

/// What `--print-capabilities` prints: the device type, by QEMU's conventions for back-end programs.
pub const CAPABILITIES: &str = r#"{"type": "net"}"#;

/// Most ports of a switch.
pub const MAX_PORTS: usize = 8;

/// vhost-user-net back-end: a switch between virtual machines, with at most one TAP interface as its uplink.
///
/// Each port is a virtio network device on a socket of its own, and serves one front-end at a time. SIGUSR1 writes the
/// counters to the log, SIGTERM ends.
#[derive(Debug, Parser)]
#[command(name = "vvu-net", version)]
pub struct Cli {
    /// A port, by settings with commas between them; may be given up to 8 times.
    ///
    /// socket=PATH: create the vhost-user socket there (or fd=N: use the inherited socket N).
    /// mac=MAC: address of the device.
    /// queues=N: queue pairs, 1 to 64 [default: 1].
    /// link=up|down: state of the link at the start [default: up].
    /// macs=MAC;MAC: source addresses that the driver may use [default: all].
    /// vlans=N;N: VLANs that pass, 0 being frames without a tag [default: all].
    /// iops=N: packets in a second, both directions together [default: 0, no limit].
    /// bandwidth=N: bytes in a second, both directions together [default: 0, no limit].
    #[arg(
        long = "port",
        value_name = "SETTINGS",
        value_parser = parse_port,
        verbatim_doc_comment,
        required_unless_present = "print_capabilities"
    )]
    ports: Vec<PortOptions>,

    /// Connect the switch to this TAP interface, which is there and which the user of the program may use.
    #[arg(long, value_name = "INTERFACE")]
    tap: Option<String>,

    /// Largest packet without its Ethernet header, in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = 1500, value_parser = clap::value_parser!(u16).range(68..=65521))]
    mtu: u16,

    /// Listen at PATH for JSON lines that change settings: set-limits, set-link, set-filter, query.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    #[command(flatten)]
    threads: Threads,

    /// Print what the program can do, as JSON, and exit.
    #[arg(long)]
    pub print_capabilities: bool,
}

impl Cli {
    /// What to serve.
    ///
    /// # Errors
    /// One line for the user.
    pub fn into_options(self) -> Result<Options, String> {
        if self.ports.is_empty() || self.ports.len() > MAX_PORTS {
            return Err(format!("give --port 1 to {MAX_PORTS} times, not {} times", self.ports.len()));
        }
        let Self { ports, tap, mtu, control, threads, print_capabilities: _ } = self;
        Ok(Options { ports, tap, mtu, control, threads })
    }
}

fn parse_port(text: &str) -> Result<PortOptions, String> {
    let mut endpoint = None;
    let mut mac = None;
    let mut settings = (1, true, PortFilter::default(), Limits::default());
    let (pairs, link_up, filter, limits) = (&mut settings.0, &mut settings.1, &mut settings.2, &mut settings.3);
    let mut seen = Vec::new();
    for setting in text.split(',') {
        let (name, value) = setting.split_once('=').ok_or_else(|| format!("'{setting}' is not NAME=VALUE"))?;
        if seen.contains(&name) {
            return Err(format!("{name} is given twice"));
        }
        seen.push(name);
        match name {
            "socket" if endpoint.is_none() && !value.is_empty() => endpoint = Some(Endpoint::Path(value.into())),
            "fd" if endpoint.is_none() => endpoint = Some(Endpoint::Descriptor(number(name, value)?)),
            "mac" => mac = Some(value.parse().map_err(|error| format!("{error}"))?),
            "queues" => *pairs = number(name, value)?,
            "link" => *link_up = parse_link(value)?,
            "macs" => filter.macs = list(name, value)?,
            "vlans" => filter.vlans = list(name, value)?,
            "iops" => limits.operations_per_second = number(name, value)?,
            "bandwidth" => limits.bytes_per_second = number(name, value)?,
            _ => return Err(format!("'{setting}' is no setting of a port")),
        }
    }
    let (pairs, link_up, filter, limits) = settings;
    if !(1..=MAX_PAIRS).contains(&pairs) {
        return Err(format!("queues={pairs}, expected 1 to {MAX_PAIRS}"));
    }
    filter.check().map_err(|error| error.to_string())?;
    Ok(PortOptions {
        endpoint: endpoint.ok_or("there is no socket: add socket=PATH or fd=N")?,
        settings: PortSettings {
            mac: mac.ok_or("there is no address: add mac=52:54:00:12:34:56 or another")?,
            pairs,
            link_up,
            filter,
            limits,
        },
    })
}

fn parse_link(value: &str) -> Result<bool, String> {
    match value {
        "up" => Ok(true),
        "down" => Ok(false),
        _ => Err(format!("link={value}, expected up or down")),
    }
}

fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_not_one| format!("{name}={value}, expected a number"))
}

/// None at all for an empty value.
fn list<T: std::str::FromStr>(name: &str, value: &str) -> Result<Vec<T>, String> {
    let items = value.split(';').filter(|item| !item.is_empty());
    items.map(|item| item.parse().map_err(|_not_one| format!("{name}: '{item}' is none"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &str) -> Result<Options, String> {
        let cli = Cli::try_parse_from(line.split(' ')).map_err(|error| error.to_string())?;
        cli.into_options()
    }

    #[test]
    fn settings_are_read() {
        let line = "vvu-net --port socket=/run/a,mac=52:54:00:00:00:01 --tap vvu0 --mtu 9000 --control /run/c \
                    --port fd=7,mac=52:54:00:00:00:02,queues=4,link=down,macs=52:54:00:00:00:02;52:54:00:00:00:03,\
                    vlans=0;7,iops=10,bandwidth=20";
        let Options { ports, tap, mtu, control, threads } = options(line).unwrap();
        assert_eq!(threads, Threads::default());
        assert_eq!((tap.as_deref(), mtu, control), (Some("vvu0"), 9000, Some("/run/c".into())));
        assert_eq!(ports[0].endpoint, Endpoint::Path("/run/a".into()));
        assert_eq!((ports[0].settings.pairs, ports[0].settings.link_up), (1, true));
        assert_eq!((&ports[0].settings.filter, ports[0].settings.limits), (&PortFilter::default(), Limits::default()));
        assert_eq!(ports[1].endpoint, Endpoint::Descriptor(7));
        assert_eq!((ports[1].settings.pairs, ports[1].settings.link_up), (4, false));
        assert_eq!((ports[1].settings.filter.macs.len(), &ports[1].settings.filter.vlans), (2, &vec![0, 7]));
        assert_eq!(ports[1].settings.limits, Limits { operations_per_second: 10, bytes_per_second: 20 });
        let line = "vvu-net --port socket=s,mac=52:54:00:00:00:01 --cpus 1-2";
        assert_eq!(options(line).unwrap().threads.cpu_of_queue(1), Some(2));
        assert!(Cli::try_parse_from(["vvu-net", "--print-capabilities"]).unwrap().print_capabilities);
        serde_json::from_str::<serde_json::Value>(CAPABILITIES).unwrap();
    }

    #[test]
    fn mistakes_are_named() {
        let with = |settings: &str| format!("vvu-net --port socket=s,mac=52:54:00:00:00:01,{settings}");
        for (line, expected) in [
            ("vvu-net".to_owned(), "--port"),
            ("vvu-net --port mac=52:54:00:00:00:01".to_owned(), "socket=PATH"),
            ("vvu-net --port socket=s".to_owned(), "mac="),
            ("vvu-net --port socket=s,mac=52".to_owned(), "MAC address"),
            ("vvu-net --port socket".to_owned(), "NAME=VALUE"),
            (with("queues=0"), "1 to 64"),
            (with("queues=65"), "1 to 64"),
            (with("queues=x"), "number"),
            (with("link=on"), "up or down"),
            (with("vlans=4095"), "0 to 4094"),
            (with("macs=52"), "macs"),
            (with("mac=52:54:00:00:00:01"), "twice"),
            (with("fd=3"), "no setting"),
            (with("speed=3"), "no setting"),
            ("vvu-net --mtu 67 --port socket=s,mac=52:54:00:00:00:01".to_owned(), "67"),
            (format!("vvu-net{}", " --port socket=s,mac=52:54:00:00:00:01".repeat(9)), "1 to 8 times"),
        ] {
            let message = options(&line).unwrap_err();
            assert!(message.contains(expected), "{line}: {message}");
        }
    }
}
