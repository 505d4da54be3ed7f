//! Eventfds that came from another process, or go to one: waited for, taken and signalled without ever changing their flags
//! and without ever blocking on them.
//!
//! O_NONBLOCK lives on the open file that all processes share, so it is never set or cleared here: reads say "do not wait"
//! themselves, and writes ask first whether there is room.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::{Errno, ReadWriteFlags, preadv2, write};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Why a descriptor cannot serve as an event.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    /// It is no eventfd.
    #[error("expected an eventfd, a descriptor of another kind came: {found}")]
    Kind {
        /// What the kernel calls it.
        found: String,
    },
    /// A system call failed.
    #[error("eventfd")]
    Io(#[from] io::Error),
}

/// A new eventfd with count 0.
///
/// # Errors
/// If the process or the system has too many open files.
pub fn create() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Refuses what is no eventfd: on another kind of file, a write could block for ever or do something else entirely.
///
/// # Errors
/// [`EventError::Kind`].
pub fn check_kind(descriptor: BorrowedFd<'_>) -> Result<(), EventError> {
    let found = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))?;
    if found.as_os_str() == "anon_inode:[eventfd]" {
        return Ok(());
    }
    Err(EventError::Kind { found: found.to_string_lossy().into_owned() })
}

/// What tells one eventfd from every other: two descriptors with the same identity are of the same eventfd, as long as one
/// of them is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity(u64);

/// Identity of an eventfd: the number by which the kernel tells them apart (proc_pid_fdinfo(5), since Linux 5.2). They all
/// share one inode.
///
/// # Errors
/// [`io::ErrorKind::Unsupported`] if the kernel does not tell.
pub fn identity(descriptor: impl AsFd) -> io::Result<Identity> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", descriptor.as_fd().as_raw_fd()))?;
    let number = text.lines().find_map(|line| line.strip_prefix("eventfd-id:")?.trim().parse().ok());
    number.map(Identity).ok_or_else(|| io::ErrorKind::Unsupported.into())
}

/// Whether reads of it never wait (O_NONBLOCK), which all who hold the same open file have in common.
///
/// # Errors
/// If the system does not tell.
pub fn is_nonblocking(descriptor: impl AsFd) -> io::Result<bool> {
    Ok(fcntl_getfl(descriptor)?.contains(OFlags::NONBLOCK))
}

/// Adds one to the count, and so wakes who waits for it. A count that is full stays full: who waits is awake then.
///
/// # Errors
/// If the descriptor is no eventfd.
pub fn signal(descriptor: impl AsFd) -> io::Result<()> {
    let mut room = [PollFd::new(&descriptor, PollFlags::OUT)];
    if poll(&mut room, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? == 0 {
        return Ok(());
    }
    write(&descriptor, &1_u64.to_ne_bytes())?;
    Ok(())
}

/// Takes the count without waiting, or `None` if it is 0.
///
/// # Errors
/// If the descriptor cannot be read.
pub fn take(descriptor: impl AsFd) -> io::Result<Option<u64>> {
    match take_now(descriptor.as_fd()) {
        Ok(count) => Ok(Some(count)),
        Err(Errno::AGAIN) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn take_now(descriptor: BorrowedFd<'_>) -> rustix::io::Result<u64> {
    let mut count = [0; 8];
    // An offset of -1 stands for the file's own position, which an eventfd does not have.
    preadv2(descriptor, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT)?;
    Ok(u64::from_ne_bytes(count))
}

/// An eventfd that is waited for.
#[derive(Debug)]
pub struct Event {
    descriptor: AsyncFd<OwnedFd>,
}

impl Event {
    /// Takes over an eventfd. Needs a tokio runtime with I/O.
    ///
    /// # Errors
    /// [`EventError`] if it is no eventfd or cannot be registered.
    #[expect(unsafe_code, reason = "tokio wants the promise that the descriptor stays what it is")]
    pub fn new(descriptor: OwnedFd) -> Result<Self, EventError> {
        check_kind(descriptor.as_fd())?;
        // SAFETY: an OwnedFd is open for as long as it lives, and always returns the same descriptor; the AsyncFd owns it.
        let registered = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
        Ok(Self { descriptor: registered.map_err(|error| error.into_parts().1)? })
    }

    /// Waits until the count is not 0, and takes it. May be cancelled.
    ///
    /// # Errors
    /// If the descriptor cannot be read.
    pub async fn signalled(&self) -> io::Result<u64> {
        self.descriptor.async_io(Interest::READABLE, |descriptor| Ok(take_now(descriptor.as_fd())?)).await
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.get_ref().as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_blocking_eventfd_is_taken_without_blocking() {
        let theirs = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let flags = rustix::fs::fcntl_getfl(&theirs).unwrap();
        let event = Event::new(theirs.try_clone().unwrap()).unwrap();
        assert_eq!(take(&theirs).unwrap(), None);
        for _ in 0..3 {
            signal(&theirs).unwrap();
            signal(&event).unwrap();
            assert_eq!(event.signalled().await.unwrap(), 2);
            // Somebody else takes the count between readiness and read: wait on, do not block.
            signal(&theirs).unwrap();
            assert_eq!(take(&theirs).unwrap(), Some(1));
            tokio::select! {
                biased;
                _ = event.signalled() => panic!("nothing was left to take"),
                () = tokio::task::yield_now() => {}
            }
        }
        assert_eq!(rustix::fs::fcntl_getfl(&theirs).unwrap(), flags);
    }

    #[test]
    fn a_full_count_does_not_block_the_signaller() {
        let full = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        signal(&full).unwrap();
        assert_eq!(take(&full).unwrap(), Some(u64::MAX - 1));
    }

    #[test]
    fn an_eventfd_is_known_again() {
        let (one, other) = (create().unwrap(), create().unwrap());
        let again = one.try_clone().unwrap();
        assert_eq!(identity(&one).unwrap(), identity(&again).unwrap());
        assert_ne!(identity(&one).unwrap(), identity(&other).unwrap());
        let (read, _write) = rustix::pipe::pipe().unwrap();
        assert_eq!(identity(&read).unwrap_err().kind(), io::ErrorKind::Unsupported);
    }

    #[test]
    fn whether_reads_wait_is_seen() {
        assert!(is_nonblocking(create().unwrap()).unwrap());
        assert!(!is_nonblocking(eventfd(0, EventfdFlags::CLOEXEC).unwrap()).unwrap());
    }

    #[test]
    fn other_kinds_of_files_are_refused() {
        let (read, _write) = rustix::pipe::pipe().unwrap();
        let error = check_kind(read.as_fd()).unwrap_err().to_string();
        assert!(error.contains("pipe:"), "{error}");
        check_kind(create().unwrap().as_fd()).unwrap();
    }
}
