//! The manifest beside an appliance image: what its kernel and initial RAM file system must be.
//!
//! It guards against mixed-up and half-written files, not against an attacker, who would write the manifest as well.

use std::fs::File;
use std::io;
use std::path::Path;

use anyhow::{Context, bail};
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// Name of the document.
const MANIFEST_FILE: &str = "manifest.json";

/// What to do about an image that is not what it says.
const REMEDY: &str = "build it again with: cargo xtask image";

/// The parts of the document that are needed here; it holds more for people.
#[derive(Debug, Deserialize)]
struct Manifest {
    /// The kernel.
    kernel: FileRecord,
    /// The initial RAM file system.
    initrd: FileRecord,
}

/// One file of the image.
#[derive(Debug, Deserialize)]
struct FileRecord {
    /// Name in the image's directory.
    path: String,
    /// Size in bytes.
    size_bytes: u64,
    /// SHA-256 in lower-case hexadecimal.
    sha256: String,
}

/// Checks the files of the appliance image in `directory` against its manifest.
///
/// # Errors
/// The manifest is missing or broken, or a file is not the one that it describes; with the remedy.
pub(crate) fn check(directory: &Path) -> anyhow::Result<()> {
    let path = directory.join(MANIFEST_FILE);
    let fault = |what: &str| format!("appliance image {} {what} {MANIFEST_FILE}; {REMEDY}", directory.display());
    let text = std::fs::read_to_string(&path).with_context(|| fault("has no readable"))?;
    let manifest: Manifest = serde_json::from_str(&text).with_context(|| fault("has a broken"))?;
    for record in [manifest.kernel, manifest.initrd] {
        if !is_as_recorded(directory, &record)? {
            bail!("appliance image {}: {} differs from {MANIFEST_FILE}; {REMEDY}", directory.display(), record.path);
        }
    }
    Ok(())
}

fn is_as_recorded(directory: &Path, record: &FileRecord) -> anyhow::Result<bool> {
    let path = directory.join(&record.path);
    let context = || format!("appliance image: {} cannot be read; {REMEDY}", path.display());
    let mut file = File::open(&path).with_context(context)?;
    if file.metadata().with_context(context)?.len() != record.size_bytes {
        return Ok(false);
    }
    let mut hash = Sha256::new();
    io::copy(&mut file, &mut hash).with_context(context)?;
    Ok(format!("{:x}", hash.finalize()) == record.sha256)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SHA-256 of "abc" (FIPS 180-2, appendix B.1).
    const HASH_OF_ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn image() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let record = |path: &str| serde_json::json!({ "path": path, "size_bytes": 3, "sha256": HASH_OF_ABC });
        let manifest = serde_json::json!({ "kernel": record("vmlinux"), "initrd": record("initrd"), "more": 1 });
        std::fs::write(directory.path().join(MANIFEST_FILE), manifest.to_string()).unwrap();
        for name in ["vmlinux", "initrd"] {
            std::fs::write(directory.path().join(name), "abc").unwrap();
        }
        directory
    }

    #[test]
    fn files_are_held_against_the_manifest() {
        let directory = image();
        check(directory.path()).unwrap();
        for (name, content) in [("initrd", "abd"), ("vmlinux", "abcd")] {
            std::fs::write(directory.path().join(name), content).unwrap();
            let refusal = check(directory.path()).unwrap_err().to_string();
            assert!(refusal.contains(&format!("{name} differs")) && refusal.contains(REMEDY), "{refusal}");
            std::fs::write(directory.path().join(name), "abc").unwrap();
        }
    }

    #[test]
    fn a_missing_or_broken_manifest_is_named() {
        let directory = image();
        std::fs::write(directory.path().join(MANIFEST_FILE), "{}").unwrap();
        assert!(check(directory.path()).unwrap_err().to_string().contains("broken manifest.json"));
        std::fs::remove_file(directory.path().join(MANIFEST_FILE)).unwrap();
        assert!(check(directory.path()).unwrap_err().to_string().contains("no readable manifest.json"));
    }
}
