//! `vvu`: the operator's command.
//!
//! It serves virtio devices from an appliance VM (`vvu run`), acts on a device that runs (`vvu status`, `upgrade`,
//! `restart`, `resize`, `limit` and others) and tells whether a host can serve one (`vvu check`). Operators and service
//! managers use it; so does the project's demo, as everybody else would.
//!
//! What it never does: it touches no driver VM memory, speaks no vhost-user, parses no disk image beyond the first bytes
//! that tell format and size, and decides nothing about the device: that is the bridge's and the appliance's.
//!
//! This file parses, runs, and turns the end into one line and an exit code: 0 for a run that a signal ended or a host
//! that can serve, 1 for everything else, 2 for arguments that do not parse.

mod accel;
mod channel_links;
mod check;
mod children;
mod cli;
mod control;
mod control_socket;
mod ending;
mod events;
mod fleet;
mod host_checks;
mod image;
mod image_lock;
mod inherit;
mod live;
mod live_counters;
mod log_files;
mod log_follow;
mod mac;
mod manifest;
mod net_options;
mod notify;
mod ofd_lock;
mod operator;
mod output;
mod overlay;
mod parent_death;
mod plan;
mod probe;
mod programs;
mod qemu_args;
mod qmp;
mod resize;
mod restart_policy;
mod run;
mod runtime_dir;
mod signals;
mod size;
mod socket_path;
mod supervisor;
mod vmm_lines;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Runtime;

use crate::cli::{Cli, Command, Device, MachineArgs};
use crate::ending::Ending;
use crate::log_files::LogFiles;
use crate::output::Output;
use crate::plan::Draft;

fn main() -> ExitCode {
    let started = Instant::now();
    let result = match Cli::parse().command {
        Command::Run(Device::Blk(args)) => run(|| Draft::blk(&args), &args.machine, started),
        Command::Run(Device::Net(args)) => run(|| Draft::net(&args), &args.machine, started),
        Command::Run(Device::Switch(args)) => run(|| Draft::switch(&args), &args.machine, started),
        Command::Run(Device::Exec(args)) => run(|| Draft::exec(&args), &args.machine, started),
        Command::Status(args) => runtime().and_then(|runtime| runtime.block_on(operator::status(&args.run))),
        Command::Upgrade(args) => runtime().and_then(|runtime| runtime.block_on(operator::upgrade(&args))),
        Command::Restart(args) => runtime().and_then(|runtime| runtime.block_on(operator::restart(&args.run))),
        Command::Resize(args) => runtime().and_then(|runtime| runtime.block_on(operator::resize(&args))),
        Command::Limit(args) => runtime().and_then(|runtime| runtime.block_on(operator::limit(&args))),
        Command::Link(args) => runtime().and_then(|runtime| runtime.block_on(operator::link(&args))),
        Command::Filter(args) => runtime().and_then(|runtime| runtime.block_on(operator::filter(&args))),
        Command::Check(args) => runtime().and_then(|runtime| runtime.block_on(check::check(&args))),
    };
    result.unwrap_or_else(|error| {
        eprintln!("vvu: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(
    draft: impl FnOnce() -> anyhow::Result<Draft>,
    args: &MachineArgs,
    started: Instant,
) -> anyhow::Result<ExitCode> {
    let files = args.log_dir.as_deref().map(|directory| LogFiles::open(directory, started)).transpose();
    let (files, fault) = match files {
        Ok(files) => (files, None),
        Err(error) => (None, Some(error)),
    };
    raise_descriptor_limit();
    let (output, writer) = Output::start(args.json, files)?;
    let runtime = runtime()?;
    let ending = match fault {
        Some(error) => Ending::refused(&error),
        None => runtime.block_on(run::run(draft, args, &output, started)),
    };
    let exit_code = ExitCode::from(ending.exit_code());
    output.event(&ending.into_event());
    // The writer ends when the last output is gone; the runtime's tasks hold some.
    drop(output);
    drop(runtime);
    writer.finish();
    Ok(exit_code)
}

/// Children inherit it: a VMM is given an eventfd for each start of each queue of each port, far more than the usual soft
/// limit allows. Where the hard limit is no higher, whoever set it meant it.
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// One thread: children are bound to the thread that spawns them (see `parent_death`), and there is little to do.
fn runtime() -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the event loop")
}
