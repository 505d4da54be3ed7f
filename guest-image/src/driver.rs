//! The driver VM's initramfs: stock programs and a script that the caller writes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vvu_setup::Setup;

use crate::appliance::write_whole;
use crate::error::{ImageError, at};
use crate::initramfs::{DeviceKind, Initramfs};
use crate::modules::ModuleTree;
use crate::programs::{add_program, resolve};

/// Kernel modules of the driver VM; on a stock cloud kernel most of them are built in.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "virtio_mem", "ext4"];

/// Programs of packages, each with further names by which it is called. All are in `/usr/bin`.
const PROGRAMS: [(&str, &[&str]); 9] = [
    ("mke2fs", &["mkfs.ext4"]),
    ("e2fsck", &["fsck.ext4"]),
    ("debugfs", &[]),
    ("dumpe2fs", &[]),
    ("blkdiscard", &[]),
    ("blockdev", &[]),
    ("lsblk", &[]),
    ("findmnt", &[]),
    ("fio", &[]),
];

/// Where programs are in a root.
const PROGRAM_DIRECTORIES: [&str; 4] = ["usr/bin", "usr/sbin", "bin", "sbin"];

/// What the driver VM of some tests has beyond what all have.
#[derive(Clone, Copy, Debug, Default)]
pub struct DriverExtras<'a> {
    /// Static programs, which go to `/usr/bin` under their file names.
    pub own: &'a [PathBuf],
    /// Programs of packages, by root and name; each is in `/usr/bin`, at least as a link.
    pub programs: &'a [(PathBuf, &'a str)],
    /// Kernel modules; what they depend on comes along.
    pub modules: &'a [&'a str],
}

/// Builds a driver VM's initramfs as the file `out`.
///
/// `init_script` becomes `/init`; it starts with `#!/bin/sh`. It finds all of busybox, of e2fsprogs
/// (`mkfs.ext4`, `e2fsck`, `debugfs`), of util-linux (`blkdiscard`, `blockdev`, `lsblk`, `findmnt`) and
/// `fio` in its `PATH`, which has to be `/usr/bin:/bin`, and modules in `/lib/modules`, listed in load
/// order in `/etc/modules.list`; and the `extras`. Nothing is mounted yet. Where busybox has a command, too, its shell
/// prefers its own: call `/usr/bin/blkdiscard` by its path to have all of its options.
///
/// # Errors
/// Any [`ImageError`] but those of building programs.
pub fn build_driver_image(
    setup: &Setup,
    init_script: &str,
    extras: &DriverExtras<'_>,
    out: &Path,
) -> Result<(), ImageError> {
    let mut image = Initramfs::new();
    image.add_file("init", 0o755, init_script.as_bytes().to_vec())?;
    image.add_node("dev/console", 0o600, DeviceKind::Character, 5, 1)?;
    for mount_point in ["proc", "sys", "run", "tmp", "mnt"] {
        image.add_dir(mount_point, 0o755)?;
    }
    let root = &setup.driver_root;
    for (program, names) in PROGRAMS {
        add_to_usr_bin(&mut image, root, program, names)?;
    }
    for (root, program) in extras.programs {
        add_to_usr_bin(&mut image, root, program, &[])?;
    }
    for file in extras.own {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        image.add_file(&format!("usr/bin/{name}"), 0o755, fs::read(file).map_err(at(file))?)?;
    }
    if let Some(file) = resolve(root, "etc/mke2fs.conf") {
        image.add_file("etc/mke2fs.conf", 0o644, fs::read(&file).map_err(at(file))?)?;
    }
    add_busybox(&mut image, root)?;
    let modules = [&MODULES, extras.modules].concat();
    ModuleTree::open(&setup.modules)?.add_to(&mut image, "etc/modules.list", &modules)?;
    write_whole(out, &image.finish()?)
}

/// Adds a program of a root, and links from `/usr/bin` for its name and further ones.
fn add_to_usr_bin(image: &mut Initramfs, root: &Path, program: &str, names: &[&str]) -> Result<(), ImageError> {
    let path = place_of(root, program)?;
    add_program(image, root, &path)?;
    for name in [program].iter().chain(names).map(|name| format!("usr/bin/{name}")).filter(|name| *name != path) {
        image.add_symlink(&name, &format!("/{path}"))?;
    }
    Ok(())
}

/// Adds busybox as `/bin/busybox`, and its applets as links where no program of a package has the name.
fn add_busybox(image: &mut Initramfs, root: &Path) -> Result<(), ImageError> {
    let place = place_of(root, "busybox")?;
    let file = resolve(root, &place).ok_or_else(|| ImageError::NotInRoot { name: place, root: root.into() })?;
    // It is static, so it runs here as it does there.
    let output = Command::new(&file).arg("--list").output().map_err(at(&file))?;
    image.add_file("bin/busybox", 0o755, fs::read(&file).map_err(at(&file))?)?;
    for applet in String::from_utf8_lossy(&output.stdout).lines().filter(|name| *name != "busybox") {
        if !image.contains(&format!("usr/bin/{applet}")) {
            image.add_symlink(&format!("bin/{applet}"), "busybox")?;
        }
    }
    Ok(())
}

fn place_of(root: &Path, program: &str) -> Result<String, ImageError> {
    let mut places = PROGRAM_DIRECTORIES.iter().map(|directory| format!("{directory}/{program}"));
    places
        .find(|place| resolve(root, place).is_some())
        .ok_or_else(|| ImageError::NotInRoot { name: program.into(), root: root.into() })
}
