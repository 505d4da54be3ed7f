//! Where the programs and the appliance image are.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{Access, access};

/// QEMU's name on `PATH`.
const QEMU_NAME: &str = "qemu-system-x86_64";

/// The bridge's name beside this executable or on `PATH`.
const BRIDGE_NAME: &str = "vvu-bridge";

/// Where a packaged appliance image lies.
const PACKAGED_APPLIANCE: &str = "/usr/share/vvu/appliance";

/// How the appliance image comes into being.
const BUILD_APPLIANCE: &str = "build it with: cargo xtask image (it writes target/appliance)";

/// Finds QEMU: `--qemu`, else `$VVU_QEMU`, else on `PATH`.
///
/// # Errors
/// One line with the remedy if there is none that can be executed.
pub(crate) fn find_qemu(argument: Option<&Path>) -> anyhow::Result<PathBuf> {
    let remedy = "install QEMU 11 or newer, or name it with --qemu or $VVU_QEMU";
    match argument.map(Path::to_owned).or_else(|| from_environment("VVU_QEMU")) {
        Some(path) => executable(&path).with_context(|| format!("QEMU {}; {remedy}", fault_of(&path))),
        None => on_path(QEMU_NAME).with_context(|| format!("QEMU: no {QEMU_NAME} on PATH; {remedy}")),
    }
}

/// Finds the bridge: `--bridge`, else beside this executable, else on `PATH`.
///
/// # Errors
/// One line with the remedy if there is none that can be executed.
pub(crate) fn find_bridge(argument: Option<&Path>) -> anyhow::Result<PathBuf> {
    let remedy = "install it beside vvu, or name it with --bridge";
    if let Some(path) = argument {
        return executable(path).with_context(|| format!("bridge {}; {remedy}", fault_of(path)));
    }
    let beside = env::current_exe().ok().and_then(|own| own.parent().map(|directory| directory.join(BRIDGE_NAME)));
    beside
        .and_then(|path| executable(&path))
        .or_else(|| on_path(BRIDGE_NAME))
        .with_context(|| format!("bridge: no {BRIDGE_NAME} beside vvu or on PATH; {remedy}"))
}

/// The files of an appliance image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApplianceFiles {
    /// The directory.
    pub(crate) directory: PathBuf,
    /// Kernel.
    pub(crate) kernel: String,
    /// Initial RAM file system.
    pub(crate) initrd: String,
}

/// Finds the appliance image: `--appliance`, else `$VVU_APPLIANCE`, else where a package puts it.
///
/// # Errors
/// One line with the remedy if a file of it is missing.
pub(crate) fn find_appliance(argument: Option<&Path>) -> anyhow::Result<ApplianceFiles> {
    let directory = argument
        .map(Path::to_owned)
        .or_else(|| from_environment("VVU_APPLIANCE"))
        .unwrap_or_else(|| PathBuf::from(PACKAGED_APPLIANCE));
    let shown = directory.display();
    let absolute = std::path::absolute(&directory).with_context(|| format!("appliance image {shown}"))?;
    let file = |name: &str| -> anyhow::Result<String> {
        let path = absolute.join(name);
        if !path.is_file() {
            bail!(
                "appliance image {shown} has no {name}; {BUILD_APPLIANCE} and name it with --appliance or $VVU_APPLIANCE"
            );
        }
        let text = path.to_str().with_context(|| format!("appliance image path {shown} is not valid UTF-8"))?;
        Ok(text.to_owned())
    };
    Ok(ApplianceFiles { kernel: file("vmlinux")?, initrd: file("initrd")?, directory: absolute })
}

fn from_environment(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The absolute path of a program: a bare name is looked up on `PATH`, as a shell does.
fn executable(path: &Path) -> Option<PathBuf> {
    if path.components().count() == 1 && !path.is_absolute() && !path.exists() {
        return on_path(path.to_str()?);
    }
    let usable = path.is_file() && access(path, Access::EXEC_OK).is_ok();
    if usable { std::path::absolute(path).ok() } else { None }
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file() && access(candidate, Access::EXEC_OK).is_ok())
}

fn fault_of(path: &Path) -> String {
    let fault = if path.is_dir() {
        "is a directory"
    } else if path.exists() {
        "may not be executed by this user"
    } else {
        "does not exist"
    };
    format!("{} {fault}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_cannot_run_is_refused_with_its_fault() {
        let directory = tempfile::tempdir().unwrap();
        let plain = directory.path().join("plain");
        std::fs::write(&plain, "text").unwrap();
        let cases = [
            (plain.as_path(), "may not be executed"),
            (directory.path(), "is a directory"),
            (Path::new("/no/qemu"), "does not exist"),
        ];
        for (path, fault) in cases {
            let refusal = find_qemu(Some(path)).unwrap_err().to_string();
            assert!(refusal.contains(fault) && refusal.contains("--qemu"), "{refusal}");
        }
        assert_eq!(find_qemu(Some(Path::new("/bin/sh"))).unwrap(), PathBuf::from("/bin/sh"));
        assert!(find_bridge(Some(Path::new("sh"))).unwrap().is_absolute());
    }

    #[test]
    fn an_appliance_without_its_files_names_the_build_command() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("vmlinux"), "kernel").unwrap();
        let refusal = find_appliance(Some(directory.path())).unwrap_err().to_string();
        assert!(refusal.contains("has no initrd") && refusal.contains("cargo xtask image"), "{refusal}");
        std::fs::write(directory.path().join("initrd"), "initrd").unwrap();
        let files = find_appliance(Some(directory.path())).unwrap();
        assert!(files.kernel.ends_with("/vmlinux") && files.initrd.ends_with("/initrd"));
    }
}
