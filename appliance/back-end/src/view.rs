//! What one ring sees of the driver VM, as it is at one moment: memory, IOMMU and dirty log.
//!
//! Every address that the driver writes into a ring or a table goes through [`View::resolve`], once. What comes out are
//! guest-physical [`Segment`]s of the view's own memory; nobody translates them again, and the dirty log speaks of them too.

use std::sync::Arc;

use vm_memory::{Address, GuestAddress, Permissions};
use vvu_protocol::address::UserAddress;

use crate::dirty_log::DirtyLog;
use crate::iommu::Iommu;
use crate::iotlb::Miss;
use crate::memory::Memory;

/// A contiguous range of guest-physical addresses, inside of the memory that it was checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub address: GuestAddress,
    /// Length in bytes; more than 0.
    pub len: u32,
}

/// Why a range cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// It is not all driver memory.
    #[error("{address:#x}+{len:#x} is not driver memory")]
    OutsideMemory {
        /// First byte.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// The front-end has to be asked for it first. Not an error of the driver.
    #[error("{0}")]
    Miss(Miss),
}

/// See the module's text.
#[derive(Debug, Clone)]
pub struct View {
    pub(crate) memory: Arc<Memory>,
    /// Present if ACCESS_PLATFORM was negotiated.
    pub(crate) iommu: Option<Arc<Iommu>>,
    /// Present if LOG_ALL is set.
    pub(crate) log: Option<Arc<DirtyLog>>,
    /// Present if the used ring is logged, too: its guest-physical address for the log.
    pub(crate) used_ring_log: Option<u64>,
}

impl View {
    /// Driver memory at this moment.
    #[must_use]
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Appends the pieces of a range that the driver named, checked to be memory. Adjoining pieces of one call are merged.
    ///
    /// # Errors
    /// [`AccessError`]; pieces may have been appended then.
    pub fn resolve(
        &self,
        address: u64,
        len: u32,
        access: Permissions,
        pieces: &mut Vec<Segment>,
    ) -> Result<(), AccessError> {
        if let Some(iommu) = &self.iommu {
            return iommu.resolve(&self.memory, address, len, access, pieces);
        }
        let start = GuestAddress(address);
        let fits = start.checked_add(u64::from(len)).is_some();
        if !fits || !self.memory.check_range(start, len as usize) {
            return Err(AccessError::OutsideMemory { address, len });
        }
        pieces.push(Segment { address: start, len });
        Ok(())
    }

    /// The pieces of a part of a ring. The front-end names rings by its own addresses, with an IOMMU by I/O addresses.
    pub(crate) fn resolve_ring(
        &self,
        address: u64,
        len: u32,
        access: Permissions,
    ) -> Result<Vec<Segment>, AccessError> {
        let mut pieces = Vec::new();
        if self.iommu.is_some() {
            self.resolve(address, len, access, &mut pieces)?;
        } else if !self.memory.resolve_user_address(UserAddress(address), len, &mut pieces) {
            return Err(AccessError::OutsideMemory { address, len });
        }
        Ok(pieces)
    }

    /// Number of times that the IOMMU has taken mappings back; always the same without one.
    pub(crate) fn invalidations(&self) -> u64 {
        self.iommu.as_ref().map_or(0, |iommu| iommu.invalidations())
    }

    /// Notes that the device has written these bytes, if writes are logged. To be called after the write and before the
    /// driver learns of it.
    pub fn mark_written(&self, segment: Segment) {
        if let Some(log) = &self.log {
            log.mark(segment.address.0, u64::from(segment.len));
        }
    }
}
