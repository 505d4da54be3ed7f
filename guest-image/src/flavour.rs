//! Which kernel an appliance has: the distribution's, or one that is built out of the same source for appliances alone.

use std::fmt;
use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vvu_setup::{BuiltKernel, Setup};

use crate::error::{ImageError, at};
use crate::kernel::{KernelError, kernel_elf, loaded_parts};

/// The options of [`KernelFlavour::Minimal`], each with its reason.
const MINIMAL_OPTIONS: &str = include_str!("../minimal.config");

/// Which kernel an appliance has. Its directory, its manifest and the kernel's release tell it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelFlavour {
    /// The distribution's own, as its package has it.
    #[default]
    Stock,
    /// One with nothing in it but what an appliance needs, built of the distribution's source.
    Minimal,
}

/// A kernel that an image can be made with.
#[derive(Debug)]
pub(crate) struct ApplianceKernel {
    /// The ELF file that QEMU starts.
    pub(crate) elf: Vec<u8>,
    /// Directory of its modules.
    pub(crate) modules: PathBuf,
    /// What `uname -r` says under it.
    pub(crate) release: String,
}

impl KernelFlavour {
    /// Name of the image's directory below the target directory.
    #[must_use]
    pub const fn directory(self) -> &'static str {
        match self {
            Self::Stock => "appliance",
            Self::Minimal => "appliance-minimal",
        }
    }

    /// The kernel; the minimal one is built now if it is not in the cache.
    pub(crate) fn kernel(self, setup: &Setup) -> Result<ApplianceKernel, ImageError> {
        let read = |path: &PathBuf, unpack: fn(&[u8]) -> Result<Vec<u8>, KernelError>| {
            let bytes = fs::read(path).map_err(at(path))?;
            unpack(&bytes).map_err(|source| ImageError::Kernel { path: path.clone(), source })
        };
        match self {
            Self::Stock => Ok(ApplianceKernel {
                elf: read(&setup.kernel, kernel_elf)?,
                modules: setup.modules.clone(),
                release: setup.kernel_release.clone(),
            }),
            Self::Minimal => {
                let BuiltKernel { image, modules, release } =
                    BuiltKernel::with_options(&self.to_string(), MINIMAL_OPTIONS)?;
                Ok(ApplianceKernel { elf: read(&image, loaded_parts)?, modules, release })
            }
        }
    }
}

impl fmt::Display for KernelFlavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stock => "stock",
            Self::Minimal => "minimal",
        })
    }
}
