//! Lets a program be root over files of its own, and over nothing else.
//!
//! A file server changes owners, and becomes the user who asks; as one plain user a program may do neither. In a user
//! namespace of its own (Linux, user_namespaces(7)) it may, within the ids that are mapped into it: the agent maps a range
//! that nobody else has, so its root is nobody outside, and all that belongs to root or to another program is out of its reach.
//!
//! What such a namespace opens of the kernel, it opens to a program which may be in the hands of a driver VM, and the kernel is
//! what stands between that and the agent. A namespace's root can mount file systems, set up networks and load packet filters
//! of its own: code that is written for root and is a usual way into a kernel. So the program gets the rights over files,
//! users and its own processes (`KEPT` in its module `syscalls`), and no others; and it can make no further user namespace, in
//! which it would have all of them. That is less of the kernel than a plain user reaches, who may make such namespaces.

mod syscalls;

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;

use syscalls::Mapped;

/// Has the next program that `command` starts be root in a new user namespace, whose ids 0 to `count - 1` are those from `first`
/// on outside, for users and groups. It must be started once. Starting it fails if that cannot be done.
///
/// # Errors
/// If there are no descriptors or threads left.
pub fn apply(command: &mut Command, first: u32, count: u32) -> io::Result<()> {
    let (agent, program) = UnixStream::pair()?;
    // Who starts a process is held until it begins, and the ids have to be mapped from outside before that.
    thread::Builder::new().name("user-namespace".to_owned()).spawn(move || map_ids(agent, first, count))?;
    syscalls::begin_as_root(command, program.into());
    Ok(())
}

/// Waits for the process that is to begin, and maps the ids of its namespace. If there is none after all, its end of the
/// connection goes together with the command.
fn map_ids(mut agent: UnixStream, first: u32, count: u32) {
    let mut pid = [0; size_of::<i32>()];
    if agent.read_exact(&mut pid).is_err() {
        return;
    }
    let process = Path::new("/proc").join(i32::from_ne_bytes(pid).to_string());
    let map = format!("0 {first} {count}");
    let mapped = fs::write(process.join("uid_map"), &map).and_then(|()| fs::write(process.join("gid_map"), &map));
    // It may have been killed since.
    let _ = agent.write_all(&Mapped::from(mapped).to_bytes());
}

/// Leaves user namespaces to the agent: no program can make one.
///
/// # Errors
/// If the kernel has them and refuses.
pub fn forbid_to_programs() -> io::Result<()> {
    match fs::write(syscalls::MAX_USER_NAMESPACES, "0") {
        // A kernel without them.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written,
    }
}
