//! Survives driver memory that disappears: the file behind it was cut, and the next access raises SIGBUS.
//!
//! Only the front-end can cut the file, so it harms its own device; but without this it would end the process at a moment
//! of its choice. The handler puts a page of zeroes in place of the lost one, and the rings learn of it by [`losses`] and break.
//! No other memory of the process is mapped from a file that somebody cuts.

#![expect(unsafe_code, reason = "a signal handler repairs a mapping")]

use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering};

/// Number of pages that were repaired.
static LOSSES: AtomicU64 = AtomicU64::new(0);

/// The unit of repair: the smallest page. Mappings with larger ones cannot be repaired in parts, and end the process.
const PAGE: usize = 4096;

/// `si_code` of an access beyond the end of a file (sigaction(2)); the libc crate does not have it.
const BUS_ADRERR: libc::c_int = 2;

/// Installs the handler, for the whole process.
///
/// # Errors
/// What sigaction(2) says.
pub fn install() -> io::Result<()> {
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = repair;
    // SAFETY: all-zero is a valid sigaction: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the action is complete, and the handler does only what a handler may (signal-safety(7)).
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// How often memory was lost since the process began. Where it is more than it was before an access, what was read is not to
/// be trusted. It says nothing of whose memory it was.
#[must_use]
pub fn losses() -> u64 {
    LOSSES.load(Ordering::Relaxed)
}

extern "C" fn repair(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: SA_SIGINFO makes the kernel pass a valid siginfo_t, and for SIGBUS it has an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr()) };
    if code == BUS_ADRERR {
        let page = address.map_addr(|address| address & !(PAGE - 1));
        let (access, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
        // SAFETY: the page belongs to a file mapping that has nothing there any more, and stays mapped as memory of the
        // same kind; mmap is a plain system call.
        if unsafe { libc::mmap(page, PAGE, access, flags, -1, 0) } == page {
            LOSSES.fetch_add(1, Ordering::Relaxed);
            return;
        }
    }
    // SAFETY: the default action ends the process as soon as the access is repeated.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}
