//! `vvu-net`: see the library's text and `--help`.

use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser, error::ErrorKind};
use tracing_subscriber::EnvFilter;
use vvu_net::cli::{CAPABILITIES, Cli};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.print_capabilities {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    let options = match cli.into_options() {
        Ok(options) => options,
        Err(message) => Cli::command().error(ErrorKind::WrongNumberOfValues, message).exit(),
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    match vvu_net::daemon::run(options).context("vvu-net") {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
