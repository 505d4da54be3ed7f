//! `vvu-bridge`: parses, runs, and turns an error into one line and an exit code.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing_subscriber::EnvFilter;
use vvu_bridge::bridge;
use vvu_bridge::cli::Options;
use vvu_bridge::log_limit::LimitedStderr;

fn main() -> ExitCode {
    let options = Options::parse();
    raise_descriptor_limit();
    if options.print_capabilities {
        let capabilities = serde_json::json!({ "type": options.class.capability_type(), "features": [] });
        return exit_code(writeln!(io::stdout(), "{capabilities:#}").map_err(Into::into));
    }
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(LimitedStderr::default()).with_ansi(false).init();
    exit_code(bridge::run(options))
}

/// 509 memory regions and the eventfds of 64 queues are more descriptors than the usual soft limit allows. Where the hard limit
/// is no higher, whoever set it meant it.
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing can be done about a standard error that is closed.
            let _ = writeln!(io::stderr(), "vvu-bridge: {error:#}");
            ExitCode::FAILURE
        }
    }
}
