//! The control device: a virtio device with a receive queue, a transmit queue and a configuration space, through which
//! bridge (the device) and agent (the driver) exchange vhost-user messages.
//!
//! `docs/protocol.md` specifies it in full. In short:
//!
//! - the configuration space begins as in the drafts of virtio-vhost-user: [`Status`], largest number of queues, uuid;
//! - one buffer of a queue holds one [`Frame`]: 8 bytes that say which channel and which session it belongs to, then
//!   the vhost-user message exactly as on a socket, then one [`Handle`] for each file descriptor;
//! - every request on either channel is answered, whether or not the socket's peer asked for it, and a channel has one
//!   request under way at a time;
//! - where a message on a socket carries an offset into a file that is mapped into the window (`mmap_offset` of memory
//!   regions, dirty log and inflight buffer), the frame carries the [`crate::address::WindowOffset`] instead.

use bitflags::bitflags;

use crate::DecodeError;
use crate::doorbell::{PeerId, Vector};
use crate::message::{Header, MAX_DESCRIPTORS, MAX_PAYLOAD_LEN, RawMessage};
use crate::payload::{Reader, Writer};

/// Index of the queue from bridge to agent.
pub const RECEIVE_QUEUE: u16 = 0;

/// Index of the queue from agent to bridge.
pub const TRANSMIT_QUEUE: u16 = 1;

/// Virtio device id of the control device, as QEMU's `virtio-id` property takes it. 21 has no driver in Linux; the drafts
/// of virtio-vhost-user have no number of their own that QEMU would accept.
pub const VIRTIO_ID: u16 = 21;

/// Largest frame in bytes, and the length of each receive buffer that the agent offers.
pub const MAX_FRAME_LEN: usize = 4096;

/// Length of the configuration space in bytes.
pub const CONFIG_LEN: usize = 64;

/// Offset of [`Status`] in the configuration space, in bytes: the only field that the agent writes.
pub const CONFIG_STATUS_OFFSET: usize = 0;

/// Marks the profile: the bytes "vvu1" in the order of the configuration space.
pub const CONFIG_MAGIC: u32 = u32::from_le_bytes(*b"vvu1");

/// Version of the profile that this crate speaks.
pub const CONFIG_VERSION: u32 = 1;

bitflags! {
    /// The status field.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Status: u32 {
        /// The agent has a back-end that waits for a session. Set and cleared by the agent; the bridge clears it when a
        /// session ends, and the agent sets it again when it has let go of all that belonged to that session.
        const BACK_END_UP = 1 << 0;
        /// A front-end is connected. Set and cleared by the bridge.
        const FRONT_END_UP = 1 << 1;
        /// The bridge is not to map the window's header yet. Set by the agent before it starts the window device, and cleared
        /// when all window devices of the appliance run; never shown by the bridge.
        const HOLD_WINDOW = 1 << 2;
    }
}

/// The configuration space, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigSpace {
    /// Offset 0, 4 bytes.
    pub status: Status,
    /// Offset 4, 4 bytes: largest number of queues of the emulated device.
    pub max_queues: u32,
    /// Offset 8, 16 bytes: identity of the device set.
    pub uuid: [u8; 16],
    /// Offset 36, 4 bytes: number of the current or last session; 0 before the first.
    pub session: u32,
    /// Offset 40, 8 bytes: length of the window in bytes, or 0 as long as its header is not mapped.
    pub window_len: u64,
}

impl ConfigSpace {
    /// Reads a configuration space.
    ///
    /// # Errors
    /// [`DecodeError`] if the magic, the version or the frame length is not the one of this profile.
    pub fn decode(bytes: &[u8; CONFIG_LEN]) -> Result<Self, DecodeError> {
        const WHAT: &str = "control device's configuration space";
        let mut reader = Reader::new(WHAT, bytes);
        let status = Status::from_bits_retain(reader.u32()?);
        let max_queues = reader.u32()?;
        let uuid = reader.array()?;
        let expected: [(&'static str, u64); 3] = [
            ("magic", u64::from(CONFIG_MAGIC)),
            ("version", u64::from(CONFIG_VERSION)),
            ("frame length", MAX_FRAME_LEN as u64),
        ];
        for (field, expected) in expected {
            let value = u64::from(reader.u32()?);
            if value != expected {
                return Err(DecodeError::Value { what: WHAT, field, value });
            }
        }
        Ok(Self { status, max_queues, uuid, session: reader.u32()?, window_len: reader.u64()? })
    }

    /// Writes the configuration space.
    #[must_use]
    pub fn encode(&self) -> [u8; CONFIG_LEN] {
        let frame_len = u32::try_from(MAX_FRAME_LEN).unwrap_or(u32::MAX);
        let bytes = Writer::default()
            .u32(self.status.bits())
            .u32(self.max_queues)
            .bytes(&self.uuid)
            .u32(CONFIG_MAGIC)
            .u32(CONFIG_VERSION)
            .u32(frame_len)
            .u32(self.session)
            .u64(self.window_len)
            .zeros(16)
            .done();
        bytes.try_into().unwrap_or([0; CONFIG_LEN])
    }
}

/// Who asks on a channel; the replies go the other way on the same channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// Requests of the front-end, replies of the back-end.
    FrontEnd,
    /// Requests of the back-end, replies of the front-end.
    BackEnd,
    /// State of the device while it is saved or loaded: [`STATE_DATA`] and its answers. Who asks is the one who has the bytes:
    /// the agent when the state is saved, the bridge when it is loaded.
    State,
}

/// Request code on [`Channel::State`]: its payload is the next part of the state, or nothing at the end of it. The answer is
/// a u64, 0 if the part was taken; the next part may come then.
pub const STATE_DATA: u32 = 1;

/// What stands for a file descriptor between the VMs, 8 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Handle {
    /// A part of the window; where, is said by the payload.
    Window,
    /// A signal into the appliance.
    Vector(Vector),
    /// A signal out of the appliance.
    Peer(PeerId),
    /// The connection for requests of the back-end: they cross on [`Channel::BackEnd`].
    BackChannel,
    /// The pipe for the state of the device: its bytes cross on [`Channel::State`].
    Stream,
}

impl Handle {
    /// Length in a frame in bytes.
    pub const LEN: usize = 8;

    fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        const WHAT: &str = "handle";
        let (kind, reserved, index) = (reader.u16()?, reader.u16()?, reader.u32()?);
        let value = u64::from(index);
        if reserved != 0 {
            return Err(DecodeError::Value { what: WHAT, field: "reserved field", value: u64::from(reserved) });
        }
        let number = u16::try_from(index).map_err(|_| DecodeError::Value { what: WHAT, field: "number", value })?;
        match (kind, number) {
            (1, 0) => Ok(Self::Window),
            (2, number) => Ok(Self::Vector(Vector(number))),
            (3, number) => Ok(Self::Peer(PeerId(number))),
            (4, 0) => Ok(Self::BackChannel),
            (5, 0) => Ok(Self::Stream),
            (1 | 4 | 5, _) => Err(DecodeError::Value { what: WHAT, field: "number", value }),
            (other, _) => Err(DecodeError::Value { what: WHAT, field: "kind", value: u64::from(other) }),
        }
    }

    fn write(self, writer: Writer) -> Writer {
        let (kind, number) = match self {
            Self::Window => (1, 0),
            Self::Vector(vector) => (2, vector.0),
            Self::Peer(peer) => (3, peer.0),
            Self::BackChannel => (4, 0),
            Self::Stream => (5, 0),
        };
        writer.u16(kind).u16(0).u32(u32::from(number))
    }
}

/// One message between bridge and agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Which requests it belongs to.
    pub channel: Channel,
    /// Session that it belongs to. What belongs to another session than the current one is dropped.
    pub session: u32,
    /// Only with SET_VRING_BASE: the device does not know the number, because the back-end before was lost. The driver
    /// takes the index of the used ring in its place.
    pub resume: bool,
    /// The message.
    pub message: RawMessage<Handle>,
}

const FRAME_HEADER_LEN: usize = 8;

/// Flag of a frame: [`Frame::resume`].
const FLAG_RESUME: u8 = 1 << 0;

// The largest message fits one buffer.
const _: () =
    assert!(FRAME_HEADER_LEN + Header::LEN + MAX_PAYLOAD_LEN + MAX_DESCRIPTORS * Handle::LEN <= MAX_FRAME_LEN);

impl Frame {
    /// A frame without flags.
    #[must_use]
    pub const fn new(channel: Channel, session: u32, message: RawMessage<Handle>) -> Self {
        Self { channel, session, resume: false, message }
    }

    /// Reads a frame: all of `bytes` belongs to it.
    ///
    /// # Errors
    /// [`DecodeError`] if lengths do not add up, a reserved field is set, or a value is not known.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        const WHAT: &str = "frame";
        if bytes.len() > MAX_FRAME_LEN {
            return Err(DecodeError::LengthRange { what: WHAT, found: bytes.len() });
        }
        let mut reader = Reader::new(WHAT, bytes);
        let channel = match reader.u8()? {
            0 => Channel::FrontEnd,
            1 => Channel::BackEnd,
            2 => Channel::State,
            other => return Err(DecodeError::Value { what: WHAT, field: "channel", value: u64::from(other) }),
        };
        let handle_count = usize::from(reader.u8()?);
        if handle_count > MAX_DESCRIPTORS {
            return Err(DecodeError::Descriptors { what: WHAT, expected: 0..=MAX_DESCRIPTORS, found: handle_count });
        }
        let resume = match reader.u8()? {
            0 => false,
            FLAG_RESUME => true,
            other => return Err(DecodeError::Value { what: WHAT, field: "flags", value: u64::from(other) }),
        };
        match reader.u8()? {
            0 => {}
            other => return Err(DecodeError::Value { what: WHAT, field: "reserved field", value: u64::from(other) }),
        }
        let session = reader.u32()?;
        let header = Header::decode(&reader.array()?)?;
        let payload = reader.bytes(header.payload_len)?.to_vec();
        let descriptors = (0..handle_count).map(|_| Handle::read(&mut reader)).collect::<Result<_, _>>()?;
        reader.finish()?;
        Ok(Self { channel, session, resume, message: RawMessage { header, payload, descriptors } })
    }

    /// Writes the frame.
    ///
    /// # Errors
    /// [`DecodeError`] if the message has more handles or a longer payload than a frame holds.
    pub fn encode(&self) -> Result<Vec<u8>, DecodeError> {
        let found = self.message.descriptors.len();
        let handle_count = u8::try_from(found).ok().filter(|_| found <= MAX_DESCRIPTORS);
        let Some(handle_count) = handle_count else {
            return Err(DecodeError::Descriptors { what: "frame", expected: 0..=MAX_DESCRIPTORS, found });
        };
        if self.message.payload.len() > MAX_PAYLOAD_LEN {
            return Err(DecodeError::LengthRange { what: "frame", found: self.message.payload.len() });
        }
        let channel = match self.channel {
            Channel::FrontEnd => 0,
            Channel::BackEnd => 1,
            Channel::State => 2,
        };
        let flags = if self.resume { FLAG_RESUME } else { 0 };
        let writer = Writer::default().u8(channel).u8(handle_count).u8(flags).u8(0).u32(self.session);
        let writer = writer.bytes(&self.message.to_bytes());
        Ok(self.message.descriptors.iter().fold(writer, |writer, handle| handle.write(writer)).done())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn golden_configuration_space() {
        let config = ConfigSpace {
            status: Status::BACK_END_UP,
            max_queues: 4,
            uuid: [0x11; 16],
            session: 2,
            window_len: 0x1_0000_0000,
        };
        let bytes = config.encode();
        assert_eq!(bytes[..8], [1, 0, 0, 0, 4, 0, 0, 0]);
        assert_eq!(bytes[8..24], [0x11; 16]);
        assert_eq!(&bytes[24..28], b"vvu1");
        assert_eq!(bytes[28..40], [1, 0, 0, 0, 0, 0x10, 0, 0, 2, 0, 0, 0]);
        assert_eq!(bytes[40..48], [0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(ConfigSpace::decode(&bytes).unwrap(), config);
        for position in [24, 28, 32] {
            let mut other = bytes;
            other[position] ^= 0x40;
            assert!(ConfigSpace::decode(&other).is_err());
        }
    }

    #[test]
    fn golden_frame() {
        let message = RawMessage::request(12, true, 3_u64.to_le_bytes().to_vec(), vec![Handle::Vector(Vector(3))]);
        let frame = Frame::new(Channel::FrontEnd, 7, message);
        let bytes = frame.encode().unwrap();
        let expected = [
            0, 1, 0, 0, 7, 0, 0, 0, // frame header
            12, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0, // vhost-user header
            3, 0, 0, 0, 0, 0, 0, 0, // payload
            2, 0, 0, 0, 3, 0, 0, 0, // handle
        ];
        assert_eq!(bytes, expected);
        assert_eq!(Frame::decode(&bytes).unwrap(), frame);
    }

    #[test]
    fn a_frame_is_strict() {
        let message = RawMessage::request(1, false, vec![], vec![Handle::Peer(PeerId(5))]);
        let good = Frame::new(Channel::BackEnd, 1, message).encode().unwrap();
        Frame::decode(&good).unwrap();
        // Channel, handle count, flags, reserved, version, payload length, handle kind, handle's reserved field, number.
        for (position, value) in [(0, 3), (1, 2), (1, 9), (2, 2), (3, 1), (12, 2), (16, 1), (20, 9), (22, 1), (26, 1)] {
            let mut bad = good.clone();
            bad[position] = value;
            assert!(Frame::decode(&bad).is_err(), "byte {position} = {value}");
        }
        for len in 0..good.len() {
            assert!(Frame::decode(&good[..len]).is_err());
        }
        assert!(Frame::decode(&vec![0; MAX_FRAME_LEN + 1]).is_err());
    }

    fn handle() -> impl Strategy<Value = Handle> {
        prop_oneof![
            Just(Handle::Window),
            any::<u16>().prop_map(|number| Handle::Vector(Vector(number))),
            any::<u16>().prop_map(|number| Handle::Peer(PeerId(number))),
            Just(Handle::BackChannel),
            Just(Handle::Stream),
        ]
    }

    proptest! {
        #[test]
        fn frames_survive_the_round_trip(
            channel in 0_u8..3, resume: bool, session: u32, code: u32, needs_reply: bool,
            payload in prop::collection::vec(any::<u8>(), 0..MAX_PAYLOAD_LEN),
            handles in prop::collection::vec(handle(), 0..=MAX_DESCRIPTORS),
        ) {
            let channel = [Channel::FrontEnd, Channel::BackEnd, Channel::State][usize::from(channel)];
            let message = RawMessage::request(code, needs_reply, payload, handles);
            let frame = Frame { channel, session, resume, message };
            prop_assert_eq!(Frame::decode(&frame.encode().unwrap()).unwrap(), frame);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Frame::decode(&bytes);
        }
    }
}
