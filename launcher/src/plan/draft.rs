//! What a class of devices wants from a run, and what becomes of it.

use std::path::PathBuf;

use anyhow::bail;
use vvu_appliance_config::Device;

use crate::image::Image;
use crate::image_lock::ImageLock;
use crate::qemu_args::DiskIo;

/// Class of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// A disk.
    Blk,
}

impl Class {
    /// The word for it in commands and events.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Blk => "blk",
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
    /// What the agent is told.
    pub(crate) device: Device,
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
}

impl DiskDraft {
    /// The disk, given how QEMU can open the image.
    ///
    /// # Errors
    /// It cannot, or not as it must; one line with the remedy.
    pub(super) fn opened(self, io: Result<DiskIo, String>) -> anyhow::Result<Disk> {
        let Self { serial, image, lock } = self;
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
