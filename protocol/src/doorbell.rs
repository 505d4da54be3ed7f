//! The ivshmem protocol: how the bridge hands eventfds to the appliance's doorbell device.
//!
//! The bridge is the server, QEMU's `ivshmem-doorbell` the client. A *vector* carries a signal into the appliance (an
//! MSI-X vector of the device), a *peer* carries one out of it (a number that the appliance writes into the doorbell
//! register). Rules of QEMU 11 that the types and comments here stand for: an id that has gone must never be announced
//! again, and vectors can be added but not replaced.
//!
//! Source: QEMU documentation, "Device Specification for Inter-VM shared memory device", sections "Client-Server protocol"
//! and "Doorbell register".

/// Version of the protocol: the first message of the server.
pub const VERSION: i64 = 0;

/// Value of the message that carries the shared memory.
const SHARED_MEMORY: i64 = -1;

/// Peer id that the bridge gives to the appliance's own device.
pub const OWN_PEER: PeerId = PeerId(0);

/// Offset of the doorbell register in BAR 0, in bytes. The register takes 32-bit writes.
pub const REGISTER_OFFSET: u64 = 12;

/// Largest number of vectors of a doorbell device: MSI-X has no more (PCI 3.0, section 6.8.2.3).
pub const MAX_VECTORS: u16 = 2048;

/// How many vectors a doorbell device is best given for `queue_count` queues, 64 at most: one for each to which the bridge
/// relays its kicks, and others for eventfds of the front-end, of which each start of a queue may bring a new one. They are
/// never given back, so there are enough for 31 starts of each queue at least, and for 255 of a device with one.
#[must_use]
pub const fn vector_count(queue_count: u16) -> u16 {
    let handed_over = match queue_count.saturating_mul(32) {
        few if few < 255 => 255,
        many => many,
    };
    match queue_count.saturating_add(handed_over) {
        count if count > MAX_VECTORS => MAX_VECTORS,
        count => count,
    }
}

/// Identity of a signal out of the appliance. Used once and never again while the doorbell device lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(pub u16);

/// Number of a signal into the appliance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vector(pub u16);

impl PeerId {
    /// What to write into the doorbell register to signal this peer's only vector.
    #[must_use]
    pub const fn doorbell_value(self) -> u32 {
        (self.0 as u32) << 16
    }
}

/// A message of the server. `F` stands for a file descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerMessage<F> {
    /// First: the protocol version.
    Version,
    /// Second: the client's own id.
    OwnId(PeerId),
    /// Third: the shared memory.
    SharedMemory(F),
    /// The next vector of this peer; for the client's own id, the next vector of its own.
    Vector(PeerId, F),
    /// This peer has gone.
    Gone(PeerId),
}

impl<F> ServerMessage<F> {
    /// The 8 bytes of the message and the descriptor beside them.
    #[must_use]
    pub fn encode(self) -> ([u8; 8], Option<F>) {
        let (value, descriptor) = match self {
            Self::Version => (VERSION, None),
            Self::OwnId(id) | Self::Gone(id) => (i64::from(id.0), None),
            Self::SharedMemory(descriptor) => (SHARED_MEMORY, Some(descriptor)),
            Self::Vector(id, descriptor) => (i64::from(id.0), Some(descriptor)),
        };
        (value.to_le_bytes(), descriptor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_queue_has_a_vector_and_starts_to_spare() {
        for queues in 1..=64 {
            let count = vector_count(queues);
            assert!(count <= MAX_VECTORS && (count - queues) / queues >= 31, "{count} vectors for {queues} queues");
        }
        assert_eq!((vector_count(1), vector_count(64)), (256, 2048));
    }

    #[test]
    fn golden_bytes() {
        assert_eq!(ServerMessage::<u8>::Version.encode(), ([0; 8], None));
        assert_eq!(ServerMessage::<u8>::OwnId(PeerId(3)).encode(), ([3, 0, 0, 0, 0, 0, 0, 0], None));
        assert_eq!(ServerMessage::SharedMemory(9).encode(), ([0xff; 8], Some(9)));
        assert_eq!(ServerMessage::Vector(PeerId(0x102), 7).encode(), ([2, 1, 0, 0, 0, 0, 0, 0], Some(7)));
        assert_eq!(PeerId(0x12).doorbell_value(), 0x12_0000);
    }
}
