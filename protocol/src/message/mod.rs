//! Messages of the vhost-user protocol, in both directions.
//!
//! A message on the wire is a [`Header`], a payload and file descriptors beside it: a [`RawMessage`]. Decoding happens
//! once, into a [`FrontEndRequest`], [`FrontEndReply`], [`BackEndRequest`] or [`BackEndReply`]; after that nobody looks at
//! raw numbers. A request code that is not known here becomes an `Unknown` value, which a session can refuse without
//! ending the connection; a known code with a wrong length, flag or number of descriptors is a [`DecodeError`], which
//! ends it.
//!
//! Source: vhost-user specification (QEMU documentation, "Vhost-user Protocol"), sections "Message Specification",
//! "Front-end message types" and "Back-end message types", as of QEMU 11.

mod back_end;
mod front_end;
mod header;
mod payloads;
mod reply;
mod request_table;

pub use back_end::{BackEndReply, BackEndRequest};
pub use front_end::FrontEndRequest;
pub use header::{Header, RawMessage};
pub use payloads::{
    ConfigSpace, DeviceStatePhase, DeviceStateTransfer, Inflight, Iotlb, LogArea, MAX_CONFIG_LEN, SHMEM_MAX_REGIONS,
    ShmemConfig, ShmemMap, StateDirection, VringAddresses, VringArea, VringFile, VringState,
};
pub use reply::FrontEndReply;
pub use request_table::{BACK_END_REQUESTS, FRONT_END_REQUESTS, ReplyPayload, RequestRow};

/// Longest payload that is read, in bytes. The longest of the specification is the reply to GET_SHMEM_CONFIG with 2,056.
pub const MAX_PAYLOAD_LEN: usize = 3840;

/// Most file descriptors of one message (vhost-user specification: at most 8 memory regions).
pub const MAX_DESCRIPTORS: usize = 8;

use crate::DecodeError;

/// The only descriptor of a message, for messages that have exactly one.
pub(crate) fn single<F>(what: &'static str, descriptors: Vec<F>) -> Result<F, DecodeError> {
    let found = descriptors.len();
    at_most_one(what, descriptors)?.ok_or(DecodeError::Descriptors { what, expected: 1..=1, found })
}

/// The descriptor of a message that has one or none.
pub(crate) fn at_most_one<F>(what: &'static str, mut descriptors: Vec<F>) -> Result<Option<F>, DecodeError> {
    if descriptors.len() > 1 {
        return Err(DecodeError::Descriptors { what, expected: 0..=1, found: descriptors.len() });
    }
    Ok(descriptors.pop())
}
