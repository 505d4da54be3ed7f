//! Why a ring does not go on: for good, or until the front-end has given something.

use vm_memory::GuestMemoryError;

use crate::chain::ChainError;
use crate::inflight::InflightError;
use crate::iotlb::Miss;
use crate::view::AccessError;

/// Why a ring breaks.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// Virtio knows no such ring.
    #[error("ring has {size} entries, expected a power of two up to {max}")]
    Size {
        /// What the front-end has set.
        size: u16,
        /// What the device serves.
        max: u16,
    },
    /// The front-end has set no addresses.
    #[error("ring has no addresses")]
    NoAddresses,
    /// Part of the ring cannot be reached.
    #[error("ring: {part}")]
    Place {
        /// Which part.
        part: &'static str,
        /// Cause.
        source: AccessError,
    },
    /// A part of the ring does not begin where it has to (virtio 1.3, section 2.7).
    #[error("ring: {part} is not aligned")]
    Unaligned {
        /// Which part.
        part: &'static str,
    },
    /// The log of the used ring does not cover it.
    #[error("the dirty log does not cover the used ring at {address:#x}")]
    Log {
        /// Address for the log.
        address: u64,
    },
    /// The driver made more available than the ring holds.
    #[error("avail index is {avail}, more than {size} beyond {next}")]
    AvailIndex {
        /// The driver's index.
        avail: u16,
        /// Position up to which heads were taken.
        next: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A head that is no descriptor of the table.
    #[error("head {head} is outside of a ring of {size} entries")]
    Head {
        /// What came.
        head: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// The request of this head has not been returned.
    #[error("head {head} is made available again while in flight")]
    DuplicateHead {
        /// What came.
        head: u16,
    },
    /// A chain that is none.
    #[error("chain of head {head}")]
    Chain {
        /// Its head.
        head: u16,
        /// Cause.
        source: ChainError,
    },
    /// The inflight buffer has no room for this ring.
    #[error("inflight tracking")]
    Inflight(#[from] InflightError),
    /// The table has lost the ring's memory and may get it back with the next change.
    #[error("ring lies in memory that was just removed")]
    BetweenTables,
    /// The front-end has answered that it knows no mapping for an address that the driver uses.
    #[error("the IOMMU has no mapping: {0}")]
    NoMapping(Miss),
    /// The ring's memory is gone.
    #[error("ring cannot be accessed")]
    Memory(#[from] GuestMemoryError),
}

/// What a ring that is not broken can wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// A mapping that the front-end has to be asked for.
    Mapping(Miss),
    /// The next change of the memory table.
    Table,
}

impl RingError {
    /// The ring is not broken, it has to wait ([`crate::Service::pause`]).
    #[must_use]
    pub fn pause(&self) -> Option<Pause> {
        match self {
            Self::Place { source: AccessError::Miss(miss), .. }
            | Self::Chain { source: ChainError::Access(AccessError::Miss(miss)), .. } => Some(Pause::Mapping(*miss)),
            Self::BetweenTables => Some(Pause::Table),
            _ => None,
        }
    }
}
