//! Recipes of what boots: the appliance image, the initramfs of the driver VM that tests and demo use, and overlays with
//! back-ends that others wrote.
//!
//! Used by `cargo xtask image` ([`build_appliance_image`]), `cargo xtask overlay` ([`build_overlay`]) and by whole-machine
//! tests ([`build_driver_image`], [`Initramfs`]). The same input gives the same bytes: entries are sorted,
//! numbered in order, owned by root and dated 1970, and no path of the building machine is in them.
//!
//! It fetches nothing itself (`vvu-setup` does), never mounts, never needs root, and leaves no binary in
//! the source tree.

mod appliance;
mod binaries;
mod driver;
mod elf;
mod error;
mod flavour;
mod initramfs;
mod kernel;
mod manifest;
mod modules;
mod overlay;
mod programs;

pub use appliance::{ApplianceFiles, appliance_initramfs, build_appliance_image};
pub use binaries::{
    ApplianceBinaries, build_appliance_binaries, build_back_ends_with_symbols, build_driver_binaries, static_program,
};
pub use driver::{DriverExtras, build_driver_image};
pub use error::ImageError;
pub use flavour::KernelFlavour;
pub use initramfs::{DeviceKind, Initramfs};
pub use kernel::{KernelError, kernel_elf};
pub use manifest::{FileRecord, Manifest};
pub use modules::ModuleTree;
pub use overlay::{Overlay, build_overlay};
pub use programs::add_program;
