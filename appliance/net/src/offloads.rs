//! What a sender leaves to others, and what a receiver takes over: feature bits of virtio 1.3, section 5.1.3, as one set.

use bitflags::bitflags;

use crate::features;
use crate::layers::{Network, Transport};

bitflags! {
    /// For a sender: what it may leave to the device. For a receiver: what the device may leave to it.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Offloads: u8 {
        /// Checksums of TCP and UDP that are not complete.
        const CHECKSUM = 1 << 0;
        /// TCP over IPv4 in packets that are to be cut.
        const TCP4 = 1 << 1;
        /// TCP over IPv6 in packets that are to be cut.
        const TCP6 = 1 << 2;
        /// UDP over IPv4 in packets that are to be cut.
        const UDP4 = 1 << 3;
        /// UDP over IPv6 in packets that are to be cut.
        const UDP6 = 1 << 4;
    }
}

impl Offloads {
    /// The one that packets of these protocols need to be cut by others.
    pub(crate) fn segmentation(network: Network, transport: Transport) -> Self {
        match (network, transport) {
            (Network::V4, Transport::Tcp) => Self::TCP4,
            (Network::V6, Transport::Tcp) => Self::TCP6,
            (Network::V4, Transport::Udp) => Self::UDP4,
            (Network::V6, Transport::Udp) => Self::UDP6,
        }
    }

    /// What a driver with these features may leave to the device. None of them works without checksums (section 5.1.3.1).
    pub(crate) fn of_sender(features: u64) -> Self {
        let pairs = [
            (features::HOST_TSO4, Self::TCP4),
            (features::HOST_TSO6, Self::TCP6),
            (features::HOST_USO, Self::UDP4.union(Self::UDP6)),
        ];
        Self::with_checksum(features & features::CSUM != 0, features, &pairs)
    }

    /// What the device may leave to a driver with these features.
    pub(crate) fn of_receiver(features: u64) -> Self {
        Self::with_checksum(features & features::GUEST_CSUM != 0, features, &RECEIVER)
    }

    /// The set as the driver names it in a command: by feature bits (section 5.1.6.5.6).
    pub(crate) fn of_command(bits: u64) -> Self {
        Self::of_receiver(bits)
    }

    /// Feature bits that a driver may name in a command.
    pub(crate) const fn command_bits() -> u64 {
        features::GUEST_CSUM | features::GUEST_TSO4 | features::GUEST_TSO6 | features::GUEST_USO4 | features::GUEST_USO6
    }

    fn with_checksum(checksum: bool, features: u64, pairs: &[(u64, Self)]) -> Self {
        if !checksum {
            return Self::empty();
        }
        let chosen = pairs.iter().filter(|(feature, _)| features & feature != 0);
        chosen.fold(Self::CHECKSUM, |all, (_, offload)| all | *offload)
    }
}

const RECEIVER: [(u64, Offloads); 4] = [
    (features::GUEST_TSO4, Offloads::TCP4),
    (features::GUEST_TSO6, Offloads::TCP6),
    (features::GUEST_USO4, Offloads::UDP4),
    (features::GUEST_USO6, Offloads::UDP6),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_works_without_checksums() {
        let sender = features::CSUM | features::HOST_TSO4 | features::HOST_USO;
        assert_eq!(Offloads::of_sender(sender), Offloads::all() - Offloads::TCP6);
        assert_eq!(Offloads::of_sender(sender & !features::CSUM), Offloads::empty());
        assert_eq!(Offloads::of_receiver(sender), Offloads::empty(), "the two directions have bits of their own");
        let receiver = features::GUEST_CSUM | features::GUEST_TSO6 | features::GUEST_USO6;
        assert_eq!(Offloads::of_receiver(receiver), Offloads::CHECKSUM | Offloads::TCP6 | Offloads::UDP6);
    }
}
