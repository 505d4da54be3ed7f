//! Programs that no package has: built here out of the crate registry, once, and kept in the cache.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::command::output_with;
use crate::error::at;
use crate::run::Lock;
use crate::{SetupError, cache_root};

/// Names the target, so that flags do not reach build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Static: what runs it in a VM needs no libraries.
const FLAGS: &str = "-C target-feature=+crt-static";

/// A program of the crate registry, at one version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegistryProgram {
    /// Random file operations, each of which is checked.
    Fsx,
    /// What POSIX says about file systems, call by call.
    Pjdfstest,
    /// A device that gives random bytes.
    VhostDeviceRng,
}

impl RegistryProgram {
    /// The program's file name, which is the crate's name too.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.crate_and_version().0
    }

    const fn crate_and_version(self) -> (&'static str, &'static str) {
        match self {
            Self::Fsx => ("fsx", "0.3.2"),
            Self::Pjdfstest => ("pjdfstest", "0.2.2"),
            Self::VhostDeviceRng => ("vhost-device-rng", "0.1.0"),
        }
    }

    /// The root directory that has the program in `bin`, static and with the dependencies of its own lock file. It is built
    /// now if it is not there: without optimisation, which takes a quarter of the time and is enough for tests.
    ///
    /// # Errors
    /// Any [`SetupError`]; [`SetupError::Failed`] has what cargo says.
    pub fn root(self) -> Result<PathBuf, SetupError> {
        let cache = cache_root()?;
        let (name, version) = self.crate_and_version();
        let all = cache.join("crates");
        fs::create_dir_all(&all).map_err(at(&all))?;
        let lock = Lock::take(&cache)?;
        let root = all.join(format!("{name}-{version}"));
        if root.exists() {
            return Ok(root);
        }
        eprintln!("setup: {name} {version} from the crate registry: it is built now");
        // What an interrupted build has left is of use to the next one.
        let (fresh, build) = (all.join("new"), all.join("build"));
        if fresh.exists() {
            fs::remove_dir_all(&fresh).map_err(at(&fresh))?;
        }
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command
            // Not in a workspace, whose configuration is for its own programs.
            .current_dir(&all)
            .args([
                "install",
                "--quiet",
                "--locked",
                "--debug",
                "--target",
                TARGET,
                "--version",
                &format!("={version}"),
            ])
            .arg("--root")
            .arg(&fresh)
            .arg("--target-dir")
            .arg(&build)
            .arg(name)
            .env("RUSTFLAGS", FLAGS)
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .env("CARGO_PROFILE_DEV_STRIP", "symbols")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env_remove("CARGO_TARGET_DIR");
        output_with(&mut command, lock.as_input().map_err(at(&cache))?)?;
        fs::remove_dir_all(&build).map_err(at(&build))?;
        fs::rename(&fresh, &root).map_err(at(&root))?;
        Ok(root)
    }
}
