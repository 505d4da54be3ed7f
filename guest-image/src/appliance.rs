//! The appliance image: a kernel, unpacked, and an initramfs that holds only what runs in it.

use std::fs;
use std::path::{Path, PathBuf};

use vvu_setup::Setup;

use crate::binaries::{ApplianceBinaries, build_appliance_binaries};
use crate::error::{ImageError, at};
use crate::flavour::KernelFlavour;
use crate::initramfs::{DeviceKind, Initramfs};
use crate::manifest::{FileRecord, Manifest};
use crate::modules::ModuleTree;

/// Where the image lists the modules that every appliance loads, and those of one with an uplink (agent, `modules.rs`).
const MODULE_LIST: &str = "etc/modules.list";
const UPLINK_MODULE_LIST: &str = "etc/modules-net.list";

/// Kernel modules of the appliance; what they depend on comes along, and what a kernel has built in is left out.
const MODULES: [&str; 12] = [
    // The configuration.
    "qemu_fw_cfg",
    // The disk.
    "virtio_pci",
    "virtio_blk",
    // The window: a virtio-pmem device that becomes a device-DAX node.
    "libnvdimm",
    "nd_pmem",
    "nd_virtio",
    "device_dax",
    "dax_pmem",
    "virtio_pmem",
    // The control device and the doorbell device, driven from user space.
    "irqbypass",
    "vfio_iommu_type1",
    "vfio-pci",
];

/// Kernel modules of an appliance whose switch has an uplink: its network card, the switch's end, and what joins the two.
const UPLINK_MODULES: [&str; 3] = ["virtio_net", "tun", "bridge"];

/// The files of a built image.
#[derive(Clone, Debug)]
pub struct ApplianceFiles {
    /// Kernel, an ELF file.
    pub kernel: PathBuf,
    /// Initramfs.
    pub initrd: PathBuf,
    /// The programs that were put in.
    pub binaries: ApplianceBinaries,
    /// What is in it.
    pub manifest: Manifest,
}

/// Builds the programs of a workspace and of them `vmlinux`, `initrd` and `manifest.json`, in the flavour's directory below the
/// given target directory.
///
/// # Errors
/// Any [`ImageError`].
pub fn build_appliance_image(
    setup: &Setup,
    flavour: KernelFlavour,
    workspace: &Path,
    target: &Path,
) -> Result<ApplianceFiles, ImageError> {
    let kernel = flavour.kernel(setup)?;
    let binaries = build_appliance_binaries(workspace, target)?;
    let (image, modules) = appliance_initramfs(&kernel.modules, &binaries)?;
    // Not compressed: QEMU hands it over faster than a guest unpacks it, above all without KVM.
    let initrd = image.finish()?;
    let manifest = Manifest {
        kernel_flavour: flavour,
        kernel_release: kernel.release,
        kernel: FileRecord::of("vmlinux", &kernel.elf),
        initrd: FileRecord::of("initrd", &initrd),
        files: image.files(),
        modules,
    };
    let directory = target.join(flavour.directory());
    fs::create_dir_all(&directory).map_err(at(&directory))?;
    let mut json = serde_json::to_vec_pretty(&manifest)?;
    json.push(b'\n');
    for (name, bytes) in [("vmlinux", &kernel.elf), ("initrd", &initrd), ("manifest.json", &json)] {
        write_whole(&directory.join(name), bytes)?;
    }
    Ok(ApplianceFiles { kernel: directory.join("vmlinux"), initrd: directory.join("initrd"), binaries, manifest })
}

/// The appliance's initramfs, with modules out of this directory, and all of these in load order.
///
/// # Errors
/// Any [`ImageError`] but those of building.
pub fn appliance_initramfs(
    modules: &Path,
    binaries: &ApplianceBinaries,
) -> Result<(Initramfs, Vec<String>), ImageError> {
    let mut image = Initramfs::new();
    let programs = [("init", &binaries.agent), ("bin/vvu-blk", &binaries.blk), ("bin/vvu-net", &binaries.net)];
    for (path, file) in programs {
        image.add_file(path, 0o755, fs::read(file).map_err(at(file))?)?;
    }
    // Before the agent has mounted anything, the kernel opens this for its standard streams.
    image.add_node("dev/console", 0o600, DeviceKind::Character, 5, 1)?;
    for mount_point in ["proc", "sys", "run", "tmp"] {
        image.add_dir(mount_point, 0o755)?;
    }
    let tree = ModuleTree::open(modules)?;
    let mut modules = tree.add_to(&mut image, MODULE_LIST, &MODULES)?;
    modules.extend(tree.add_to(&mut image, UPLINK_MODULE_LIST, &UPLINK_MODULES)?);
    Ok((image, modules))
}

/// Replaces a file by a rename: a VM that starts meanwhile reads the old or the new one.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
    let fresh = path.with_extension("new");
    fs::write(&fresh, bytes).map_err(at(&fresh))?;
    fs::rename(&fresh, path).map_err(at(path))
}
