//! `vvu-blk`: see the library's text and `--help`.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, error::ErrorKind};
use vvu_back_end::program;
use vvu_blk::cli::{CAPABILITIES, Cli};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.print_capabilities {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    match cli.into_options() {
        Ok(options) => program::run("vvu-blk", || vvu_blk::daemon::run(&options)),
        Err(message) => Cli::command().error(ErrorKind::MissingRequiredArgument, message).exit(),
    }
}
