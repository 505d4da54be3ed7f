//! Reads of a file into a memory, by the kernel.
//!
//! # Safety
//! The kernel writes only to places that [`Memory::slice`] has checked. The memory is borrowed for as long as reads may be under
//! way: [`Reads`] waits for all of them when it is dropped, and is not forgotten by the module above, which alone can name it.

#![expect(unsafe_code, reason = "reads are handed to the kernel by address; the module's text says why that is sound")]

use std::fs::File;
use std::os::fd::AsRawFd;

use io_uring::types::Fixed;
use io_uring::{IoUring, opcode};
use rustix::io::Errno;

use crate::error::Error;
use crate::memory::Memory;

/// The file's index among the ring's registered ones.
const FILE: Fixed = Fixed(0);

/// Reads that are under way together.
pub(super) struct Reads<'m> {
    ring: IoUring,
    memory: &'m Memory,
    under_way: usize,
}

impl<'m> Reads<'m> {
    /// Room for `depth` reads. All further calls must come from this thread.
    pub(super) fn new(file: &File, memory: &'m Memory, depth: u16) -> Result<Self, Error> {
        let mut builder = IoUring::builder();
        builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
        let ring = builder.build(u32::from(depth)).map_err(|error| refused("set up an io_uring", &error))?;
        let registered = ring.submitter().register_files(&[file.as_raw_fd()]);
        registered.map_err(|error| refused("register a file", &error))?;
        Ok(Self { ring, memory, under_way: 0 })
    }

    pub(super) fn under_way(&self) -> usize {
        self.under_way
    }

    /// Prepares a read from `offset` of the file to `place` of the memory. Goes to the kernel with the next submission.
    pub(super) fn start(&mut self, slot: u16, offset: u64, place: usize, len: u32) -> Result<(), Error> {
        let target = self.memory.slice(place, len as usize)?;
        let read = opcode::Read::new(FILE, target.ptr_guard_mut().as_ptr(), len).offset(offset);
        // SAFETY: see the module's text.
        unsafe { self.ring.submission().push(&read.build().user_data(u64::from(slot))) }
            .map_err(|_full| Error::Usage("more reads are under way than there is room for".to_owned()))?;
        self.under_way += 1;
        Ok(())
    }

    /// Hands over what was prepared, and has the kernel note what is complete; `waits` for one, if there is none.
    pub(super) fn submit(&mut self, waits: bool) -> Result<(), Error> {
        let queue = self.ring.submission();
        if queue.is_empty() && !queue.taskrun() && !waits {
            return Ok(());
        }
        drop(queue);
        match self.ring.submit_and_wait(usize::from(waits)) {
            Err(error) if error.raw_os_error() != Some(Errno::INTR.raw_os_error()) => Err(refused("read", &error)),
            _ => Ok(()),
        }
    }

    pub(super) fn has_completions(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// The slot of a read that is complete. All have to be of this length.
    pub(super) fn complete(&mut self, len: u32) -> Result<Option<u16>, Error> {
        let Some(entry) = self.ring.completion().next() else { return Ok(None) };
        self.under_way -= 1;
        match u32::try_from(entry.result()) {
            Ok(read) if read == len => Ok(u16::try_from(entry.user_data()).ok()),
            Ok(_) => Err(Error::Short),
            Err(_negative) => {
                Err(Error::System { what: "read", source: Errno::from_raw_os_error(entry.result().saturating_neg()) })
            }
        }
    }
}

impl Drop for Reads<'_> {
    fn drop(&mut self) {
        while self.under_way > 0 {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.raw_os_error() != Some(Errno::INTR.raw_os_error()) => {
                    // Nothing else keeps the kernel from writing to memory that is about to go.
                    std::process::abort();
                }
                _ => self.under_way -= self.ring.completion().count(),
            }
        }
    }
}

/// Reads from `offset` of the file to `place` of the memory, and waits for it.
pub(super) fn pread(file: &File, memory: &Memory, offset: u64, place: usize, len: u32) -> Result<(), Error> {
    let target = memory.slice(place, len as usize)?;
    let guard = target.ptr_guard_mut();
    let offset = libc::off_t::try_from(offset).unwrap_or(libc::off_t::MAX);
    // SAFETY: see the module's text; it is done when the call returns.
    let read = unsafe { libc::pread(file.as_raw_fd(), guard.as_ptr().cast(), target.len(), offset) };
    match usize::try_from(read) {
        Ok(read) if read == target.len() => Ok(()),
        Ok(_) => Err(Error::Short),
        Err(_negative) => Err(refused("read", &std::io::Error::last_os_error())),
    }
}

fn refused(what: &'static str, error: &std::io::Error) -> Error {
    Error::System { what, source: Errno::from_io_error(error).unwrap_or(Errno::IO) }
}
