//! The dirty log: which pages of the driver VM's memory the back-end has written, while that VM migrates.
//!
//! The front-end shares a bitmap, and transfers every page again whose bit it finds set; it sets the bits to 0 as it reads
//! them. A write that is not marked is lost on the other side, silently. So a page is marked after it was written and before
//! the driver learns of it, always, even if its bit seems to be set already: the front-end may be about to take that bit
//! together with the page as it was before.
//!
//! Nothing here knows whether the log is wanted. That is LOG_ALL for what requests write, and `VHOST_VRING_F_LOG` of each ring
//! for its used ring.
//!
//! Source: vhost-user specification, section "Migration".

use std::fs::File;
use std::sync::atomic::Ordering;

pub use crate::shared_mapping::MapError;
use crate::shared_mapping::SharedMapping;

/// What one bit stands for, in bytes (`VHOST_LOG_PAGE`).
pub const LOG_PAGE: u64 = 4096;

/// Bits of one byte of the log.
const BITS: u64 = 8;

/// A log of the front-end, mapped. All threads of a device may mark in it at the same time.
#[derive(Debug)]
pub struct DirtyLog {
    bits: SharedMapping,
    /// Number of pages that have a bit.
    page_count: u64,
}

impl DirtyLog {
    /// Maps the log that the front-end sent (SET_LOG_BASE): `size` bytes of `file` from `offset` on. The first bit is that of
    /// guest address 0.
    ///
    /// # Errors
    /// [`MapError`] if the file has no such range.
    pub fn map(file: &File, offset: u64, size: u64) -> Result<Self, MapError> {
        let page_count = size.checked_mul(BITS).ok_or(MapError::Range { offset, size })?;
        Ok(Self { bits: SharedMapping::new(file, offset, size)?, page_count })
    }

    /// Whether the log has a bit for each of the `len` bytes at `guest_address`. To be asked when a log, a region or a used
    /// ring is set up; it holds for no bytes at all.
    #[must_use]
    pub fn covers(&self, guest_address: u64, len: u64) -> bool {
        match pages(guest_address, len) {
            Some((_, last)) => last < self.page_count && guest_address.checked_add(len - 1).is_some(),
            None => true,
        }
    }

    /// Marks the pages of `len` bytes at `guest_address`, after they were written. Pages that the log does not cover are left
    /// out; see [`DirtyLog::covers`].
    pub fn mark(&self, guest_address: u64, len: u64) {
        let Some((first, last)) = pages(guest_address, len) else { return };
        let last = last.min(self.page_count - 1);
        let mut page = first;
        while page <= last {
            let byte = page / BITS;
            let last_of_byte = last.min(byte * BITS + (BITS - 1));
            self.set(byte, mask(page % BITS, last_of_byte % BITS));
            page = last_of_byte + 1;
        }
    }

    /// Release: who finds the bits set finds the bytes written.
    fn set(&self, byte: u64, mask: u8) {
        // Inside the mapping, whose length is a `usize`.
        let place = usize::try_from(byte).ok().and_then(|byte| self.bits.byte(byte));
        if let Some(place) = place {
            place.fetch_or(mask, Ordering::Release);
        }
    }
}

/// First and last page of a range; `None` if it has no bytes. A range over the end of the address space ends there.
fn pages(guest_address: u64, len: u64) -> Option<(u64, u64)> {
    let last = guest_address.saturating_add(len.checked_sub(1)?);
    Some((guest_address / LOG_PAGE, last / LOG_PAGE))
}

/// The bits from `first` to `last`, both less than 8, the lowest bit first.
fn mask(first: u64, last: u64) -> u8 {
    (u8::MAX >> (BITS - 1 - last)) & (u8::MAX << first)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::Barrier;

    use proptest::prelude::*;

    use super::*;

    /// A log between guard bytes, which nobody may touch.
    struct Fixture {
        file: File,
        log: DirtyLog,
        offset: u64,
        size: u64,
    }

    impl Fixture {
        fn new(offset: u64, size: u64) -> Self {
            let file = tempfile::tempfile().unwrap();
            file.set_len(offset + size + 100).unwrap();
            let log = DirtyLog::map(&file, offset, size).unwrap();
            Self { file, log, offset, size }
        }

        /// The pages that are marked, after a check that nothing outside the log has changed.
        fn marked(&self) -> Vec<u64> {
            let mut bytes = vec![0; usize::try_from(self.offset + self.size + 100).unwrap()];
            self.file.read_exact_at(&mut bytes, 0).unwrap();
            let (start, len) = (usize::try_from(self.offset).unwrap(), usize::try_from(self.size).unwrap());
            let log: Vec<u8> = bytes.drain(start..start + len).collect();
            assert!(bytes.iter().all(|byte| *byte == 0), "written outside the log");
            let bits = log.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1));
            (0..).zip(bits).filter_map(|(page, marked)| marked.then_some(page)).collect()
        }
    }

    #[test]
    fn the_bit_of_a_page_is_where_the_specification_says() {
        let fixture = Fixture::new(0, 16);
        fixture.log.mark(0, 1);
        fixture.log.mark(9 * 4096 + 4095, 1);
        fixture.log.mark(127 * 4096, 4096);
        let mut bytes = [0; 16];
        fixture.file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!((bytes[0], bytes[1], bytes[15]), (0b1, 0b10, 0b1000_0000));
        assert_eq!(fixture.marked(), [0, 9, 127]);
    }

    #[test]
    fn bits_that_are_set_stay_set() {
        let fixture = Fixture::new(4096, 2);
        fixture.file.write_all_at(&[0b0100_0001, 0], 4096).unwrap();
        fixture.log.mark(4096, 3 * 4096);
        assert_eq!(fixture.marked(), [0, 1, 2, 3, 6]);
    }

    /// CVE-2020-10722 (DPDK): offset and size of the log overflow, or go beyond the file.
    #[test]
    fn cve_2020_10722_a_log_beyond_its_file_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        for (offset, size) in [
            (0, 0),
            (0, 8193),
            (8192, 1),
            (u64::MAX - 4095, 4096),
            (4096, u64::MAX - 4095),
            (0, u64::MAX),
            (0, 1 << 61),
        ] {
            DirtyLog::map(&file, offset, size).unwrap_err();
        }
        DirtyLog::map(&file, 8, 8184).unwrap();
    }

    /// CVE-2019-14835 (Linux vhost): a length that the log has no room for is marked all the same.
    #[test]
    fn cve_2019_14835_what_the_log_does_not_cover_is_not_written() {
        let fixture = Fixture::new(8, 3);
        let end = 24 * 4096;
        for (address, len) in
            [(end, 1), (end, u64::MAX), (u64::MAX, u64::MAX), (u64::MAX, 1), (end - 1, u64::MAX), (0, 0)]
        {
            fixture.log.mark(address, len);
        }
        assert_eq!(fixture.marked(), [23]);
        fixture.log.mark(0, u64::MAX);
        assert_eq!(fixture.marked().len(), 24);
    }

    #[test]
    fn coverage_is_said_exactly() {
        let log = Fixture::new(0, 3).log;
        let end = 24 * 4096;
        for (address, len) in [(0, end), (end - 1, 1), (0, 0), (u64::MAX, 0), (end, 0)] {
            assert!(log.covers(address, len), "{address} {len}");
        }
        for (address, len) in [(0, end + 1), (end, 1), (end - 1, 2), (u64::MAX, 1), (1, u64::MAX), (4096, u64::MAX)] {
            assert!(!log.covers(address, len), "{address} {len}");
        }
    }

    /// DPDK: marking that is not atomic loses bits that other threads set in the same byte at the same time.
    #[test]
    fn threads_do_not_lose_each_others_bits() {
        const BYTES: u64 = 200_000;
        let fixture = Fixture::new(0, BYTES);
        let barrier = Barrier::new(2);
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (log, barrier) = (&fixture.log, &barrier);
                scope.spawn(move || {
                    for byte in 0..BYTES {
                        // Side by side, so that they meet in the same byte often.
                        if byte.is_multiple_of(10_000) {
                            barrier.wait();
                        }
                        for bit in 0..4 {
                            log.mark((byte * 8 + bit * 2 + thread) * 4096, 1);
                        }
                    }
                });
            }
        });
        assert_eq!(fixture.marked().len() as u64, BYTES * 8);
    }

    proptest! {
        #[test]
        fn marks_are_those_of_a_naive_log(
            offset in 0_u64..5000,
            ranges in prop::collection::vec((0_u64..45 * 4096, 0_u64..30 * 4096), 0..4),
        ) {
            let fixture = Fixture::new(offset, 5);
            let mut expected = std::collections::BTreeSet::new();
            for (address, len) in ranges {
                fixture.log.mark(address, len);
                let touched: Vec<u64> = (0..46 + 30).filter(|page| {
                    let start = page * 4096;
                    len > 0 && start < address + len && address < start + 4096
                }).collect();
                prop_assert_eq!(fixture.log.covers(address, len), touched.iter().all(|page| *page < 40));
                expected.extend(touched.into_iter().filter(|page| *page < 40));
            }
            prop_assert_eq!(fixture.marked(), expected.into_iter().collect::<Vec<_>>());
        }
    }
}
