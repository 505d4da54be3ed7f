//! The doorbell device: eventfds for the signals that go into and out of the appliance.
//!
//! A vector's eventfd is signalled by the device's MSI-X vector; a peer's eventfd, when signalled, makes the kernel write
//! the doorbell register. No signal passes through a process of ours.
//!
//! The bridge may name a vector or a peer at any time after it was announced to the device, and not before: so nothing is
//! switched on until it is named, and what the back-end uses no longer is switched off again. However many are named in the
//! life of a device set, the kernel holds no more of them than are in use.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use tracing::warn;
use vvu_protocol::doorbell::{PeerId, REGISTER_OFFSET, Vector};
use vvu_socket::event;

use crate::uuid::Uuid;
use crate::vfio::{Region, VfioDevice, VfioError};

/// Base address register with the doorbell register, and the one that is the shared memory with the uuid.
const REGISTERS_BAR: u8 = 0;
const SHARED_MEMORY_BAR: u8 = 2;

/// Most peers of one device set at a time. The kernel allows 1,000 eventfds for each device; a call and an error eventfd for
/// each of 64 queues need 128.
pub const MAX_PEERS: usize = 512;

/// Why there is no eventfd.
#[derive(Debug, thiserror::Error)]
pub enum DoorbellError {
    /// The doorbell device does not have this vector.
    #[error("vector {} is named, the doorbell device has {count}", vector.0)]
    NoVector {
        /// Vector that is asked for.
        vector: Vector,
        /// Number of vectors.
        count: usize,
    },
    /// Too many peers.
    #[error("peer {} is named, beside {MAX_PEERS} others", peer.0)]
    TooManyPeers {
        /// Peer that is asked for.
        peer: PeerId,
    },
    /// VFIO refuses.
    #[error("doorbell device")]
    Vfio(#[from] VfioError),
    /// No eventfd could be made.
    #[error("eventfd for the doorbell device")]
    Io(#[from] io::Error),
}

/// Signals that the back-end of a session may use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SignalsInUse {
    /// Signals into the appliance: kicks.
    pub vectors: BTreeSet<Vector>,
    /// Signals out of the appliance: calls, errors, and updates of the dirty log.
    pub peers: BTreeSet<PeerId>,
}

/// What a session needs of the doorbell device.
pub trait Doorbell {
    /// The eventfd that is signalled by this vector; the same one each time until it is given up.
    ///
    /// # Errors
    /// [`DoorbellError`].
    fn vector(&mut self, vector: Vector) -> Result<Arc<OwnedFd>, DoorbellError>;

    /// The eventfd that signals this peer; the same one each time until it is given up.
    ///
    /// # Errors
    /// [`DoorbellError`].
    fn peer(&mut self, peer: PeerId) -> Result<Arc<OwnedFd>, DoorbellError>;

    /// Gives up all vectors and peers but these.
    fn keep_only(&mut self, in_use: &SignalsInUse);
}

/// The doorbell device.
#[derive(Debug)]
pub struct DoorbellDevice {
    vfio: VfioDevice,
    registers: Region,
    uuid: Uuid,
    vector_count: usize,
    vectors: BTreeMap<Vector, Arc<OwnedFd>>,
    peers: BTreeMap<PeerId, Arc<OwnedFd>>,
}

impl DoorbellDevice {
    /// Takes a device and switches its interrupts on, each of them masked.
    ///
    /// # Errors
    /// [`DoorbellError`].
    pub fn new(vfio: VfioDevice) -> Result<Self, DoorbellError> {
        let shared_memory = vfio.bar(SHARED_MEMORY_BAR)?;
        let mut uuid = [0; 16];
        for (offset, bytes) in (0..).step_by(4).zip(uuid.chunks_exact_mut(4)) {
            bytes.copy_from_slice(&shared_memory.read_u32(offset)?.to_le_bytes());
        }
        let registers = vfio.bar(REGISTERS_BAR)?;
        let vector_count = vfio.enable_msix()?;
        Ok(Self { vfio, registers, uuid: Uuid(uuid), vector_count, vectors: BTreeMap::new(), peers: BTreeMap::new() })
    }

    /// Identity of the device set that it belongs to.
    #[must_use]
    pub const fn uuid(&self) -> Uuid {
        self.uuid
    }
}

impl Doorbell for DoorbellDevice {
    fn vector(&mut self, vector: Vector) -> Result<Arc<OwnedFd>, DoorbellError> {
        if let Some(known) = self.vectors.get(&vector) {
            return Ok(Arc::clone(known));
        }
        if usize::from(vector.0) >= self.vector_count {
            return Err(DoorbellError::NoVector { vector, count: self.vector_count });
        }
        let eventfd = Arc::new(event::create()?);
        self.vfio.set_vector(vector.0, Some(eventfd.as_fd()))?;
        self.vectors.insert(vector, Arc::clone(&eventfd));
        Ok(eventfd)
    }

    fn peer(&mut self, peer: PeerId) -> Result<Arc<OwnedFd>, DoorbellError> {
        if let Some(known) = self.peers.get(&peer) {
            return Ok(Arc::clone(known));
        }
        if self.peers.len() >= MAX_PEERS {
            return Err(DoorbellError::TooManyPeers { peer });
        }
        let eventfd = Arc::new(event::create()?);
        self.vfio.write_on_event(&self.registers, REGISTER_OFFSET, peer.doorbell_value(), eventfd.as_fd())?;
        self.peers.insert(peer, Arc::clone(&eventfd));
        Ok(eventfd)
    }

    fn keep_only(&mut self, in_use: &SignalsInUse) {
        let Self { vfio, registers, vectors, peers, .. } = self;
        vectors.retain(|vector, _| {
            in_use.vectors.contains(vector) || {
                let disabled = vfio.set_vector(vector.0, None);
                disabled.unwrap_or_else(|error| warn!(vector = vector.0, %error, "cannot be switched off"));
                false
            }
        });
        peers.retain(|peer, _| {
            in_use.peers.contains(peer) || {
                let dropped = vfio.write_no_longer(registers, REGISTER_OFFSET, peer.doorbell_value());
                dropped.unwrap_or_else(|error| warn!(peer = peer.0, %error, "cannot be given up"));
                false
            }
        });
    }
}
