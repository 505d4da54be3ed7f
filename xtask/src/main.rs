//! `cargo xtask`: the commands of a developer. Each does what it needs first: `demo` on a fresh clone makes the set-up,
//! builds the image and the programs, and then plays the demo.
//!
//! It holds no recipe itself: the set-up is `vvu-setup`, the image `vvu-guest-image`, demo and benchmark `vvu-tests`.

mod bench;
mod capacity;
mod cli;
mod dependencies;
mod image;
mod instructions;
mod report;
mod simulate;
mod test;
mod workspace;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::process::ExitCode;

use clap::Parser;
use vvu_guest_image::KernelFlavour;
use vvu_tests::demo::{self, DemoOptions};
use vvu_tests::soak::{self, SoakOptions};

use crate::cli::{Cli, Command};
use crate::workspace::{Profile, Workspace};

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a command; `false` if it has said itself what failed.
fn run(command: Command) -> anyhow::Result<bool> {
    let workspace = Workspace::new()?;
    match command {
        Command::Setup(options) => {
            vvu_setup::run(&options.into())?;
        }
        Command::Image(options) => {
            println!("{}", image::build(&workspace, options.kernel.into())?.manifest);
        }
        Command::Overlay { program, directory } => image::build_overlay(program.into(), &directory)?,
        Command::Demo { keep_image } => {
            image::build(&workspace, KernelFlavour::Stock)?;
            workspace.build_programs(Profile::Dev)?;
            demo::run(&DemoOptions { keep_image })?;
        }
        Command::Simulate(options) => workspace::run(&mut simulate::command(&workspace, Some(&options)))?,
        Command::Test(options) => return test::run(&workspace, &options),
        Command::Bench(options) => bench::run(&workspace, &options)?,
        Command::Capacity(options) => capacity::run(&workspace, &options)?,
        Command::Soak(options) => {
            image::build(&workspace, KernelFlavour::Stock)?;
            workspace.build_programs(Profile::Dev)?;
            // Any number will do if only it is printed, which the soak does.
            let seed = options.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
            soak::run(&SoakOptions { iterations: options.iterations, seed, json: options.json })?;
        }
    }
    Ok(true)
}
