//! What of vhost-user crosses between the socket and the appliance: one table that bridge, agent and document share.
//!
//! A message that does not cross is kept away by its feature: the bridge never offers it ([`PROTOCOL_FEATURES`]). If it
//! comes all the same, it is refused with the reason that stands here. Device features all cross.

use crate::features::ProtocolFeatures;

/// Protocol features whose messages cross to the appliance.
pub const PROTOCOL_FEATURES: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::RARP)
    .union(ProtocolFeatures::MTU)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::STATUS)
    .union(ProtocolFeatures::LOG_SHMFD)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::DEVICE_STATE)
    .union(ProtocolFeatures::GET_VRING_BASE_INFLIGHT);

/// Protocol features that the bridge offers by itself, whatever the back-end does: the agent answers every request, and keeps
/// the list of memory slots.
pub const OWN_PROTOCOL_FEATURES: ProtocolFeatures =
    ProtocolFeatures::REPLY_ACK.union(ProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// What a front-end is offered of a back-end's protocol features.
#[must_use]
pub const fn offer_protocol(back_end: ProtocolFeatures) -> ProtocolFeatures {
    back_end.intersection(PROTOCOL_FEATURES).union(OWN_PROTOCOL_FEATURES)
}

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carriage {
    /// It crosses as it is, and its answer too.
    Carried,
    /// It crosses with handles in place of descriptors, and window offsets in place of file offsets.
    Translated,
    /// It crosses, and the bridge masks the answer, or the value on its way.
    Masked,
    /// The bridge answers it by itself.
    Answered,
    /// It does not cross.
    Refused(&'static str),
}

use Carriage::{Answered, Carried, Masked, Refused, Translated};

const NO_INBAND: &str = "INBAND_NOTIFICATIONS is not offered: eventfds do the same without a message";
const NO_POSTCOPY: &str = "postcopy: a userfaultfd serves one host's page tables, not another VM's";
const NO_SHARED_OBJECTS: &str = "shared objects are dma-bufs of the host";

/// What happens to a request of the front-end, by its code.
#[must_use]
pub const fn front_end(code: u32) -> Carriage {
    match code {
        1 | 2 | 15 | 16 | 17 => Masked,
        3 | 4 | 8..=11 | 18..=20 | 22 | 24 | 25 | 34 | 39 | 40 | 43 => Carried,
        5..=7 | 12..=14 | 21 | 32 | 37 | 38 | 42 => Translated,
        31 | 36 => Answered,
        23 => Refused("CROSS_ENDIAN is not offered: legacy devices of the other byte order"),
        26 | 27 => Refused("crypto sessions have no fixed form on the wire"),
        28..=30 => Refused(NO_POSTCOPY),
        33 => Refused("the display's socket cannot cross"),
        35 => Refused(NO_INBAND),
        41 => Refused(NO_SHARED_OBJECTS),
        44 => Refused("shared memory regions of the device lie in the driver VM's VMM"),
        _ => Refused("not known"),
    }
}

/// What happens to a request of the back-end, by its code.
#[must_use]
pub const fn back_end(code: u32) -> Carriage {
    match code {
        1 | 2 => Carried,
        3 => Refused("HOST_NOTIFIER is not offered: a register of the appliance cannot be mapped into the driver VM"),
        4 | 5 => Refused(NO_INBAND),
        6..=8 => Refused(NO_SHARED_OBJECTS),
        9 | 10 => Refused("shared memory regions of the device lie in the driver VM's VMM"),
        _ => Refused("not known"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{BACK_END_REQUESTS, FRONT_END_REQUESTS, FrontEndRequest, Header, RawMessage, RequestRow};

    const DOCUMENT: &str = include_str!("../../docs/protocol.md");

    /// The table's row for a request, as the document has it.
    fn document_row(row: &RequestRow, carriage: Carriage) -> String {
        let treatment = match carriage {
            Carried => "carried".to_owned(),
            Translated => "carried, descriptors as handles".to_owned(),
            Masked => "carried, masked by the bridge".to_owned(),
            Answered => "answered by the bridge".to_owned(),
            Refused(reason) => format!("refused: {reason}"),
        };
        format!("| {} | {} | {treatment} |", row.code, row.name)
    }

    #[test]
    fn masks_are_made_of_bits_and_not_of_bit_numbers() {
        let all = ProtocolFeatures::from_bits_retain(u64::MAX);
        let bits = [0, 1, 2, 3, 4, 5, 9, 12, 13, 15, 16, 19, 20];
        let expected = bits.iter().fold(0, |bits, bit| bits | (1 << bit));
        assert_eq!(offer_protocol(all).bits(), expected);
        assert_eq!(offer_protocol(ProtocolFeatures::empty()).bits(), 1 << 3 | 1 << 15);
    }

    #[test]
    fn the_document_has_each_row() {
        let front_end = FRONT_END_REQUESTS.iter().map(|row| document_row(row, front_end(row.code)));
        let back_end = BACK_END_REQUESTS.iter().map(|row| document_row(row, back_end(row.code)));
        let missing: Vec<String> =
            front_end.chain(back_end).filter(|row| !DOCUMENT.lines().any(|line| line == row)).collect();
        assert!(missing.is_empty(), "docs/protocol.md lacks:\n{}", missing.join("\n"));
    }

    #[test]
    fn what_is_carried_as_it_is_has_no_descriptors() {
        for row in &FRONT_END_REQUESTS {
            let carriage = front_end(row.code);
            if matches!(carriage, Carried | Masked) {
                assert_eq!(row.descriptors, 0..=0, "{}", row.name);
            }
            if carriage == Translated {
                assert_ne!(row.descriptors, 0..=0, "{}", row.name);
            }
        }
    }

    #[test]
    fn a_request_without_descriptors_changes_its_type_and_nothing_else() {
        for row in FRONT_END_REQUESTS.iter().filter(|row| row.descriptors == (0..=0)) {
            let lengths = (0..100).filter_map(|len| {
                let header = Header { request: row.code, is_reply: false, needs_reply: false, payload_len: len };
                FrontEndRequest::<u8>::decode(RawMessage { header, payload: vec![0; len], descriptors: Vec::new() })
                    .ok()
            });
            for request in lengths {
                let bytes = request.clone().encode(false).to_bytes();
                let other: FrontEndRequest<String> = request.without_descriptors().unwrap();
                assert_eq!(other.encode(false).to_bytes(), bytes, "{}", row.name);
            }
        }
    }

    #[test]
    fn messages_of_features_that_are_not_offered_are_refused() {
        let of_features = [
            (ProtocolFeatures::LOG_SHMFD, 6),
            (ProtocolFeatures::BACKEND_REQ, 21),
            (ProtocolFeatures::CRYPTO_SESSION, 26),
            (ProtocolFeatures::PAGEFAULT, 28),
            (ProtocolFeatures::CONFIG, 24),
            (ProtocolFeatures::INFLIGHT_SHMFD, 31),
            (ProtocolFeatures::RESET_DEVICE, 34),
            (ProtocolFeatures::INBAND_NOTIFICATIONS, 35),
            (ProtocolFeatures::CONFIGURE_MEM_SLOTS, 37),
            (ProtocolFeatures::STATUS, 39),
            (ProtocolFeatures::SHARED_OBJECT, 41),
            (ProtocolFeatures::DEVICE_STATE, 42),
            (ProtocolFeatures::SHMEM, 44),
            (ProtocolFeatures::RARP, 19),
            (ProtocolFeatures::MTU, 20),
        ];
        let offered = PROTOCOL_FEATURES.union(OWN_PROTOCOL_FEATURES);
        for (feature, code) in of_features {
            let refused = matches!(front_end(code), Refused(_));
            assert_eq!(offered.contains(feature), !refused, "{feature:?} and request {code}");
        }
    }
}
