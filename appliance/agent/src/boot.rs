//! What PID 1 does before and after everything else: file systems, the configuration, the log, the end.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};
use rustix::termios::tcdrain;
use tracing_subscriber::EnvFilter;
use vvu_appliance_config::{ApplianceConfig, FW_CFG_NAME, MAX_CONFIG_LEN};

/// File systems of the kernel, and a place for sockets.
const MOUNTS: [(&str, &str, MountFlags); 4] = [
    ("proc", "/proc", MountFlags::from_bits_retain(NOTHING_RUNS_FROM)),
    ("sysfs", "/sys", MountFlags::from_bits_retain(NOTHING_RUNS_FROM)),
    ("devtmpfs", "/dev", MountFlags::NOSUID),
    ("tmpfs", "/run", MountFlags::from_bits_retain(NOTHING_RUNS_FROM)),
];

const NOTHING_RUNS_FROM: u32 = MountFlags::NOSUID.bits() | MountFlags::NODEV.bits() | MountFlags::NOEXEC.bits();

/// Mounts the file systems that the agent and the back-ends need.
///
/// # Errors
/// If the kernel refuses one.
pub fn mount_file_systems() -> Result<()> {
    for (kind, target, flags) in MOUNTS {
        fs::create_dir_all(target).with_context(|| format!("cannot make {target}"))?;
        mount(kind, target, kind, flags, None).with_context(|| format!("cannot mount {kind} on {target}"))?;
    }
    Ok(())
}

/// Reads and checks the configuration document.
///
/// # Errors
/// If there is none, or it breaks a rule.
pub fn read_config() -> Result<ApplianceConfig> {
    use std::io::Read;
    let path = fw_cfg_path(FW_CFG_NAME);
    let file = fs::File::open(&path)
        .with_context(|| format!("no configuration: start the VM with '-fw_cfg name={FW_CFG_NAME},file=…'"))?;
    let mut bytes = Vec::new();
    // One byte more than is allowed shows that there are more.
    file.take(MAX_CONFIG_LEN as u64 + 1).read_to_end(&mut bytes).with_context(|| path.display().to_string())?;
    Ok(ApplianceConfig::from_json(&bytes)?)
}

fn fw_cfg_path(name: &str) -> PathBuf {
    Path::new("/sys/firmware/qemu_fw_cfg/by_name").join(name).join("raw")
}

/// Sends the log to the console, filtered as the configuration says.
///
/// # Errors
/// If the filter is none.
pub fn start_log(filter: &str) -> Result<()> {
    let filter = EnvFilter::try_new(filter).with_context(|| format!("'{filter}' is not a log filter"))?;
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).without_time().with_writer(io::stderr).init();
    Ok(())
}

/// Switches the VM off, after the console has sent all that was written to it.
///
/// # Errors
/// If the kernel refuses.
pub fn power_off() -> io::Result<()> {
    let _ = tcdrain(io::stderr());
    Ok(reboot(RebootCommand::PowerOff)?)
}
