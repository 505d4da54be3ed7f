//! What PID 1 does before and after everything else: file systems, the configuration, the log, the end.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::system::{RebootCommand, reboot};
use rustix::termios::tcdrain;
use rustix::time::{ClockId, clock_gettime};
use tracing_subscriber::EnvFilter;
use vvu_appliance_config::{ApplianceConfig, Device, FW_CFG_NAME, MAX_CONFIG_LEN};

use crate::network::bring_loopback_up;
use crate::user_namespace::forbid_to_programs;

/// File systems of the kernel, and a place for sockets.
const MOUNTS: [(&str, &str, MountFlags); 4] = [
    ("proc", "/proc", MountFlags::from_bits_retain(NOTHING_RUNS_FROM)),
    ("sysfs", "/sys", MountFlags::from_bits_retain(NOTHING_RUNS_FROM)),
    ("devtmpfs", "/dev", MountFlags::NOSUID),
    ("tmpfs", "/run", MountFlags::from_bits_retain(NOTHING_RUNS_FROM)),
];

/// What programs of others expect besides, which the appliance's own do not need: kind, place, flags, options.
const MOUNTS_OF_PROGRAMS: [(&str, &str, MountFlags, &CStr); 3] = [
    ("tmpfs", "/tmp", NO_RIGHTS, c"mode=1777"),
    ("tmpfs", "/dev/shm", NO_RIGHTS, c"mode=1777"),
    ("devpts", "/dev/pts", MountFlags::NOSUID, c"mode=620,ptmxmode=666"),
];

/// Names in /dev that no driver makes.
const LINKS_OF_PROGRAMS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Most files that a program of others may have open, if it raises its own limit: some keep one for each file that they serve.
const MAX_OPEN_FILES: u64 = 1 << 20;

const NO_RIGHTS: MountFlags = MountFlags::from_bits_retain(MountFlags::NOSUID.bits() | MountFlags::NODEV.bits());

const NOTHING_RUNS_FROM: u32 = MountFlags::NOSUID.bits() | MountFlags::NODEV.bits() | MountFlags::NOEXEC.bits();

/// Time since the kernel started its clock, in milliseconds.
#[must_use]
pub fn uptime_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let duration = Duration::try_from(now).unwrap_or_default();
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Mounts the file systems that the agent and the back-ends need.
///
/// # Errors
/// If the kernel refuses one.
pub fn mount_file_systems() -> Result<()> {
    for (kind, target, flags) in MOUNTS {
        fs::create_dir_all(target).with_context(|| format!("cannot make {target}"))?;
        mount(kind, target, kind, flags, None).with_context(|| format!("cannot mount {kind} on {target}"))?;
    }
    // Both are file systems in memory, where everybody may write at first.
    for place in ["/", "/run"] {
        let permissions = fs::Permissions::from_mode(0o755);
        fs::set_permissions(place, permissions).with_context(|| format!("cannot protect {place}"))?;
    }
    Ok(())
}

/// Prepares what back-end programs find and inherit: nobody's memory is ever written to a file, and programs of others, if the
/// configuration has any, find what they expect of a system. Without those, nobody has a use for user namespaces.
///
/// # Errors
/// If the kernel refuses something.
pub fn prepare_for_programs(config: &ApplianceConfig) -> Result<()> {
    limit(Resource::Core, |_| Rlimit { current: Some(0), maximum: Some(0) })?;
    // Driver memory that a back-end has the kernel keep at hand counts as locked, and is none of the VM's own.
    limit(Resource::Memlock, |_| Rlimit { current: None, maximum: None })?;
    if !config.back_ends.iter().any(|back_end| matches!(back_end.device, Device::Exec(_))) {
        return forbid_to_programs().context("cannot forbid user namespaces");
    }
    limit(Resource::Nofile, |now| Rlimit { maximum: Some(MAX_OPEN_FILES), ..now })?;
    for (kind, target, flags, options) in MOUNTS_OF_PROGRAMS {
        fs::create_dir_all(target).with_context(|| format!("cannot make {target}"))?;
        mount(kind, target, kind, flags, Some(options)).with_context(|| format!("cannot mount {kind} on {target}"))?;
    }
    for (target, link) in LINKS_OF_PROGRAMS {
        symlink(target, link).with_context(|| format!("cannot make {link}"))?;
    }
    Ok(bring_loopback_up()?)
}

fn limit(resource: Resource, change: impl FnOnce(Rlimit) -> Rlimit) -> Result<()> {
    setrlimit(resource, change(getrlimit(resource))).with_context(|| format!("cannot limit {resource:?}"))
}

/// Whether a network card of the appliance is to be used.
#[must_use]
pub fn has_uplink(config: &ApplianceConfig) -> bool {
    config.back_ends.iter().any(|back_end| matches!(&back_end.device, Device::Net(net) if net.uplink.is_some()))
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

/// The kernel's release, as `uname -r` has it.
#[must_use]
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Switches the VM off, after the console has sent all that was written to it.
///
/// # Errors
/// If the kernel refuses.
pub fn power_off() -> io::Result<()> {
    let _ = tcdrain(io::stderr());
    Ok(reboot(RebootCommand::PowerOff)?)
}
