//! File descriptors that are known by number only.

#![expect(unsafe_code, reason = "a number becomes an owned descriptor; each block says why it is ours")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Takes over a descriptor that the parent process left open for us (`--fd`). To be called once, before anything else
/// opens descriptors.
///
/// # Errors
/// The number is no open descriptor, or one of the standard streams.
pub(crate) fn inherit(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "descriptors 0 to 2 are the standard streams"));
    }
    // SAFETY: only looked at; fcntl refuses a number that is not open.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, the parent passed it for this purpose, and nothing in this process uses it yet.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
