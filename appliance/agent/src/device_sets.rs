//! Finds the devices of each device set by their uuid, and brings them up in the order that they need.
//!
//! 1. Control devices and doorbell devices go to vfio-pci; each says which set it belongs to.
//! 2. The control devices start, so that the bridges can tell of their windows.
//! 3. The windows' devices start, and each bridge maps the header of its window.
//! 4. With all headers in place, the kernel looks at them and makes the device-DAX nodes.
//! 5. Back-end programs get what they work on, and each device set its socket of one.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::time::timeout;
use tracing::{info, warn};
use vvu_appliance_config::{ApplianceConfig, CONTROL_CHANNEL, Device};
use vvu_protocol::control::VIRTIO_ID;

use crate::channel::{Channel, Port};
use crate::control::{ControlDevice, ControlPort, FoundControlDevice};
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
use crate::window::Window;

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

/// Brings up all device sets of the configuration.
///
/// # Errors
/// If a device is missing or cannot be driven.
pub async fn bring_up(config: &ApplianceConfig, modules: &Modules, reaper: &Reaper) -> Result<Machine> {
    let mut devices = start_controls(config)?;
    modules.load(Stage::Window)?;
    for set in &mut devices {
        let uuid = set.uuid;
        let len = timeout(WINDOW_TIMEOUT, window_len(&mut set.control)).await;
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
            let window = Window::open(set.uuid, set.window_len).await?;
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
    Ok(machine)
}

/// Starts the control device of each device set, in the order of the configuration.
fn start_controls(config: &ApplianceConfig) -> Result<Vec<Devices>> {
    let mut controls = find_controls()?;
    let mut doorbells = find_doorbells()?;
    let mut sets = Vec::new();
    for uuid in config.back_ends.iter().flat_map(|back_end| &back_end.device_sets) {
        let uuid: Uuid = uuid.parse()?;
        let control = controls.remove(&uuid).with_context(|| format!("device set {uuid} has no control device"))?;
        let doorbell = doorbells.remove(&uuid).with_context(|| format!("device set {uuid} has no doorbell device"))?;
        let control = control.start().with_context(|| format!("device set {uuid}"))?;
        sets.push(Devices { uuid, control, doorbell, window_len: 0 });
    }
    for uuid in controls.keys().chain(doorbells.keys()) {
        warn!(set = %uuid, "there is a device of a set that is not configured");
    }
    Ok(sets)
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

fn find_doorbells() -> Result<BTreeMap<Uuid, DoorbellDevice>> {
    let mut found = BTreeMap::new();
    for function in PciFunction::all(PciId::IVSHMEM)? {
        let device = DoorbellDevice::new(open(&function)?).with_context(|| format!("PCI device {function}"))?;
        info!(set = %device.uuid(), %function, "doorbell device");
        found.insert(device.uuid(), device);
    }
    Ok(found)
}

fn open(function: &PciFunction) -> Result<VfioDevice> {
    let group = function.bind_to_vfio()?;
    VfioDevice::open(function, group).with_context(|| format!("PCI device {function}"))
}

/// Waits until the device tells how long its window is.
async fn window_len(control: &mut ControlDevice) -> Result<u64> {
    loop {
        let len = control.config()?.window_len;
        if len != 0 {
            return Ok(len);
        }
        control.config_change().await?;
    }
}
