//! Everything that a run needs, checked before anything is started.
//!
//! A class of devices makes a [`Draft`] of what it wants from its own arguments; what is the same for all classes is added
//! here, and everything that depends on the host is looked at.

mod blk;
mod draft;
mod exec;
mod machine;
mod net;

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, bail};
use vvu_appliance_config::{ApplianceConfig, BackEnd, CONFIG_VERSION, CONTROL_CHANNEL};

use self::draft::PortDraft;
pub(crate) use self::draft::{Class, Disk, Draft, Nic, Port};
pub(crate) use self::exec::MAX_CHANNELS;
pub(crate) use self::machine::{Machine, default_memory};
use crate::cli::MachineArgs;
use crate::control;
use crate::overlay::Overlay;
use crate::probe;
use crate::socket_path;

/// A byte stream between the host and the back-end.
#[derive(Debug)]
pub(crate) struct Channel {
    /// Its name.
    pub(crate) name: String,
    /// Where the operator finds it, unless it is for the run itself: absolute path of a link to a socket.
    pub(crate) link: Option<String>,
}

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
    /// The appliance VM's own network card.
    pub(crate) nic: Option<Nic>,
    /// Byte streams between the host and the back-end.
    pub(crate) channels: Vec<Channel>,
    /// What is added to the appliance image.
    pub(crate) overlay: Option<Overlay>,
    /// Whether two appliance VMs can be there at once, one of them ready to take the place of the other.
    pub(crate) can_stand_by: bool,
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
        let can_stand_by = draft.can_stand_by();
        let mut ports = Vec::new();
        for PortDraft { socket, option, queues, vrings, mac } in draft.ports {
            let socket = socket_path::claim(&socket, option).await?;
            ports.push(Port { socket, uuid: new_uuid()?, queues, vrings, mac });
        }
        refuse_twins(&ports)?;
        let first = ports.first().context("there is no port to serve")?;
        let control = args.control.clone().unwrap_or_else(|| control::beside(Path::new(&first.socket)));
        let control = socket_path::claim(&control, "--control").await?;
        let channels = channels(draft.channels, &first.socket).await?;
        let overlay_bytes = draft.overlay.as_ref().map(Overlay::len_bytes).unwrap_or_default();
        let overlay_bytes = (draft.class == Class::Exec).then_some(overlay_bytes);
        let mut machine = Machine::find(args, ports.len(), overlay_bytes)?;
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
            channels: channels.iter().map(|channel| channel.name.clone()).collect(),
            device: draft.device,
        };
        let config = ApplianceConfig { version: CONFIG_VERSION, log: args.log.clone(), back_ends: vec![back_end] };
        // It is written anew for each appliance VM, but now is the time to refuse it.
        config.to_json().context("the appliance cannot be configured so")?;
        Ok(Self {
            class: draft.class,
            ports,
            control,
            disks,
            nic: draft.nic,
            channels,
            overlay: draft.overlay,
            can_stand_by,
            config,
            machine,
        })
    }

    /// Number of the channel that is for the run itself.
    pub(crate) fn control_channel(&self) -> Option<usize> {
        self.channels.iter().position(|channel| channel.name == CONTROL_CHANNEL)
    }

    /// The socket by which the run is known, that of the first port.
    pub(crate) fn socket(&self) -> &str {
        self.ports.first().map(|port| port.socket.as_str()).unwrap_or_default()
    }
}

/// Refuses two ports at the same path: the second bridge could not bind it.
fn refuse_twins(ports: &[Port]) -> anyhow::Result<()> {
    let mut seen = BTreeSet::new();
    match ports.iter().find(|port| !seen.insert(&port.socket)) {
        Some(twin) => bail!("socket {} is named for two ports; give each its own", twin.socket),
        None => Ok(()),
    }
}

/// The channels with the places where the operator will find them. That of the run itself has none.
async fn channels(names: Vec<String>, socket: &str) -> anyhow::Result<Vec<Channel>> {
    let mut channels = Vec::new();
    for name in names {
        let link = match name.as_str() {
            CONTROL_CHANNEL => None,
            _ => Some(socket_path::claim_link(Path::new(&format!("{socket}.{name}")), "--channel").await?),
        };
        channels.push(Channel { name, link });
    }
    Ok(channels)
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
