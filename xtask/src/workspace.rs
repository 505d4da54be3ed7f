//! Where the workspace is, and how cargo is called in it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

/// Programs that demo, tests and benchmark start on the host.
const PROGRAM_PACKAGES: [&str; 4] = ["vvu", "vvu-bridge", "vvu-blk", "vvu-net"];

/// Programs that only figures need.
const BENCH_PACKAGES: [&str; 2] = ["vvu-bench", "vvu-loopback"];

/// A profile of the workspace's `Cargo.toml`, for what runs on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    /// As this program itself was built.
    Dev,
    /// For figures.
    Release,
}

/// The workspace and its target directory.
#[derive(Debug)]
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    pub(crate) target: PathBuf,
}

impl Workspace {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let own = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = own.parent().context("xtask is in no workspace")?.to_owned();
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(directory) => std::path::absolute(directory)?,
            None => root.join("target"),
        };
        Ok(Self { root, target })
    }

    /// The cargo that started this program, or the one on `PATH`, in the workspace.
    pub(crate) fn cargo(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(&self.root).args(arguments);
        command
    }

    /// Builds what is started on the host.
    pub(crate) fn build_programs(&self, profile: Profile) -> anyhow::Result<()> {
        let mut command = self.cargo(&["build"]);
        let mut packages = PROGRAM_PACKAGES.to_vec();
        if profile == Profile::Release {
            command.arg("--release");
            packages.extend(BENCH_PACKAGES);
        }
        for package in packages {
            command.args(["--package", package]);
        }
        run(&mut command)
    }
}

/// Runs a command whose output a person sees as it comes.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("cannot start {program}"))?;
    if status.success() {
        return Ok(());
    }
    let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
    bail!("{program} {} failed ({status})", arguments.join(" "))
}
