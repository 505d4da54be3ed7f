//! Messages of [`crate::control::Channel::State`]: the state of the device in parts, each of them answered.

use crate::DecodeError;
use crate::control::{Handle, STATE_DATA};
use crate::message::RawMessage;
use crate::payload::{Reader, Writer};

const WHAT: &str = "state of the device";

/// One message, without the header that all of them have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StateMessage {
    /// The next part, at most [`crate::message::MAX_PAYLOAD_LEN`] bytes; nothing says that there are no more.
    Part(Vec<u8>),
    /// The answer to a part: 0 if it was taken, anything else if the transfer has failed.
    Answer(u64),
}

impl StateMessage {
    /// Reads a message.
    ///
    /// # Errors
    /// [`DecodeError`] if it has another code or handles, or is an answer of another form.
    pub fn decode(message: RawMessage<Handle>) -> Result<Self, DecodeError> {
        let RawMessage { header, payload, descriptors } = message;
        if header.request != STATE_DATA {
            return Err(DecodeError::Value { what: WHAT, field: "request", value: u64::from(header.request) });
        }
        if !descriptors.is_empty() {
            return Err(DecodeError::Descriptors { what: WHAT, expected: 0..=0, found: descriptors.len() });
        }
        if !header.is_reply {
            return Ok(Self::Part(payload));
        }
        let mut reader = Reader::new(WHAT, &payload);
        let answer = reader.u64()?;
        reader.finish()?;
        Ok(Self::Answer(answer))
    }

    /// Writes the message. A part has the flag "need reply", as every request on a channel.
    #[must_use]
    pub fn encode(self) -> RawMessage<Handle> {
        match self {
            Self::Part(bytes) => RawMessage::request(STATE_DATA, true, bytes, Vec::new()),
            Self::Answer(value) => RawMessage::reply(STATE_DATA, Writer::default().u64(value).done(), Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_round_trip() {
        for message in [StateMessage::Part(vec![1; 3840]), StateMessage::Part(vec![]), StateMessage::Answer(7)] {
            assert_eq!(StateMessage::decode(message.clone().encode()), Ok(message));
        }
        let part = StateMessage::Part(vec![1]).encode();
        assert!(part.header.needs_reply && !part.header.is_reply && part.header.request == STATE_DATA);
    }

    #[test]
    fn other_messages_are_refused() {
        let bad: [RawMessage<Handle>; 5] = [
            RawMessage::request(2, true, vec![], vec![]),
            RawMessage::request(STATE_DATA, true, vec![], vec![Handle::Stream]),
            RawMessage::reply(STATE_DATA, vec![0; 7], vec![]),
            RawMessage::reply(STATE_DATA, vec![0; 9], vec![]),
            RawMessage::reply(2, vec![0; 8], vec![]),
        ];
        for message in bad {
            assert!(StateMessage::decode(message.clone()).is_err(), "{message:?}");
        }
    }
}
