//! The benchmark, with host programs that are built for speed.

use std::env;
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use vvu_tests::backend::Backend;
use vvu_tests::bench::network::{self, NetworkOptions};
use vvu_tests::bench::{self, BenchOptions, memory};
use vvu_tests::pauses::{self, PausesOptions};

use crate::cli::{Bench, Figure, Measured};
use crate::{image, instructions};
use crate::workspace::{Profile, Workspace, run as run_command};

/// Tell the benchmark which programs to start (`vvu_tests::testbed::workspace_program`).
const VVU_VARIABLE: &str = "VVU_BIN";
const VVU_BLK_VARIABLE: &str = "VVU_BLK_BIN";
const VVU_NET_VARIABLE: &str = "VVU_NET_BIN";

/// Rounds unless the command line says otherwise.
const ROUNDS: u32 = 3;
const PAUSES_ROUNDS: u32 = 10;

/// Runs the benchmark on the programs that the environment names, else on release builds.
pub(crate) fn run(workspace: &Workspace, options: &Bench) -> anyhow::Result<()> {
    let own = || env::current_exe().context("cannot find this executable");
    if env::var_os(VVU_VARIABLE).is_none() && options.figure != Figure::Instructions {
        image::build(workspace)?;
        workspace.build_programs(Profile::Release)?;
        let release = workspace.target.join("release");
        // The programs are named by the environment, which a process should not change for itself.
        return run_command(
            Command::new(own()?)
                .args(env::args_os().skip(1))
                .env(VVU_VARIABLE, release.join("vvu"))
                .env(VVU_BLK_VARIABLE, release.join("vvu-blk"))
                .env(VVU_NET_VARIABLE, release.join("vvu-net")),
        );
    }
    match options.figure {
        Figure::Net if !network::is_in_a_namespace() => {
            run_command(&mut network::in_a_namespace(own()?.as_os_str(), env::args_os().skip(1))?)
        }
        Figure::Net => network::run(&NetworkOptions {
            rounds: options.rounds.unwrap_or(ROUNDS),
            runtime: Duration::from_secs(options.runtime),
            json: options.json,
        }),
        Figure::Instructions => instructions::bench(workspace, options),
        Figure::Memory => memory::run(options.json),
        Figure::Pauses => {
            pauses::run(&PausesOptions { rounds: options.rounds.unwrap_or(PAUSES_ROUNDS), json: options.json })
        }
        Figure::Disk => bench::run(&BenchOptions {
            rounds: options.rounds.unwrap_or(ROUNDS),
            runtime: Duration::from_secs(options.runtime),
            image_len: options.image_size << 20,
            measured: match options.measured {
                Measured::Vvu => Backend::Vvu,
                Measured::VvuBlk => Backend::VvuBlkOnHost,
            },
            json: options.json,
        }),
    }
}
