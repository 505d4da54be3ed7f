//! Replies of the back-end to requests of the front-end, typed.

use crate::DecodeError;
use crate::address::FileOffset;
use crate::payload::{Reader, Writer};

use super::payloads::{ConfigSpace, Inflight, LogArea, ShmemConfig, VringState};
use super::request_table::{FRONT_END_REQUESTS, ReplyPayload, row};
use super::{RawMessage, at_most_one, single};

/// The answer to a request of the front-end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrontEndReply<F> {
    /// A request without a reply of its own: 0 for success, else an error number that only means "failed".
    Acknowledgement(u64),
    /// A number: features, queue count, slots, status, or the result of a request whose reply is not optional.
    Number(u64),
    /// GET_VRING_BASE.
    VringState(VringState),
    /// GET_CONFIG; `None` if the device refuses. The specification's refusal has no payload; one of a configuration space
    /// of no bytes, as the vhost crate sends it, is read as a refusal too.
    Config(Option<ConfigSpace>),
    /// GET_INFLIGHT_FD.
    Inflight(Inflight, F),
    /// SET_LOG_BASE.
    LogBase,
    /// POSTCOPY_ADVISE.
    Descriptor(F),
    /// SET_DEVICE_STATE_FD: the value's low 8 bits are 0 for success, bit 8 says that no descriptor came. A failure comes
    /// without one in any case.
    DeviceState(u64, Option<F>),
    /// GET_SHARED_OBJECT.
    SharedObject(Option<F>),
    /// GET_SHMEM_CONFIG.
    ShmemConfig(ShmemConfig),
    /// CREATE_CRYPTO_SESSION.
    Bytes(Vec<u8>),
}

/// Requests whose number is an acknowledgement.
const IOTLB_MSG: u32 = 22;
const CHECK_DEVICE_STATE: u32 = 43;

/// Longest reply to SET_LOG_BASE that is read, in bytes.
const LOG_BASE_REPLY_MAX: usize = 16;

/// What is written as reply to SET_LOG_BASE. The specification asks for a reply and defines no payload; QEMU ignores it, but
/// the vhost crate waits for a whole log description that is not empty.
const LOG_BASE_REPLY: LogArea = LogArea { size: 1, mmap_offset: FileOffset(0) };

impl<F> FrontEndReply<F> {
    /// Reads the reply to the request with code `request`.
    ///
    /// # Errors
    /// [`DecodeError`] if the message is no reply to it, or does not have its form.
    pub fn decode(request: u32, message: RawMessage<F>) -> Result<Self, DecodeError> {
        if !message.header.is_reply {
            return Err(DecodeError::Flags { found: message.header.flags() });
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
            ReplyPayload::Config => {
                let config = ConfigSpace::read(what, &mut reader)?;
                Self::Config((!config.bytes.is_empty()).then_some(config))
            }
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
            ReplyPayload::DeviceState => read_device_state(what, reader.u64()?, at_most_one(what, descriptors)?)?,
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

    /// What the request with code `request` is refused with between the VMs: as the specification has it, or where it has no
    /// way to refuse, a reply without payload.
    #[must_use]
    pub fn refusal(request: u32) -> Self {
        const REFUSED: u64 = 1;
        const NO_DESCRIPTOR: u64 = 0x100;
        match row(&FRONT_END_REQUESTS, request).map_or(ReplyPayload::None, |row| row.reply) {
            ReplyPayload::None => Self::Acknowledgement(REFUSED),
            ReplyPayload::Number if matches!(request, IOTLB_MSG | CHECK_DEVICE_STATE) => Self::Number(REFUSED),
            ReplyPayload::Config => Self::Config(None),
            ReplyPayload::DeviceState => Self::DeviceState(NO_DESCRIPTOR | REFUSED, None),
            _ => Self::Bytes(Vec::new()),
        }
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
            Self::LogBase => (LOG_BASE_REPLY.write(writer), Vec::new()),
            Self::Descriptor(descriptor) => (writer, vec![descriptor]),
            Self::DeviceState(value, descriptor) => (writer.u64(value), descriptor.into_iter().collect()),
            Self::SharedObject(descriptor) => (writer, descriptor.into_iter().collect()),
            Self::ShmemConfig(config) => (config.write(writer), Vec::new()),
            Self::Bytes(bytes) => (writer.bytes(&bytes), Vec::new()),
        };
        RawMessage::reply(request, writer.done(), descriptors)
    }
}

/// Bits of the reply to SET_DEVICE_STATE_FD that speak against a descriptor: a failure, or "no descriptor".
const DEVICE_STATE_NO_DESCRIPTOR: u64 = 0x1ff;

fn read_device_state<F>(
    what: &'static str,
    value: u64,
    descriptor: Option<F>,
) -> Result<FrontEndReply<F>, DecodeError> {
    let expected = usize::from(value & DEVICE_STATE_NO_DESCRIPTOR == 0);
    let found = usize::from(descriptor.is_some());
    if found != expected {
        return Err(DecodeError::Descriptors { what, expected: expected..=expected, found });
    }
    Ok(FrontEndReply::DeviceState(value, descriptor))
}
