//! One row for each message of the specification. Number of descriptors and kind of reply are data, so that a check, a
//! document and a test can go through all of them.

use std::ops::RangeInclusive;

use super::{MAX_DESCRIPTORS, RawMessage};
use crate::DecodeError;

/// What answers a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyPayload {
    /// No reply of its own: an acknowledgement (u64, 0 = success) if REPLY_ACK was negotiated and it was asked for.
    None,
    /// A u64: a number, or 0 for success where the specification gives an acknowledgement to the request itself.
    Number,
    /// A vring state.
    VringState,
    /// A configuration space, or no payload if the device refuses.
    Config,
    /// An inflight description and its buffer's descriptor.
    Inflight,
    /// The reply to SET_LOG_BASE: its payload is not defined, 0 to 16 bytes are sent by known back-ends.
    LogBase,
    /// One descriptor and no payload that matters.
    Descriptor,
    /// A u64, and a descriptor if the back-end has chosen one of its own.
    DeviceState,
    /// A descriptor if the object exists.
    SharedObject,
    /// Sizes of shared memory regions.
    ShmemConfig,
    /// Bytes that are carried without being understood.
    Bytes,
}

/// What the specification says of one request.
#[derive(Debug, Clone)]
pub struct RequestRow {
    /// Request code.
    pub code: u32,
    /// Name as in the specification, without its prefix.
    pub name: &'static str,
    /// Number of file descriptors that come with it.
    pub descriptors: RangeInclusive<usize>,
    /// What answers it.
    pub reply: ReplyPayload,
}

impl RequestRow {
    const fn new(code: u32, name: &'static str, descriptors: RangeInclusive<usize>, reply: ReplyPayload) -> Self {
        Self { code, name, descriptors, reply }
    }
}

/// Requests of the front-end ("Front-end message types"); row `n` has code `n + 1`.
pub const FRONT_END_REQUESTS: [RequestRow; 44] = [
    RequestRow::new(1, "GET_FEATURES", 0..=0, ReplyPayload::Number),
    RequestRow::new(2, "SET_FEATURES", 0..=0, ReplyPayload::None),
    RequestRow::new(3, "SET_OWNER", 0..=0, ReplyPayload::None),
    RequestRow::new(4, "RESET_OWNER", 0..=0, ReplyPayload::None),
    RequestRow::new(5, "SET_MEM_TABLE", 0..=MAX_DESCRIPTORS, ReplyPayload::None),
    RequestRow::new(6, "SET_LOG_BASE", 1..=1, ReplyPayload::LogBase),
    RequestRow::new(7, "SET_LOG_FD", 1..=1, ReplyPayload::None),
    RequestRow::new(8, "SET_VRING_NUM", 0..=0, ReplyPayload::None),
    RequestRow::new(9, "SET_VRING_ADDR", 0..=0, ReplyPayload::None),
    RequestRow::new(10, "SET_VRING_BASE", 0..=0, ReplyPayload::None),
    RequestRow::new(11, "GET_VRING_BASE", 0..=0, ReplyPayload::VringState),
    RequestRow::new(12, "SET_VRING_KICK", 0..=1, ReplyPayload::None),
    RequestRow::new(13, "SET_VRING_CALL", 0..=1, ReplyPayload::None),
    RequestRow::new(14, "SET_VRING_ERR", 0..=1, ReplyPayload::None),
    RequestRow::new(15, "GET_PROTOCOL_FEATURES", 0..=0, ReplyPayload::Number),
    RequestRow::new(16, "SET_PROTOCOL_FEATURES", 0..=0, ReplyPayload::None),
    RequestRow::new(17, "GET_QUEUE_NUM", 0..=0, ReplyPayload::Number),
    RequestRow::new(18, "SET_VRING_ENABLE", 0..=0, ReplyPayload::None),
    RequestRow::new(19, "SEND_RARP", 0..=0, ReplyPayload::None),
    RequestRow::new(20, "NET_SET_MTU", 0..=0, ReplyPayload::None),
    RequestRow::new(21, "SET_BACKEND_REQ_FD", 1..=1, ReplyPayload::None),
    RequestRow::new(22, "IOTLB_MSG", 0..=0, ReplyPayload::Number),
    RequestRow::new(23, "SET_VRING_ENDIAN", 0..=0, ReplyPayload::None),
    RequestRow::new(24, "GET_CONFIG", 0..=0, ReplyPayload::Config),
    RequestRow::new(25, "SET_CONFIG", 0..=0, ReplyPayload::None),
    RequestRow::new(26, "CREATE_CRYPTO_SESSION", 0..=0, ReplyPayload::Bytes),
    RequestRow::new(27, "CLOSE_CRYPTO_SESSION", 0..=0, ReplyPayload::None),
    RequestRow::new(28, "POSTCOPY_ADVISE", 0..=0, ReplyPayload::Descriptor),
    RequestRow::new(29, "POSTCOPY_LISTEN", 0..=0, ReplyPayload::None),
    RequestRow::new(30, "POSTCOPY_END", 0..=0, ReplyPayload::Number),
    RequestRow::new(31, "GET_INFLIGHT_FD", 0..=0, ReplyPayload::Inflight),
    RequestRow::new(32, "SET_INFLIGHT_FD", 1..=1, ReplyPayload::None),
    RequestRow::new(33, "GPU_SET_SOCKET", 1..=1, ReplyPayload::None),
    RequestRow::new(34, "RESET_DEVICE", 0..=0, ReplyPayload::None),
    RequestRow::new(35, "VRING_KICK", 0..=0, ReplyPayload::None),
    RequestRow::new(36, "GET_MAX_MEM_SLOTS", 0..=0, ReplyPayload::Number),
    RequestRow::new(37, "ADD_MEM_REG", 1..=1, ReplyPayload::None),
    RequestRow::new(38, "REM_MEM_REG", 0..=1, ReplyPayload::None),
    RequestRow::new(39, "SET_STATUS", 0..=0, ReplyPayload::None),
    RequestRow::new(40, "GET_STATUS", 0..=0, ReplyPayload::Number),
    RequestRow::new(41, "GET_SHARED_OBJECT", 0..=0, ReplyPayload::SharedObject),
    RequestRow::new(42, "SET_DEVICE_STATE_FD", 1..=1, ReplyPayload::DeviceState),
    RequestRow::new(43, "CHECK_DEVICE_STATE", 0..=0, ReplyPayload::Number),
    RequestRow::new(44, "GET_SHMEM_CONFIG", 0..=0, ReplyPayload::ShmemConfig),
];

/// Requests of the back-end ("Back-end message types"); row `n` has code `n + 1`.
pub const BACK_END_REQUESTS: [RequestRow; 10] = [
    RequestRow::new(1, "IOTLB_MSG", 0..=0, ReplyPayload::None),
    RequestRow::new(2, "CONFIG_CHANGE_MSG", 0..=0, ReplyPayload::None),
    RequestRow::new(3, "VRING_HOST_NOTIFIER_MSG", 0..=1, ReplyPayload::None),
    RequestRow::new(4, "VRING_CALL", 0..=0, ReplyPayload::None),
    RequestRow::new(5, "VRING_ERR", 0..=0, ReplyPayload::None),
    RequestRow::new(6, "SHARED_OBJECT_ADD", 0..=0, ReplyPayload::None),
    RequestRow::new(7, "SHARED_OBJECT_REMOVE", 0..=0, ReplyPayload::None),
    RequestRow::new(8, "SHARED_OBJECT_LOOKUP", 0..=0, ReplyPayload::SharedObject),
    RequestRow::new(9, "SHMEM_MAP", 1..=1, ReplyPayload::None),
    RequestRow::new(10, "SHMEM_UNMAP", 0..=0, ReplyPayload::None),
];

pub(crate) fn row(rows: &'static [RequestRow], code: u32) -> Option<&'static RequestRow> {
    let index = usize::try_from(code.checked_sub(1)?).ok()?;
    rows.get(index)
}

/// The row of a request, or `None` if its code is not known. Its payload is not looked at.
///
/// # Errors
/// [`DecodeError`] if it is a reply, or its number of descriptors does not fit its code.
pub(crate) fn known_request<F>(
    rows: &'static [RequestRow],
    message: &RawMessage<F>,
) -> Result<Option<&'static RequestRow>, DecodeError> {
    if message.header.is_reply {
        return Err(DecodeError::Flags { found: message.header.flags() });
    }
    let row = row(rows, message.header.request);
    let found = message.descriptors.len();
    match row.filter(|row| !row.descriptors.contains(&found)) {
        Some(row) => Err(DecodeError::Descriptors { what: row.name, expected: row.descriptors.clone(), found }),
        None => Ok(row),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_at_their_codes() {
        for rows in [FRONT_END_REQUESTS.as_slice(), BACK_END_REQUESTS.as_slice()] {
            for (index, row) in rows.iter().enumerate() {
                assert_eq!(usize::try_from(row.code).unwrap(), index + 1, "{}", row.name);
            }
        }
    }
}
