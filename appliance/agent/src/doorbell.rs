//! The doorbell device: eventfds for the signals that go into and out of the appliance.
//!
//! A vector's eventfd is signalled by the device's MSI-X vector; a peer's eventfd, when signalled, makes the kernel write
//! the doorbell register. No signal passes through a process of ours.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vvu_protocol::doorbell::{PeerId, REGISTER_OFFSET, Vector};
use vvu_socket::event;

use crate::uuid::Uuid;
use crate::vfio::{Region, VfioDevice, VfioError};

/// Base address register with the doorbell register, and the one that is the shared memory with the uuid.
const REGISTERS_BAR: u8 = 0;
const SHARED_MEMORY_BAR: u8 = 2;

/// Most peers of one device set. The kernel allows 1,000 eventfds for each device; a call and an error eventfd for each of
/// 64 queues need 128.
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
    #[error("peer {} is named, after {MAX_PEERS} others", peer.0)]
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

/// What a session needs of the doorbell device.
pub trait Doorbell {
    /// The eventfd that is signalled by this vector.
    ///
    /// # Errors
    /// [`DoorbellError::NoVector`].
    fn vector(&self, vector: Vector) -> Result<Arc<OwnedFd>, DoorbellError>;

    /// The eventfd that signals this peer; the same one each time.
    ///
    /// # Errors
    /// [`DoorbellError`].
    fn peer(&mut self, peer: PeerId) -> Result<Arc<OwnedFd>, DoorbellError>;
}

/// The doorbell device.
#[derive(Debug)]
pub struct DoorbellDevice {
    vfio: VfioDevice,
    registers: Region,
    uuid: Uuid,
    vectors: Vec<Arc<OwnedFd>>,
    peers: BTreeMap<PeerId, Arc<OwnedFd>>,
}

impl DoorbellDevice {
    /// Takes a device and switches its interrupts on.
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
        let vectors = (0..vfio.vector_count()?).map(|_| event::create().map(Arc::new));
        let vectors = vectors.collect::<io::Result<Vec<_>>>()?;
        let eventfds = vectors.iter().map(|eventfd| eventfd.as_fd()).collect::<Vec<_>>();
        vfio.enable_vectors(&eventfds)?;
        Ok(Self { vfio, registers, uuid: Uuid(uuid), vectors, peers: BTreeMap::new() })
    }

    /// Identity of the device set that it belongs to.
    #[must_use]
    pub const fn uuid(&self) -> Uuid {
        self.uuid
    }
}

impl Doorbell for DoorbellDevice {
    fn vector(&self, vector: Vector) -> Result<Arc<OwnedFd>, DoorbellError> {
        let found = self.vectors.get(usize::from(vector.0)).cloned();
        found.ok_or(DoorbellError::NoVector { vector, count: self.vectors.len() })
    }

    fn peer(&mut self, peer: PeerId) -> Result<Arc<OwnedFd>, DoorbellError> {
        if let Some(known) = self.peers.get(&peer) {
            return Ok(Arc::clone(known));
        }
        if self.peers.len() >= MAX_PEERS {
            return Err(DoorbellError::TooManyPeers { peer });
        }
        let eventfd = event::create()?;
        self.vfio.write_on_event(&self.registers, REGISTER_OFFSET, peer.doorbell_value(), &eventfd)?;
        let eventfd = Arc::new(eventfd);
        self.peers.insert(peer, Arc::clone(&eventfd));
        Ok(eventfd)
    }
}
