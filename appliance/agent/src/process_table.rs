//! The processes of a back-end as `/proc` shows them: which they are, and what they hold.

use std::fs;
use std::io;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

use crate::user::User;

const PROC: &str = "/proc";

/// All processes whose real user id is one of this user's, but for those that have ended and are only waited for. A program
/// that has no rights beyond its user's cannot leave its user, and neither can what it has started.
///
/// # Errors
/// If `/proc` cannot be read.
pub fn of_user(user: User) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(PROC)? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // It may have gone since.
        let Ok(status) = fs::read_to_string(Path::new(PROC).join(pid.to_string()).join("status")) else { continue };
        if real_user(&status).is_some_and(|id| user.has(id)) && !is_zombie(&status) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Ends all processes of a user without asking them, and says whether there were any. One that starts others faster than they
/// are found may go on: only when none was found all have gone.
///
/// # Errors
/// If `/proc` cannot be read.
pub fn kill_user(user: User) -> io::Result<bool> {
    let processes = of_user(user)?;
    for pid in processes.iter().copied().filter_map(Pid::from_raw) {
        // Nothing but its own end takes a process id from a process, and nothing here waits since it was looked at.
        let _ = kill_process(pid, Signal::KILL);
    }
    Ok(!processes.is_empty())
}

/// Whether a process maps a file of this name or has it open. One that has gone holds nothing.
///
/// # Errors
/// If the process is there and cannot be looked at.
pub fn holds(pid: i32, name: &Path) -> io::Result<bool> {
    let process = Path::new(PROC).join(pid.to_string());
    let held = maps(&process, name).and_then(|maps| Ok(maps || has_open(&process, name)?));
    match held {
        Err(_) if !process.exists() => Ok(false),
        other => other,
    }
}

fn maps(process: &Path, name: &Path) -> io::Result<bool> {
    let maps = fs::read_to_string(process.join("maps"))?;
    Ok(maps.lines().any(|line| line.ends_with(&*name.to_string_lossy())))
}

fn has_open(process: &Path, name: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(process.join("fd"))? {
        // A descriptor may be closed while the directory is read.
        if fs::read_link(entry?.path()).is_ok_and(|target| target == name) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The first number of the line `Uid:` (proc(5), "/proc/pid/status").
fn real_user(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_ascii_whitespace().next()?.parse().ok()
}

fn is_zombie(status: &str) -> bool {
    let state = status.lines().find_map(|line| line.strip_prefix("State:"));
    state.is_some_and(|state| state.trim_start().starts_with('Z'))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn the_line_of_the_user_is_read() {
        let status = "Name:\tsh\nState:\tS (sleeping)\nUid:\t1003\t1004\t1005\t1006\nGid:\t7\t7\t7\t7\n";
        assert_eq!(real_user(status), Some(1003));
        assert!(!is_zombie(status));
        assert_eq!(real_user("Name:\tUid:\n"), None);
        assert!(is_zombie("Name:\tsh\nState:\tZ (zombie)\n"));
    }

    #[test]
    fn this_process_is_found_and_what_it_has_open() {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        assert!(of_user(User::Plain { id: rustix::process::getuid().as_raw() }).unwrap().contains(&pid));
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(holds(pid, file.path()).unwrap());
        let path = file.into_temp_path();
        assert!(!holds(pid, &path).unwrap());
        let again = File::open(&path).unwrap();
        assert!(again.as_raw_fd() >= 0 && holds(pid, &path).unwrap());
        assert!(!holds(i32::MAX, &path).unwrap());
    }
}
