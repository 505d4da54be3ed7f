//! The header that precedes each payload, and the message in its raw form.

use crate::DecodeError;
use crate::payload::{Reader, Writer};

use super::MAX_PAYLOAD_LEN;

/// vhost-user specification, "Header": request code, flags and payload length, 12 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Request code. Its meaning depends on the channel.
    pub request: u32,
    /// Bit 2 of the flags: this is the reply to a request.
    pub is_reply: bool,
    /// Bit 3 of the flags: the sender of this request asks for an acknowledgement.
    pub needs_reply: bool,
    /// Length of the payload in bytes, at most [`MAX_PAYLOAD_LEN`].
    pub payload_len: usize,
}

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 0b11;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

impl Header {
    /// Length on the wire in bytes.
    pub const LEN: usize = 12;

    /// Reads a header.
    ///
    /// # Errors
    /// [`DecodeError`] if the version is not 1, a reserved flag is set, or the payload would be longer than
    /// [`MAX_PAYLOAD_LEN`].
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("vhost-user header", bytes);
        let (request, flags, size) = (reader.u32()?, reader.u32()?, reader.u32()?);
        if flags & VERSION_MASK != VERSION {
            return Err(DecodeError::Version { found: flags & VERSION_MASK });
        }
        if flags & !(VERSION_MASK | REPLY | NEED_REPLY) != 0 {
            return Err(DecodeError::Flags { found: flags });
        }
        let payload_len = usize::try_from(size).unwrap_or(usize::MAX);
        if payload_len > MAX_PAYLOAD_LEN {
            return Err(DecodeError::LengthRange { what: "vhost-user payload", found: payload_len });
        }
        Ok(Self { request, is_reply: flags & REPLY != 0, needs_reply: flags & NEED_REPLY != 0, payload_len })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let size = u32::try_from(self.payload_len).unwrap_or(u32::MAX);
        let bytes = Writer::default().u32(self.request).u32(self.flags()).u32(size).done();
        bytes.try_into().unwrap_or([0; Self::LEN])
    }

    /// The flags word as it is on the wire.
    pub(crate) const fn flags(&self) -> u32 {
        VERSION | if self.is_reply { REPLY } else { 0 } | if self.needs_reply { NEED_REPLY } else { 0 }
    }
}

/// One message as it is on the wire: header, payload and what came beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawMessage<F> {
    /// The header; its `payload_len` is the length of `payload`.
    pub header: Header,
    /// The payload.
    pub payload: Vec<u8>,
    /// File descriptors, or what stands for them.
    pub descriptors: Vec<F>,
}

impl<F> RawMessage<F> {
    /// A request with its payload.
    #[must_use]
    pub fn request(code: u32, needs_reply: bool, payload: Vec<u8>, descriptors: Vec<F>) -> Self {
        let header = Header { request: code, is_reply: false, needs_reply, payload_len: payload.len() };
        Self { header, payload, descriptors }
    }

    /// The reply to the request with this code.
    #[must_use]
    pub fn reply(code: u32, payload: Vec<u8>, descriptors: Vec<F>) -> Self {
        let header = Header { request: code, is_reply: true, needs_reply: false, payload_len: payload.len() };
        Self { header, payload, descriptors }
    }

    /// Header and payload in one piece. They belong into one system call: some receivers read a payload with a single one.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Header::LEN + self.payload.len());
        bytes.extend_from_slice(&self.header.encode());
        bytes.extend_from_slice(&self.payload);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let header = Header { request: 5, is_reply: false, needs_reply: true, payload_len: 72 };
        let bytes = [5, 0, 0, 0, 0x9, 0, 0, 0, 72, 0, 0, 0];
        assert_eq!(header.encode(), bytes);
        assert_eq!(Header::decode(&bytes).unwrap(), header);
    }

    #[test]
    fn version_flags_and_length_are_strict() {
        let with = |flags: u8, size: u32| {
            let mut bytes = [1, 0, 0, 0, flags, 0, 0, 0, 0, 0, 0, 0];
            bytes[8..].copy_from_slice(&size.to_le_bytes());
            Header::decode(&bytes)
        };
        assert!(with(1, 0).is_ok());
        assert_eq!(with(2, 0), Err(DecodeError::Version { found: 2 }));
        assert_eq!(with(0, 0), Err(DecodeError::Version { found: 0 }));
        assert_eq!(with(0x11, 0), Err(DecodeError::Flags { found: 0x11 }));
        let limit = u32::try_from(MAX_PAYLOAD_LEN).unwrap();
        assert!(with(1, limit).is_ok());
        assert!(matches!(with(1, limit + 1), Err(DecodeError::LengthRange { .. })));
        assert!(matches!(with(1, u32::MAX), Err(DecodeError::LengthRange { .. })));
    }
}
