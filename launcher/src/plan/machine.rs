//! The appliance VM and its surroundings, the same for every class of device.

use std::path::PathBuf;

use crate::accel::{self, Accel, KvmState};
use crate::cli::{MachineArgs, RestartChoice};
use crate::probe::Version;
use crate::programs::{self, ApplianceFiles};
use crate::restart_policy::RestartLimit;
use crate::size::{MIB, Size};

/// Appliance memory that does not depend on the window, in bytes: kernel, initial RAM file system, agent, back-end and
/// its buffers.
const BASE_MEMORY_BYTES: u64 = 160 * MIB;

/// Window bytes for each byte of page descriptors: the appliance's kernel keeps a `struct page` of 64 bytes for every
/// 4096 bytes of the window.
const WINDOW_BYTES_PER_DESCRIPTOR_BYTE: u64 = 4096 / 64;

/// Programs, image and sizes.
#[derive(Debug)]
pub(crate) struct Machine {
    /// Restarts that are allowed; none if there shall never be one.
    pub(crate) restart_limit: Option<RestartLimit>,
    /// Further words for the kernel's command line.
    pub(crate) append: Option<String>,
    /// Window of each port.
    pub(crate) window: Size,
    /// Memory of the appliance.
    pub(crate) memory: Size,
    /// CPUs of the appliance.
    pub(crate) cpus: u16,
    /// KVM or TCG.
    pub(crate) accel: Accel,
    /// Why.
    pub(crate) accel_reason: String,
    /// Kernel and initial RAM file system.
    pub(crate) appliance: ApplianceFiles,
    /// QEMU.
    pub(crate) qemu: PathBuf,
    /// Its version, once it was asked.
    pub(crate) qemu_version: Option<Version>,
    /// The bridge.
    pub(crate) bridge: PathBuf,
    /// Log filter of bridge and appliance.
    pub(crate) log: String,
}

impl Machine {
    /// Finds all of it for `ports` ports and an overlay of `overlay_bytes`.
    ///
    /// # Errors
    /// One line with the remedy.
    pub(super) fn find(args: &MachineArgs, ports: usize, overlay_bytes: u64) -> anyhow::Result<Self> {
        let (accel, accel_reason) = accel::choose(args.accel, &KvmState::of_this_host())?;
        let bridge = programs::find_bridge(args.bridge.as_deref())?;
        let qemu = programs::find_qemu(args.qemu.as_deref())?;
        let appliance = programs::find_appliance(args.appliance.as_deref())?;
        Ok(Self {
            restart_limit: (args.restart == RestartChoice::Always).then_some(args.restart_limit),
            append: args.append.clone(),
            window: args.window,
            memory: args.memory.unwrap_or_else(|| default_memory(args.window, ports, overlay_bytes)),
            cpus: args.cpus,
            accel,
            accel_reason,
            appliance,
            qemu,
            qemu_version: None,
            bridge,
            log: args.log.clone(),
        })
    }
}

/// Appliance memory for `ports` windows and an overlay: [`BASE_MEMORY_BYTES`] plus the page descriptors plus the overlay
/// twice, packed and unpacked, in whole mebibytes.
pub(crate) fn default_memory(window: Size, ports: usize, overlay_bytes: u64) -> Size {
    let descriptors = window.0.div_ceil(WINDOW_BYTES_PER_DESCRIPTOR_BYTE).saturating_mul(ports as u64);
    let overlay = overlay_bytes.saturating_mul(2);
    Size(BASE_MEMORY_BYTES.saturating_add(descriptors).saturating_add(overlay).next_multiple_of(MIB))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::{GIB, TIB};

    #[test]
    fn memory_follows_the_windows() {
        assert_eq!(default_memory(Size(4 * GIB), 1, 0), Size(224 * MIB));
        assert_eq!(default_memory(Size(16 * MIB), 1, 0), Size(161 * MIB));
        assert_eq!(default_memory(Size(TIB), 1, 0), Size(16 * GIB + 160 * MIB));
        assert_eq!(default_memory(Size(4 * GIB), 3, 10 * MIB + 1), Size(373 * MIB));
    }
}
