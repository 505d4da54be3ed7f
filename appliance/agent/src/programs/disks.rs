//! The appliance's disks, by their serial numbers.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::watch::wait_for;

/// How long the kernel may take to show a disk.
const DISK_TIMEOUT: Duration = Duration::from_secs(10);

/// Waits for the node of the disk with this serial number.
pub(super) async fn find_disk(serial: &str) -> Result<PathBuf> {
    let look = || disk_with_serial(Path::new("/sys/block"), serial);
    let found = wait_for(Path::new("/dev"), DISK_TIMEOUT, || {
        Ok::<_, io::Error>(look()?.map(|name| Path::new("/dev").join(name)).filter(|node| node.exists()))
    });
    found
        .await
        .context("cannot look for disks")?
        .with_context(|| format!("there is no disk with serial number {serial}"))
}

fn disk_with_serial(block: &Path, serial: &str) -> io::Result<Option<OsString>> {
    for entry in fs::read_dir(block)? {
        let entry = entry?;
        // Only virtio disks have this attribute; the others are not meant.
        if fs::read_to_string(entry.path().join("serial")).is_ok_and(|text| text.trim() == serial) {
            return Ok(Some(entry.file_name()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_is_found_by_its_whole_serial_number() {
        let directory = tempfile::tempdir().unwrap();
        for (disk, serial) in [("vda", Some("vvu-disk-10\n")), ("vdb", Some("vvu-disk-1\n")), ("ram0", None)] {
            fs::create_dir(directory.path().join(disk)).unwrap();
            if let Some(serial) = serial {
                fs::write(directory.path().join(disk).join("serial"), serial).unwrap();
            }
        }
        let find = |serial| disk_with_serial(directory.path(), serial).unwrap();
        assert_eq!(find("vvu-disk-1"), Some("vdb".into()));
        assert_eq!(find("vvu-disk-10"), Some("vda".into()));
        assert_eq!(find("vvu-disk"), None);
    }
}
