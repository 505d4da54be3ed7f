//! A row of a table of golden bytes, and how bytes become messages in these tests.

use vvu_protocol::message::{Header, RawMessage};

/// One message and what it is on the wire.
pub(crate) struct Golden<M> {
    /// The message.
    pub(crate) message: M,
    /// Its header and payload.
    pub(crate) bytes: Vec<u8>,
    /// Its descriptors.
    pub(crate) descriptors: Vec<u32>,
}

/// A row: the message, then header and payload in hexadecimal, one group of digits for each field, and the descriptors.
pub(crate) fn golden<M>(message: M, header: &str, payload: &str, descriptors: &[u32]) -> Golden<M> {
    let mut bytes = hex(header);
    bytes.extend(hex(payload));
    Golden { message, bytes, descriptors: descriptors.to_vec() }
}

impl<M> Golden<M> {
    /// The bytes as a socket hands them over.
    pub(crate) fn raw(&self) -> RawMessage<u32> {
        raw(&self.bytes, &self.descriptors)
    }
}

/// Header and payload, cut apart. The header has to give the right length.
pub(crate) fn raw(bytes: &[u8], descriptors: &[u32]) -> RawMessage<u32> {
    let (header, payload) = bytes.split_first_chunk::<{ Header::LEN }>().expect("a whole header");
    let header = Header::decode(header).expect("a header of vhost-user");
    assert_eq!(header.payload_len, payload.len(), "the header of request {} gives another length", header.request);
    RawMessage { header, payload: payload.to_vec(), descriptors: descriptors.to_vec() }
}

/// Hexadecimal digits, with spaces between fields.
pub(crate) fn hex(text: &str) -> Vec<u8> {
    let digits = text.chars().filter(|c| !c.is_whitespace()).collect::<Vec<_>>();
    let byte = |pair: &[char]| u8::from_str_radix(&pair.iter().collect::<String>(), 16).expect("two digits");
    digits.chunks(2).map(byte).collect()
}
