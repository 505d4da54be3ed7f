//! What can be wrong with bytes that a peer sent.

use std::ops::RangeInclusive;

/// Why bytes are no message. Each text says what was expected and what came.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Fewer bytes than the structure has.
    #[error("{what}: expected {expected} bytes, {found} came")]
    Length {
        /// Name of the structure or message.
        what: &'static str,
        /// Bytes it has.
        expected: usize,
        /// Bytes that came.
        found: usize,
    },
    /// A length that is not allowed for this message.
    #[error("{what}: a length of {found} bytes is not allowed")]
    LengthRange {
        /// Name of the structure or message.
        what: &'static str,
        /// Bytes that came.
        found: usize,
    },
    /// The header's version is not 1.
    #[error("vhost-user header: expected version 1, version {found} came")]
    Version {
        /// Version that came.
        found: u32,
    },
    /// A reserved bit of the header's flags is set, or a flag that does not fit the message.
    #[error("vhost-user header: flags {found:#x} are not valid here")]
    Flags {
        /// Flags that came.
        found: u32,
    },
    /// The number of file descriptors or handles does not fit the message.
    #[error("{what}: expected {} to {} file descriptors, {found} came", expected.start(), expected.end())]
    Descriptors {
        /// Name of the message.
        what: &'static str,
        /// Numbers that are allowed.
        expected: RangeInclusive<usize>,
        /// Number that came.
        found: usize,
    },
    /// A field holds a value that is not allowed.
    #[error("{what}: {field} {value:#x} is not valid")]
    Value {
        /// Name of the structure or message.
        what: &'static str,
        /// Name of the field.
        field: &'static str,
        /// Value that came.
        value: u64,
    },
    /// A reply to another request than the one that was sent.
    #[error("expected a reply to request {expected}, one to request {found} came")]
    WrongReply {
        /// Request that was sent.
        expected: u32,
        /// Request that the reply names.
        found: u32,
    },
}
