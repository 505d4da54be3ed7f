//! What a class of devices wants from a run, and what becomes of it.

use std::path::PathBuf;

use anyhow::bail;
use vvu_appliance_config::Device;

use crate::image::Image;
use crate::image_lock::ImageLock;
use crate::mac::Mac;
use crate::overlay::Overlay;
use crate::qemu_args::DiskIo;

/// Class of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// A disk.
    Blk,
    /// Network devices on a switch.
    Net,
    /// A program of the operator's.
    Exec,
}

impl Class {
    /// The word for it in commands and events.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Blk => "blk",
            Self::Net => "net",
            Self::Exec => "exec",
        }
    }
}

/// What a class wants, with everything checked that is its own.
#[derive(Debug)]
pub(crate) struct Draft {
    /// The class.
    pub(crate) class: Class,
    /// Where it shall be served, at least one.
    pub(crate) ports: Vec<PortDraft>,
    /// Disks of the appliance VM.
    pub(crate) disks: Vec<DiskDraft>,
    /// The appliance VM's own network card.
    pub(crate) nic: Option<Nic>,
    /// Byte streams between the host and the back-end.
    pub(crate) channels: Vec<String>,
    /// What is added to the appliance image.
    pub(crate) overlay: Option<Overlay>,
    /// What the agent is told.
    pub(crate) device: Device,
}

impl Draft {
    /// Nothing but a device.
    pub(super) fn of(class: Class, device: Device) -> Self {
        let (ports, disks, channels) = (Vec::new(), Vec::new(), Vec::new());
        Self { class, ports, disks, nic: None, channels, overlay: None, device }
    }

    /// Whether two appliance VMs can be there at once, one of them ready to take the place of the other: not if a back-end
    /// that starts would read what another one still writes, or wants what only one can have.
    pub(super) fn can_stand_by(&self) -> bool {
        let written = |disk: &DiskDraft| disk.has_metadata && !disk.image.read_only;
        !self.disks.iter().any(written) && self.nic.as_ref().is_none_or(|nic| nic.can_be_shared)
    }
}

/// The appliance VM's own network card.
#[derive(Debug, Clone)]
pub(crate) struct Nic {
    /// Value of QEMU's `-netdev`, with the id [`Nic::ID`].
    pub(crate) netdev: String,
    /// Its MAC address, by which the agent finds it.
    pub(crate) mac: Mac,
    /// Whether two appliance VMs can be connected to it at once.
    pub(crate) can_be_shared: bool,
}

impl Nic {
    /// Name of the network in QEMU.
    pub(crate) const ID: &str = "uplink";
}

/// A port that is wanted.
#[derive(Debug)]
pub(crate) struct PortDraft {
    /// The vhost-user socket.
    pub(crate) socket: PathBuf,
    /// The option that names it.
    pub(crate) option: &'static str,
    /// Queues, or queue pairs of a network device, that the driver VM is offered.
    pub(crate) queues: u16,
    /// All vrings of the device.
    pub(crate) vrings: u16,
    /// MAC address of a network device.
    pub(crate) mac: Option<Mac>,
}

/// A port of a run.
#[derive(Debug, Clone)]
pub(crate) struct Port {
    /// Absolute path of the vhost-user socket.
    pub(crate) socket: String,
    /// Identity of the device set.
    pub(crate) uuid: String,
    /// Queues, or queue pairs of a network device, that the driver VM is offered.
    pub(crate) queues: u16,
    /// All vrings of the device: one kick vector each.
    pub(crate) vrings: u16,
    /// MAC address of a network device.
    pub(crate) mac: Option<Mac>,
}

/// A disk that is wanted.
#[derive(Debug)]
pub(crate) struct DiskDraft {
    /// Serial number by which the agent finds it.
    pub(crate) serial: String,
    /// The image.
    pub(crate) image: Image,
    /// The lock on it, unless other hosts may have it open.
    pub(crate) lock: Option<ImageLock>,
    /// Whether a back-end keeps something of what is on it in memory.
    pub(crate) has_metadata: bool,
}

impl DiskDraft {
    /// The disk, given how QEMU can open the image.
    ///
    /// # Errors
    /// It cannot, or not as it must; one line with the remedy.
    pub(super) fn opened(self, io: Result<DiskIo, String>) -> anyhow::Result<Disk> {
        let Self { serial, image, lock, .. } = self;
        let io = match io {
            Ok(way) => way,
            Err(reason) => bail!("QEMU cannot open image {}: {reason}", image.path),
        };
        if lock.is_none() && !io.direct {
            bail!(
                "image {} cannot be opened with O_DIRECT, so --share-image would let hosts read stale data from their page \
                 caches; put it on a file system that has O_DIRECT",
                image.path
            );
        }
        Ok(Disk { serial, image, lock, io })
    }
}

/// A disk of the appliance VM.
#[derive(Debug)]
pub(crate) struct Disk {
    /// Serial number by which the agent finds it.
    pub(crate) serial: String,
    /// The image.
    pub(crate) image: Image,
    /// The lock on it, unless other hosts may have it open.
    pub(crate) lock: Option<ImageLock>,
    /// How QEMU submits its requests.
    pub(crate) io: DiskIo,
}
