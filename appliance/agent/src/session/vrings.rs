//! What a session has to remember of its vrings: what is needed to find the place where a lost back-end stopped.

use std::collections::{BTreeMap, BTreeSet};

use vvu_protocol::address::UserAddress;
use vvu_protocol::features::Features;
use vvu_protocol::message::FrontEndRequest;

use super::refusal::Refusal;

/// Most vrings: SET_VRING_KICK has 8 bits for the index.
const MAX_VRINGS: u32 = 256;

/// Distance of the index from the start of a used ring in bytes (virtio 1.3, section 2.7.8, "The Virtqueue Used Ring").
const USED_INDEX: u64 = 2;

/// What a request says about vrings, if the back-end takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fact {
    Features(Features),
    UsedRing { index: u32, address: UserAddress },
    HasInflightBuffer,
    Started(u32),
    Stopped(u32),
    AllStopped,
}

impl Fact {
    pub(super) fn of<F>(request: &FrontEndRequest<F>) -> Option<Self> {
        use FrontEndRequest as R;
        match request {
            R::SetFeatures(features) => Some(Self::Features(*features)),
            R::SetVringAddr(addresses) if addresses.index < MAX_VRINGS => {
                Some(Self::UsedRing { index: addresses.index, address: UserAddress(addresses.used) })
            }
            R::SetInflightFd(..) => Some(Self::HasInflightBuffer),
            R::SetVringKick(file) => Some(Self::Started(u32::from(file.index))),
            R::GetVringBase(state) => Some(Self::Stopped(state.index)),
            R::ResetOwner | R::ResetDevice => Some(Self::AllStopped),
            _ => None,
        }
    }
}

/// Where a vring goes on after its back-end was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Position {
    /// At the number that stands at this address.
    UsedIndexAt(UserAddress),
    /// Nobody but the back-end can tell: it has the inflight buffer, and takes the position from there and from the ring,
    /// whatever it is told.
    InflightBuffer,
}

/// The vrings of one session.
#[derive(Debug)]
pub(super) struct Vrings {
    features: Features,
    used_rings: BTreeMap<u32, UserAddress>,
    has_inflight_buffer: bool,
    running: BTreeSet<u32>,
}

impl Vrings {
    pub(super) const fn new() -> Self {
        Self {
            features: Features::empty(),
            used_rings: BTreeMap::new(),
            has_inflight_buffer: false,
            running: BTreeSet::new(),
        }
    }

    pub(super) fn note(&mut self, fact: Fact) {
        match fact {
            Fact::Features(features) => self.features = features,
            Fact::UsedRing { index, address } => drop(self.used_rings.insert(index, address)),
            Fact::HasInflightBuffer => self.has_inflight_buffer = true,
            Fact::Started(index) => drop(self.running.insert(index)),
            Fact::Stopped(index) => drop(self.running.remove(&index)),
            Fact::AllStopped => self.running.clear(),
        }
    }

    /// Whether requests may be under way.
    pub(super) fn are_running(&self) -> bool {
        !self.running.is_empty()
    }

    /// Where vring `index` goes on.
    ///
    /// The index of a split ring's used ring counts the requests that are done, so the next one is there; QEMU takes it for
    /// a lost back-end, too. A packed ring has no such index, and with an IOMMU in the driver VM the ring's address
    /// means nothing here: then the position is left to the inflight buffer.
    pub(super) fn position(&self, index: u32) -> Result<Position, Refusal> {
        let unknown = if self.features.contains(Features::RING_PACKED) {
            Some("a packed ring has no index of requests that are done")
        } else if self.features.contains(Features::ACCESS_PLATFORM) {
            Some("its address passes an IOMMU of the driver VM")
        } else {
            None
        };
        match unknown {
            Some(_) if self.has_inflight_buffer => Ok(Position::InflightBuffer),
            Some(reason) => Err(Refusal::NotFound { index, reason }),
            None => {
                let address = self.used_rings.get(&index).ok_or(Refusal::NoAddress { index })?;
                let address = address.checked_add(USED_INDEX);
                Ok(Position::UsedIndexAt(address.ok_or(Refusal::NoAddress { index })?))
            }
        }
    }
}
