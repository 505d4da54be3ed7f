//! What a load costs processes, from `/proc`.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Sums over all threads of a process, since they started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// How often a thread went to sleep: the number of times that it was woken.
    pub voluntary_switches: u64,
    /// How often a thread had to make room for another one.
    pub involuntary_switches: u64,
    /// Time on a processor, in nanoseconds.
    pub processor_ns: u64,
}

/// A process, and what it took from one moment to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its name, as the kernel has it.
    pub name: String,
    /// What it took.
    pub usage: Usage,
}

/// What the calling thread has taken so far. It has to ask before it ends: the process's sums are those of threads that live.
#[must_use]
pub fn own_thread() -> Usage {
    task_usage(Path::new("/proc/thread-self"))
}

/// What processes have taken so far. A process that does not exist has taken nothing.
#[must_use]
pub fn look_at(pids: &[u32]) -> Vec<Process> {
    let look = |&pid: &u32| {
        let directory = format!("/proc/{pid}");
        let name = fs::read_to_string(format!("{directory}/comm")).unwrap_or_default().trim_end().to_owned();
        Process { pid, name, usage: usage(Path::new(&directory)) }
    };
    pids.iter().map(look).collect()
}

/// What was taken between two looks at the same processes.
#[must_use]
pub fn between(before: &[Process], after: Vec<Process>) -> Vec<Process> {
    let since = |(before, after): (&Process, Process)| Process { usage: after.usage.since(&before.usage), ..after };
    before.iter().zip(after).map(since).collect()
}

impl Usage {
    /// Both together.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            voluntary_switches: self.voluntary_switches + other.voluntary_switches,
            involuntary_switches: self.involuntary_switches + other.involuntary_switches,
            processor_ns: self.processor_ns + other.processor_ns,
        }
    }

    /// What came after an earlier look; a thread that ended in between takes its share along.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        Self {
            voluntary_switches: self.voluntary_switches.saturating_sub(earlier.voluntary_switches),
            involuntary_switches: self.involuntary_switches.saturating_sub(earlier.involuntary_switches),
            processor_ns: self.processor_ns.saturating_sub(earlier.processor_ns),
        }
    }
}

/// The sum over a process's threads.
fn usage(process: &Path) -> Usage {
    let tasks = fs::read_dir(process.join("task")).into_iter().flatten().flatten();
    tasks.fold(Usage::default(), |sum, task| sum.plus(&task_usage(&task.path())))
}

/// What one thread has taken; nothing, if it has ended meanwhile.
fn task_usage(task: &Path) -> Usage {
    let status = fs::read_to_string(task.join("status")).unwrap_or_default();
    let schedstat = fs::read_to_string(task.join("schedstat")).unwrap_or_default();
    Usage {
        voluntary_switches: field(&status, "voluntary_ctxt_switches:"),
        involuntary_switches: field(&status, "nonvoluntary_ctxt_switches:"),
        processor_ns: schedstat.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0),
    }
}

fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_sleeps_is_seen_and_a_process_that_never_was_took_nothing() {
        let before = own_thread();
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert!(own_thread().since(&before).voluntary_switches >= 1);
        // Of this process other tests' threads may end at any time, and take their sums with them; this one lives.
        let processes = look_at(&[std::process::id(), u32::MAX]);
        assert!(processes[0].usage.voluntary_switches >= 1 && !processes[0].name.is_empty(), "{processes:?}");
        assert_eq!(processes[1].usage, Usage::default());
        let later = vec![Process { usage: processes[0].usage.plus(&processes[0].usage), ..processes[0].clone() }];
        assert_eq!(between(&processes, later)[0].usage, processes[0].usage);
    }
}
