//! Finds the devices of each device set by their uuid, and brings them up in the order that they need.
//!
//! 1. Control devices go to vfio-pci; each says which set it belongs to. They start, so that the bridges can tell of their
//!    windows, which they hold back at first.
//! 2. The windows' devices start.
//! 3. Doorbell devices go to vfio-pci, and each bridge maps the header of its window.
//! 4. With all headers in place, the kernel looks at them and makes the device-DAX nodes.
//! 5. Back-end programs get what they work on, and each device set its socket of one.
//!
//! Headers and doorbells come late because QEMU starts a vhost-user device only while its machine has 8 regions of memory or
//! less, and each of them is one.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::time::timeout;
use tracing::{info, warn};
use vvu_appliance_config::{ApplianceConfig, BootTimes, CONTROL_CHANNEL, Device};
use vvu_protocol::control::VIRTIO_ID;

use crate::boot::uptime_ms;
use crate::channel::{Channel, Port};
use crate::control::{ControlDevice, FoundControlDevice};
use crate::doorbell::DoorbellDevice;
use crate::modules::{Modules, Stage};
use crate::orderly_end::OrderlyEnd;
use crate::pci::{PciFunction, PciId};
use crate::process::BackEndProcess;
use crate::programs::{Prepared, port_name, prepare};
use crate::reaper::Reaper;
use crate::session::DeviceSet;
use crate::supervisor::Supervisor;
use crate::uuid::Uuid;
use crate::vfio::VfioDevice;
use crate::window::WindowNode;

/// How long a bridge may take to map the header of its window.
const WINDOW_TIMEOUT: Duration = Duration::from_secs(30);

/// A device set of the real machine.
pub type RealDeviceSet = DeviceSet<ControlDevice, DoorbellDevice>;

struct Devices {
    uuid: Uuid,
    control: ControlDevice,
    doorbell: DoorbellDevice,
    window_len: u64,
}

/// What a real machine serves.
#[derive(Debug)]
pub struct Machine {
    /// All device sets.
    pub sets: Vec<RealDeviceSet>,
    /// The channels of their back-ends, each with its name.
    pub channels: Vec<(String, Channel)>,
    /// The end that its programs want, if there are any that do.
    pub orderly_end: Option<OrderlyEnd>,
}

/// Brings up all device sets of the configuration, and notes in `times` when it got how far.
///
/// # Errors
/// If a device is missing or cannot be driven.
pub async fn bring_up(
    config: &ApplianceConfig,
    modules: &Modules,
    reaper: &Reaper,
    times: &mut BootTimes,
) -> Result<Machine> {
    let doorbells = PciFunction::all(PciId::IVSHMEM)?;
    doorbells.iter().try_for_each(PciFunction::hide_memory)?;
    let controls = start_controls(config)?;
    times.controls = uptime_ms();
    modules.load(Stage::Window)?;
    let mut devices = add_doorbells(controls, &doorbells)?;
    for set in &mut devices {
        set.control.hold_window(false)?;
    }
    for set in &mut devices {
        let uuid = set.uuid;
        let len = timeout(WINDOW_TIMEOUT, set.control.window_len()).await;
        set.window_len = len.with_context(|| format!("bridge of device set {uuid} does not map its window"))??;
    }
    modules.load(Stage::Dax)?;
    let mut machine = Machine { sets: Vec::new(), channels: Vec::new(), orderly_end: None };
    let mut devices = devices.into_iter();
    for (index, back_end) in (0..).zip(&config.back_ends) {
        let Prepared { mut program, channels } = prepare(index, back_end, &config.log).await?;
        let sockets = program.sockets.clone();
        // The devices are in the order of the sets in the configuration.
        let mut sets = Vec::new();
        for set in devices.by_ref().take(sockets.len()) {
            let window = WindowNode::open(set.uuid, set.window_len).await?;
            sets.push((set, window));
        }
        if let Device::Exec(_) = back_end.device {
            program.window = sets.first().map(|(_, window)| window.clone());
        }
        let process = BackEndProcess::new(program, reaper.clone());
        for (socket, (Devices { uuid, control, doorbell, .. }, window)) in sockets.into_iter().zip(sets) {
            let supervisor = Supervisor::new(process.clone(), socket, &window.file)?;
            info!(set = %uuid, "devices are up");
            machine.sets.push(DeviceSet::new(uuid, control, doorbell, window, supervisor));
        }
        for channel in channels {
            let port = open_port(&channel.name, &channel.port).await?;
            machine.channels.push((channel.name, Channel::new(port, channel.socket)));
        }
        if matches!(back_end.device, Device::Exec(_)) && back_end.channels.iter().any(|name| name == CONTROL_CHANNEL) {
            let port = open_port(CONTROL_CHANNEL, &port_name(CONTROL_CHANNEL)).await?;
            machine.orderly_end = Some(OrderlyEnd::new(port, process));
        }
    }
    times.windows = uptime_ms();
    Ok(machine)
}

/// Starts the control device of each device set, in the order of the configuration. Their windows are held back.
fn start_controls(config: &ApplianceConfig) -> Result<Vec<(Uuid, ControlDevice)>> {
    let mut found = find_controls()?;
    let mut started = Vec::new();
    for uuid in config.back_ends.iter().flat_map(|back_end| &back_end.device_sets) {
        let uuid: Uuid = uuid.parse()?;
        let control = found.remove(&uuid).with_context(|| format!("device set {uuid} has no control device"))?;
        let mut control = control.start().with_context(|| format!("device set {uuid}"))?;
        control.hold_window(true)?;
        started.push((uuid, control));
    }
    warn_of_others(found.keys());
    Ok(started)
}

/// Adds the doorbell device of each device set.
fn add_doorbells(controls: Vec<(Uuid, ControlDevice)>, functions: &[PciFunction]) -> Result<Vec<Devices>> {
    let mut found = find_doorbells(functions)?;
    let mut devices = Vec::new();
    for (uuid, control) in controls {
        let doorbell = found.remove(&uuid).with_context(|| format!("device set {uuid} has no doorbell device"))?;
        devices.push(Devices { uuid, control, doorbell, window_len: 0 });
    }
    warn_of_others(found.keys());
    Ok(devices)
}

fn warn_of_others<'a>(sets: impl Iterator<Item = &'a Uuid>) {
    for uuid in sets {
        warn!(set = %uuid, "there is a device of a set that is not configured");
    }
}

async fn open_port(channel: &str, name: &str) -> Result<Port> {
    let port = Port::find(name).await.with_context(|| format!("channel {channel}"))?;
    port.with_context(|| format!("channel {channel}: there is no virtio-serial port '{name}'"))
}

fn find_controls() -> Result<BTreeMap<Uuid, FoundControlDevice>> {
    let mut found = BTreeMap::new();
    for function in PciFunction::all(PciId::modern_virtio(VIRTIO_ID))? {
        let device = FoundControlDevice::new(open(&function)?).with_context(|| format!("PCI device {function}"))?;
        info!(set = %device.uuid(), %function, "control device");
        found.insert(device.uuid(), device);
    }
    Ok(found)
}

fn find_doorbells(functions: &[PciFunction]) -> Result<BTreeMap<Uuid, DoorbellDevice>> {
    let mut found = BTreeMap::new();
    for function in functions {
        let device = DoorbellDevice::new(open(function)?).with_context(|| format!("PCI device {function}"))?;
        info!(set = %device.uuid(), %function, "doorbell device");
        found.insert(device.uuid(), device);
    }
    Ok(found)
}

fn open(function: &PciFunction) -> Result<VfioDevice> {
    let group = function.bind_to_vfio()?;
    VfioDevice::open(function, group).with_context(|| format!("PCI device {function}"))
}
