//! The set-up itself: decides what is there, fetches the rest, and writes the record.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::fs::{FlockOperation, flock};

use crate::apt::{Apt, Package, Selection};
use crate::error::at;
use crate::kernel::Kernel;
use crate::root::{size_of, unpack, wrap};
use crate::step::{Step, Wanted, recipe};
use crate::{Setup, SetupError, cache_root, distribution, qemu};

/// What a person may provide instead of having it fetched.
#[derive(Clone, Debug, Default)]
pub struct SetupOptions {
    /// A `qemu-system-x86_64`, version 11 or later. Its tools (`qemu-img`, …) are taken from beside it.
    pub qemu: Option<PathBuf>,
    /// A kernel image (bzImage), 6.12 or later, for appliance and driver VMs.
    pub kernel: Option<PathBuf>,
    /// Directory of that kernel's modules; by default searched beside the kernel and below `/lib/modules`.
    pub modules: Option<PathBuf>,
}

/// Programs of `qemu-utils`, in the order of [`Tools`].
const TOOL_NAMES: [&str; 3] = ["qemu-img", "qemu-io", "qemu-storage-daemon"];

/// Paths of the programs in [`TOOL_NAMES`].
type Tools = [PathBuf; 3];

/// Makes the set-up, or completes one that was interrupted, and writes its record into the cache.
///
/// Prints to standard error what it does and how much it fetches. A second set-up at the same time waits
/// for the first. What is in the cache already is used as it is.
///
/// # Errors
/// Any [`SetupError`]; a failed program's output is part of it.
pub fn run(options: &SetupOptions) -> Result<Setup, SetupError> {
    let cache = cache_root()?;
    fs::create_dir_all(&cache).map_err(at(&cache))?;
    let lock = Lock::take(&cache)?;
    let provider = Provider::new(&cache, &lock)?;
    let (qemu, tools) = provider.qemu(options)?;
    let version = qemu::check(&qemu)?;
    let kernel = provider.kernel(options)?;
    let driver_root = provider.driver_root()?;
    let [qemu_img, qemu_io, qemu_storage_daemon] = tools;
    let setup = Setup {
        qemu_distribution: provider.qemu_distribution(&qemu)?,
        qemu,
        kernel: kernel.image,
        modules: kernel.modules,
        kernel_release: kernel.release,
        debugfs: provider.debugfs(&driver_root)?,
        driver_root,
        qemu_img,
        qemu_io,
        qemu_storage_daemon,
        recipe: recipe(),
    };
    remove_lists(&cache)?;
    setup.save_to(&cache)?;
    let megabytes = megabytes(size_of(&cache)?);
    eprintln!("setup: QEMU {version}, kernel {}; {megabytes} in {}", setup.kernel_release, cache.display());
    Ok(setup)
}

/// Once all packages are unpacked, neither they nor their lists are needed again.
pub(crate) fn remove_lists(cache: &Path) -> Result<(), SetupError> {
    let apt = cache.join("apt");
    if apt.exists() {
        fs::remove_dir_all(&apt).map_err(at(&apt))?;
    }
    Ok(())
}

/// The cache, taken for this process and those of its children that are given it.
#[derive(Debug)]
pub(crate) struct Lock(File);

impl Lock {
    /// Waits for another set-up to end.
    pub(crate) fn take(cache: &Path) -> Result<Self, SetupError> {
        let path = cache.join("lock");
        let file =
            File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(at(&path))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            eprintln!("setup: waiting for another set-up to end");
            flock(&file, FlockOperation::LockExclusive).map_err(|error| at(&path)(error.into()))?;
        }
        Ok(Self(file))
    }

    /// An empty standard input that holds the lock: a child that outlives a killed set-up must keep the next one waiting. No
    /// other child may have it, for whatever another thread starts meanwhile may live long.
    pub(crate) fn as_input(&self) -> io::Result<Stdio> {
        self.0.try_clone().map(Stdio::from)
    }
}

/// Where things come from on this machine.
pub(crate) struct Provider<'a> {
    cache: &'a Path,
    lock: &'a Lock,
    /// Debian's mirror and the machine's release, or why this is no Debian.
    debian: Result<distribution::Debian, String>,
    search: Option<std::ffi::OsString>,
}

impl<'a> Provider<'a> {
    pub(crate) fn new(cache: &'a Path, lock: &'a Lock) -> Result<Self, SetupError> {
        Ok(Self { cache, lock, debian: distribution::detect()?, search: std::env::var_os("PATH") })
    }

    /// Codename of the machine's release, or why it is no Debian.
    pub(crate) fn release(&self) -> Result<&str, &str> {
        self.debian.as_ref().map(|debian| debian.codename.as_str()).map_err(String::as_str)
    }

    /// Whether no packages can be unpacked.
    pub(crate) fn is_foreign(&self) -> bool {
        self.debian.is_err()
    }

    /// The QEMU of the appliance VM with its tools: the one named, else the machine's, else a private one.
    fn qemu(&self, options: &SetupOptions) -> Result<(PathBuf, Tools), SetupError> {
        let found = match &options.qemu {
            Some(path) => Some(fs::canonicalize(path).map_err(at(path))?),
            None => qemu::on_path(self.search.as_deref()).filter(|(_, fit)| *fit).map(|(path, _)| path),
        };
        let Some(path) = found else {
            let root = self.root(&Step::qemu())?;
            return Ok((self.wrap(&root, &format!("usr/bin/{}", qemu::PROGRAM), "qemu")?, self.tools(&root)?));
        };
        let tools = TOOL_NAMES.map(|name| path.with_file_name(name));
        if tools.iter().all(|tool| tool.is_file()) {
            return Ok((path, tools));
        }
        let tools = match &self.debian {
            Ok(_) => self.tools(&self.root(&Step::qemu())?)?,
            Err(_) => {
                let [image, io, daemon] = TOOL_NAMES.map(|name| self.installed(name));
                [image?, io?, daemon?]
            }
        };
        Ok((path, tools))
    }

    /// A program of a system from whose packages nothing can be unpacked.
    pub(crate) fn installed(&self, program: &'static str) -> Result<PathBuf, SetupError> {
        qemu::program_on_path(self.search.as_deref(), program).ok_or(SetupError::NoProgram(program))
    }

    fn tools(&self, root: &Path) -> Result<Tools, SetupError> {
        let [image, io, daemon] = TOOL_NAMES.map(|name| self.wrap(root, &format!("usr/bin/{name}"), name));
        Ok([image?, io?, daemon?])
    }

    /// The QEMU that the machine's release has: the installed one if it is not the appliance's.
    fn qemu_distribution(&self, appliance_qemu: &Path) -> Result<PathBuf, SetupError> {
        if let Some((path, false)) = qemu::on_path(self.search.as_deref()) {
            return Ok(path);
        }
        match &self.debian {
            Ok(debian) => {
                let root = self.root(&Step::qemu_distribution(&debian.codename))?;
                self.wrap(&root, &format!("usr/bin/{}", qemu::PROGRAM), "qemu-distribution")
            }
            Err(_) => Ok(appliance_qemu.into()),
        }
    }

    fn kernel(&self, options: &SetupOptions) -> Result<Kernel, SetupError> {
        match &options.kernel {
            Some(path) => Kernel::find(&fs::canonicalize(path).map_err(at(path))?, options.modules.as_deref()),
            None => Kernel::of_root(&self.root(&Step::kernel())?),
        }
    }

    /// Root of the driver VM's programs; on a foreign system, the system itself.
    fn driver_root(&self) -> Result<PathBuf, SetupError> {
        if self.debian.is_ok() {
            return self.root(&Step::driver());
        }
        for program in ["busybox", "fio", "mkfs.ext4", "debugfs"] {
            self.installed(program)?;
        }
        Ok("/".into())
    }

    fn debugfs(&self, driver_root: &Path) -> Result<PathBuf, SetupError> {
        if self.debian.is_err() {
            return self.installed("debugfs");
        }
        let places = ["usr/sbin/debugfs", "sbin/debugfs"];
        let place = places.into_iter().find(|place| driver_root.join(place).exists()).unwrap_or(places[0]);
        self.wrap(driver_root, place, "debugfs")
    }

    fn wrap(&self, root: &Path, program: &str, name: &str) -> Result<PathBuf, SetupError> {
        wrap(root, program, self.cache.join("bin").join(name))
    }

    /// The private root of a step, which is fetched and unpacked if it is not there.
    pub(crate) fn root(&self, step: &Step) -> Result<PathBuf, SetupError> {
        let root = self.cache.join("roots").join(step.directory_name());
        if root.exists() {
            return Ok(root);
        }
        let debian = self.debian.as_ref().map_err(|why| SetupError::Unsupported { why: why.clone() })?;
        eprintln!("setup: {} from {}: lists of packages", step.what, step.suites.join(" and "));
        let apt =
            Apt::open(&self.cache.join("apt").join(step.suites.join("+")), &debian.mirror, &step.suites, self.lock)?;
        let selection = match &step.wanted {
            Wanted::Packages(selection) => selection.clone(),
            Wanted::DependencyOf(meta) => Selection::Alone(apt.dependency_of(meta)?),
        };
        let packages = apt.plan(&selection)?;
        let total = megabytes(packages.iter().map(|package| package.size_bytes).sum());
        eprintln!("setup: {}: {total} in {} package(s)", step.what, packages.len());
        apt.fetch(&selection, &total)?;
        let archives: Vec<PathBuf> = packages.iter().map(|package: &Package| apt.path_of(package)).collect();
        unpack(&archives, &root)?;
        eprintln!("setup: {}: unpacked, {}", step.what, megabytes(size_of(&root)?));
        self.remove_older(step, &root)?;
        Ok(root)
    }

    /// Removes what an earlier recipe of the same step left.
    fn remove_older(&self, step: &Step, root: &Path) -> Result<(), SetupError> {
        let roots = self.cache.join("roots");
        for entry in fs::read_dir(&roots).map_err(at(&roots))? {
            let path = entry.map_err(at(&roots))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let same_step = name.rsplit_once('-').is_some_and(|(prefix, _)| prefix == step.name);
            if same_step && path != root {
                fs::remove_dir_all(&path).map_err(at(&path))?;
            }
        }
        Ok(())
    }
}

/// A size as a person reads it.
fn megabytes(bytes: u64) -> String {
    format!("{} MB", bytes.div_ceil(1_000_000))
}
