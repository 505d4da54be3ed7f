//! Memory that a file of the peer backs, mapped for as long as the value lives.
//!
//! The peer, and with it another VM, reads and writes the same memory at any time. So nothing here hands out a reference to
//! plain bytes: all access is by atomics, whose address and alignment are checked each time.

#![expect(unsafe_code, reason = "maps memory and names atomics in it; each block says why they are there")]

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64};

use rustix::fs::FileType;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The unit in which files are mapped, in bytes.
const PAGE_SIZE: u64 = 4096;

/// The unit in which device-DAX nodes are mapped: a length that is no multiple of the node's alignment is refused with
/// EINVAL, and 2 MiB is what the nodes have (kernel: drivers/dax/device.c, `check_vma`).
const DAX_ALIGNMENT: u64 = 2 << 20;

/// Why a file cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Nothing to map, or more than an address space holds.
    #[error("no range that can be mapped: {size} bytes at offset {offset:#x}")]
    Range {
        /// Start in the file.
        offset: u64,
        /// Length in bytes.
        size: u64,
    },
    /// The file ends before the range does; an access behind its end would raise SIGBUS.
    #[error("the file has {file_len} bytes, but {size} bytes at offset {offset:#x} are to be mapped")]
    BeyondFile {
        /// Start in the file.
        offset: u64,
        /// Length in bytes.
        size: u64,
        /// What there is.
        file_len: u64,
    },
    /// Pipes, sockets, directories, eventfds.
    #[error("neither a regular file nor a device node")]
    Kind,
    /// A system call failed.
    #[error("cannot map the file")]
    System(#[from] io::Error),
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct SharedMapping {
    base: NonNull<u8>,
    /// Length of the whole mapping.
    mapped_len: usize,
    /// Where the part that was asked for begins.
    start: usize,
    len: usize,
}

// SAFETY: the mapping is memory of the process, not of a thread; its owner may be any thread.
unsafe impl Send for SharedMapping {}
// SAFETY: all access is atomic.
unsafe impl Sync for SharedMapping {}

impl SharedMapping {
    /// Maps `size` bytes of `file` from `offset` on, for reading and writing. The length of a device node is not known
    /// (device-DAX tells 0), so only that of a regular file is checked.
    ///
    /// # Errors
    /// [`MapError`].
    pub(crate) fn new(file: &File, offset: u64, size: u64) -> Result<Self, MapError> {
        let range = MapError::Range { offset, size };
        let Some(end) = offset.checked_add(size).filter(|end| size > 0 && *end <= i64::MAX.unsigned_abs()) else {
            return Err(range);
        };
        let stat = rustix::fs::fstat(file).map_err(io::Error::from)?;
        let unit = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let file_len = u64::try_from(stat.st_size).unwrap_or(0);
                if end > file_len {
                    return Err(MapError::BeyondFile { offset, size, file_len });
                }
                PAGE_SIZE
            }
            FileType::CharacterDevice => DAX_ALIGNMENT,
            _ => return Err(MapError::Kind),
        };
        let first = offset - offset % unit;
        let (Some(last), Ok(start), Ok(len)) =
            (end.checked_next_multiple_of(unit), usize::try_from(offset - first), usize::try_from(size))
        else {
            return Err(range);
        };
        let Ok(mapped_len) = usize::try_from(last - first) else { return Err(range) };
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses a place that nothing else uses.
        let base = unsafe { mmap(std::ptr::null_mut(), mapped_len, access, MapFlags::SHARED, file, first) };
        let base = NonNull::new(base.map_err(io::Error::from)?.cast()).ok_or(range)?;
        Ok(Self { base, mapped_len, start, len })
    }

    /// The byte at `offset`, or `None` behind the end.
    pub(crate) fn byte(&self, offset: usize) -> Option<&AtomicU8> {
        // SAFETY: see `place`; a byte has no alignment.
        self.place(offset, 1, 1).map(|place| unsafe { AtomicU8::from_ptr(place.as_ptr()) })
    }

    /// The 16-bit number at `offset`, or `None` behind the end or where it is not aligned.
    pub(crate) fn half_word(&self, offset: usize) -> Option<&AtomicU16> {
        // SAFETY: see `place`.
        self.place(offset, 2, align_of::<AtomicU16>())
            .map(|place| unsafe { AtomicU16::from_ptr(place.as_ptr().cast()) })
    }

    /// The 64-bit number at `offset`, or `None` behind the end or where it is not aligned.
    pub(crate) fn word(&self, offset: usize) -> Option<&AtomicU64> {
        // SAFETY: see `place`.
        self.place(offset, 8, align_of::<AtomicU64>())
            .map(|place| unsafe { AtomicU64::from_ptr(place.as_ptr().cast()) })
    }

    /// The address of `size` bytes that lie in the mapping, at a multiple of `alignment`. They stay there as long as `self`
    /// does, are initialised (a file's bytes always are), and this process reads and writes them by atomics only.
    fn place(&self, offset: usize, size: usize, alignment: usize) -> Option<NonNull<u8>> {
        if offset.checked_add(size)? > self.len {
            return None;
        }
        // SAFETY: `start + len` is at most the mapping's length, and `offset` is less than `len`.
        let place = unsafe { self.base.add(self.start + offset) };
        place.addr().get().is_multiple_of(alignment).then_some(place)
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and every reference into it has borrowed `self`.
        let _unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.mapped_len) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn the_part_that_was_asked_for_is_reached_and_nothing_else() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10_000).unwrap();
        let mapping = SharedMapping::new(&file, 4104, 100).unwrap();
        mapping.byte(0).unwrap().store(7, Ordering::Relaxed);
        mapping.half_word(98).unwrap().store(0x0201, Ordering::Relaxed);
        mapping.word(8).unwrap().store(0x0807_0605_0403_0201, Ordering::Relaxed);
        let mut bytes = [0; 100];
        file.read_exact_at(&mut bytes, 4104).unwrap();
        assert_eq!((bytes[0], bytes[98], bytes[99]), (7, 1, 2));
        assert_eq!(bytes[8..16], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(mapping.byte(100).is_none() && mapping.half_word(99).is_none() && mapping.word(93).is_none());
        assert!(mapping.half_word(1).is_none() && mapping.word(4).is_none(), "not aligned");
        assert!(mapping.byte(usize::MAX).is_none() && mapping.word(usize::MAX - 3).is_none());
    }

    #[test]
    fn what_cannot_be_mapped_is_refused_by_name() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let map = |offset, size| SharedMapping::new(&file, offset, size).unwrap_err();
        for (offset, size) in [(0, 0), (u64::MAX, 1), (u64::MAX - 10, 11), (4096, u64::MAX), (1 << 63, 1)] {
            assert!(matches!(map(offset, size), MapError::Range { .. }), "{offset} {size}");
        }
        for (offset, size) in [(0, 8193), (8192, 1), (4096, 4097), (0, 1 << 62)] {
            assert!(matches!(map(offset, size), MapError::BeyondFile { .. }), "{offset} {size}");
        }
        let directory = File::open("/").unwrap();
        assert!(matches!(SharedMapping::new(&directory, 0, 1), Err(MapError::Kind)));
    }

    #[test]
    fn a_device_node_is_mapped_in_its_own_unit() {
        // Like device-DAX it has the length 0 and can be mapped; unlike it, any unit is good.
        let node = File::options().read(true).write(true).open("/dev/zero").unwrap();
        let mapping = SharedMapping::new(&node, 4096, 100).unwrap();
        assert_eq!((mapping.mapped_len, mapping.start, mapping.len), (2 << 20, 4096, 100));
        mapping.byte(99).unwrap().store(1, Ordering::Relaxed);
    }
}
