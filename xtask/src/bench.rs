//! The benchmark, with host programs that are built for speed.

use std::env;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use vvu_guest_image::KernelFlavour;
use vvu_tests::backend::Backend;
use vvu_tests::bench::network::{self, NetworkOptions};
use vvu_tests::bench::{self, BenchOptions, Runs, back_ends, boot, bridge, devices, memory, packets, paths};
use vvu_tests::pauses::{self, PausesOptions};

use crate::cli::{Bench, Figure, Measured};
use crate::workspace::{Profile, Workspace, run as run_command};
use crate::{image, instructions};

/// Tell the benchmark which image and which programs to start (`vvu_tests::testbed::workspace_program`).
const APPLIANCE_VARIABLE: &str = "VVU_APPLIANCE";
const VVU_VARIABLE: &str = "VVU_BIN";
const VVU_BENCH_VARIABLE: &str = "VVU_BENCH_BIN";
const VVU_BLK_VARIABLE: &str = "VVU_BLK_BIN";
const VVU_BRIDGE_VARIABLE: &str = "VVU_BRIDGE_BIN";
const VVU_LOOPBACK_VARIABLE: &str = "VVU_LOOPBACK_BIN";
const VVU_NET_VARIABLE: &str = "VVU_NET_BIN";

/// Rounds unless the command line says otherwise.
const ROUNDS: u32 = 3;
const PAUSES_ROUNDS: u32 = 10;

/// Length of a run in a driver VM unless the command line says otherwise, and of one of vvu-bench.
const RUNTIME: Duration = Duration::from_secs(4);
const LOAD_RUNTIME: Duration = Duration::from_millis(500);

/// Runs the benchmark on the programs that the environment names, else on release builds.
pub(crate) fn run(workspace: &Workspace, options: &Bench) -> anyhow::Result<()> {
    let flavour = options.kernel.map(KernelFlavour::from);
    let own = || env::current_exe().context("cannot find this executable");
    if env::var_os(VVU_VARIABLE).is_none() && options.figure.needs_programs() {
        if options.figure.needs_image() {
            // Driver VMs boot the stock one's kernel.
            image::build(workspace, KernelFlavour::Stock)?;
            if let Some(flavour) = flavour {
                image::build(workspace, flavour)?;
            }
        }
        workspace.build_programs(Profile::Release)?;
        let release = workspace.target.join("release");
        // The programs are named by the environment, which a process should not change for itself.
        let mut again = Command::new(own()?);
        if let Some(flavour) = flavour {
            again.env(APPLIANCE_VARIABLE, workspace.target.join(flavour.directory()));
        }
        return run_command(
            again
                .args(env::args_os().skip(1))
                .env(VVU_VARIABLE, release.join("vvu"))
                .env(VVU_BENCH_VARIABLE, release.join("vvu-bench"))
                .env(VVU_BLK_VARIABLE, release.join("vvu-blk"))
                .env(VVU_BRIDGE_VARIABLE, release.join("vvu-bridge"))
                .env(VVU_LOOPBACK_VARIABLE, release.join("vvu-loopback"))
                .env(VVU_NET_VARIABLE, release.join("vvu-net")),
        );
    }
    let rounds = options.rounds.unwrap_or(ROUNDS);
    let runtime = options.runtime.unwrap_or(RUNTIME);
    if matches!(options.figure, Figure::Disk | Figure::Net) && runtime.subsec_nanos() != 0 {
        bail!("fio and iperf3 run for whole seconds: give --runtime without a fraction");
    }
    let runs = Runs { rounds, runtime: options.runtime.unwrap_or(LOAD_RUNTIME) };
    match options.figure {
        Figure::Net if !network::is_in_a_namespace() => {
            run_command(&mut network::in_a_namespace(own()?.as_os_str(), env::args_os().skip(1))?)
        }
        Figure::Net => network::run(&NetworkOptions { rounds, runtime, json: options.json }),
        Figure::Functions => {
            run_command(&mut workspace.cargo(&["bench", "--package", "vvu-bench", "--bench", "functions"]))
        }
        Figure::Instructions => instructions::bench(workspace, options),
        Figure::Backend => back_ends::run(runs),
        Figure::Loopback => paths::loopback(runs),
        Figure::Appliance => paths::appliance(runs),
        Figure::Bridge => bridge::run(runs),
        Figure::Packets => packets::run(runs),
        Figure::Memory => memory::run(options.json),
        Figure::Boot => boot::run(rounds, options.json),
        Figure::Devices => devices::run(),
        Figure::Pauses => {
            pauses::run(&PausesOptions { rounds: options.rounds.unwrap_or(PAUSES_ROUNDS), json: options.json })
        }
        Figure::Disk => bench::run(&BenchOptions {
            rounds,
            runtime,
            image_len: options.image_size << 20,
            measured: match options.measured {
                Measured::Vvu => Backend::Vvu,
                Measured::VvuBlk => Backend::VvuBlkOnHost,
            },
            json: options.json,
        }),
    }
}
