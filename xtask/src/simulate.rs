//! The simulation of bridge and agent: the test of the package `vvu-simulation`, built so that a seed says everything.

use std::process::Command;

use crate::cli::Simulate;
use crate::workspace::Workspace;

const PACKAGE: &str = "vvu-simulation";

/// The command that plays schedules: as many as `options` say, else as many as fit into a minute.
///
/// Tokio's scheduler takes a seed only with a `cfg` that the rest of the workspace is not built with, and thousands of
/// schedules are worth some optimisation. So it has a target directory of its own.
pub(crate) fn command(workspace: &Workspace, options: Option<&Simulate>) -> Command {
    let mut command = workspace.cargo(&["test", "--package", PACKAGE]);
    command.env("CARGO_TARGET_DIR", workspace.target.join("simulation"));
    command.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1");
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    command.env("RUSTFLAGS", format!("{flags} --cfg tokio_unstable"));
    if let Some(Simulate { schedules, seed }) = options {
        command.env("VVU_SIMULATION_SCHEDULES", schedules.to_string());
        command.env("VVU_SIMULATION_SEED", seed.to_string());
        command.args(["--test", "simulation", "random_schedules", "--", "--nocapture"]);
    }
    command
}
