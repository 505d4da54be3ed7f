//! The memory table of a front-end.

use crate::DecodeError;
use crate::address::{FileOffset, GuestAddress, UserAddress};
use crate::payload::{Reader, Writer};

/// Most regions in one SET_MEM_TABLE (vhost-user specification, "Memory regions description": at most 8).
pub const MAX_TABLE_REGIONS: usize = 8;

/// Most regions with memory slots (ADD_MEM_REG): as many as KVM and the reference implementations of vhost-user have.
pub const MAX_SLOTS: usize = 509;

/// Page size that regions are aligned to, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// One region of driver memory, 32 bytes on the wire (vhost-user specification, "Memory region description").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Where the driver VM sees it.
    pub guest_address: GuestAddress,
    /// Length in bytes.
    pub size: u64,
    /// Where the front-end's process sees it.
    pub user_address: UserAddress,
    /// Where it starts in the file that comes with it. On the control device the same field carries a window offset
    /// (see [`crate::control`]).
    pub mmap_offset: FileOffset,
}

/// Why regions cannot form a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// A region of no bytes.
    #[error("memory region at guest address {guest_address} is empty")]
    Empty {
        /// The region's start.
        guest_address: GuestAddress,
    },
    /// Start plus size is beyond the end of an address space.
    #[error("memory region at guest address {guest_address} with {size:#x} bytes ends beyond the address space")]
    Overflow {
        /// The region's start.
        guest_address: GuestAddress,
        /// Its length in bytes.
        size: u64,
    },
    /// Start, length or offset is not a multiple of the page size.
    #[error(
        "memory region at guest address {guest_address} is not aligned to pages: {size:#x} bytes at offset {mmap_offset}"
    )]
    Unaligned {
        /// The region's start.
        guest_address: GuestAddress,
        /// Its length in bytes.
        size: u64,
        /// Its offset in its file.
        mmap_offset: FileOffset,
    },
    /// Two regions share guest addresses or user addresses.
    #[error("memory regions at guest addresses {first} and {second} overlap")]
    Overlap {
        /// Start of the lower one.
        first: GuestAddress,
        /// Start of the other one.
        second: GuestAddress,
    },
    /// More regions than there are slots.
    #[error("memory table has {found} regions, at most {limit} are allowed")]
    TooMany {
        /// Regions that came.
        found: usize,
        /// Slots there are.
        limit: usize,
    },
}

impl MemoryRegion {
    /// Length on the wire in bytes.
    pub const LEN: usize = 32;

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            guest_address: GuestAddress(reader.u64()?),
            size: reader.u64()?,
            user_address: UserAddress(reader.u64()?),
            mmap_offset: FileOffset(reader.u64()?),
        })
    }

    pub(crate) fn write(&self, writer: Writer) -> Writer {
        writer.u64(self.guest_address.0).u64(self.size).u64(self.user_address.0).u64(self.mmap_offset.0)
    }

    /// Checks what can be said of one region alone.
    ///
    /// # Errors
    /// [`MemoryError::Empty`], [`MemoryError::Overflow`] or [`MemoryError::Unaligned`].
    pub fn check(&self) -> Result<(), MemoryError> {
        let Self { guest_address, size, mmap_offset, .. } = *self;
        if size == 0 {
            return Err(MemoryError::Empty { guest_address });
        }
        let ends = [self.guest_address.0, self.user_address.0, self.mmap_offset.0];
        if ends.iter().any(|start| start.checked_add(size).is_none()) {
            return Err(MemoryError::Overflow { guest_address, size });
        }
        let aligned = [size, guest_address.0, mmap_offset.0].iter().all(|value| value.is_multiple_of(PAGE_SIZE));
        if aligned { Ok(()) } else { Err(MemoryError::Unaligned { guest_address, size, mmap_offset }) }
    }

    /// First file offset behind the region. Does not overflow on a region that passed [`MemoryRegion::check`].
    #[must_use]
    pub const fn file_end(&self) -> u64 {
        self.mmap_offset.0.saturating_add(self.size)
    }

    /// First guest address behind the region. Does not overflow on a region that passed [`MemoryRegion::check`].
    #[must_use]
    pub const fn guest_end(&self) -> u64 {
        self.guest_address.0.saturating_add(self.size)
    }

    const fn user_end(&self) -> u64 {
        self.user_address.0.saturating_add(self.size)
    }
}

/// Checks that `regions` can form a table of at most `limit` slots.
///
/// # Errors
/// [`MemoryError`] for the first rule that is broken.
pub fn check_table(regions: &[MemoryRegion], limit: usize) -> Result<(), MemoryError> {
    if regions.len() > limit {
        return Err(MemoryError::TooMany { found: regions.len(), limit });
    }
    regions.iter().try_for_each(MemoryRegion::check)?;
    let mut sorted = regions.to_vec();
    sorted.sort_by_key(|region| region.guest_address);
    check_neighbours(&sorted, MemoryRegion::guest_end, |region| region.guest_address.0)?;
    sorted.sort_by_key(|region| region.user_address);
    check_neighbours(&sorted, MemoryRegion::user_end, |region| region.user_address.0)
}

fn check_neighbours(
    sorted: &[MemoryRegion],
    end: impl Fn(&MemoryRegion) -> u64,
    start: impl Fn(&MemoryRegion) -> u64,
) -> Result<(), MemoryError> {
    for (lower, upper) in sorted.iter().zip(sorted.iter().skip(1)) {
        if end(lower) > start(upper) {
            return Err(MemoryError::Overlap { first: lower.guest_address, second: upper.guest_address });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn region(guest: u64, size: u64, user: u64, offset: u64) -> MemoryRegion {
        MemoryRegion {
            guest_address: GuestAddress(guest),
            size,
            user_address: UserAddress(user),
            mmap_offset: FileOffset(offset),
        }
    }

    #[test]
    fn a_pc_memory_map_is_accepted() {
        let user = 0x7f00_0000_0000;
        let table = [
            region(0, 0xa_0000, user, 0),
            region(0xc_0000, 0x8000_0000 - 0xc_0000, user + 0xc_0000, 0xc_0000),
            region(0x1_0000_0000, 0x8000_0000, user + 0x8000_0000, 0x8000_0000),
        ];
        check_table(&table, MAX_TABLE_REGIONS).unwrap();
    }

    #[test]
    fn each_broken_rule_is_named() {
        let user = 0x7f00_0000_0000;
        let good = region(0x1000, 0x1000, user, 0);
        let cases = [
            (vec![region(0x1000, 0, user, 0)], "is empty"),
            (vec![region(u64::MAX - 0xfff, 0x2000, user, 0)], "beyond the address space"),
            (vec![region(0x1000, 0x1000, u64::MAX, 0)], "beyond the address space"),
            (vec![region(0x1000, 0x1000, user, u64::MAX - 0xfff)], "beyond the address space"),
            (vec![region(0x1000, 0x1001, user, 0)], "not aligned"),
            (vec![region(0x1000, 0x1000, user, 0x10)], "not aligned"),
            (vec![good, region(0x1000, 0x1000, user + 0x1000, 0)], "overlap"),
            (vec![good, region(0x9000, 0x1000, user + 0xfff, 0)], "overlap"),
            (vec![good; 9], "at most 8"),
        ];
        for (table, expected) in cases {
            let message = check_table(&table, MAX_TABLE_REGIONS).unwrap_err().to_string();
            assert!(message.contains(expected), "{message} does not say {expected}");
        }
    }
}
