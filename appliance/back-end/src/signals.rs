//! The signals that the program obeys, as a descriptor to wait for.

#![expect(unsafe_code, reason = "signal masks and signalfd are not wrapped by the crates in use")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// What the operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// SIGTERM or SIGINT: end in order.
    End,
    /// SIGUSR1: write the counters to the log.
    Report,
    /// SIGHUP: look at the world around again; the size of an image may have changed.
    LookAgain,
}

/// See the module's text.
#[derive(Debug)]
pub struct Signals {
    signalfd: OwnedFd,
}

impl Signals {
    /// Takes the signals over, for all threads that are started from now on. SIGXFSZ is ignored: a write beyond the
    /// limit of file sizes is an I/O error of the request.
    ///
    /// # Errors
    /// The system has no descriptor left.
    pub fn take_over() -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set that the other two get; signal and sigaddset take valid numbers.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGHUP] {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            set.assume_init()
        };
        // SAFETY: the set is initialised, and the old mask is not asked for.
        if unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the set is initialised.
        let signalfd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if signalfd == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, owned by nobody else.
        Ok(Self { signalfd: unsafe { OwnedFd::from_raw_fd(signalfd) } })
    }

    /// Takes one pending signal.
    #[must_use]
    pub fn next(&self) -> Option<Wish> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        rustix::io::read(&self.signalfd, &mut info).ok()?;
        // ssi_signo, the first field.
        let number = info.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes))?;
        Some(match number {
            libc::SIGUSR1 => Wish::Report,
            libc::SIGHUP => Wish::LookAgain,
            _ => Wish::End,
        })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signalfd.as_fd()
    }
}
