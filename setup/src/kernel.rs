//! Finds out which release a kernel image is, and where its modules are.

use std::fs;
use std::path::{Path, PathBuf};

use crate::SetupError;
use crate::error::at;

/// Offset of the boot sector's signature "HdrS" and of `kernel_version` in a bzImage
/// (Linux, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header").
const SIGNATURE_OFFSET: usize = 0x202;
const KERNEL_VERSION_OFFSET: usize = 0x20e;
/// `kernel_version` counts from here.
const SETUP_SECTOR_OFFSET: usize = 0x200;

/// Kernel image, directory of modules, release.
pub(crate) struct Kernel {
    pub(crate) image: PathBuf,
    pub(crate) modules: PathBuf,
    pub(crate) release: String,
}

impl Kernel {
    /// A kernel whose modules are in `modules`, else where they are installed next to it or on this system.
    pub(crate) fn find(image: &Path, modules: Option<&Path>) -> Result<Self, SetupError> {
        let bytes = fs::read(image).map_err(at(image))?;
        let release = release_of(&bytes).ok_or_else(|| SetupError::Kernel(image.into()))?;
        let installed = |prefix: &Path| prefix.join("lib/modules").join(&release);
        let beside = image.parent().and_then(Path::parent).map(|root| [installed(root), installed(&root.join("usr"))]);
        let mut places = match modules {
            Some(directory) => vec![directory.to_owned()],
            None => beside.into_iter().flatten().chain([installed(Path::new("/"))]).collect(),
        };
        places.retain(|directory| directory.join("modules.builtin").is_file());
        match places.into_iter().next() {
            Some(modules) => Ok(Self { image: image.into(), modules, release }),
            None => Err(SetupError::Modules { release }),
        }
    }

    /// The kernel of a private root, which has one.
    pub(crate) fn of_root(root: &Path) -> Result<Self, SetupError> {
        let boot = root.join("boot");
        for entry in fs::read_dir(&boot).map_err(at(&boot))? {
            let entry = entry.map_err(at(&boot))?;
            if entry.file_name().to_string_lossy().starts_with("vmlinuz-") {
                return Self::find(&entry.path(), None);
            }
        }
        Err(SetupError::Incomplete { what: "kernel".into(), root: root.into() })
    }
}

/// First word of the version text of a bzImage.
fn release_of(image: &[u8]) -> Option<String> {
    image.get(SIGNATURE_OFFSET..)?.strip_prefix(b"HdrS")?;
    let pointer = image.get(KERNEL_VERSION_OFFSET..)?.first_chunk::<2>()?;
    let text = image.get(SETUP_SECTOR_OFFSET + usize::from(u16::from_le_bytes(*pointer))..)?;
    let word = text.split(|byte| matches!(byte, b' ' | 0)).next()?;
    let release = std::str::from_utf8(word).ok()?;
    // The release becomes part of paths.
    let plain = !release.is_empty() && release.bytes().all(|b| b.is_ascii_alphanumeric() || b".+-_~".contains(&b));
    plain.then(|| release.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(version: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x180_u16.to_le_bytes());
        image[0x380..0x380 + version.len()].copy_from_slice(version);
        image
    }

    #[test]
    fn the_release_is_read_from_the_boot_header() {
        assert_eq!(
            release_of(&image(b"6.12.1+deb13-cloud-amd64 (who@where) #1\0")).unwrap(),
            "6.12.1+deb13-cloud-amd64"
        );
        assert_eq!(release_of(&image(b"../../etc #1")), None);
        assert_eq!(release_of(&image(b"")), None);
        assert_eq!(release_of(b"\x7fELF"), None);
        let mut beyond = image(b"6.12");
        beyond[0x20e..0x210].copy_from_slice(&0xffff_u16.to_le_bytes());
        assert_eq!(release_of(&beyond), None);
    }

    #[test]
    fn modules_are_found_beside_the_kernel_or_where_the_caller_says() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("boot")).unwrap();
        let kernel = root.path().join("boot/vmlinuz-6.0.0-vvu");
        fs::write(&kernel, image(b"6.0.0-vvu #1\0")).unwrap();
        let refusal = Kernel::find(&kernel, None).err().unwrap().to_string();
        assert!(refusal.contains("6.0.0-vvu") && refusal.contains("--modules"), "{refusal}");

        let modules = root.path().join("usr/lib/modules/6.0.0-vvu");
        fs::create_dir_all(&modules).unwrap();
        fs::write(modules.join("modules.builtin"), "").unwrap();
        assert_eq!(Kernel::of_root(root.path()).unwrap().modules, modules);
        assert!(Kernel::find(&kernel, Some(root.path())).is_err());
        assert_eq!(Kernel::find(&kernel, Some(&modules)).unwrap().release, "6.0.0-vvu");
    }
}
