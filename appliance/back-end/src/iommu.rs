//! The driver VM's IOMMU, as far as the front-end has told of it, for all rings of a device (vhost-user specification, "IOMMU
//! support").
//!
//! # What an invalidation guarantees
//! When INVALIDATE has been answered, no address is translated by the mapping any more, and no ring is worked on through it:
//! rings whose own structures lay there have let go of them. A request that was taken before keeps the memory that it was
//! translated to until it is returned, as a device with a translation cache of its own does; the memory stays mapped in
//! this process for that long.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use vm_memory::Permissions;
use vvu_protocol::message;

use crate::iotlb::{Access, Iotlb, IotlbError, Miss, TranslateError};
use crate::memory::Memory;
use crate::view::{AccessError, Segment};

/// "IOTLB message type": miss.
const MISS: u8 = 1;

/// "IOTLB message type": invalidate.
const INVALIDATE: u8 = 3;

/// The question for the front-end. As in the kernel's vhost, it is about an address and has no length.
pub(crate) fn miss_message(miss: Miss) -> message::Iotlb {
    message::Iotlb { iova: miss.iova, size: 0, user_address: 0, permission: miss.access.permission(), kind: MISS }
}

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Iommu {
    iotlb: RwLock<Iotlb>,
    invalidations: AtomicU64,
}

/// What a message of the front-end has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// There is more to know: who waits may look again.
    Updated,
    /// Mappings are gone.
    Invalidated,
}

impl Iommu {
    /// Applies a message of the front-end.
    pub(crate) fn apply(&self, message: &message::Iotlb) -> Result<Change, IotlbError> {
        self.iotlb.write().unwrap_or_else(PoisonError::into_inner).apply(message)?;
        if message.kind != INVALIDATE {
            return Ok(Change::Updated);
        }
        // After the change: who sees the new number translates anew and sees the change, too.
        self.invalidations.fetch_add(1, Ordering::Release);
        Ok(Change::Invalidated)
    }

    /// Number of times that mappings were taken back.
    pub(crate) fn invalidations(&self) -> u64 {
        self.invalidations.load(Ordering::Acquire)
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        self.iotlb.write().unwrap_or_else(PoisonError::into_inner).clear();
        self.invalidations.fetch_add(1, Ordering::Release);
    }

    /// Appends the guest-physical pieces of a range of I/O addresses; those that adjoin are merged.
    pub(crate) fn resolve(
        &self,
        memory: &Memory,
        iova: u64,
        len: u32,
        access: Permissions,
        pieces: &mut Vec<Segment>,
    ) -> Result<(), AccessError> {
        let outside = AccessError::OutsideMemory { address: iova, len };
        let mut ranges = Vec::new();
        let needed = [(Permissions::Read, Access::Read), (Permissions::Write, Access::Write)];
        for (_, access) in needed.into_iter().filter(|(permission, _)| access.allow(*permission)) {
            ranges.clear();
            let iotlb = self.iotlb.read().unwrap_or_else(PoisonError::into_inner);
            iotlb.translate(iova, u64::from(len), access, &mut ranges).map_err(|error| match error {
                TranslateError::Miss(miss) => AccessError::Miss(miss),
                TranslateError::Wraps { .. } => outside,
            })?;
        }
        let first = pieces.len();
        for range in ranges {
            // No longer than the whole.
            let len = u32::try_from(range.len).unwrap_or(len);
            if !memory.resolve_user_address(range.address, len, pieces) {
                return Err(outside);
            }
        }
        merge(pieces, first);
        Ok(())
    }
}

/// Merges what adjoins among the pieces from `first` on.
fn merge(pieces: &mut Vec<Segment>, first: usize) {
    let mut end = first;
    for index in first..pieces.len() {
        let Some(piece) = pieces.get(index).copied() else { break };
        let before = end.checked_sub(1).filter(|before| *before >= first).and_then(|before| pieces.get_mut(before));
        match before {
            Some(before) if before.address.0 + u64::from(before.len) == piece.address.0 => before.len += piece.len,
            _ => {
                if let Some(place) = pieces.get_mut(end) {
                    *place = piece;
                }
                end += 1;
            }
        }
    }
    pieces.truncate(end);
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn adjoining_pieces_are_merged_and_others_kept() {
        let segment = |address, len| Segment { address: GuestAddress(address), len };
        let mut pieces = vec![
            segment(0x1000, 0x1000),
            segment(0x2000, 0x1000),
            segment(0x3000, 0x10),
            segment(0x9000, 0x1000),
            segment(0x8000, 0x1000),
            segment(0x9000, 1),
        ];
        merge(&mut pieces, 1);
        let expected =
            [segment(0x1000, 0x1000), segment(0x2000, 0x1010), segment(0x9000, 0x1000), segment(0x8000, 0x1001)];
        assert_eq!(pieces, expected);
    }
}
