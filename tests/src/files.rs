//! Files on the driver VM's disk that are known by their checksums, in the VM and on the host.

use std::path::Path;

use anyhow::{Context, Result, bail};
use vvu_setup::Setup;

use crate::driver_vm::DriverVm;
use crate::image_file::sha256_inside;

/// Where the disk is mounted in the driver VM.
const MOUNT: &str = "/mnt";

/// The files: name and length in bytes; one large, one of an odd length, one that fits in an inode's neighbour block.
const FILES: [(&str, u32); 3] = [("large", 8 << 20), ("deep/er/odd", 1_234_567), ("deep/one-byte", 1)];

/// Files of random content with their checksums.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// Name below the mount point and SHA-256, in the order of [`FILES`].
    sums: Vec<(String, String)>,
}

impl Files {
    /// Makes a file system on `device`, writes the files and makes them durable. The disk stays mounted.
    ///
    /// # Errors
    /// If any command fails.
    pub fn write_on_new_file_system(vm: &mut DriverVm, device: &str) -> Result<Self> {
        vm.run(&format!("mkfs.ext4 -q {device} && mount -t ext4 {device} {MOUNT}"))?;
        vm.run(&format!("mkdir -p {MOUNT}/deep/er"))?;
        for (name, len) in FILES {
            vm.run(&format!("head -c {len} /dev/urandom > {MOUNT}/{name}"))?;
        }
        vm.run("sync")?;
        Ok(Self { sums: sums(vm)? })
    }

    /// Sum of the files' lengths in bytes.
    pub fn total_len(&self) -> u64 {
        FILES.iter().map(|(_, len)| u64::from(*len)).sum()
    }

    /// Number of files.
    pub fn count(&self) -> usize {
        self.sums.len()
    }

    /// Checks the files of the mounted disk, with nothing of it in the VM's page cache.
    ///
    /// # Errors
    /// If a file is missing or differs.
    pub fn verify_mounted(&self, vm: &mut DriverVm) -> Result<()> {
        vm.run("sync; echo 3 > /proc/sys/vm/drop_caches")?;
        let found = sums(vm)?;
        if found != self.sums {
            bail!("files differ in the driver VM: wrote {:?}, read {found:?}", self.sums);
        }
        Ok(())
    }

    /// Mounts `device` (after a boot, or again), checks the files, and leaves it mounted.
    ///
    /// # Errors
    /// If it cannot be mounted, or a file is missing or differs.
    pub fn mount_and_verify(&self, vm: &mut DriverVm, device: &str) -> Result<()> {
        vm.run(&format!("mount -t ext4 {device} {MOUNT}"))?;
        self.verify_mounted(vm)
    }

    /// Unmounts the disk.
    ///
    /// # Errors
    /// If it is busy or not mounted.
    pub fn unmount(vm: &mut DriverVm) -> Result<()> {
        vm.run(&format!("umount {MOUNT}")).map(drop)
    }

    /// Checks the files in the image, on the host, without any VM.
    ///
    /// # Errors
    /// If a file is missing or differs.
    pub fn verify_in_image(&self, setup: &Setup, image: &Path, scratch: &Path) -> Result<()> {
        for (name, sum) in &self.sums {
            let found = sha256_inside(setup, image, &format!("/{name}"), scratch)?;
            if found != *sum {
                bail!("{name} differs in {}: the driver VM wrote {sum}, the host reads {found}", image.display());
            }
        }
        Ok(())
    }
}

fn sums(vm: &mut DriverVm) -> Result<Vec<(String, String)>> {
    let names = FILES.map(|(name, _)| name).join(" ");
    let output = vm.run(&format!("cd {MOUNT} && sha256sum {names}"))?;
    output
        .lines()
        .map(|line| {
            let (sum, name) = line.split_once("  ").with_context(|| format!("sha256sum says {line:?}"))?;
            Ok((name.to_owned(), sum.to_owned()))
        })
        .collect()
}
