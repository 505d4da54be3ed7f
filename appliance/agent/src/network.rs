//! The uplink of a switch: a TAP for the back-end, and a bridge between it and the appliance's own network card.
//!
//! ```text
//!   back-end ◄──► vvu0 (TAP) ◄──► vvubr0 (bridge) ◄──► the card with the MAC address ◄──► outside
//! ```
//!
//! Frames pass, and nothing here has an address: IPv6 is off, IPv4 has none, the bridge speaks no protocol of its own. So nobody
//! outside or in the driver VM finds anything in the appliance that answers. The back-end needs no right but that of the TAP's
//! owner.

use std::fs;
use std::io;
use std::path::Path;

mod interface;

use interface::{Interfaces, Tap};

/// The TAP's name.
pub const TAP: &str = "vvu0";

/// The bridge's name.
const BRIDGE: &str = "vvubr0";

/// The interface that leads back to where a packet comes from.
const LOOPBACK: &str = "lo";

/// Where TAPs are made and opened. Who has no rights but may open it can use the TAPs of his user and do nothing else.
pub const TUN_DEVICE: &str = "/dev/net/tun";

/// Network interfaces, each with its attributes.
const CLASS: &str = "/sys/class/net";

/// IPv6 of all interfaces, of those to come, and of each.
const IPV6: &str = "/proc/sys/net/ipv6/conf";

/// Why there is no uplink.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No interface has the address.
    #[error("the appliance has no network card with MAC address {mac}")]
    NoCard {
        /// The address.
        mac: String,
    },
    /// A step was refused.
    #[error("cannot {step}")]
    Step {
        /// What was to be done.
        step: String,
        /// Why it was not.
        source: io::Error,
    },
}

/// Connects the network card that has a MAC address to a new TAP, which belongs to a user. Both have this MTU in bytes, and are up.
///
/// # Errors
/// [`NetworkError`].
pub fn make_uplink(mac: &str, mtu: u16, owner: u32) -> Result<(), NetworkError> {
    no_ip()?;
    let card = card_with(Path::new(CLASS), mac)?.ok_or_else(|| NetworkError::NoCard { mac: mac.to_owned() })?;
    let interfaces = Interfaces::new().map_err(failed("open a socket"))?;
    Tap::open(Path::new(TUN_DEVICE))
        .and_then(|tap| tap.make_persistent(TAP, owner))
        .map_err(failed(format!("make the TAP {TAP}")))?;
    interfaces.add_bridge(BRIDGE).map_err(failed(format!("make the bridge {BRIDGE}")))?;
    // To forward all groups to everybody is what a cable does.
    let snooping = Path::new(CLASS).join(BRIDGE).join("bridge/multicast_snooping");
    fs::write(&snooping, "0").map_err(failed(format!("write {}", snooping.display())))?;
    for port in [card.as_str(), TAP] {
        interfaces.set_mtu(port, mtu).map_err(failed(format!("set the MTU of {port} to {mtu}")))?;
        interfaces.add_to_bridge(BRIDGE, port).map_err(failed(format!("add {port} to {BRIDGE}")))?;
    }
    for interface in [card.as_str(), TAP, BRIDGE] {
        interfaces.set_up(interface).map_err(failed(format!("bring {interface} up")))?;
    }
    tracing::info!(card, mac, mtu, "uplink is up");
    Ok(())
}

/// Lets programs of the appliance talk to each other, and to nobody else, by their own addresses (127.0.0.1, `::1`).
///
/// # Errors
/// [`NetworkError`].
pub fn bring_loopback_up() -> Result<(), NetworkError> {
    let interfaces = Interfaces::new().map_err(failed("open a socket"))?;
    interfaces.set_up(LOOPBACK).map_err(failed(format!("bring {LOOPBACK} up")))
}

/// No interface, now or later, gets an IPv6 address by itself. A kernel without IPv6 has nothing to switch off.
fn no_ip() -> Result<(), NetworkError> {
    if !Path::new(IPV6).exists() {
        return Ok(());
    }
    for which in ["all", "default"] {
        let path = Path::new(IPV6).join(which).join("disable_ipv6");
        fs::write(&path, "1").map_err(failed(format!("write {}", path.display())))?;
    }
    Ok(())
}

fn card_with(class: &Path, mac: &str) -> Result<Option<String>, NetworkError> {
    let unreadable = |source| failed(format!("read {}", class.display()))(source);
    for entry in fs::read_dir(class).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let address = fs::read_to_string(entry.path().join("address"));
        if address.is_ok_and(|address| address.trim() == mac) {
            return Ok(entry.file_name().into_string().ok());
        }
    }
    Ok(None)
}

fn failed(step: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    let step = step.into();
    move |source| NetworkError::Step { step, source }
}
