//! Disk images as the host sees them: made, hashed, measured, and looked into without the driver VM.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use vvu_setup::Setup;

use crate::process::output_of;

/// Unit of `st_blocks` (stat(2)), in bytes.
const STAT_BLOCK: u64 = 512;

/// Makes an empty (sparse) raw image of `len` bytes.
///
/// # Errors
/// If the file exists or the file system refuses.
pub fn create(path: &Path, len: u64) -> Result<PathBuf> {
    let file = File::create_new(path).with_context(|| format!("cannot make {}", path.display()))?;
    file.set_len(len).with_context(|| format!("cannot make {} {len} bytes long", path.display()))?;
    Ok(path.to_owned())
}

/// Bytes that the image takes on its file system.
///
/// # Errors
/// If it is gone.
pub fn allocated(path: &Path) -> Result<u64> {
    let metadata = path.metadata().with_context(|| format!("cannot look at {}", path.display()))?;
    Ok(metadata.blocks() * STAT_BLOCK)
}

/// SHA-256 of a file in the form that `sha256sum` prints.
///
/// # Errors
/// If the file cannot be read.
pub fn sha256(path: &Path) -> Result<String> {
    sha256_of_part(path, 0, u64::MAX)
}

/// The same of the `len` bytes that begin at `start`, or of as many as there are.
///
/// # Errors
/// If the file cannot be read.
pub fn sha256_of_part(path: &Path, start: u64, len: u64) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    file.seek(SeekFrom::Start(start))?;
    let mut file = file.take(len);
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let len = file.read(&mut buffer).with_context(|| format!("cannot read {}", path.display()))?;
        let Some(piece) = buffer.get(..len).filter(|piece| !piece.is_empty()) else { break };
        hasher.update(piece);
    }
    Ok(hex(&hasher.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// SHA-256 of one file inside an ext4 image, read with `debugfs`: no mount, no driver VM.
///
/// # Errors
/// If the image holds no such file.
pub fn sha256_inside(setup: &Setup, image: &Path, inner: &str, scratch: &Path) -> Result<String> {
    let dump = scratch.join("dumped-from-image");
    let request = format!("dump {inner} {}", dump.display());
    output_of(Command::new(&setup.debugfs).args(["-R", &request]).arg(image))?;
    // debugfs reports a missing file on standard error and succeeds all the same.
    let hash = sha256(&dump).with_context(|| format!("{} holds no {inner}", image.display()))?;
    std::fs::remove_file(&dump).context("cannot remove what was dumped")?;
    Ok(hash)
}

/// State of the ext4 file system in an image, as its superblock has it: "clean" after an unmount.
///
/// # Errors
/// If the image holds no ext4 file system.
pub fn file_system_state(setup: &Setup, image: &Path) -> Result<String> {
    let statistics = output_of(Command::new(&setup.debugfs).args(["-R", "show_super_stats -h"]).arg(image))?;
    match statistics.lines().find_map(|line| line.strip_prefix("Filesystem state:")) {
        Some(state) => Ok(state.trim().to_owned()),
        None => bail!("{} holds no ext4 file system", image.display()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn an_image_is_sparse_until_written() {
        let folder = tempfile::tempdir().unwrap();
        let image = create(&folder.path().join("disk.img"), 1 << 20).unwrap();
        assert_eq!(allocated(&image).unwrap(), 0);
        File::options().write(true).open(&image).unwrap().write_all_at(&[7; 4096], 8192).unwrap();
        assert!((4096..=65536).contains(&allocated(&image).unwrap()));
    }

    #[test]
    fn a_hash_is_the_one_of_sha256sum() {
        let folder = tempfile::tempdir().unwrap();
        let image = create(&folder.path().join("disk.img"), 3 << 20).unwrap();
        let expected = output_of(Command::new("sha256sum").arg(&image)).unwrap();
        assert_eq!(sha256(&image).unwrap(), expected.split_whitespace().next().unwrap());
    }

    #[test]
    fn a_part_has_the_hash_that_it_has_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (whole, part) = (folder.path().join("whole"), folder.path().join("part"));
        std::fs::write(&whole, b"before, inside, after").unwrap();
        std::fs::write(&part, b"inside").unwrap();
        assert_eq!(sha256_of_part(&whole, 8, 6).unwrap(), sha256(&part).unwrap());
    }
}
