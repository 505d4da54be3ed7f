//! Kernels that no package has: built here out of the distribution's own kernel source, once, and kept in the cache.
//!
//! The source is the package that Debian makes of the stock kernel's source; the programs that a build needs beside a C compiler are
//! unpacked from the machine's own release, so that nothing has to be installed. The result is kept under a name that holds a
//! hash of source, configuration and compiler.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::available_parallelism;
use std::time::{Instant, UNIX_EPOCH};

use crate::command::{output_of, output_with};
use crate::error::at;
use crate::kernel_options::unmet;
use crate::root::wrap;
use crate::run::{Lock, Provider, remove_lists};
use crate::step::{Step, hash_of};
use crate::{SetupError, cache_root};

/// Counts changes in how a kernel is built that its configuration does not show.
const RECIPE: u32 = 1;

/// Programs of the build that are unpacked, each of which runs under its own name.
const TOOLS: [&str; 6] = ["bc", "bison", "flex", "m4", "make", "xz"];

/// The compiler; cargo links with it as well, so it is there.
const COMPILER: &str = "cc";

/// What a build would write into the kernel about the machine that builds it.
const IDENTITY: [(&str, &str); 4] = [
    ("KBUILD_BUILD_USER", "vvu"),
    ("KBUILD_BUILD_HOST", "vvu"),
    ("KBUILD_BUILD_VERSION", "1"),
    ("KBUILD_BUILD_TIMESTAMP", "1970-01-01"),
];

/// The kernel as an ELF file, and its configuration, in a finished build's directory.
const IMAGE: &str = "vmlinux";
const CONFIGURATION: &str = "config";

/// A kernel that has been built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuiltKernel {
    /// The kernel, an ELF file with all of its sections.
    pub image: PathBuf,
    /// Directory of its modules, with `modules.builtin` in it.
    pub modules: PathBuf,
    /// What `uname -r` says under it.
    pub release: String,
}

impl BuiltKernel {
    /// The kernel with these options (lines of a `.config`) and no others but those that they need. It is built now if it is not in
    /// the cache, for which the source (150 MB) is fetched; `name` tells it from kernels with other options.
    ///
    /// # Errors
    /// Any [`SetupError`]: [`SetupError::NoKernelSource`] on a system that is no Debian, [`SetupError::KernelOptions`] if the
    /// source or the compiler cannot have an option as it is wanted.
    pub fn with_options(name: &str, options: &str) -> Result<Self, SetupError> {
        let cache = cache_root()?;
        let all = cache.join("kernels");
        fs::create_dir_all(&all).map_err(at(&all))?;
        let Sources { archive, tools, place } = Sources::fetch(&cache, &all, name, options)?;
        // A build takes long, and others may use the cache meanwhile: so it has a lock of its own.
        let lock = Lock::take(&all)?;
        if !place.exists() {
            let build = Build::new(&all.join("new"), &tools, &lock)?;
            build.run(name, &archive, options)?;
            fs::rename(&build.outcome, &place).map_err(at(&place))?;
            fs::remove_dir_all(&build.directory).map_err(at(&build.directory))?;
            remove_others(&all, name, &place)?;
        }
        Self::in_directory(&place)
    }

    fn in_directory(place: &Path) -> Result<Self, SetupError> {
        let all = place.join("lib/modules");
        let incomplete = || SetupError::Incomplete { what: "kernel".into(), root: place.to_owned() };
        let entry = fs::read_dir(&all).map_err(at(&all))?.next().ok_or_else(incomplete)?.map_err(at(&all))?;
        let release = entry.file_name().into_string().map_err(|_| incomplete())?;
        Ok(Self { image: place.join(IMAGE), modules: entry.path(), release })
    }
}

/// What a kernel is built of, and where it goes.
struct Sources {
    archive: PathBuf,
    tools: PathBuf,
    place: PathBuf,
}

impl Sources {
    fn fetch(cache: &Path, all: &Path, name: &str, options: &str) -> Result<Self, SetupError> {
        let lock = Lock::take(cache)?;
        let provider = Provider::new(cache, &lock)?;
        let release = provider.release().map_err(|why| SetupError::NoKernelSource { why: why.into() })?;
        let archive = source_archive(&provider.root(&Step::kernel_source())?)?;
        let tools = provider.root(&Step::kernel_tools(release))?;
        remove_lists(cache)?;
        let place = all.join(format!("{name}-{}", hash_of(&recipe_of(&archive, options)?)));
        Ok(Self { archive, tools, place })
    }
}

/// The one archive in the unpacked source package.
fn source_archive(root: &Path) -> Result<PathBuf, SetupError> {
    let directory = root.join("usr/src");
    for entry in fs::read_dir(&directory).map_err(at(&directory))? {
        let path = entry.map_err(at(&directory))?.path();
        if path.to_string_lossy().ends_with(".tar.xz") {
            return Ok(path);
        }
    }
    Err(SetupError::Incomplete { what: "kernel source".into(), root: root.into() })
}

/// All that decides what a build gives. An archive of another version has another length or date.
fn recipe_of(source: &Path, options: &str) -> Result<String, SetupError> {
    let meta = fs::metadata(source).map_err(at(source))?;
    let date = meta.modified().map_err(at(source))?.duration_since(UNIX_EPOCH).unwrap_or_default();
    let compiler = output_of(Command::new(COMPILER).arg("--version"))?;
    let compiler = compiler.lines().next().unwrap_or_default();
    let name = source.file_name().unwrap_or_default().display();
    Ok(format!("{RECIPE} {name} {} {} {compiler}\n{options}", meta.len(), date.as_secs()))
}

/// Removes what was built of the same name with other options, source or compiler.
fn remove_others(all: &Path, name: &str, place: &Path) -> Result<(), SetupError> {
    for entry in fs::read_dir(all).map_err(at(all))? {
        let path = entry.map_err(at(all))?.path();
        let other = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path != place && other.rsplit_once('-').is_some_and(|(prefix, _)| prefix == name) {
            fs::remove_dir_all(&path).map_err(at(&path))?;
        }
    }
    Ok(())
}

/// A build under way. What an interrupted one has left is thrown away.
struct Build<'a> {
    directory: PathBuf,
    source: PathBuf,
    outcome: PathBuf,
    programs: PathBuf,
    tools: &'a Path,
    lock: &'a Lock,
}

impl<'a> Build<'a> {
    fn new(directory: &Path, tools: &'a Path, lock: &'a Lock) -> Result<Self, SetupError> {
        if directory.exists() {
            fs::remove_dir_all(directory).map_err(at(directory))?;
        }
        let part = |name: &str| -> Result<PathBuf, SetupError> {
            let path = directory.join(name);
            fs::create_dir_all(&path).map_err(at(&path))?;
            Ok(path)
        };
        let (source, outcome, programs) = (part("source")?, part("outcome")?, part("bin")?);
        for tool in TOOLS {
            wrap(tools, &format!("usr/bin/{tool}"), programs.join(tool))?;
        }
        Ok(Self { directory: directory.into(), source, outcome, programs, tools, lock })
    }

    fn run(&self, name: &str, archive: &Path, options: &str) -> Result<(), SetupError> {
        let start = Instant::now();
        eprintln!("setup: {name} kernel: unpacking its source");
        self.execute(
            self.command("tar")
                .args(["--extract", "--strip-components=1", "--use-compress-program=xz --threads=0", "--file"])
                .arg(archive),
        )?;
        eprintln!("setup: {name} kernel: it is built now, which takes some minutes");
        self.configure(options)?;
        let jobs = available_parallelism().map_or(1, usize::from);
        self.execute(self.make().arg(format!("--jobs={jobs}")).args(["vmlinux", "modules"]))?;
        let modules_path = format!("INSTALL_MOD_PATH={}", self.outcome.display());
        // Dependencies are read from the modules themselves, so nothing is lost without depmod.
        self.execute(self.make().arg(modules_path).args(["INSTALL_MOD_STRIP=1", "DEPMOD=true", "modules_install"]))?;
        self.keep(IMAGE, IMAGE)?;
        self.keep(".config", CONFIGURATION)?;
        eprintln!("setup: {name} kernel: built in {} s", start.elapsed().as_secs());
        Ok(())
    }

    /// Writes the configuration, and checks that it is what was wanted.
    fn configure(&self, options: &str) -> Result<(), SetupError> {
        let wanted = self.directory.join("options");
        fs::write(&wanted, options).map_err(at(&wanted))?;
        self.execute(self.make().arg(format!("KCONFIG_ALLCONFIG={}", wanted.display())).arg("allnoconfig"))?;
        let made = self.source.join(".config");
        let made = fs::read_to_string(&made).map_err(at(&made))?;
        let unmet = unmet(options, &made);
        if unmet.is_empty() { Ok(()) } else { Err(SetupError::KernelOptions { unmet: unmet.join(", ") }) }
    }

    fn keep(&self, from: &str, name: &str) -> Result<(), SetupError> {
        let to = self.outcome.join(name);
        fs::rename(self.source.join(from), &to).map_err(at(&to))
    }

    fn make(&self) -> Command {
        let usr = self.tools.join("usr");
        let libraries = usr.join("lib/x86_64-linux-gnu");
        let mut command = self.command("make");
        command
            .arg("--silent")
            .args([&format!("CC={COMPILER}"), &format!("HOSTCC={COMPILER}")])
            // objtool's one library; all other headers are the machine's.
            .arg(format!("LIBELF_FLAGS=-idirafter {}", usr.join("include").display()))
            .arg(format!("LIBELF_LIBS=-L{0} -Wl,-rpath,{0} -lelf", libraries.display()))
            .envs(IDENTITY)
            .env("BISON_PKGDATADIR", usr.join("share/bison"))
            .env("M4", self.programs.join("m4"));
        command
    }

    /// A command in the source's directory that finds the unpacked programs first, and nothing of this process's settings: make
    /// and the kernel's build take many variables as theirs.
    fn command(&self, program: &str) -> Command {
        let path = env::var_os("PATH").unwrap_or_default();
        let places = [self.programs.clone()].into_iter().chain(env::split_paths(&path));
        let mut command = Command::new(program);
        command
            .current_dir(&self.source)
            .env_clear()
            .env("LC_ALL", "C")
            .env("PATH", env::join_paths(places).unwrap_or(path));
        command
    }

    fn execute(&self, command: &mut Command) -> Result<(), SetupError> {
        output_with(command, self.lock.as_input().map_err(at(&self.directory))?).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finished_build_tells_its_release() {
        let place = tempfile::tempdir().unwrap();
        let modules = place.path().join("lib/modules/6.0.0-vvu-test");
        fs::create_dir_all(&modules).unwrap();
        let built = BuiltKernel::in_directory(place.path()).unwrap();
        assert_eq!(
            built,
            BuiltKernel { image: place.path().join("vmlinux"), modules, release: "6.0.0-vvu-test".into() }
        );
        let empty = tempfile::tempdir().unwrap();
        assert!(BuiltKernel::in_directory(empty.path()).is_err());
    }

    #[test]
    fn other_options_and_another_source_are_another_recipe() {
        let place = tempfile::tempdir().unwrap();
        let source = place.path().join("linux-source-6.0.tar.xz");
        fs::write(&source, "one").unwrap();
        let first = recipe_of(&source, "CONFIG_SMP=y").unwrap();
        assert_eq!(recipe_of(&source, "CONFIG_SMP=y").unwrap(), first);
        assert_ne!(recipe_of(&source, "CONFIG_SMP=n").unwrap(), first);
        fs::write(&source, "another").unwrap();
        assert_ne!(recipe_of(&source, "CONFIG_SMP=y").unwrap(), first);
    }

    #[test]
    fn the_source_is_the_archive_of_its_package() {
        let root = tempfile::tempdir().unwrap();
        let sources = root.path().join("usr/src");
        fs::create_dir_all(&sources).unwrap();
        fs::write(sources.join("linux-patch-6.0-rt.patch.xz"), "").unwrap();
        assert!(matches!(source_archive(root.path()), Err(SetupError::Incomplete { .. })));
        fs::write(sources.join("linux-source-6.0.tar.xz"), "").unwrap();
        assert_eq!(source_archive(root.path()).unwrap(), sources.join("linux-source-6.0.tar.xz"));
    }

    #[test]
    fn a_new_build_replaces_those_of_its_name_alone() {
        let all = tempfile::tempdir().unwrap();
        for name in ["minimal-00000001", "minimal-00000002", "other-00000001", "new"] {
            fs::create_dir(all.path().join(name)).unwrap();
        }
        remove_others(all.path(), "minimal", &all.path().join("minimal-00000002")).unwrap();
        let left = |name: &str| all.path().join(name).exists();
        assert!(!left("minimal-00000001"));
        assert!(left("minimal-00000002") && left("other-00000001") && left("new"));
    }
}
