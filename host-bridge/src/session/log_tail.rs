//! The end of a dirty log whose file ends within a page.
//!
//! A VMM maps whole pages only, so for this page another one, made here, stands in the window. Back-ends set bits in it;
//! [`LogTail::merge`] moves them into the file. The file is sealed against shrinking, so the mapping of its end cannot be
//! taken away under this process.

#![expect(unsafe_code, reason = "maps a page of a file, and sets bits in it that others see")]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vvu_protocol::memory::PAGE_SIZE;
use vvu_protocol::window::{FileId, Tail};

use crate::appliance::file_identity;

const PAGE_LEN: usize = 4096;

const _: () = assert!(PAGE_LEN as u64 == PAGE_SIZE);

/// Why the end of a log cannot be served.
#[derive(Debug, thiserror::Error)]
pub(super) enum LogTailError {
    #[error("its file ends within a page and is not sealed against shrinking")]
    NotSealed,
    #[error("its file has become shorter")]
    Shrunk,
    #[error("its last page")]
    Io(#[from] io::Error),
}

/// One page of a file, mapped as long as this lives.
#[derive(Debug)]
struct Page(ptr::NonNull<AtomicU8>);

impl Page {
    fn map(file: impl AsFd, offset: u64) -> io::Result<Self> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that Rust knows of.
        let address = unsafe { mmap(ptr::null_mut(), PAGE_LEN, protection, flags, file, offset) }?;
        ptr::NonNull::new(address.cast()).map(Self).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: the mapping has PAGE_LEN bytes, all of which are backed because the file cannot shrink below any of them, and
        // lives as long as `self`. Other processes write to it; all accesses here are atomic.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), PAGE_LEN) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `Page::map`, and nothing borrows from it any more. It cannot fail for a whole mapping;
        // if it did, a page of address space would stay in use.
        let _ = unsafe { munmap(self.0.as_ptr().cast::<c_void>(), PAGE_LEN) };
    }
}

/// The last page of a log's file, and the page that stands for it in the window.
#[derive(Debug)]
pub(super) struct LogTail {
    log: FileId,
    tail: Tail,
    /// The file behind the page in the window.
    window_file: OwnedFd,
    window: Page,
    file: Page,
}

impl LogTail {
    /// A page for the end of `file`, whose identity is `log`.
    ///
    /// # Errors
    /// [`LogTailError`].
    pub(super) fn new(file: &OwnedFd, log: FileId, tail: Tail) -> Result<Self, LogTailError> {
        // A file that can shrink would let its owner kill this process with SIGBUS.
        let seals = fcntl_get_seals(file).unwrap_or(SealFlags::empty());
        if !seals.contains(SealFlags::SHRINK) {
            return Err(LogTailError::NotSealed);
        }
        // From here on it stays as long as it is; before, it may have changed.
        let (_, file_len) = file_identity(file).map_err(io::Error::other)?;
        if file_len <= tail.file_offset.0 {
            return Err(LogTailError::Shrunk);
        }
        let window_file = page_file()?;
        let (window, file) = (Page::map(&window_file, 0)?, Page::map(file, tail.file_offset.0)?);
        Ok(Self { log, tail, window_file, window, file })
    }

    /// Whether it serves this end of this file, wherever in the window.
    pub(super) fn serves(&self, log: FileId, tail: &Tail) -> bool {
        let part = |tail: &Tail| (tail.file_offset, tail.before, tail.len);
        self.log == log && part(&self.tail) == part(tail)
    }

    /// The file behind the page in the window.
    pub(super) const fn window_file(&self) -> &OwnedFd {
        &self.window_file
    }

    /// Moves all bits that were set in the window into the file. Bits that are set meanwhile are moved now or the next time.
    pub(super) fn merge(&self) {
        let (start, end) = (usize::try_from(self.tail.before), usize::try_from(self.tail.len));
        let part = start.unwrap_or(PAGE_LEN)..end.unwrap_or(PAGE_LEN);
        let (from, to) = (self.window.bytes().get(part.clone()), self.file.bytes().get(part));
        for (from, to) in from.unwrap_or_default().iter().zip(to.unwrap_or_default()) {
            let bits = from.swap(0, Ordering::AcqRel);
            if bits != 0 {
                to.fetch_or(bits, Ordering::AcqRel);
            }
        }
    }
}

fn page_file() -> io::Result<OwnedFd> {
    let file = memfd_create("vvu-log-tail", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, PAGE_SIZE)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use rustix::io::{pread, pwrite};
    use vvu_protocol::address::{FileOffset, WindowOffset};

    use super::*;

    const LOG: FileId = FileId { device: 1, inode: 7 };

    fn log_file(len: u64, seals: SealFlags) -> OwnedFd {
        let file = memfd_create("log", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, len).unwrap();
        fcntl_add_seals(&file, seals).unwrap();
        file
    }

    const fn tail(before: u64, len: u64) -> Tail {
        Tail { file_offset: FileOffset(0x2000), before, len, window_offset: WindowOffset(0) }
    }

    fn byte(file: &OwnedFd, offset: u64) -> u8 {
        let mut byte = [0];
        pread(file, &mut byte[..], offset).unwrap();
        byte[0]
    }

    #[test]
    fn bits_move_once_and_others_stay() {
        let file = log_file(0x2345, SealFlags::SHRINK);
        let log_tail = LogTail::new(&file, LOG, tail(0x10, 0x340)).unwrap();
        pwrite(&file, &[0b100], 0x2010).unwrap();
        for offset in [0xf, 0x10, 0x33f, 0x340] {
            pwrite(log_tail.window_file(), &[0b11], offset).unwrap();
        }
        log_tail.merge();
        let merged = [0x200f, 0x2010, 0x233f, 0x2340].map(|offset| byte(&file, offset));
        assert_eq!(merged, [0, 0b111, 0b11, 0], "the buffer's bytes, and no others");
        pwrite(&file, &[0], 0x2010).unwrap();
        log_tail.merge();
        assert_eq!(byte(&file, 0x2010), 0, "a bit that the front-end has taken came again");
    }

    #[test]
    fn a_file_that_can_shrink_is_refused() {
        let file = log_file(0x2345, SealFlags::GROW);
        assert!(matches!(LogTail::new(&file, LOG, tail(0, 0x345)), Err(LogTailError::NotSealed)));
        let short = log_file(0x2000, SealFlags::SHRINK);
        assert!(matches!(LogTail::new(&short, LOG, tail(0, 0x345)), Err(LogTailError::Shrunk)));
        let (read, _write) = rustix::pipe::pipe().unwrap();
        assert!(LogTail::new(&read, LOG, tail(0, 0x345)).is_err());
    }
}
