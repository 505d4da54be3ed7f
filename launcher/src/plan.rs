//! Everything that a run needs, checked before anything is started.
//!
//! A class of devices makes a [`Draft`] of what it wants from its own arguments; what is the same for all classes is added
//! here, and everything that depends on the host is looked at.

mod blk;
mod draft;
mod machine;

use std::path::Path;

use anyhow::{Context, bail};
use vvu_appliance_config::{ApplianceConfig, BackEnd, CONFIG_VERSION};

pub(crate) use self::draft::{Class, Disk, Draft, Port};
pub(crate) use self::machine::{Machine, default_memory};
use crate::cli::MachineArgs;
use crate::control;
use crate::probe;
use crate::socket_path;

/// A run that can be started.
#[derive(Debug)]
pub(crate) struct Plan {
    /// What is served.
    pub(crate) class: Class,
    /// Where it is served, at least one.
    pub(crate) ports: Vec<Port>,
    /// Absolute path of the control socket.
    pub(crate) control: String,
    /// Disks of the appliance VM.
    pub(crate) disks: Vec<Disk>,
    /// The document for the agent, as the next appliance VM will get it.
    pub(crate) config: ApplianceConfig,
    /// The appliance VM and its surroundings.
    pub(crate) machine: Machine,
}

impl Plan {
    /// Checks sockets and programs; the draft's own things are checked already, as the operator's likeliest mistakes.
    ///
    /// # Errors
    /// One line with the remedy.
    pub(crate) async fn make(draft: Draft, args: &MachineArgs) -> anyhow::Result<Self> {
        let mut ports = Vec::new();
        for wanted in draft.ports {
            let socket = socket_path::claim(&wanted.socket, wanted.option).await?;
            ports.push(Port { socket, uuid: new_uuid()?, queues: wanted.queues, vrings: wanted.vrings });
        }
        let first = ports.first().context("there is no port to serve")?;
        let control = args.control.clone().unwrap_or_else(|| control::beside(Path::new(&first.socket)));
        let control = socket_path::claim(&control, "--control").await?;
        let mut machine = Machine::find(args, ports.len())?;
        let images: Vec<_> = draft.disks.iter().map(|disk| &disk.image).collect();
        let facts = probe::probe(&machine.qemu, &images).await?;
        if let Some(refusal) = facts.refusal() {
            bail!("{refusal}");
        }
        machine.qemu_version = Some(facts.version);
        let tried = draft.disks.into_iter().zip(facts.disk_io);
        let disks: Vec<Disk> = tried.map(|(disk, io)| disk.opened(io)).collect::<anyhow::Result<_>>()?;
        let back_end = BackEnd {
            device_sets: ports.iter().map(|port| port.uuid.clone()).collect(),
            channels: Vec::new(),
            device: draft.device,
        };
        let config = ApplianceConfig { version: CONFIG_VERSION, log: args.log.clone(), back_ends: vec![back_end] };
        // It is written anew for each appliance VM, but now is the time to refuse it.
        config.to_json().context("the appliance cannot be configured so")?;
        Ok(Self { class: draft.class, ports, control, disks, config, machine })
    }

    /// The socket by which the run is known, that of the first port.
    pub(crate) fn socket(&self) -> &str {
        self.ports.first().map(|port| port.socket.as_str()).unwrap_or_default()
    }
}

/// A random uuid in lower case; the kernel makes one with each read (random(4)).
fn new_uuid() -> anyhow::Result<String> {
    let path = "/proc/sys/kernel/random/uuid";
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}; mount /proc"))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_what_the_appliance_takes() {
        let (first, second) = (new_uuid().unwrap(), new_uuid().unwrap());
        assert_eq!(first.len(), 36);
        assert_ne!(first, second);
        assert_eq!(first, first.to_ascii_lowercase());
    }
}
