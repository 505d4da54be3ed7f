//! Children that die with `vvu`, even when it is killed.
//!
//! QEMU and the bridge have options of their own for this; this is the layer below, which also covers wrapper scripts
//! and the time before the options are read.
#![expect(
    unsafe_code,
    reason = "Command::pre_exec runs between fork and exec, where only async-signal-safe calls may be made"
)]

use std::io;

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};
use tokio::process::Command;

/// Has the kernel kill the child when the thread that spawns it ends (`PR_SET_PDEATHSIG`, prctl(2)): spawn from the main
/// thread only.
pub(crate) fn die_with_parent(command: &mut Command) {
    let parent = getpid();
    let arm = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the signal was armed.
        if getppid() == Some(parent) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(rustix::io::Errno::SRCH.raw_os_error()))
        }
    };
    // SAFETY: the closure makes two system calls (prctl, getppid) and neither allocates nor locks, so it is sound to run
    // in a child that was forked from a process with several threads.
    unsafe { command.pre_exec(arm) };
}
