//! Initramfs of driver VMs: one for each kind of device that tests look at, since what is not in it need not be loaded.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use vvu_guest_image::{DriverExtras, build_driver_image, static_program};
use vvu_setup::{Extra, RegistryProgram, Setup};

use crate::testbed::target_dir;

/// What PID 1 of every driver VM runs.
const DRIVER_INIT: &str = include_str!("driver_init.sh");

/// What a driver VM boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DriverImage {
    /// What all have, and the witness: enough for disks and file systems.
    Disk,
    /// What all have, `vvu-station`, `iperf3`, `ethtool` and the drivers of network cards and VLANs.
    Network,
    /// What all have, and test suites for file systems: `fsx` and `pjdfstest`.
    FileSystem,
    /// What all have, `socat` and the drivers of sources of random bytes and of virtio's own sockets.
    Peripherals,
}

impl DriverImage {
    /// The image, which is built once per process: it depends on nothing but the set-up, the script and the programs.
    /// Different ones are built side by side.
    pub(crate) fn built(self, setup: &Setup, folder: &Path) -> Result<PathBuf> {
        static BUILT: Mutex<BTreeMap<DriverImage, Arc<Mutex<Option<PathBuf>>>>> = Mutex::new(BTreeMap::new());
        let of_kind = Arc::clone(BUILT.lock().unwrap_or_else(PoisonError::into_inner).entry(self).or_default());
        let mut built = of_kind.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = &*built {
            return Ok(path.clone());
        }
        let path = folder.join(self.file_name());
        self.build(setup, &path).with_context(|| format!("cannot build the driver VM's image {}", path.display()))?;
        Ok(built.insert(path).clone())
    }

    const fn file_name(self) -> &'static str {
        match self {
            Self::Disk => "driver.initrd",
            Self::Network => "driver-network.initrd",
            Self::FileSystem => "driver-file-system.initrd",
            Self::Peripherals => "driver-peripherals.initrd",
        }
    }

    fn build(self, setup: &Setup, out: &Path) -> Result<()> {
        match self {
            Self::Disk => {
                let extras = DriverExtras { own: &[own_program("vvu-witness")?], ..DriverExtras::default() };
                build_driver_image(setup, DRIVER_INIT, &extras, out)?;
            }
            Self::Network => {
                let root = Extra::Network.root()?;
                let programs = [(root.clone(), "iperf3"), (root, "ethtool")];
                let modules = ["virtio_net", "8021q"];
                let own = [station()?];
                let extras = DriverExtras { own: &own, programs: &programs, modules: &modules };
                build_driver_image(setup, DRIVER_INIT, &extras, out)?;
            }
            Self::FileSystem => {
                let own = [registry_program(RegistryProgram::Fsx)?, registry_program(RegistryProgram::Pjdfstest)?];
                let extras = DriverExtras { own: &own, ..DriverExtras::default() };
                build_driver_image(setup, DRIVER_INIT, &extras, out)?;
            }
            Self::Peripherals => {
                let programs = [(Extra::Network.root()?, "socat")];
                let modules = ["virtio_rng", "vmw_vsock_virtio_transport"];
                let extras = DriverExtras { programs: &programs, modules: &modules, ..DriverExtras::default() };
                build_driver_image(setup, DRIVER_INIT, &extras, out)?;
            }
        }
        Ok(())
    }
}

/// The program that a test runs at both ends of a network, which is static.
///
/// # Errors
/// If it is not built.
pub fn station() -> Result<PathBuf> {
    own_program("vvu-station")
}

/// A static program of the crate registry, which is built when it is first asked for.
fn registry_program(program: RegistryProgram) -> Result<PathBuf> {
    Ok(program.root()?.join("bin").join(program.name()))
}

/// A static program of ours.
fn own_program(name: &str) -> Result<PathBuf> {
    let program = static_program(&target_dir()?, name);
    ensure!(program.is_file(), "the driver VM's own program {name} is not built: run `cargo xtask image`");
    Ok(program)
}
