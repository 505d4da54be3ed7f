//! Descriptors that a child keeps though nothing tells it of them.
#![expect(
    unsafe_code,
    reason = "Command::pre_exec runs between fork and exec, where only async-signal-safe calls may be made"
)]

use std::fs::File;
use std::sync::Arc;

use rustix::io::{FdFlags, fcntl_setfd};
use tokio::process::Command;

/// Leaves `file` open in the child, so that its open file description lives as long as the child does.
pub(crate) fn keep_open(command: &mut Command, file: Arc<File>) {
    let keep = move || Ok(fcntl_setfd(&*file, FdFlags::empty())?);
    // SAFETY: the closure makes one system call (fcntl) on a descriptor that it keeps open itself, and neither allocates nor
    // locks, so it is sound to run in a child that was forked from a process with several threads.
    unsafe { command.pre_exec(keep) };
}
