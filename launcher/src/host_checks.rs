//! The single checks of `vvu check`: each looks at one thing of this host and says what it found and what to do.

use std::path::Path;

use rustix::fs::MemfdFlags;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use crate::accel::KvmState;
use crate::image::{Expected, Image};
use crate::probe::{MIN_VERSION, QemuFacts, REMEDY};
use crate::programs::ApplianceFiles;
use crate::qemu_args::DiskIo;
use crate::runtime_dir::RuntimeDir;
use crate::size::{KIB, Size};

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    /// As it should be.
    Ok,
    /// A device can be served, though not as well as it could.
    Warning,
    /// No device can be served.
    Failed,
}

impl Status {
    /// The word that is printed.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
        }
    }
}

/// One check's result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// What was looked at; stable, for programs.
    pub(crate) id: &'static str,
    /// How it came out.
    pub(crate) status: Status,
    /// What was found, in one line.
    pub(crate) found: String,
    /// What to do about it; absent if nothing.
    pub(crate) remedy: Option<String>,
}

impl Check {
    fn ok(id: &'static str, found: impl Into<String>) -> Self {
        Self { id, status: Status::Ok, found: found.into(), remedy: None }
    }

    fn warning(id: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { id, status: Status::Warning, found: found.into(), remedy: Some(remedy.into()) }
    }

    /// A failed check.
    pub(crate) fn failed(id: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { id, status: Status::Failed, found: found.into(), remedy: Some(remedy.into()) }
    }

    /// A check whose error text is finding and remedy in one, parted by the first semicolon.
    fn refused(id: &'static str, error: &anyhow::Error) -> Self {
        let text = format!("{error:#}").replace('\n', " ");
        match text.split_once("; ") {
            Some((found, remedy)) => Self::failed(id, found, remedy),
            None => Self { id, status: Status::Failed, found: text, remedy: None },
        }
    }
}

/// Whether the appliance VM runs under KVM.
pub(crate) fn kvm(state: &KvmState) -> Check {
    match state.remedy() {
        None => Check::ok("kvm", state.finding()),
        Some(remedy) => Check::warning("kvm", format!("{}: TCG is used, which is slow", state.finding()), remedy),
    }
}

/// Everything about QEMU: found, new enough, complete, its sandbox, its disk I/O.
pub(crate) fn qemu(found: &anyhow::Result<QemuFacts>, path: &Path) -> Vec<Check> {
    let facts = match found {
        Ok(facts) => facts,
        // The probe runs inside the sandbox: a QEMU without one ends before it greets.
        Err(error) if format!("{error:#}").contains("sandbox") => {
            return vec![Check::failed("qemu-sandbox", format!("{error:#}"), "use a QEMU built with seccomp")];
        }
        Err(error) => return vec![Check::refused("qemu", error)],
    };
    let version = format!("{} is version {}", path.display(), facts.version);
    let age = match facts.version < MIN_VERSION {
        false => Check::ok("qemu", version),
        true => Check::failed("qemu", format!("{version}, too old"), REMEDY),
    };
    let devices = match facts.missing_devices.is_empty() {
        true => Check::ok("qemu-devices", crate::qemu_args::REQUIRED_DEVICES.join(", ")),
        false => Check::failed("qemu-devices", format!("missing: {}", facts.missing_devices.join(", ")), REMEDY),
    };
    let parent = match facts.exit_with_parent {
        true => Check::ok("qemu-exit-with-parent", "QEMU ends with vvu"),
        false => Check::failed("qemu-exit-with-parent", "no -run-with exit-with-parent", REMEDY),
    };
    let sandbox = Check::ok("qemu-sandbox", "QEMU runs inside its seccomp sandbox");
    let disk_io = facts.disk_io.iter().map(disk_io);
    [age, devices, parent, sandbox].into_iter().chain(disk_io).collect()
}

fn disk_io(tried: &Result<DiskIo, String>) -> Check {
    let id = "disk-io";
    match tried {
        Ok(way) if way.aio == "io_uring" => Check::ok(id, "io_uring works inside the sandbox"),
        Ok(way) => Check::warning(
            id,
            format!("io_uring is refused, disk I/O uses {}", way.aio),
            "set the sysctl kernel.io_uring_disabled to 0, and use a QEMU built with liburing",
        ),
        Err(reason) => Check::failed(id, format!("QEMU cannot open an image: {reason}"), "see QEMU's message"),
    }
}

/// Whether the default appliance fits into the memory that is free (`/proc/meminfo`, proc(5)).
pub(crate) fn memory(meminfo: &str, needed: Size) -> Check {
    let available = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map(|kibibytes| Size(kibibytes.saturating_mul(KIB)));
    match available {
        None => Check::warning("memory", "/proc/meminfo does not tell the free memory", "mount /proc"),
        Some(free) if free < needed => Check::failed(
            "memory",
            format!("{} free, an appliance of default size takes {}", free.in_mebibytes(), needed.in_mebibytes()),
            "free memory, or give a smaller --memory and --window",
        ),
        Some(free) => Check::ok(
            "memory",
            format!("{} free, an appliance of default size takes {}", free.in_mebibytes(), needed.in_mebibytes()),
        ),
    }
}

/// Whether shared memory of the appliance's size can be made (memfd_create(2), getrlimit(2)).
pub(crate) fn shared_memory(needed: Size) -> Check {
    let id = "shared-memory";
    if let Err(error) = rustix::fs::memfd_create("vvu-check", MemfdFlags::CLOEXEC) {
        return Check::failed(id, format!("memfd_create: {error}"), "allow memfd_create in this container or sandbox");
    }
    limits(id, needed, getrlimit(Resource::Fsize).current, getrlimit(Resource::Memlock).current)
}

/// A memfd is a file, so the file size limit binds it. The locked memory limit binds nothing here (no memory is locked)
/// and is shown because VFIO and older io_uring setups elsewhere depend on it.
fn limits(id: &'static str, needed: Size, file_size: Option<u64>, locked: Option<u64>) -> Check {
    if let Some(limit) = file_size.filter(|limit| *limit < needed.0) {
        let found = format!("the file size limit of {} is below the appliance's {needed}", Size(limit));
        return Check::failed(id, found, "raise it with: ulimit -f unlimited");
    }
    let locked = locked.map_or_else(|| "unlimited".to_owned(), |limit| Size(limit).to_string());
    Check::ok(id, format!("memfd works; locked memory limit {locked}, none is locked"))
}

/// Whether the private runtime directory can be made.
pub(crate) fn runtime_dir() -> Check {
    match RuntimeDir::create() {
        Ok(directory) => {
            let parent = directory.path().parent().unwrap_or(directory.path());
            Check::ok("runtime-dir", format!("{} is writable", parent.display()))
        }
        Err(error) => Check::failed("runtime-dir", format!("{error:#}"), "set XDG_RUNTIME_DIR to your own directory"),
    }
}

/// Whether there is a bridge.
pub(crate) fn bridge(found: &anyhow::Result<std::path::PathBuf>) -> Check {
    match found {
        Ok(path) => Check::ok("bridge", path.display().to_string()),
        Err(error) => Check::refused("bridge", error),
    }
}

/// Whether there is an appliance image, and whether its files are those of its manifest.
pub(crate) fn appliance(found: &anyhow::Result<ApplianceFiles>) -> Check {
    match found.as_ref().map(|files| (files, crate::manifest::check(&files.directory))) {
        Ok((files, Ok(()))) => Check::ok("appliance", format!("{} matches its manifest", files.directory.display())),
        Ok((_, Err(error))) => Check::refused("appliance", &error),
        Err(error) => Check::refused("appliance", error),
    }
}

/// An empty image in the directory for temporary files, to try disk I/O with.
pub(crate) fn scratch_image() -> anyhow::Result<(tempfile::NamedTempFile, Image)> {
    use anyhow::Context;
    let file = tempfile::NamedTempFile::new().context("cannot create a temporary file; set TMPDIR")?;
    file.as_file().set_len(crate::size::MIB).context("cannot write a temporary file; set TMPDIR")?;
    let image = Image::check(file.path(), false, Expected::Raw)?;
    Ok((file, image))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::{GIB, MIB};

    #[test]
    fn memory_is_compared_with_what_is_needed() {
        let meminfo = "MemTotal:  2000000 kB\nMemAvailable:   1048576 kB\n";
        let fits = memory(meminfo, Size(224 * MIB));
        assert_eq!((fits.status, fits.remedy), (Status::Ok, None));
        assert!(fits.found.starts_with("1024 MiB free"), "{}", fits.found);
        assert_eq!(memory(meminfo, Size(2 * GIB)).status, Status::Failed);
        assert_eq!(memory("", Size(GIB)).status, Status::Warning);
    }

    #[test]
    fn a_low_file_size_limit_fails_and_a_low_lock_limit_does_not() {
        let needed = Size(224 * MIB);
        assert_eq!(limits("x", needed, Some(MIB), None).status, Status::Failed);
        assert_eq!(limits("x", needed, None, Some(0)).status, Status::Ok);
        assert_eq!(limits("x", needed, Some(224 * MIB), Some(MIB)).status, Status::Ok);
    }

    #[test]
    fn an_unusable_kvm_is_a_warning_with_a_remedy() {
        let check = kvm(&KvmState::NoCpuSupport);
        assert_eq!(check.status, Status::Warning);
        assert!(check.found.contains("TCG") && check.remedy.is_some());
        assert_eq!(kvm(&KvmState::Usable).status, Status::Ok);
    }

    #[test]
    fn a_refusal_is_parted_into_finding_and_remedy() {
        let check = Check::refused("bridge", &anyhow::anyhow!("no bridge; install it"));
        assert_eq!((check.found.as_str(), check.remedy.as_deref()), ("no bridge", Some("install it")));
    }

    #[test]
    fn a_qemu_without_sandbox_is_told_apart() {
        let checks =
            qemu(&Err(anyhow::anyhow!("QEMU q does not start: -sandbox support is not enabled")), Path::new("q"));
        assert_eq!((checks[0].id, checks[0].status), ("qemu-sandbox", Status::Failed));
    }
}
