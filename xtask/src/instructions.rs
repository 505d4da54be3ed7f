//! Instructions per request of the back-ends: builds what is measured, and starts `vvu-instructions`, which measures it.

use std::path::Path;
use std::process::Command;

use vvu_guest_image::{build_back_ends_with_symbols, static_program};

use crate::cli::Bench;
use crate::workspace::{Workspace, run as run_command};

/// The figures that are compared with, below the workspace.
const BASELINE: &str = "appliance/instructions/baseline.json";

/// Functions of each scenario in the table.
const FUNCTIONS: &str = "12";

/// Compares the back-ends of the appliance image, which has to be built, with the baseline.
pub(crate) fn check(workspace: &Workspace) -> anyhow::Result<()> {
    let [blk, net] = ["vvu-blk", "vvu-net"].map(|name| static_program(&workspace.target, name));
    run_command(&mut command(workspace, &blk, &net)?)
}

/// Prints all figures and where the instructions go, and makes them the baseline if that is wanted. The programs are those of
/// the image, built once more with the names of their functions.
pub(crate) fn bench(workspace: &Workspace, options: &Bench) -> anyhow::Result<()> {
    let [blk, net] = build_back_ends_with_symbols(&workspace.root, &workspace.target)?;
    let mut command = command(workspace, &blk, &net)?;
    command.args(["--functions", FUNCTIONS]);
    let flags = [("--accept", options.accept), ("--json", options.json)];
    run_command(command.args(flags.into_iter().filter_map(|(flag, set)| set.then_some(flag))))
}

fn command(workspace: &Workspace, blk: &Path, net: &Path) -> anyhow::Result<Command> {
    let directory = workspace.target.join("tmp");
    std::fs::create_dir_all(&directory)?;
    let mut command = workspace.cargo(&["run", "--quiet", "--package", "vvu-instructions", "--"]);
    command.arg("--blk").arg(blk).arg("--net").arg(net).arg("--directory").arg(directory);
    command.arg("--baseline").arg(workspace.root.join(BASELINE));
    Ok(command)
}
