//! Waits until a process has nothing more to do.

use std::fs;

use anyhow::{Context, bail};
use vvu_test_driver::event::wait_until;

/// A thread and how often it has gone to sleep.
type Sleeper = (String, u64);

/// Waits until there was a moment in which all threads of a process slept. What they waited for then can only come from
/// outside of the process, if the kernel has no work of theirs.
///
/// # Errors
/// If `/proc` does not say.
pub(crate) fn wait_asleep(process: u32) -> anyhow::Result<()> {
    let mut outcome = Ok(());
    wait_until("sleep of all threads", || match is_asleep(process) {
        Ok(asleep) => asleep,
        Err(error) => {
            outcome = Err(error);
            true
        }
    });
    outcome
}

/// A thread that sleeps in two looks and has not gone to sleep in between has slept all the time: so between two looks at
/// all of them, all have slept.
fn is_asleep(process: u32) -> anyhow::Result<bool> {
    let first = sleepers(process)?;
    Ok(first.is_some() && first == sleepers(process)?)
}

/// All threads, if all of them sleep.
fn sleepers(process: u32) -> anyhow::Result<Option<Vec<Sleeper>>> {
    let directory = format!("/proc/{process}/task");
    let tasks = fs::read_dir(&directory).with_context(|| format!("cannot read {directory}"))?;
    let mut sleepers = Vec::new();
    for task in tasks {
        let path = task?.path();
        let Ok(status) = fs::read_to_string(path.join("status")) else {
            // It has just ended.
            return Ok(None);
        };
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let (Some(state), Some(switches)) = (field("State:"), field("voluntary_ctxt_switches:")) else {
            bail!("{} has no state", path.display());
        };
        if !state.starts_with('S') {
            return Ok(None);
        }
        sleepers.push((path.to_string_lossy().into_owned(), switches.parse()?));
    }
    Ok(Some(sleepers))
}
