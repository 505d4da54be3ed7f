//! `vvu-net`: see the library's text and `--help`.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, error::ErrorKind};
use vvu_back_end::program;
use vvu_net::cli::{CAPABILITIES, Cli};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.print_capabilities {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    match cli.into_options() {
        Ok(options) => program::run("vvu-net", || vvu_net::daemon::run(options)),
        Err(message) => Cli::command().error(ErrorKind::WrongNumberOfValues, message).exit(),
    }
}
