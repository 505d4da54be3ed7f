//! Overlays: directories with programs that others wrote, for `vvu run exec --overlay`.
//!
//! An overlay is a part of a root directory: programs out of packages as they are, with the loader and the libraries that
//! they need, and nothing else.

use std::path::{Path, PathBuf};
use std::{fmt, fs};

use vvu_setup::{Extra, RegistryProgram, SetupError};

use crate::error::{ImageError, at};
use crate::initramfs::Initramfs;
use crate::manifest::FileRecord;
use crate::programs::add_program;

/// Back-ends of Debian's packages, or of the crate registry, that are known to run in the appliance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlay {
    /// QEMU's block layer without a QEMU: `/usr/bin/qemu-storage-daemon`.
    QemuStorageDaemon,
    /// The file system device: `/usr/libexec/virtiofsd`.
    Virtiofsd,
    /// DPDK's program that forwards packets: `/usr/bin/dpdk-testpmd`.
    DpdkTestpmd,
    /// The device of virtio's own sockets: `/usr/bin/vhost-device-vsock`.
    VhostDeviceVsock,
    /// A source of random bytes: `/bin/vhost-device-rng`.
    VhostDeviceRng,
}

impl Overlay {
    /// The program's path in the appliance.
    #[must_use]
    pub const fn program(self) -> &'static str {
        match self {
            Self::QemuStorageDaemon => "/usr/bin/qemu-storage-daemon",
            Self::Virtiofsd => "/usr/libexec/virtiofsd",
            Self::DpdkTestpmd => "/usr/bin/dpdk-testpmd",
            Self::VhostDeviceVsock => "/usr/bin/vhost-device-vsock",
            Self::VhostDeviceRng => "/bin/vhost-device-rng",
        }
    }

    /// The paths of the program and of the libraries that it asks for by name while it runs.
    #[must_use]
    pub fn files(self) -> Vec<&'static str> {
        let libraries: &[_] = match self {
            // The device, the default kind of packet pool, and what pthread_cancel(3) needs.
            Self::DpdkTestpmd => &[
                "/usr/lib/x86_64-linux-gnu/librte_net_vhost.so.25",
                "/usr/lib/x86_64-linux-gnu/librte_mempool_ring.so.25",
                "/usr/lib/x86_64-linux-gnu/libgcc_s.so.1",
            ],
            Self::QemuStorageDaemon | Self::Virtiofsd | Self::VhostDeviceVsock | Self::VhostDeviceRng => &[],
        };
        [&[self.program()], libraries].concat()
    }

    /// The root directory that has the program: packages that are fetched, or a program that is built, now if it is not there.
    ///
    /// # Errors
    /// Any [`SetupError`].
    pub fn root(self) -> Result<PathBuf, SetupError> {
        match self {
            Self::QemuStorageDaemon => Extra::StorageDaemon.root(),
            Self::Virtiofsd => Extra::Virtiofsd.root(),
            Self::DpdkTestpmd => Extra::Dpdk.root(),
            Self::VhostDeviceVsock => Extra::VhostDeviceVsock.root(),
            Self::VhostDeviceRng => RegistryProgram::VhostDeviceRng.root(),
        }
    }
}

impl fmt::Display for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::QemuStorageDaemon => "qemu-storage-daemon",
            Self::Virtiofsd => "virtiofsd",
            Self::DpdkTestpmd => "dpdk-testpmd",
            Self::VhostDeviceVsock => "vhost-device-vsock",
            Self::VhostDeviceRng => "vhost-device-rng",
        })
    }
}

/// Makes `directory`, which must not be there yet, with the programs at these paths of a root, and says what is in it.
///
/// # Errors
/// [`ImageError::NotInRoot`] for a program or one of its libraries, and errors of reading and writing.
pub fn build_overlay(root: &Path, programs: &[&str], directory: &Path) -> Result<Vec<FileRecord>, ImageError> {
    let mut content = Initramfs::new();
    for program in programs {
        add_program(&mut content, root, program.trim_start_matches('/'))?;
    }
    fs::create_dir(directory).map_err(at(directory))?;
    content.write_to(directory)?;
    Ok(content.files())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_program_runs_out_of_its_overlay_alone() {
        let place = tempfile::tempdir().unwrap();
        let overlay = place.path().join("overlay");
        let files = build_overlay(Path::new("/"), &["/bin/ls"], &overlay).unwrap();
        let loader = files.iter().find(|file| file.path.contains("ld-linux")).unwrap();
        let libraries = files.iter().filter(|file| file.path.contains(".so"));
        let libraries: Vec<_> =
            libraries.map(|file| overlay.join(&file.path).parent().unwrap().display().to_string()).collect();
        // The overlay's own loader, told to look nowhere else.
        let output = Command::new(overlay.join(&loader.path))
            .args(["--inhibit-cache", "--library-path", &libraries.join(":")])
            .arg(overlay.join("bin/ls"))
            .arg(&overlay)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(String::from_utf8_lossy(&output.stdout).contains("bin"));
    }

    #[test]
    fn a_directory_that_is_there_is_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let refusal = build_overlay(Path::new("/"), &["/bin/ls"], place.path()).unwrap_err();
        assert!(matches!(refusal, ImageError::Io { .. }), "{refusal}");
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    }
}
