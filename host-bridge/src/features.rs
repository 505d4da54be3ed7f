//! What the two halves of the proxy carry: everything else is masked out of what a back-end offers, and so never used.

use vvu_protocol::features::{Features, ProtocolFeatures};

/// Protocol features whose messages cross to the appliance.
pub(crate) const CARRIED_PROTOCOL: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::RARP)
    .union(ProtocolFeatures::MTU)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::STATUS);

/// Protocol features that the bridge itself offers, whatever the back-end does: every request is answered by the agent.
pub(crate) const OWN_PROTOCOL: ProtocolFeatures = ProtocolFeatures::REPLY_ACK;

/// Device features that do not cross: no dirty log and no IOTLB messages yet.
pub(crate) const NOT_CARRIED: Features = Features::LOG_ALL.union(Features::ACCESS_PLATFORM);

/// What the front-end is offered of a back-end's device features.
pub(crate) fn offer(back_end: u64) -> Features {
    Features::from_bits_retain(back_end).difference(NOT_CARRIED)
}

/// What the front-end is offered of a back-end's protocol features.
pub(crate) fn offer_protocol(back_end: u64) -> ProtocolFeatures {
    ProtocolFeatures::from_bits_retain(back_end).intersection(CARRIED_PROTOCOL).union(OWN_PROTOCOL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_made_of_bits_and_not_of_bit_numbers() {
        assert_eq!(offer(u64::MAX).bits(), !((1 << 26) | (1 << 33)));
        assert_eq!(
            offer_protocol(u64::MAX).bits(),
            1 | (1 << 2) | (1 << 3) | (1 << 4) | (1 << 9) | (1 << 13) | (1 << 16)
        );
        assert_eq!(offer_protocol(0).bits(), 1 << 3);
    }
}
