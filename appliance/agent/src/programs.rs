//! The back-end program of each device class, and what it may touch.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use vvu_appliance_config::{BlkOptions, Device, Format, Limits};

use crate::supervisor::BackEndProgram;
use crate::uuid::Uuid;
use crate::watch::wait_for;

/// First user and group id for back-ends; each device set has its own.
const FIRST_USER: u32 = 1000;

/// How long the kernel may take to show a disk.
const DISK_TIMEOUT: Duration = Duration::from_secs(10);

/// Prepares the program of device set number `index`: a user of its own, a directory for its socket, and its disk.
///
/// # Errors
/// If something that it needs is not there.
pub async fn prepare(index: u32, uuid: Uuid, device: &Device, log: &str) -> Result<BackEndProgram> {
    let user = FIRST_USER + index;
    let directory = Path::new("/run").join(uuid.to_string());
    fs::create_dir_all(&directory)
        .and_then(|()| give(&directory, user, 0o700))
        .with_context(|| format!("cannot prepare the directory {} for the back-end", directory.display()))?;
    let socket = directory.join("back-end.sock");
    let arguments = match device {
        Device::Blk(options) => {
            if options.image.format != Format::Raw || options.limits != Limits::default() {
                bail!("this appliance has raw images without limits only");
            }
            let disk = find_disk(&options.image.disk_serial).await?;
            let mode = if options.read_only { 0o400 } else { 0o600 };
            give(&disk, user, mode).with_context(|| format!("cannot hand over the disk {}", disk.display()))?;
            blk_arguments(options, &disk, &socket)
        }
        Device::Net(_) | Device::Exec(_) => bail!("this appliance has block devices only"),
    };
    let program = "/bin/vvu-blk".into();
    let environment = vec![("RUST_LOG".into(), log.into())];
    Ok(BackEndProgram { program, arguments, environment, socket, user: Some(user) })
}

fn blk_arguments(options: &BlkOptions, disk: &Path, socket: &Path) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec![
        "--socket-path".into(),
        socket.into(),
        "--image".into(),
        disk.into(),
        "--queues".into(),
        options.queues.to_string().into(),
        "--serial".into(),
        options.serial.clone().into(),
    ];
    if options.read_only {
        arguments.push("--read-only".into());
    }
    arguments
}

/// Makes a file or directory accessible to one user only.
fn give(path: &Path, user: u32, mode: u32) -> io::Result<()> {
    chown(path, Some(user), Some(user))?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Waits for the node of the disk with this serial number.
async fn find_disk(serial: &str) -> Result<PathBuf> {
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
    use vvu_appliance_config::Layer;

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

    #[test]
    fn blk_is_started_as_configured() {
        let image = || Layer { disk_serial: "d".into(), format: Format::Raw };
        let options = |read_only| BlkOptions {
            image: image(),
            backing: Vec::new(),
            read_only,
            queues: 4,
            serial: "s".into(),
            limits: Limits::default(),
        };
        let arguments = |read_only| {
            let arguments = blk_arguments(&options(read_only), Path::new("/dev/vda"), Path::new("/run/b.sock"));
            arguments.join(std::ffi::OsStr::new(" ")).into_string().unwrap()
        };
        let expected = "--socket-path /run/b.sock --image /dev/vda --queues 4 --serial s";
        assert_eq!(arguments(false), expected);
        assert_eq!(arguments(true), format!("{expected} --read-only"));
    }
}
