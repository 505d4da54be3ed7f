//! The appliance VM and its surroundings, the same for every class of device.

use std::path::PathBuf;

use crate::accel::{self, Accel, KvmState};
use crate::cli::{MachineArgs, RestartChoice};
use crate::probe::Version;
use crate::programs::{self, ApplianceFiles};
use crate::restart_policy::RestartLimit;
use crate::size::{MIB, Size};

/// Appliance memory that does not depend on the window, in bytes: kernel, initial RAM file system, agent, back-end and its
/// buffers. 96 MiB were enough for a disk and 112 MiB for a network with an uplink, both with a window of 4 GiB included.
const BASE_MEMORY_BYTES: u64 = 128 * MIB;

/// What programs of others get beside: nobody has measured what they need.
const PROGRAM_MEMORY_BYTES: u64 = 64 * MIB;

/// What the appliance's kernel keeps for 2 MiB of the window, in bytes. It has a `struct page` of 64 bytes for every 4096, but of
/// the 8 pages that they fill, the last 7 are one, since a node with huge pages has descriptors that are alike (Linux,
/// Documentation/mm/vmemmap_dedup.rst); and 8 bytes of page table for each of the 8.
const DESCRIPTOR_BYTES_PER_HUGE_PAGE: u64 = 2 * 4096 + 8 * 8;

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
    /// Whether the bridge relays all kicks and calls.
    pub(crate) relay: bool,
    /// Log filter of bridge and appliance.
    pub(crate) log: String,
}

impl Machine {
    /// Finds all of it for `ports` ports and, if the back-end is a program of others, an overlay of `overlay_bytes`.
    ///
    /// # Errors
    /// One line with the remedy.
    pub(super) fn find(args: &MachineArgs, ports: usize, overlay_bytes: Option<u64>) -> anyhow::Result<Self> {
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
            relay: args.relay,
            log: args.log.clone(),
        })
    }
}

/// Appliance memory for `ports` windows and, if its back-end is a program of others, for that and its overlay:
/// [`BASE_MEMORY_BYTES`] plus the page descriptors plus [`PROGRAM_MEMORY_BYTES`] plus the overlay twice, packed and unpacked, in
/// whole mebibytes.
pub(crate) fn default_memory(window: Size, ports: usize, overlay_bytes: Option<u64>) -> Size {
    let huge_pages = window.0.div_ceil(2 * MIB).saturating_mul(ports as u64);
    let descriptors = huge_pages.saturating_mul(DESCRIPTOR_BYTES_PER_HUGE_PAGE);
    let program = overlay_bytes.map_or(0, |bytes| bytes.saturating_mul(2).saturating_add(PROGRAM_MEMORY_BYTES));
    Size(BASE_MEMORY_BYTES.saturating_add(descriptors).saturating_add(program).next_multiple_of(MIB))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::{GIB, TIB};

    #[test]
    fn memory_follows_the_windows() {
        assert_eq!(default_memory(Size(4 * GIB), 1, None), Size(145 * MIB));
        assert_eq!(default_memory(Size(16 * MIB), 1, None), Size(129 * MIB));
        assert_eq!(default_memory(Size(TIB), 1, None), Size(4 * GIB + 160 * MIB));
        assert_eq!(default_memory(Size(4 * GIB), 3, None), Size(177 * MIB));
        assert_eq!(default_memory(Size(4 * GIB), 3, Some(10 * MIB + 1)), Size(261 * MIB));
    }
}
