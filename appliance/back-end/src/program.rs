//! What a back-end program does around its own work.

use std::error::Error;
use std::panic::set_hook;
use std::process::{ExitCode, abort};

use tracing_subscriber::EnvFilter;

use crate::in_one_line::in_one_line;

/// Runs the work of the program `name`: with a log on standard error, which `RUST_LOG` filters, and with one line if the work
/// cannot be done.
///
/// A panic ends the whole program, whatever the profile that it was built with says: nobody would notice that a thread is
/// missing, but whoever has started the program notices its end and starts it again.
pub fn run<E: Error>(name: &str, work: impl FnOnce() -> Result<(), E>) -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    set_hook(Box::new(|panic| {
        eprintln!("{panic}");
        abort();
    }));
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {}", in_one_line(&error));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_panic_of_any_thread_ends_the_program() {
        let test = "program::tests::inside_a_panic_of_any_thread_ends_the_program";
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--ignored", "--nocapture"])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(6), "{text}");
        assert!(text.contains("a thread is at fault"), "{text}");
    }

    #[test]
    #[ignore = "ends its process"]
    fn inside_a_panic_of_any_thread_ends_the_program() {
        let _code = run("test", || {
            let thread = std::thread::spawn(|| panic!("a thread is at fault"));
            thread.join().map_err(|_panic| std::io::Error::other("it went on"))
        });
    }
}
