//! Requests of the back-end and their replies, typed.

use crate::DecodeError;
use crate::payload::{Reader, Writer};

use super::payloads::{Iotlb, ShmemMap, VringArea, VringState};
use super::request_table::{BACK_END_REQUESTS, ReplyPayload, RequestRow, known_request, row};
use super::{RawMessage, at_most_one, single};

/// A request of the back-end ("Back-end message types"). `F` stands for a file descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackEndRequest<F> {
    /// IOTLB_MSG (1). A miss or a failed access of the device IOTLB.
    Iotlb(Iotlb),
    /// CONFIG_CHANGE_MSG (2). The configuration space has changed.
    ConfigChange,
    /// VRING_HOST_NOTIFIER_MSG (3). Hands over a mapping of a notification register.
    VringHostNotifier(VringArea, Option<F>),
    /// VRING_CALL (4). A call as a message.
    VringCall(VringState),
    /// VRING_ERR (5). An error as a message.
    VringErr(VringState),
    /// SHARED_OBJECT_ADD (6). A shared object exists from now on.
    SharedObjectAdd([u8; 16]),
    /// SHARED_OBJECT_REMOVE (7). A shared object exists no longer.
    SharedObjectRemove([u8; 16]),
    /// SHARED_OBJECT_LOOKUP (8). Asks for a shared object.
    SharedObjectLookup([u8; 16]),
    /// SHMEM_MAP (9). Maps a file into a shared memory region.
    ShmemMap(ShmemMap, F),
    /// SHMEM_UNMAP (10). Undoes SHMEM_MAP.
    ShmemUnmap(ShmemMap),
    /// A request that the specification, as known here, does not have.
    Unknown(RawMessage<F>),
}

impl<F> BackEndRequest<F> {
    /// Reads a request.
    ///
    /// # Errors
    /// [`DecodeError`] if `message` is a reply, or its payload or number of descriptors does not fit the request code.
    pub fn decode(message: RawMessage<F>) -> Result<Self, DecodeError> {
        match known_request(&BACK_END_REQUESTS, &message)? {
            Some(row) => Self::decode_known(row, message),
            None => Ok(Self::Unknown(message)),
        }
    }

    fn decode_known(row: &RequestRow, message: RawMessage<F>) -> Result<Self, DecodeError> {
        let (name, payload, descriptors) = (row.name, message.payload.as_slice(), message.descriptors);
        let mut reader = Reader::new(name, payload);
        let request = match row.code {
            1 => Self::Iotlb(Iotlb::read(&mut reader)?),
            2 => Self::ConfigChange,
            3 => {
                let descriptor = at_most_one(name, descriptors)?;
                Self::VringHostNotifier(VringArea::read(name, &mut reader, descriptor.is_some())?, descriptor)
            }
            4 => Self::VringCall(VringState::read(&mut reader)?),
            5 => Self::VringErr(VringState::read(&mut reader)?),
            6 => Self::SharedObjectAdd(reader.array()?),
            7 => Self::SharedObjectRemove(reader.array()?),
            8 => Self::SharedObjectLookup(reader.array()?),
            9 => Self::ShmemMap(ShmemMap::read(name, &mut reader)?, single(name, descriptors)?),
            10 => Self::ShmemUnmap(ShmemMap::read(name, &mut reader)?),
            found => return Err(DecodeError::Value { what: name, field: "request", value: u64::from(found) }),
        };
        reader.finish()?;
        Ok(request)
    }

    /// Request code of the specification.
    #[must_use]
    pub fn code(&self) -> u32 {
        match self {
            Self::Iotlb(..) => 1,
            Self::ConfigChange => 2,
            Self::VringHostNotifier(..) => 3,
            Self::VringCall(..) => 4,
            Self::VringErr(..) => 5,
            Self::SharedObjectAdd(..) => 6,
            Self::SharedObjectRemove(..) => 7,
            Self::SharedObjectLookup(..) => 8,
            Self::ShmemMap(..) => 9,
            Self::ShmemUnmap(..) => 10,
            Self::Unknown(message) => message.header.request,
        }
    }

    /// What the specification says of this request, or `None` for [`Self::Unknown`].
    #[must_use]
    pub fn row(&self) -> Option<&'static RequestRow> {
        row(&BACK_END_REQUESTS, self.code())
    }

    /// Name as in the specification.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.row().map_or("unknown request", |row| row.name)
    }

    /// Writes the request.
    #[must_use]
    pub fn encode(self, needs_reply: bool) -> RawMessage<F> {
        let code = self.code();
        let (writer, descriptors) = self.into_body();
        RawMessage::request(code, needs_reply, writer.done(), descriptors)
    }

    fn into_body(self) -> (Writer, Vec<F>) {
        match self {
            Self::Iotlb(iotlb) => (iotlb.write(Writer::default()), Vec::new()),
            Self::ConfigChange => (Writer::default(), Vec::new()),
            Self::VringHostNotifier(area, descriptor) => {
                (area.write(Writer::default()), descriptor.into_iter().collect())
            }
            Self::VringCall(state) | Self::VringErr(state) => (state.write(Writer::default()), Vec::new()),
            Self::SharedObjectAdd(uuid) | Self::SharedObjectRemove(uuid) | Self::SharedObjectLookup(uuid) => {
                (Writer::default().bytes(&uuid), Vec::new())
            }
            Self::ShmemMap(map, descriptor) => (map.write(Writer::default()), vec![descriptor]),
            Self::ShmemUnmap(map) => (map.write(Writer::default()), Vec::new()),
            Self::Unknown(message) => (Writer::default().bytes(&message.payload), message.descriptors),
        }
    }
}

/// The answer to a request of the back-end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackEndReply<F> {
    /// 0 for success, else an error number that only means "failed".
    Acknowledgement(u64),
    /// SHARED_OBJECT_LOOKUP: the object, if it exists. A failure comes without one.
    SharedObject(Option<F>),
}

impl<F> BackEndReply<F> {
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
        let row = row(&BACK_END_REQUESTS, request);
        let name = row.map_or("reply", |row| row.name);
        let mut reader = Reader::new(name, &message.payload);
        let value = reader.u64()?;
        reader.finish()?;
        if row.is_some_and(|row| row.reply == ReplyPayload::SharedObject) {
            let object = at_most_one(name, message.descriptors)?;
            if value != 0 && object.is_some() {
                return Err(DecodeError::Descriptors { what: name, expected: 0..=0, found: 1 });
            }
            return Ok(Self::SharedObject(object));
        }
        if !message.descriptors.is_empty() {
            let found = message.descriptors.len();
            return Err(DecodeError::Descriptors { what: name, expected: 0..=0, found });
        }
        Ok(Self::Acknowledgement(value))
    }

    /// Writes the reply to the request with code `request`.
    #[must_use]
    pub fn encode(self, request: u32) -> RawMessage<F> {
        let (value, descriptors) = match self {
            Self::Acknowledgement(value) => (value, Vec::new()),
            Self::SharedObject(descriptor) => {
                (u64::from(descriptor.is_none()), descriptor.into_iter().collect::<Vec<_>>())
            }
        };
        RawMessage::reply(request, Writer::default().u64(value).done(), descriptors)
    }
}
