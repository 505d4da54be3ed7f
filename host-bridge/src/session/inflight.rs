//! The buffer with the requests in flight: made here, kept by the front-end, or by the bridge for a front-end that has none.
//!
//! What a back-end writes into it is its own affair (vhost-user specification, "Inflight I/O tracking"); here only lengths
//! count. The layouts that the specification recommends are assumed to be the largest.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vvu_protocol::address::FileOffset;
use vvu_protocol::memory::PAGE_SIZE;
use vvu_protocol::message::Inflight;
use vvu_protocol::window::{ALIGNMENT, BufferError, INFLIGHT_LEN};

/// Bytes of a queue before its entries: 32 for a packed ring, up to the next cache line.
const QUEUE_LEN: u64 = 64;

/// Bytes of each entry of a packed ring, the larger of the two layouts.
const ENTRY_LEN: u64 = 32;

/// The same two for a split ring, the smaller one: a buffer with less cannot be meant.
const QUEUE_LEN_MIN: u64 = 16;
const ENTRY_LEN_MIN: u64 = 16;

/// Largest buffer: two of them fit the window.
const LEN_MAX: u64 = INFLIGHT_LEN / 2;

/// Entries that a buffer of the bridge's own has for each queue, at least.
pub(super) const OWN_QUEUE_SIZE_MIN: u16 = 1024;

/// Why an inflight buffer is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum InflightError {
    #[error("{found} queues, the device has {count}")]
    Queues { found: u16, count: usize },
    #[error("{len:#x} bytes for {queue_count} queues of {queue_size} entries")]
    Size { len: u64, queue_count: u16, queue_size: u16 },
    #[error("its file ends within a page")]
    Unaligned,
    #[error("a vring of {found} entries, the inflight buffer was made for {limit}: set the largest vring first")]
    LargeVring { found: u32, limit: u16 },
    #[error("buffer")]
    Buffer(#[from] BufferError),
    #[error("memory for it")]
    Io(#[from] io::Error),
}

/// A description for `queue_count` queues of `queue_size` entries.
///
/// # Errors
/// [`InflightError`] if there are no such queues, or if that is more than the window has room for.
pub(super) fn describe(queue_count: u16, queue_size: u16, device_queues: usize) -> Result<Inflight, InflightError> {
    check_queues(queue_count, device_queues)?;
    let wanted = u64::from(queue_count) * (QUEUE_LEN + u64::from(queue_size) * ENTRY_LEN);
    // A front-end that migrates has a file of just this length, and only whole pages can be mapped.
    let mmap_size = wanted.next_multiple_of(PAGE_SIZE);
    if queue_size == 0 || mmap_size > LEN_MAX {
        return Err(InflightError::Size { len: LEN_MAX, queue_count, queue_size });
    }
    Ok(Inflight { mmap_size, mmap_offset: FileOffset(0), queue_count, queue_size })
}

/// Checks a description that comes from outside.
///
/// # Errors
/// [`InflightError`].
pub(super) fn check(inflight: &Inflight, device_queues: usize) -> Result<(), InflightError> {
    let Inflight { mmap_size: len, queue_count, queue_size, .. } = *inflight;
    check_queues(queue_count, device_queues)?;
    let least = u64::from(queue_count) * (QUEUE_LEN_MIN + u64::from(queue_size) * ENTRY_LEN_MIN);
    let fits = queue_size != 0 && least <= len && len <= LEN_MAX;
    if fits { Ok(()) } else { Err(InflightError::Size { len, queue_count, queue_size }) }
}

fn check_queues(found: u16, count: usize) -> Result<(), InflightError> {
    let exist = found != 0 && usize::from(found) <= count;
    if exist { Ok(()) } else { Err(InflightError::Queues { found, count }) }
}

/// A file for it, zeroed, that can neither shrink nor grow.
///
/// # Errors
/// If the process or the system has too many open files.
pub(super) fn buffer(inflight: &Inflight) -> io::Result<OwnedFd> {
    let file = memfd_create("vvu-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, inflight.mmap_size.next_multiple_of(ALIGNMENT))?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_device_fits_twice() {
        let largest = describe(64, 1024, 64).unwrap();
        assert!(largest.mmap_size.next_multiple_of(ALIGNMENT) <= LEN_MAX);
        check(&largest, 64).unwrap();
        assert!(matches!(describe(64, 4096, 64), Err(InflightError::Size { .. })));
    }

    /// hardening: `num_queues` of SET_INFLIGHT_FD unchecked (CVE-2021-3839).
    #[test]
    fn descriptions_are_checked() {
        let good = describe(2, 128, 2).unwrap();
        assert_eq!(good.mmap_size % PAGE_SIZE, 0);
        check(&good, 2).unwrap();
        let bad = [
            Inflight { queue_count: 3, ..good },
            Inflight { queue_count: 0, ..good },
            Inflight { queue_count: u16::MAX, ..good },
            Inflight { queue_size: 0, ..good },
            Inflight { queue_size: u16::MAX, ..good },
            Inflight { mmap_size: 0, ..good },
            Inflight { mmap_size: 2 * (16 + 128 * 16) - 1, ..good },
            Inflight { mmap_size: LEN_MAX + 1, ..good },
            Inflight { mmap_size: u64::MAX, ..good },
        ];
        for inflight in bad {
            assert!(check(&inflight, 2).is_err(), "{inflight:?}");
        }
        assert!(describe(0, 128, 2).is_err() && describe(3, 128, 2).is_err() && describe(1, 0, 2).is_err());
    }

    #[test]
    fn a_buffer_is_zeroed_and_sealed() {
        let inflight = describe(1, 128, 1).unwrap();
        let file = buffer(&inflight).unwrap();
        assert!(rustix::fs::ftruncate(&file, 0).is_err());
        assert!(rustix::fs::fstat(&file).unwrap().st_size.unsigned_abs().is_multiple_of(ALIGNMENT));
    }
}
