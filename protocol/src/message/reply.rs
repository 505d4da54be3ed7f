//! Replies of the back-end to requests of the front-end, typed.

use crate::DecodeError;
use crate::payload::{Reader, Writer};

use super::payloads::{ConfigSpace, Inflight, ShmemConfig, VringState};
use super::request_table::{FRONT_END_REQUESTS, ReplyPayload, row};
use super::{RawMessage, at_most_one, single};

/// The answer to a request of the front-end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrontEndReply<F> {
    /// A request without a reply of its own: 0 for success, else an error number that only means "failed".
    Acknowledgement(u64),
    /// A number: features, queue count, slots, status.
    Number(u64),
    /// GET_VRING_BASE.
    VringState(VringState),
    /// GET_CONFIG; `None` if the device refuses.
    Config(Option<ConfigSpace>),
    /// GET_INFLIGHT_FD.
    Inflight(Inflight, F),
    /// SET_LOG_BASE.
    LogBase,
    /// POSTCOPY_ADVISE.
    Descriptor(F),
    /// SET_DEVICE_STATE_FD: the value's low 8 bits are 0 for success, bit 8 says that no descriptor came.
    DeviceState(u64, Option<F>),
    /// GET_SHARED_OBJECT.
    SharedObject(Option<F>),
    /// GET_SHMEM_CONFIG.
    ShmemConfig(ShmemConfig),
    /// CREATE_CRYPTO_SESSION.
    Bytes(Vec<u8>),
}

/// Longest reply to SET_LOG_BASE that is read, in bytes.
const LOG_BASE_REPLY_MAX: usize = 16;

impl<F> FrontEndReply<F> {
    /// Reads the reply to the request with code `request`.
    ///
    /// # Errors
    /// [`DecodeError`] if the message is no reply to it, or does not have its form.
    pub fn decode(request: u32, message: RawMessage<F>) -> Result<Self, DecodeError> {
        if !message.header.is_reply {
            return Err(DecodeError::Flags { found: 0 });
        }
        if message.header.request != request {
            return Err(DecodeError::WrongReply { expected: request, found: message.header.request });
        }
        let row = row(&FRONT_END_REQUESTS, request);
        let (name, kind) = row.map_or(("reply", ReplyPayload::None), |row| (row.name, row.reply));
        Self::decode_kind(name, kind, &message.payload, message.descriptors)
    }

    fn decode_kind(
        what: &'static str,
        kind: ReplyPayload,
        payload: &[u8],
        descriptors: Vec<F>,
    ) -> Result<Self, DecodeError> {
        let may_carry = matches!(
            kind,
            ReplyPayload::Inflight | ReplyPayload::Descriptor | ReplyPayload::DeviceState | ReplyPayload::SharedObject
        );
        if !may_carry && !descriptors.is_empty() {
            return Err(DecodeError::Descriptors { what, expected: 0..=0, found: descriptors.len() });
        }
        let mut reader = Reader::new(what, payload);
        let reply = match kind {
            ReplyPayload::None => Self::Acknowledgement(reader.u64()?),
            ReplyPayload::Number => Self::Number(reader.u64()?),
            ReplyPayload::VringState => Self::VringState(VringState::read(&mut reader)?),
            ReplyPayload::Config if payload.is_empty() => Self::Config(None),
            ReplyPayload::Config => Self::Config(Some(ConfigSpace::read(what, &mut reader)?)),
            ReplyPayload::Inflight => {
                Self::Inflight(Inflight::read(reader.bytes(payload.len())?, what)?, single(what, descriptors)?)
            }
            ReplyPayload::LogBase if payload.len() > LOG_BASE_REPLY_MAX => {
                return Err(DecodeError::LengthRange { what, found: payload.len() });
            }
            ReplyPayload::LogBase => {
                reader.skip(payload.len())?;
                Self::LogBase
            }
            ReplyPayload::Descriptor => {
                reader.skip(payload.len())?;
                Self::Descriptor(single(what, descriptors)?)
            }
            ReplyPayload::DeviceState => Self::DeviceState(reader.u64()?, at_most_one(what, descriptors)?),
            ReplyPayload::SharedObject => {
                reader.skip(payload.len())?;
                Self::SharedObject(at_most_one(what, descriptors)?)
            }
            ReplyPayload::ShmemConfig => Self::ShmemConfig(ShmemConfig::read(what, &mut reader)?),
            ReplyPayload::Bytes => Self::Bytes(reader.bytes(payload.len())?.to_vec()),
        };
        reader.finish()?;
        Ok(reply)
    }

    /// Writes the reply to the request with code `request`.
    #[must_use]
    pub fn encode(self, request: u32) -> RawMessage<F> {
        let writer = Writer::default();
        let (writer, descriptors) = match self {
            Self::Acknowledgement(value) | Self::Number(value) => (writer.u64(value), Vec::new()),
            Self::VringState(state) => (state.write(writer), Vec::new()),
            Self::Config(Some(config)) => (config.write(writer), Vec::new()),
            Self::Config(None) => (writer, Vec::new()),
            Self::Inflight(inflight, descriptor) => (inflight.write(writer), vec![descriptor]),
            Self::LogBase => (writer.u64(0), Vec::new()),
            Self::Descriptor(descriptor) => (writer, vec![descriptor]),
            Self::DeviceState(value, descriptor) => (writer.u64(value), descriptor.into_iter().collect()),
            Self::SharedObject(descriptor) => (writer.u64(0), descriptor.into_iter().collect()),
            Self::ShmemConfig(config) => (config.write(writer), Vec::new()),
            Self::Bytes(bytes) => (writer.bytes(&bytes), Vec::new()),
        };
        RawMessage::reply(request, writer.done(), descriptors)
    }
}
