//! Builds the programs that run in VMs: static, small, and without a path of the building machine.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::ImageError;
use crate::error::at;

/// Target of the static programs; naming it keeps flags away from build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Profile in the workspace's `Cargo.toml`.
const PROFILE: &str = "appliance";
/// Where they are built, below the target directory.
const BUILD_DIRECTORY: &str = "appliance-build";
/// Where they are built with symbols, below the target directory.
const SYMBOLS_DIRECTORY: &str = "appliance-symbols";
/// Separates flags in `CARGO_ENCODED_RUSTFLAGS` (Cargo reference, "Environment variables").
const FLAG_SEPARATOR: &str = "\u{1f}";

/// The appliance's own programs.
#[derive(Clone, Debug)]
pub struct ApplianceBinaries {
    /// PID 1 of the appliance.
    pub agent: PathBuf,
    /// The block back-end.
    pub blk: PathBuf,
    /// The network back-end.
    pub net: PathBuf,
}

/// Builds the appliance's programs of a workspace, in `appliance-build` below the given target directory.
///
/// # Errors
/// [`ImageError::Cargo`] and [`ImageError::Build`]; cargo itself says why on standard error.
pub fn build_appliance_binaries(workspace: &Path, target: &Path) -> Result<ApplianceBinaries, ImageError> {
    build_static(workspace, target, &["vvu-agent", "vvu-blk", "vvu-net"])?;
    let [agent, blk, net] = ["vvu-agent", "vvu-blk", "vvu-net"].map(|name| static_program(target, name));
    Ok(ApplianceBinaries { agent, blk, net })
}

/// Builds the programs that only the driver VM of the tests has, in the same place: see [`static_program`].
///
/// # Errors
/// [`ImageError::Cargo`] and [`ImageError::Build`]; cargo itself says why on standard error.
pub fn build_driver_binaries(workspace: &Path, target: &Path) -> Result<(), ImageError> {
    build_static(workspace, target, &["vvu-witness", "vvu-station"])
}

/// Builds the back-ends as [`build_appliance_binaries`] does, but with names and lines in them, in a directory of their own:
/// the block back-end and the network back-end. The instructions are the same.
///
/// # Errors
/// [`ImageError::Cargo`] and [`ImageError::Build`]; cargo itself says why on standard error.
pub fn build_back_ends_with_symbols(workspace: &Path, target: &Path) -> Result<[PathBuf; 2], ImageError> {
    let names = ["vvu-blk", "vvu-net"];
    let symbols = [("CARGO_PROFILE_APPLIANCE_STRIP", "none"), ("CARGO_PROFILE_APPLIANCE_DEBUG", "line-tables-only")];
    build(workspace, &target.join(SYMBOLS_DIRECTORY), &names, &symbols)?;
    Ok(names.map(|name| target.join(SYMBOLS_DIRECTORY).join(TARGET).join(PROFILE).join(name)))
}

/// Where a program that was built for a VM is, in the given target directory.
pub fn static_program(target: &Path, name: &str) -> PathBuf {
    target.join(BUILD_DIRECTORY).join(TARGET).join(PROFILE).join(name)
}

fn build_static(workspace: &Path, target: &Path, packages: &[&str]) -> Result<(), ImageError> {
    build(workspace, &target.join(BUILD_DIRECTORY), packages, &[])
}

/// Builds with these settings of cargo instead of the profile's own.
fn build(workspace: &Path, directory: &Path, packages: &[&str], settings: &[(&str, &str)]) -> Result<(), ImageError> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let flags = [vec!["-C".into(), "target-feature=+crt-static".into()], remapped_paths(workspace)?].concat();
    let status = Command::new(cargo)
        .current_dir(workspace)
        .args(["build", "--profile", PROFILE, "--target", TARGET])
        .args(packages.iter().flat_map(|package| ["--package", package]))
        .arg("--target-dir")
        .arg(directory)
        .envs(settings.iter().copied())
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join(FLAG_SEPARATOR))
        // Flags of this process's own build would be added to ours.
        .env_remove("RUSTFLAGS")
        .stdin(Stdio::null())
        .status()
        .map_err(ImageError::Cargo)?;
    if status.success() { Ok(()) } else { Err(ImageError::Build) }
}

/// Options that keep this machine's paths out of panic messages.
fn remapped_paths(workspace: &Path) -> Result<Vec<String>, ImageError> {
    let workspace = workspace.canonicalize().map_err(at(workspace))?;
    let home = env::var_os("HOME").unwrap_or_default();
    let below_home = |variable: &str, name: &str| -> OsString {
        env::var_os(variable).unwrap_or_else(|| Path::new(&home).join(name).into())
    };
    let (cargo, rustup) = (below_home("CARGO_HOME", ".cargo"), below_home("RUSTUP_HOME", ".rustup"));
    let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    Ok(vec![remap(Path::new(&rustup), "/rustup"), remap(Path::new(&cargo), "/cargo"), remap(&workspace, "/vvu")])
}
