//! PCI functions as sysfs shows them: finding those of a device set, and handing them to vfio-pci.
//!
//! A device is handed over before its driver set is known, so it may be in the hands of virtio-pci by then (which binds
//! every virtio function, whether or not a driver for the virtio device exists): it is taken from there.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::{fmt, fs};

const DEVICES: &str = "/sys/bus/pci/devices";
/// The command register in the configuration space, and its bit for memory.
const COMMAND_OFFSET: u64 = 4;
const COMMAND_MEMORY: u16 = 1 << 1;

const PROBE: &str = "/sys/bus/pci/drivers_probe";

/// Vendor and device id of a PCI function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciId {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
}

impl PciId {
    /// A virtio device with this virtio id, without its legacy interface (virtio 1.3, section 4.1.2).
    #[must_use]
    pub const fn modern_virtio(virtio_id: u16) -> Self {
        Self { vendor: 0x1af4, device: 0x1040 + virtio_id }
    }

    /// The doorbell device (QEMU documentation, "Device Specification for Inter-VM shared memory device").
    pub const IVSHMEM: Self = Self { vendor: 0x1af4, device: 0x1110 };
}

/// Why a function cannot be handed to vfio-pci.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// A file of sysfs cannot be read or written.
    #[error("cannot access {path}")]
    Sysfs {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// There is no IOMMU.
    #[error(
        "PCI device {address} is in no IOMMU group: the VM needs '-device intel-iommu' and the kernel 'intel_iommu=on iommu=pt'"
    )]
    NoIommu {
        /// PCI address.
        address: String,
    },
}

/// One PCI function.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciFunction {
    address: String,
}

impl fmt::Display for PciFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address)
    }
}

impl PciFunction {
    /// All functions with this id, in the order of their addresses.
    ///
    /// # Errors
    /// [`PciError::Sysfs`].
    pub fn all(id: PciId) -> Result<Vec<Self>, PciError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(DEVICES).map_err(at(Path::new(DEVICES)))? {
            let entry = entry.map_err(at(Path::new(DEVICES)))?;
            let function = Self { address: entry.file_name().to_string_lossy().into_owned() };
            if function.id()? == id {
                found.push(function);
            }
        }
        found.sort();
        Ok(found)
    }

    /// PCI address in text form, as `0000:00:03.0`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    fn file(&self, name: &str) -> PathBuf {
        Path::new(DEVICES).join(&self.address).join(name)
    }

    fn id(&self) -> Result<PciId, PciError> {
        Ok(PciId { vendor: read_hex(&self.file("vendor"))?, device: read_hex(&self.file("device"))? })
    }

    /// Takes the function's memory out of the address space; opening it by VFIO puts it back (PCI Local Bus Specification 3.0,
    /// section 6.2.2, bit 1 of the command register).
    ///
    /// # Errors
    /// [`PciError::Sysfs`].
    pub fn hide_memory(&self) -> Result<(), PciError> {
        let path = self.file("config");
        let hide = || {
            let config = fs::File::options().read(true).write(true).open(&path)?;
            let mut command = [0; 2];
            config.read_exact_at(&mut command, COMMAND_OFFSET)?;
            let hidden = u16::from_le_bytes(command) & !COMMAND_MEMORY;
            config.write_all_at(&hidden.to_le_bytes(), COMMAND_OFFSET)
        };
        hide().map_err(at(&path))
    }

    /// Takes the function from its driver, if it has one, gives it to vfio-pci, and says which IOMMU group it is in.
    ///
    /// # Errors
    /// [`PciError`].
    pub fn bind_to_vfio(&self) -> Result<u32, PciError> {
        write(&self.file("driver_override"), "vfio-pci")?;
        if self.file("driver").exists() {
            write(&self.file("driver/unbind"), &self.address)?;
        }
        write(Path::new(PROBE), &self.address)?;
        let link = fs::read_link(self.file("iommu_group")).ok();
        let name = link.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
        let group = name.and_then(|name| name.parse().ok());
        group.ok_or_else(|| PciError::NoIommu { address: self.address.clone() })
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> PciError {
    let path = path.display().to_string();
    move |source| PciError::Sysfs { path, source }
}

fn write(path: &Path, text: &str) -> Result<(), PciError> {
    fs::write(path, text).map_err(at(path))
}

/// Reads a number in the form `0x1af4`.
fn read_hex(path: &Path) -> Result<u16, PciError> {
    let text = fs::read_to_string(path).map_err(at(path))?;
    let digits = text.trim().trim_start_matches("0x");
    u16::from_str_radix(digits, 16).map_err(|error| at(path)(io::Error::new(io::ErrorKind::InvalidData, error)))
}
