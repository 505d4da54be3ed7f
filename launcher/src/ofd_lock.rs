//! Locks that belong to an open file description (fcntl(2), "Open file description locks"): they live as long as any
//! process has the description open, and are not lost when some other descriptor of the file is closed.
#![expect(unsafe_code, reason = "no safe crate offers F_OFD_SETLK on a range of bytes")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// How a range is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Others may hold the same.
    Shared,
    /// Nobody else holds anything; needs a descriptor that may write.
    Exclusive,
}

/// A range of bytes of a file; it may lie behind the file's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    /// First byte.
    pub(crate) first: u16,
    /// Number of bytes, at least 1: the system takes 0 for "up to the end of the file".
    pub(crate) len: u16,
}

/// Locks `range`, or tells at once that it cannot be had (`Ok(false)`).
///
/// # Errors
/// The file system has no such locks.
pub(crate) fn try_lock(file: BorrowedFd<'_>, kind: Kind, range: Range) -> io::Result<bool> {
    match call(file, libc::F_OFD_SETLK, kind, range) {
        Ok(_) => Ok(true),
        // The system may say either of the two (fcntl(2), F_SETLK).
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a lock of `kind` on `range` could be had now.
///
/// # Errors
/// The file system has no such locks.
pub(crate) fn is_free(file: BorrowedFd<'_>, kind: Kind, range: Range) -> io::Result<bool> {
    Ok(call(file, libc::F_OFD_GETLK, kind, range)?.l_type == type_of(libc::F_UNLCK))
}

/// The lock types are small constants (0, 1, 2) of a wider type than the field that takes them.
fn type_of(constant: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(constant).unwrap_or(libc::c_short::MAX)
}

fn call(file: BorrowedFd<'_>, command: libc::c_int, kind: Kind, range: Range) -> io::Result<libc::flock> {
    let kind = match kind {
        Kind::Shared => libc::F_RDLCK,
        Kind::Exclusive => libc::F_WRLCK,
    };
    let mut lock = libc::flock {
        l_type: type_of(kind),
        l_whence: type_of(libc::SEEK_SET),
        l_start: i64::from(range.first),
        l_len: i64::from(range.len),
        // The system demands it of these locks.
        l_pid: 0,
    };
    // SAFETY: the descriptor is open as long as `file` is borrowed, and the commands F_OFD_SETLK and F_OFD_GETLK take a
    // pointer to one `flock`, which `lock` is; the kernel does not keep it.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(lock) }
}
