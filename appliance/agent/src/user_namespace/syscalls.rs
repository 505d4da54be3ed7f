//! What a process does between its start and its program: from one user namespace into another.
//!
//! Source: user_namespaces(7), capabilities(7).

#![expect(unsafe_code, reason = "between fork and exec a process may do only what the caller vouches for")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, read, retry_on_intr, write};
use rustix::process::{Gid, Uid, getpid};
use rustix::thread::{
    CapabilitySet, UnshareFlags, remove_capability_from_bounding_set, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid, unshare_unsafe,
};

/// Most user namespaces in the one of the process that looks, and in all below it.
pub(super) const MAX_USER_NAMESPACES: &str = "/proc/sys/user/max_user_namespaces";

/// What a program may do to the files, users and processes of its namespace.
pub(super) const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SYS_CHROOT);

/// Whether the ids are mapped: 0, or the error number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mapped(i32);

impl Mapped {
    pub(super) const fn to_bytes(self) -> [u8; 4] {
        self.0.to_ne_bytes()
    }
}

impl From<io::Result<()>> for Mapped {
    fn from(result: io::Result<()>) -> Self {
        Self(result.err().map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO)))
    }
}

/// Has the program that `command` starts begin as root of a new user namespace, whose ids `agent` maps.
pub(super) fn begin_as_root(command: &mut Command, agent: OwnedFd) {
    let begin = move || become_root(agent.as_fd());
    // SAFETY: between fork and exec, `become_root` makes system calls only: it does not allocate, takes no lock, and what it
    // borrows is its own.
    unsafe { command.pre_exec(begin) };
}

fn become_root(agent: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a user namespace changes what the process may do; no memory and no descriptor depends on it.
    unsafe { unshare_unsafe(UnshareFlags::NEWUSER) }?;
    write(agent, &getpid().as_raw_nonzero().get().to_ne_bytes())?;
    let mut answer = [0; 4];
    if retry_on_intr(|| read(agent, &mut answer))? != answer.len() {
        return Err(Errno::PIPE.into());
    }
    match i32::from_ne_bytes(answer) {
        0 => {}
        error => return Err(io::Error::from_raw_os_error(error)),
    }
    set_thread_groups(&[])?;
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
    set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)?;
    forbid_namespaces()?;
    limit_capabilities()
}

/// The limit of the new namespace can be raised again only with a capability that the program does not get.
fn forbid_namespaces() -> io::Result<()> {
    let limit = open(MAX_USER_NAMESPACES, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    write(&limit, b"0")?;
    Ok(())
}

/// Takes all but the kept capabilities out of the bounding set: those that root gets when the program begins are in it.
fn limit_capabilities() -> io::Result<()> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if KEPT.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            // Beyond the last one that the kernel knows.
            Err(Errno::INVAL) => break,
            removed => removed?,
        }
    }
    Ok(())
}
