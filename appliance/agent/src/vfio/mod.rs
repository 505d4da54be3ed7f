//! PCI devices driven from here by way of Linux' VFIO.
//!
//! Registers are read and written through the device's file, not through a mapping, so nothing of it is unsafe; there are
//! few accesses, and none on a device's data path. The devices of a device set bypass the appliance's IOMMU (a virtio
//! device without `iommu_platform`), so the container's translations serve one purpose only: they pin memory.

mod ioctl;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;

use vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;
use vm_memory::MmapRegion;

use crate::pci::PciFunction;

/// Address that pinned memory has for devices of its container; any would do, as no device of ours uses it.
const PINNED_IOVA: u64 = 0x10_0000;

/// Command register of the PCI configuration space (PCI 3.0, section 6.2.2): offset, and the bits for memory accesses and
/// for bus mastering.
const PCI_COMMAND: u64 = 4;
const PCI_COMMAND_MEMORY_AND_MASTER: u16 = 0b110;

/// Why a device cannot be driven.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// A file could not be opened.
    #[error("cannot open {path}")]
    Open {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A step of the set-up failed.
    #[error("VFIO refuses {what}")]
    Refused {
        /// The step.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Another driver holds a device of the same IOMMU group.
    #[error("IOMMU group {group} has a device in it that another driver holds")]
    NotViable {
        /// The group.
        group: u32,
    },
    /// A register could not be read or written.
    #[error("access to {len} bytes at offset {offset:#x} of region {region}, which has {size:#x} bytes")]
    Access {
        /// Index of the region.
        region: u32,
        /// Length of the region in bytes.
        size: u64,
        /// Start of the access.
        offset: u64,
        /// Length of the access in bytes.
        len: usize,
        /// Why, if the kernel said so; else the access is not aligned or beyond the end.
        source: Option<io::Error>,
    },
}

fn refused(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> VfioError {
    move |errno| VfioError::Refused { what, source: errno.into() }
}

/// One PCI function in the hands of VFIO, in a container of its own.
///
/// Dropping it closes the device, upon which the kernel disables it: interrupts and bus mastering end.
#[derive(Debug)]
pub struct VfioDevice {
    // Order of the fields is order of closing: device, group, container.
    device: Rc<File>,
    _group: File,
    container: File,
}

impl VfioDevice {
    /// Opens a function that is bound to vfio-pci, and lets it answer memory accesses and write to memory.
    ///
    /// # Errors
    /// [`VfioError`].
    pub fn open(function: &PciFunction, group: u32) -> Result<Self, VfioError> {
        let container = open(Path::new("/dev/vfio/vfio"))?;
        let group_file = open(&Path::new("/dev/vfio").join(group.to_string()))?;
        if !ioctl::group_is_viable(group_file.as_fd()).map_err(refused("the group's status"))? {
            return Err(VfioError::NotViable { group });
        }
        ioctl::group_set_container(group_file.as_fd(), container.as_fd()).map_err(refused("the group's container"))?;
        ioctl::set_iommu_type1(container.as_fd()).map_err(refused("an IOMMU of type 1"))?;
        let address = CString::new(function.address()).unwrap_or_default();
        let device = ioctl::group_device(group_file.as_fd(), &address).map_err(refused("the device's file"))?;
        let device = Self { device: Rc::new(File::from(device)), _group: group_file, container };
        let config = device.config()?;
        config.write_u16(PCI_COMMAND, config.read_u16(PCI_COMMAND)? | PCI_COMMAND_MEMORY_AND_MASTER)?;
        Ok(device)
    }

    /// The PCI configuration space.
    ///
    /// # Errors
    /// [`VfioError::Refused`].
    pub fn config(&self) -> Result<Region, VfioError> {
        self.region(VFIO_PCI_CONFIG_REGION_INDEX)
    }

    /// A base address register's memory.
    ///
    /// # Errors
    /// [`VfioError::Refused`]. A register that the device does not have is a region of length 0.
    pub fn bar(&self, index: u8) -> Result<Region, VfioError> {
        self.region(u32::from(index))
    }

    fn region(&self, index: u32) -> Result<Region, VfioError> {
        let (start, size) = ioctl::region_info(self.device.as_fd(), index).map_err(refused("a region's place"))?;
        Ok(Region { device: Rc::clone(&self.device), index, start, size })
    }

    /// Switches MSI-X on with no vector in use, and answers how many there are.
    ///
    /// # Errors
    /// [`VfioError::Refused`].
    pub fn enable_msix(&self) -> Result<usize, VfioError> {
        let info = ioctl::msix_info(self.device.as_fd()).map_err(refused("the number of interrupts"))?;
        if let Some(last) = info.last_at_first() {
            ioctl::set_msix_eventfd(self.device.as_fd(), last, None).map_err(refused("interrupts"))?;
        }
        Ok(usize::try_from(info.count).unwrap_or(usize::MAX))
    }

    /// From now on an interrupt signals this eventfd, or is masked. MSI-X must be on.
    ///
    /// # Errors
    /// [`VfioError::Refused`].
    pub fn set_vector(&self, vector: u16, eventfd: Option<BorrowedFd<'_>>) -> Result<(), VfioError> {
        let set = ioctl::set_msix_eventfd(self.device.as_fd(), u32::from(vector), eventfd);
        set.map_err(refused("an eventfd for an interrupt"))
    }

    /// Keeps all pages of `memory` where they are as long as the device is open. To be called once.
    ///
    /// # Errors
    /// [`VfioError::Refused`].
    pub fn pin(&self, memory: &MmapRegion) -> Result<(), VfioError> {
        ioctl::map_dma(self.container.as_fd(), PINNED_IOVA, memory).map_err(refused("to pin memory"))
    }

    /// From now on each signal of `eventfd` is a write of `data` at `offset` of `region`, made by the kernel.
    ///
    /// # Errors
    /// [`VfioError::Refused`]; the kernel allows 1,000 of these for each device.
    pub fn write_on_event(
        &self,
        region: &Region,
        offset: u64,
        data: u32,
        eventfd: BorrowedFd<'_>,
    ) -> Result<(), VfioError> {
        let place = region.place(offset, 4)?;
        ioctl::write_on_event(self.device.as_fd(), place, data, Some(eventfd))
            .map_err(refused("an eventfd for a register"))
    }

    /// Undoes [`VfioDevice::write_on_event`]. What was signalled before is written before this returns.
    ///
    /// # Errors
    /// [`VfioError::Refused`].
    pub fn write_no_longer(&self, region: &Region, offset: u64, data: u32) -> Result<(), VfioError> {
        let place = region.place(offset, 4)?;
        ioctl::write_on_event(self.device.as_fd(), place, data, None)
            .map_err(refused("to take the eventfd of a register back"))
    }
}

fn open(path: &Path) -> Result<File, VfioError> {
    let file = File::options().read(true).write(true).open(path);
    file.map_err(|source| VfioError::Open { path: path.display().to_string(), source })
}

/// A part of a device that can be read and written: a base address register's memory, or the configuration space.
#[derive(Debug, Clone)]
pub struct Region {
    device: Rc<File>,
    index: u32,
    start: u64,
    size: u64,
}

impl Region {
    /// Length in bytes; 0 if the device does not have this region.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Reads one byte.
    ///
    /// # Errors
    /// [`VfioError::Access`].
    pub fn read_u8(&self, offset: u64) -> Result<u8, VfioError> {
        self.read(offset).map(u8::from_le_bytes)
    }

    /// Reads a 16-bit little-endian register.
    ///
    /// # Errors
    /// [`VfioError::Access`].
    pub fn read_u16(&self, offset: u64) -> Result<u16, VfioError> {
        self.read(offset).map(u16::from_le_bytes)
    }

    /// Reads a 32-bit little-endian register.
    ///
    /// # Errors
    /// [`VfioError::Access`].
    pub fn read_u32(&self, offset: u64) -> Result<u32, VfioError> {
        self.read(offset).map(u32::from_le_bytes)
    }

    /// Writes one byte.
    ///
    /// # Errors
    /// [`VfioError::Access`].
    pub fn write_u8(&self, offset: u64, value: u8) -> Result<(), VfioError> {
        self.write(offset, value.to_le_bytes())
    }

    /// Writes a 16-bit little-endian register.
    ///
    /// # Errors
    /// [`VfioError::Access`].
    pub fn write_u16(&self, offset: u64, value: u16) -> Result<(), VfioError> {
        self.write(offset, value.to_le_bytes())
    }

    /// Writes a 32-bit little-endian register.
    ///
    /// # Errors
    /// [`VfioError::Access`].
    pub fn write_u32(&self, offset: u64, value: u32) -> Result<(), VfioError> {
        self.write(offset, value.to_le_bytes())
    }

    fn read<const N: usize>(&self, offset: u64) -> Result<[u8; N], VfioError> {
        let mut bytes = [0; N];
        let place = self.place(offset, N)?;
        self.device.read_exact_at(&mut bytes, place).map_err(|source| self.error(offset, N, Some(source)))?;
        Ok(bytes)
    }

    fn write<const N: usize>(&self, offset: u64, bytes: [u8; N]) -> Result<(), VfioError> {
        let place = self.place(offset, N)?;
        self.device.write_all_at(&bytes, place).map_err(|source| self.error(offset, N, Some(source)))
    }

    /// Where in the device's file an aligned access of `len` bytes lies. The kernel makes one bus access of it only if it
    /// is aligned.
    fn place(&self, offset: u64, len: usize) -> Result<u64, VfioError> {
        let end = offset.checked_add(len as u64).filter(|end| *end <= self.size && offset.is_multiple_of(len as u64));
        let place = end.and_then(|_| self.start.checked_add(offset));
        place.ok_or_else(|| self.error(offset, len, None))
    }

    fn error(&self, offset: u64, len: usize, source: Option<io::Error>) -> VfioError {
        VfioError::Access { region: self.index, size: self.size, offset, len, source }
    }
}
