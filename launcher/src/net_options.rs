//! What an operator says about networks: ports of a switch, filters, the uplink.

use std::path::PathBuf;
use std::str::FromStr;

use vvu_appliance_config::{Limits, MAX_QUEUES, PortFilter, PortOptions};

use crate::mac::Mac;
use crate::size::Size;

/// Most queue pairs of a port: two vrings each, and one for a control queue, have to be among the vrings of a device.
pub(crate) const MAX_PAIRS: u16 = (MAX_QUEUES - 1) / 2;

/// Largest VLAN identifier (IEEE 802.1Q; 4095 is reserved).
const MAX_VLAN: u16 = 4094;

/// Longest name of a network interface in bytes: `IFNAMSIZ` without its NUL (netdevice(7)).
const MAX_IFNAME_LEN: usize = 15;

/// Most addresses or VLANs of a filter: all ports' filters are in one document.
const MAX_LISTED: usize = 128;

/// Word for a filter that lets everything pass.
const ANY: &str = "any";

/// One port: `PATH[,mac=MAC][,queues=N][,link=up|down][,macs=MAC;MAC][,vlans=N;N][,iops=N][,bandwidth=SIZE]`. A comma in
/// the path is doubled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PortSpec {
    /// The vhost-user socket.
    pub(crate) socket: PathBuf,
    /// MAC address; none: one is derived from the socket's path.
    pub(crate) mac: Option<Mac>,
    /// Queue pairs.
    pub(crate) queues: u16,
    /// Whether the link is up at the start.
    pub(crate) link: Link,
    /// Who may be behind it.
    pub(crate) macs: Macs,
    /// Which VLANs.
    pub(crate) vlans: Vlans,
    /// What it may send and receive.
    pub(crate) limits: Limits,
}

impl PortSpec {
    /// A port with nothing special about it.
    pub(crate) fn at(socket: PathBuf) -> Self {
        Self {
            socket,
            mac: None,
            queues: 1,
            link: Link::Up,
            macs: Macs::default(),
            vlans: Vlans::default(),
            limits: Limits::default(),
        }
    }

    /// What the agent is told.
    pub(crate) fn options(&self, mac: Mac) -> PortOptions {
        PortOptions {
            mac: mac.to_string(),
            queues: self.queues,
            link: self.link == Link::Up,
            filter: PortFilter { macs: self.macs.texts(), vlans: self.vlans.0.clone() },
            limits: self.limits,
        }
    }
}

impl FromStr for PortSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // No path has a NUL.
        let escaped = text.replace(",,", "\0");
        let mut parts = escaped.split(',').map(|part| part.replace('\0', ","));
        let path = parts.next().filter(|path| !path.is_empty()).ok_or("the socket's path comes first")?;
        let mut port = Self::at(path.into());
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| format!("'{part}' is not KEY=VALUE"))?;
            match key {
                "mac" => port.mac = Some(value.parse().map_err(|error: crate::mac::MacError| error.to_string())?),
                "queues" => port.queues = pairs(value)?,
                "link" => port.link = value.parse()?,
                "macs" => port.macs = value.parse()?,
                "vlans" => port.vlans = value.parse()?,
                "iops" => port.limits.operations_per_second = number(value)?,
                "bandwidth" => {
                    let size: Size = value.parse().map_err(|error: crate::size::SizeError| error.to_string())?;
                    port.limits.bytes_per_second = size.0;
                }
                _ => return Err(format!("'{key}' is none of mac, queues, link, macs, vlans, iops, bandwidth")),
            }
        }
        Ok(port)
    }
}

/// Queue pairs, 1 to [`MAX_PAIRS`].
pub(crate) fn pairs(text: &str) -> Result<u16, String> {
    let allowed = 1..=MAX_PAIRS;
    let count = text.parse().ok().filter(|count| allowed.contains(count));
    count.ok_or_else(|| format!("'{text}' is not a number of queue pairs from 1 to {MAX_PAIRS}"))
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("'{text}' is not a number"))
}

/// State of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Link {
    /// Frames pass.
    Up,
    /// As if the cable were pulled out.
    Down,
}

impl FromStr for Link {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "up" => Ok(Self::Up),
            "down" => Ok(Self::Down),
            _ => Err(format!("'{text}' is neither up nor down")),
        }
    }
}

/// Source addresses that pass; all if there are none. `MAC;MAC` or `any`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Macs(Vec<Mac>);

impl Macs {
    /// The addresses as the agent reads them.
    pub(crate) fn texts(&self) -> Vec<String> {
        self.0.iter().map(Mac::to_string).collect()
    }
}

impl FromStr for Macs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        list(text, |part| part.parse().map_err(|error: crate::mac::MacError| error.to_string())).map(Self)
    }
}

/// VLANs that pass, 0 being frames without a tag; all if there are none. `N;N` or `any`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Vlans(pub(crate) Vec<u16>);

impl FromStr for Vlans {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let vlan = |part: &str| part.parse().ok().filter(|vlan| *vlan <= MAX_VLAN);
        list(text, |part| vlan(part).ok_or_else(|| format!("'{part}' is not a VLAN from 0 to {MAX_VLAN}"))).map(Self)
    }
}

fn list<T>(text: &str, read: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    let count = text.split(';').count();
    if count > MAX_LISTED {
        return Err(format!("{count} are too many; name at most {MAX_LISTED}"));
    }
    if text == ANY { Ok(Vec::new()) } else { text.split(';').map(read).collect() }
}

/// Where a switch is connected to: the value of QEMU's `-netdev` for the appliance's own network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Uplink {
    /// A TAP of the host that exists.
    Tap(String),
    /// QEMU's user-mode network.
    User,
    /// What QEMU is told, without an id.
    Netdev(String),
}

impl Uplink {
    /// The value for QEMU, with this id.
    pub(crate) fn netdev(&self, id: &str) -> String {
        match self {
            Self::Tap(name) => format!("tap,id={id},ifname={},script=no,downscript=no", name.replace(',', ",,")),
            Self::User => format!("user,id={id}"),
            Self::Netdev(text) => format!("{text},id={id}"),
        }
    }

    /// Whether two QEMUs can have it at once.
    pub(crate) fn can_be_shared(&self) -> bool {
        *self == Self::User
    }
}

impl FromStr for Uplink {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "user" => Ok(Self::User),
            Some(("tap", name)) => {
                let plain = !name.bytes().any(|byte| byte == b'/' || byte.is_ascii_whitespace() || byte == b':');
                let fits = (1..=MAX_IFNAME_LEN).contains(&name.len()) && name != "." && name != "..";
                if plain && fits { Ok(Self::Tap(name.to_owned())) } else { Err(format!("'{name}' names no interface")) }
            }
            Some(("netdev", netdev)) if netdev.split(',').any(|part| part.starts_with("id=")) => {
                Err("leave the id out, it is vvu's".to_owned())
            }
            Some(("netdev", netdev)) if !netdev.is_empty() => Ok(Self::Netdev(netdev.to_owned())),
            _ => Err("expected tap=INTERFACE, user, or netdev=VALUE with a value of QEMU's -netdev".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_read_with_all_that_can_be_said_of_it() {
        let text = "/run/a,,b.sock,mac=52:54:00:AA:00:01,queues=4,link=down,macs=52:54:00:aa:00:01;52:54:00:aa:00:02,\
                    vlans=0;7,iops=100,bandwidth=1M";
        let port: PortSpec = text.parse().unwrap();
        assert_eq!(port.socket, PathBuf::from("/run/a,b.sock"));
        let options = port.options(port.mac.unwrap());
        assert_eq!((options.mac.as_str(), options.queues, options.link), ("52:54:00:aa:00:01", 4, false));
        assert_eq!((options.filter.macs.len(), options.filter.vlans), (2, vec![0, 7]));
        assert_eq!((options.limits.operations_per_second, options.limits.bytes_per_second), (100, 1 << 20));
        assert_eq!("a.sock".parse(), Ok(PortSpec::at("a.sock".into())));
        assert_eq!("a.sock,macs=any,vlans=any".parse(), Ok(PortSpec::at("a.sock".into())));
    }

    #[test]
    fn what_is_no_port_is_refused_with_the_reason() {
        let cases = [
            ("", "path comes first"),
            (",mac=52:54:00:aa:00:01", "path comes first"),
            ("a,queues", "KEY=VALUE"),
            ("a,queues=0", "1 to 31"),
            ("a,queues=32", "1 to 31"),
            ("a,link=left", "neither up nor down"),
            ("a,mac=01:00:5e:00:00:01", "network card"),
            ("a,macs=", "network card"),
            ("a,vlans=4095", "0 to 4094"),
            ("a,vlans=1;", "0 to 4094"),
            ("a,iops=many", "number"),
            ("a,bandwidth=1X", "size"),
            ("a,color=red", "none of"),
        ];
        for (text, reason) in cases {
            let refusal = text.parse::<PortSpec>().unwrap_err();
            assert!(refusal.contains(reason), "{text}: {refusal}");
        }
    }

    #[test]
    fn an_uplink_becomes_a_netdev() {
        let cases = [
            ("tap=tap0", "tap,id=uplink,ifname=tap0,script=no,downscript=no"),
            ("tap=a,b", "tap,id=uplink,ifname=a,,b,script=no,downscript=no"),
            ("user", "user,id=uplink"),
            ("netdev=socket,connect=:1234", "socket,connect=:1234,id=uplink"),
        ];
        for (text, netdev) in cases {
            assert_eq!(text.parse::<Uplink>().unwrap().netdev("uplink"), netdev);
        }
        for text in
            ["", "tap", "tap=", "tap=../x", "tap=averyveryverylongname", "netdev=", "netdev=user,id=x", "bridge"]
        {
            assert!(text.parse::<Uplink>().is_err(), "{text}");
        }
    }
}
