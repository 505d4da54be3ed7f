//! Provides what the real-machine commands need and a host seldom has: a QEMU with the three stock
//! devices of the device set, the distribution's own older QEMU, a stock kernel with its modules, and
//! the programs of the driver VM's root.
//!
//! Used by `cargo xtask setup`, which calls [`run`], and by everything that starts a machine
//! (`guest-image`, `tests`), which reads the result with [`Setup::load`]; what few need, they ask for with [`Extra::root`],
//! [`RegistryProgram::root`] and [`BuiltKernel::with_options`].
//!
//! It never installs anything on the host's system, never needs root, never checks a signature itself
//! (apt does) and never names a mirror (the machine's own apt configuration does).
//!
//! # Theory of operation
//! Each private root is one step with a recipe: suites and packages. Its directory's name holds a hash
//! of the recipe, and it appears by a rename when all is unpacked, so a root that exists is complete and
//! right. An interrupted set-up finds complete roots, apt finds fetched packages and partial files; both
//! go on from there. A newer version in the archive is not looked for: remove the cache to have it.

mod apt;
mod command;
mod distribution;
mod error;
mod extra;
mod kernel;
mod kernel_build;
mod kernel_options;
mod qemu;
mod record;
mod registry;
mod root;
mod run;
mod sources;
mod step;

pub use error::SetupError;
pub use extra::Extra;
pub use kernel_build::BuiltKernel;
pub use record::{Setup, cache_root};
pub use registry::RegistryProgram;
pub use run::{SetupOptions, run};
