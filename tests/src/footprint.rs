//! What a process holds, counted, so that a leak shows as a number that does not come back.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::evidence;

/// How long what is on its way out may take to be gone.
const SETTLE_PATIENCE: Duration = Duration::from_secs(20);

/// Nobody tells when another process closes a descriptor, so it is looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Descriptors by kind, mapped files and child processes of one process.
///
/// Anonymous memory and threads are not counted: allocators and thread pools grow and shrink as they like.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Footprint {
    counts: BTreeMap<String, usize>,
    /// What may become more or less.
    ignored: Option<String>,
}

impl Footprint {
    /// Counts what process `pid` holds now.
    ///
    /// # Errors
    /// If the process is gone or belongs to someone else.
    pub fn of(pid: u32) -> Result<Self> {
        let mut counts = BTreeMap::new();
        let mut count = |kind: String| *counts.entry(kind).or_default() += 1;
        let folder = format!("/proc/{pid}/fd");
        for descriptor in fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))?.flatten() {
            // A descriptor may be closed between the two looks.
            if let Ok(target) = fs::read_link(descriptor.path()) {
                count(format!("fd {}", kind(&target.to_string_lossy())));
            }
        }
        for map in
            evidence::maps(pid)?.iter().filter(|map| map.path.starts_with("/memfd:") || map.path.contains("/dev/"))
        {
            count(format!("map {}", map.path));
        }
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            children.split_whitespace().for_each(|_| count("child".to_owned()));
        }
        Ok(Self { counts, ignored: None })
    }

    /// The same without eventfds, for an appliance's VMM: by design it keeps those of every start of the device, up to its number
    /// of vectors, and a new one has none of the past.
    #[must_use]
    pub fn without_eventfds(mut self) -> Self {
        let kind = "fd anon_inode:[eventfd]";
        self.counts.remove(kind);
        self.ignored = Some(kind.to_owned());
        self
    }

    /// Waits until what `pid` holds is this again.
    ///
    /// # Errors
    /// If it is not within 20 seconds; the text says what there is too much or too little of.
    pub fn await_again(&self, name: &str, pid: u32) -> Result<()> {
        let deadline = Instant::now() + SETTLE_PATIENCE;
        loop {
            let mut now = Self::of(pid)?;
            now.counts.retain(|kind, _| self.ignored.as_ref() != Some(kind));
            if now.counts == self.counts {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{name} (pid {pid}) holds something else than before:\n{}", self.difference(&now));
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn difference(&self, now: &Self) -> String {
        let mut text = String::new();
        let kinds = self.counts.keys().chain(now.counts.keys().filter(|kind| !self.counts.contains_key(*kind)));
        for kind in kinds {
            let of = |footprint: &Self| footprint.counts.get(kind).copied().unwrap_or(0);
            if of(self) != of(now) {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "  {kind}: {} before, {} now", of(self), of(now));
            }
        }
        text
    }
}

/// The kind of what a descriptor leads to: `socket:[123]` without its number; and a file that was made for appliance VM
/// number 7 is like the one for number 6.
fn kind(target: &str) -> String {
    target.chars().filter(|character| !character.is_ascii_digit()).collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn numbers_do_not_make_kinds() {
        assert_eq!(kind("socket:[4711]"), "socket:[]");
        assert_eq!(kind("/run/vvu/console-2.in"), kind("/run/vvu/console-17.in"));
        assert_eq!(kind("anon_inode:[eventfd]"), "anon_inode:[eventfd]");
    }

    #[test]
    fn a_descriptor_too_many_is_named() {
        // A process of its own: in this one other tests open files at the same time.
        let mut child =
            Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let before = Footprint::of(child.id()).unwrap();
        before.await_again("cat", child.id()).unwrap();
        let mut more = before.clone();
        more.counts.insert("fd socket".to_owned(), 2);
        assert_eq!(before.difference(&more), "  fd socket: 0 before, 2 now\n");
        assert!(before.counts.contains_key("fd pipe:[]"), "{before:?}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
