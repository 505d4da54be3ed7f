//! What an image consists of, for people (a table) and programs (JSON).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::flavour::KernelFlavour;
use crate::initramfs::sha256_hex;

/// A file's name, size and hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Path inside the image, or name in the output directory.
    pub path: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// SHA-256 of the content, in hexadecimal.
    pub sha256: String,
}

impl FileRecord {
    /// Record of a file with this content.
    #[must_use]
    pub fn of(path: &str, bytes: &[u8]) -> Self {
        Self { path: path.into(), size_bytes: bytes.len() as u64, sha256: sha256_hex(bytes) }
    }
}

/// Content of `manifest.json`. Its `Display` is the table that `cargo xtask image` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Where its kernel comes from.
    pub kernel_flavour: KernelFlavour,
    /// What `uname -r` says in the appliance.
    pub kernel_release: String,
    /// The kernel image.
    pub kernel: FileRecord,
    /// The initramfs as a whole.
    pub initrd: FileRecord,
    /// The regular files of the initramfs.
    pub files: Vec<FileRecord>,
    /// Kernel modules in load order.
    pub modules: Vec<String>,
}

impl fmt::Display for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:>12}  {:<16}  {} kernel {}", "bytes", "sha256", self.kernel_flavour, self.kernel_release)?;
        for file in [&self.kernel, &self.initrd] {
            write_line(f, file, "")?;
        }
        self.files.iter().try_for_each(|file| write_line(f, file, "  "))
    }
}

fn write_line(f: &mut fmt::Formatter<'_>, file: &FileRecord, indent: &str) -> fmt::Result {
    let hash = file.sha256.get(..16).unwrap_or(&file.sha256);
    writeln!(f, "{:>12}  {hash:<16}  {indent}{}", file.size_bytes, file.path)
}
