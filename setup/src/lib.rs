//! Provides what the real-machine commands need and a host seldom has: a QEMU with the three stock
//! devices of the device set, the distribution's own older QEMU, a stock kernel with its modules, and
//! the programs of the driver VM's root.
//!
//! Used by `cargo xtask setup` and by everything that starts a machine (`guest-image`, `tests`), which
//! reads the result with [`Setup::load`].
//!
//! It never installs anything on the host's system, never needs root, never checks a signature itself
//! (apt does) and never names a mirror (the machine's own apt configuration does).

mod record;

pub use record::{Setup, SetupError, cache_root};
