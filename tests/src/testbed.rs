//! One test's place: its turn on the machine, its folder of logs, its sockets, and the set-up.

use std::fs::{self, File};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{env, io};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;
use vvu_setup::Setup;

use crate::driver_image::DriverImage;
use crate::process::last_lines;
use crate::vvu_run::appliance_dir;

/// Lines of each log that a failing test prints.
const PRINTED_LINES: usize = 40;

/// Who else may run machines on this checkout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Others that share: they make each other slow, and nothing else.
    Shared,
    /// Nobody: what is measured depends on it.
    Alone,
}

impl Turn {
    /// Waits for the turn. Whoever waits keeps those behind it from overtaking: else it would wait until no test is left.
    fn take(self, directory: &Path) -> Result<File> {
        let open = |name: &str| {
            let path = directory.join(name);
            File::create(&path).with_context(|| format!("cannot make {}", path.display()))
        };
        let (next, turn) = (open("next.lock")?, open("turn.lock")?);
        next.lock().context("cannot wait to be the next on the machine")?;
        let taken = match self {
            Self::Shared => turn.lock_shared(),
            Self::Alone => turn.lock(),
        };
        taken.context("cannot wait for a turn on the machine")?;
        Ok(turn)
    }
}

/// The place of one test, demo or bench run.
#[derive(Debug)]
pub struct Testbed {
    folder: PathBuf,
    sockets: TempDir,
    setup: Setup,
    appliance: PathBuf,
    /// Holds the lock.
    _turn: File,
}

impl Testbed {
    /// Waits for its turn, then makes an empty folder `target/machine-tests/<name>`.
    ///
    /// # Errors
    /// If there is no set-up (the text says which command makes one) or the file system refuses.
    pub fn open(name: &str, turn: Turn) -> Result<Self> {
        let setup = Setup::load()?;
        let root = target_dir()?.join("machine-tests");
        fs::create_dir_all(&root).with_context(|| format!("cannot make {}", root.display()))?;
        let turn = turn.take(&root)?;
        let folder = root.join(name);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot empty {}", folder.display()));
            }
            _ => fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?,
        }
        // A socket's path has at most 107 bytes; the folder of logs may be deeper than that.
        let sockets =
            tempfile::Builder::new().prefix("vvu-").tempdir().context("cannot make a directory of sockets")?;
        Ok(Self { folder, sockets, setup, appliance: appliance_dir()?, _turn: turn })
    }

    /// Where logs and images go.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A path for a socket, short enough for any test's name.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.sockets.path().join(name)
    }

    /// A private directory that stands for `$XDG_RUNTIME_DIR`: what is left in it after a run was forgotten.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn runtime_dir(&self) -> Result<PathBuf> {
        let path = self.sockets.path().join("run");
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(error).with_context(|| format!("cannot make {}", path.display()))
            }
            _ => Ok(path),
        }
    }

    /// The set-up: QEMU, kernel and programs.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// The appliance image of its runs.
    pub(crate) fn appliance(&self) -> &Path {
        &self.appliance
    }

    /// A driver VM's initramfs, which is built when it is first asked for.
    ///
    /// # Errors
    /// If a program is missing or cannot be fetched.
    pub fn driver_image(&self, kind: DriverImage) -> Result<PathBuf> {
        kind.built(&self.setup, &target_dir()?.join("machine-tests"))
    }

    /// Prints the last lines of every log in the folder.
    pub(crate) fn print_logs(&self) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        let mut logs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        logs.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
        logs.sort();
        let mut stderr = io::stderr().lock();
        for log in logs {
            let text = last_lines(&log, PRINTED_LINES).unwrap_or_else(|error| format!("{error:#}"));
            // Nothing to do about a standard error that is closed.
            let _ = writeln!(stderr, "\n--- {} (last {PRINTED_LINES} lines)\n{text}", log.display());
        }
    }

    /// Images are large and say nothing about a test that held.
    pub(crate) fn remove_images(&self) -> Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "img") {
                fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(())
    }
}

/// Runs one whole-machine test, beside others. If it fails or panics, the last lines of all its logs are printed and its
/// images stay.
///
/// # Errors
/// What the test returns, and what [`Testbed::open`] says.
pub fn machine_test(name: &str, story: impl FnOnce(&Testbed) -> Result<()>) -> Result<()> {
    machine_test_in(Testbed::open(name, Turn::Shared)?, name, story)
}

/// The same with the appliance image in this directory.
///
/// # Errors
/// As [`machine_test`].
pub fn machine_test_of(appliance: PathBuf, name: &str, story: impl FnOnce(&Testbed) -> Result<()>) -> Result<()> {
    machine_test_in(Testbed { appliance, ..Testbed::open(name, Turn::Shared)? }, name, story)
}

/// The same for a test whose verdict depends on how busy the machine is: no other one runs.
///
/// # Errors
/// As [`machine_test`].
pub fn machine_test_alone(name: &str, story: impl FnOnce(&Testbed) -> Result<()>) -> Result<()> {
    machine_test_in(Testbed::open(name, Turn::Alone)?, name, story)
}

fn machine_test_in(testbed: Testbed, name: &str, story: impl FnOnce(&Testbed) -> Result<()>) -> Result<()> {
    let start = Instant::now();
    match catch_unwind(AssertUnwindSafe(|| story(&testbed))) {
        Ok(Ok(())) => {
            testbed.remove_images()?;
            let held = format!("held in {:.1} s\n", start.elapsed().as_secs_f64());
            fs::write(testbed.folder().join("verdict.txt"), held).context("cannot write the verdict")
        }
        Ok(Err(error)) => {
            testbed.print_logs();
            Err(error.context(format!("{name} failed; its logs are in {}", testbed.folder().display())))
        }
        Err(panic) => {
            testbed.print_logs();
            resume_unwind(panic)
        }
    }
}

/// Cargo's target directory, found from this executable (`target/<profile>/…`): the nearest one that cargo has marked.
///
/// # Errors
/// If this executable was moved out of the target directory.
pub fn target_dir() -> Result<PathBuf> {
    let executable = env::current_exe().context("cannot find this executable")?;
    match executable.ancestors().find(|ancestor| ancestor.join("CACHEDIR.TAG").exists()) {
        Some(target) => Ok(target.to_owned()),
        None => bail!("{} is not in cargo's target directory", executable.display()),
    }
}

/// A program of this workspace: `$<variable>` if set, else next to this executable (or one directory up from a test).
///
/// # Errors
/// If it has not been built.
pub fn workspace_program(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = env::var_os(variable) {
        return Ok(path.into());
    }
    let executable = env::current_exe().context("cannot find this executable")?;
    let candidates = executable.ancestors().skip(1).take(2).map(|directory| directory.join(name));
    candidates
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not built: run `cargo build -p {name}` or set {variable}"))
}
