//! Asks a QEMU what it is: its version and whether it has the devices of the device set.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::SetupError;
use crate::command::output_of;

/// The system emulator's name on `PATH`.
pub(crate) const PROGRAM: &str = "qemu-system-x86_64";

/// First major version whose stock devices can carry a vhost-user back-end in a VM (SHMEM_MAP).
const NEEDED_MAJOR: u32 = 11;

/// Devices that the appliance VM is made of.
const NEEDED_DEVICES: [&str; 2] = ["vhost-user-test-device-pci", "ivshmem-doorbell"];

/// Checks that a QEMU can run the appliance VM, and returns its version.
pub(crate) fn check(path: &Path) -> Result<String, SetupError> {
    let answer = output_of(Command::new(path).arg("--version"))?;
    let found = answer.lines().next().unwrap_or("silent").to_owned();
    match parse_version(&answer) {
        Some((major, minor, micro)) if major >= NEEDED_MAJOR => {
            let devices = output_of(Command::new(path).args(["-device", "help"]))?;
            match NEEDED_DEVICES.into_iter().find(|device| !devices.contains(&format!("name \"{device}\""))) {
                None => Ok(format!("{major}.{minor}.{micro}")),
                Some(device) => Err(SetupError::QemuDevice { path: path.into(), device }),
            }
        }
        _ => Err(SetupError::QemuVersion { path: path.into(), found }),
    }
}

/// The machine's own QEMU, if it has one, and whether it is fit for the appliance.
pub(crate) fn on_path(search: Option<&OsStr>) -> Option<(PathBuf, bool)> {
    let path = program_on_path(search, PROGRAM)?;
    let fit = check(&path).is_ok();
    Some((path, fit))
}

/// First file of that name in the directories of `PATH`.
pub(crate) fn program_on_path(search: Option<&OsStr>, name: &str) -> Option<PathBuf> {
    std::env::split_paths(search?).map(|directory| directory.join(name)).find(|path| path.is_file())
}

/// Version in the first line of `--version`: `QEMU emulator version 11.1.3 (Debian …)`.
fn parse_version(answer: &str) -> Option<(u32, u32, u32)> {
    let (_, rest) = answer.lines().next()?.split_once(" version ")?;
    let number = rest.split(|c: char| c != '.' && !c.is_ascii_digit()).next()?;
    let mut parts = number.split('.').map(str::parse::<u32>);
    Some((parts.next()?.ok()?, parts.next()?.ok()?, parts.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn versions_are_read() {
        let version = |text| parse_version(text);
        assert_eq!(version("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)\nCopyright"), Some((11, 1, 3)));
        assert_eq!(version("QEMU emulator version 7.2.22"), Some((7, 2, 22)));
        assert_eq!(version("QEMU emulator version 11.0.92-dirty"), Some((11, 0, 92)));
        assert_eq!(version("bash version five"), None);
        assert_eq!(version(""), None);
    }

    /// A program that answers as QEMU would.
    fn qemu(directory: &Path, version: &str, devices: &str) -> PathBuf {
        let path = directory.join(PROGRAM);
        let text = format!(
            "#!/bin/sh\ncase $1 in\n--version) echo 'QEMU emulator version {version}';;\n-device) echo '{devices}';;\nesac\n"
        );
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn an_old_or_incomplete_qemu_is_refused_with_the_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let both = "name \"vhost-user-test-device-pci\", bus PCI\nname \"ivshmem-doorbell\", bus PCI";

        assert_eq!(check(&qemu(directory.path(), "11.2.0", both)).unwrap(), "11.2.0");
        assert_eq!(on_path(Some(directory.path().as_os_str())).unwrap(), (directory.path().join(PROGRAM), true));

        let refusal = check(&qemu(directory.path(), "10.0.13", both)).unwrap_err().to_string();
        assert!(refusal.contains("version 10.0.13") && refusal.contains("--qemu"), "{refusal}");
        let refusal = check(&qemu(directory.path(), "11.2.0", "name \"ivshmem-doorbell\"")).unwrap_err().to_string();
        assert!(refusal.contains("lacks the device vhost-user-test-device-pci"), "{refusal}");
        assert!(!on_path(Some(directory.path().as_os_str())).unwrap().1);
        assert_eq!(on_path(None), None);
    }
}
