//! Negotiation, refusals, configuration, and what a hostile front-end sends.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use vvu_back_end::{Ending, SessionError};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::message::{ConfigSpace, FRONT_END_REQUESTS, RawMessage, VringFile, VringState};

use crate::driver::running;
use crate::echo::{MAX_QUEUE_SIZE, QUEUES};
use crate::front_end::{FEATURES, FrontEnd, PROTOCOL, Reply, Request};

#[test]
fn what_works_is_offered_and_nothing_else() {
    let mut front_end = FrontEnd::connect();
    let Reply::Number(features) = front_end.ask(Request::GetFeatures) else { panic!() };
    let expected = FEATURES | Features::EVENT_IDX | Features::LOG_ALL | Features::ACCESS_PLATFORM;
    assert_eq!(Features::from_bits_retain(features), expected);
    let Reply::Number(features) = front_end.ask(Request::GetProtocolFeatures) else { panic!() };
    assert_eq!(ProtocolFeatures::from_bits_retain(features), PROTOCOL);
    front_end.negotiate(FEATURES);
    front_end.refused(Request::SetFeatures(FEATURES | Features::RING_PACKED));
    front_end.refused(Request::SetProtocolFeatures(PROTOCOL | ProtocolFeatures::STATUS));
    let Reply::Number(queues) = front_end.ask(Request::GetQueueNum) else { panic!() };
    let Reply::Number(slots) = front_end.ask(Request::GetMaxMemSlots) else { panic!() };
    assert_eq!((queues, slots), (u64::from(QUEUES), 509));
}

/// Payload length of each request that is never offered, as the specification has it.
const NOT_OFFERED: [(u32, usize); 14] = [
    (19, 8),
    (20, 8),
    (23, 8),
    (26, 16),
    (27, 8),
    (29, 0),
    (33, 0),
    (35, 8),
    (39, 8),
    (40, 0),
    (42, 8),
    (43, 0),
    (44, 0),
    (99, 4),
];

#[test]
fn what_is_not_offered_is_refused_or_ends_the_connection() {
    for (code, len) in NOT_OFFERED {
        let row = FRONT_END_REQUESTS.iter().find(|row| row.code == code);
        let descriptors = || -> Vec<OwnedFd> {
            let count = row.map_or(0, |row| *row.descriptors.start());
            (0..count).map(|_| UnixStream::pair().unwrap().0.into()).collect()
        };
        for needs_reply in [true, false] {
            let mut front_end = FrontEnd::negotiated();
            front_end.send_raw(&RawMessage::request(code, needs_reply, vec![0; len], descriptors()));
            // A request with a reply of its own cannot be refused.
            let acknowledged = row.is_none_or(|row| row.reply == vvu_protocol::message::ReplyPayload::None);
            let reply = front_end.receive();
            if needs_reply && acknowledged {
                let reply = Reply::decode(code, reply.unwrap()).unwrap();
                assert!(matches!(reply, Reply::Acknowledgement(1..)), "{code}: {reply:?}");
                front_end.done(Request::SetOwner);
            } else {
                assert!(reply.is_none(), "{code}: {reply:?}");
                assert!(matches!(front_end.outcome(), Err(SessionError::Refused { .. })), "{code}");
            }
        }
    }
}

#[test]
fn an_answer_is_sent_only_where_it_was_negotiated() {
    let mut front_end = FrontEnd::connect();
    front_end.send(Request::SetOwner, true);
    front_end.send(Request::SetFeatures(FEATURES), true);
    // The next thing heard is the reply to this.
    assert!(matches!(front_end.ask(Request::GetFeatures), Reply::Number(_)));
    front_end.send(Request::ResetDevice, true);
    assert!(front_end.receive().is_none(), "a refusal that cannot be told ends the connection");
}

#[test]
fn a_feature_has_to_be_negotiated_before_its_messages() {
    let mut front_end = FrontEnd::connect();
    front_end.send(Request::SetProtocolFeatures(ProtocolFeatures::REPLY_ACK), false);
    front_end.refused(Request::ResetDevice);
    front_end.refused(Request::SetConfig(ConfigSpace { offset: 4, flags: 0, bytes: vec![1] }));
    let wanted = ConfigSpace { offset: 0, flags: 0, bytes: vec![0; 4] };
    assert!(matches!(front_end.ask(Request::GetConfig(wanted)), Reply::Config(None)));
    let socket = UnixStream::pair().unwrap().0;
    front_end.refused(Request::SetBackendReqFd(socket.into()));
}

#[test]
fn configuration_is_read_written_and_its_change_told() {
    let mut front_end = FrontEnd::negotiated();
    let config = |offset, flags, bytes: &[u8]| ConfigSpace { offset, flags, bytes: bytes.to_vec() };
    front_end.done(Request::SetConfig(config(4, 0, &[1, 2])));
    front_end.refused(Request::SetConfig(config(0, 0, &[9])));
    front_end.done(Request::SetConfig(config(0, 1, &[7])));
    front_end.refused(Request::SetConfig(config(4, 2, &[9])));
    let Reply::Config(reply) = front_end.ask(Request::GetConfig(config(0, 0, &[0; 6]))) else { panic!() };
    assert_eq!(reply, Some(config(0, 0, &[7, 0, 0, 0, 1, 2])));
    assert!(matches!(front_end.ask(Request::GetConfig(config(6, 0, &[0; 6]))), Reply::Config(None)));

    // Told as soon as there is a channel, however often it has changed before.
    front_end.handle.config_changed();
    front_end.handle.config_changed();
    let mut channel = front_end.open_back_channel();
    let message = channel.receive();
    assert_eq!((message.header.request, message.header.needs_reply), (2, true));
    // The next change waits for the answer, and the front-end's own requests do not.
    front_end.handle.config_changed();
    assert!(!channel.hears_something());
    front_end.done(Request::SetOwner);
    channel.reply(2, 0);
    assert_eq!(channel.receive().header.request, 2);
    channel.reply(2, 0);
    // A second channel takes the place of the first.
    let mut second = front_end.open_back_channel();
    front_end.handle.config_changed();
    assert_eq!(second.receive().header.request, 2);
}

#[test]
fn a_front_end_without_config_hears_of_no_change() {
    let mut front_end = FrontEnd::connect();
    front_end.negotiate(FEATURES);
    front_end.done(Request::SetProtocolFeatures(PROTOCOL & !ProtocolFeatures::CONFIG));
    let mut channel = front_end.open_back_channel();
    front_end.handle.config_changed();
    assert!(!channel.hears_something());
}

#[test]
fn a_reset_stops_the_rings_and_keeps_the_connection() {
    let (mut front_end, memory, mut queue) = running();
    queue.echo(&memory, "before");
    let resets = front_end.device.resets.load(Ordering::SeqCst);
    front_end.done(Request::ResetDevice);
    assert_eq!(front_end.device.resets.load(Ordering::SeqCst), resets + 1);
    queue.offer(&memory, 2, crate::driver::DATA, crate::driver::DATA, 1);
    queue.kick();
    front_end.done(Request::SetOwner);
    assert_eq!(queue.used_index(&memory), 1, "disabled");
    front_end.done(Request::SetVringEnable(VringState { index: 0, num: 1 }));
    assert_eq!(queue.wait_used(&memory).0, 2);
    // So does the deprecated way, which keeps the device's state.
    front_end.done(Request::ResetOwner);
    assert_eq!(front_end.device.resets.load(Ordering::SeqCst), resets + 1);
    assert_eq!(front_end.stop(0), 2);
}

#[test]
fn cve_2020_10723_all_bits_of_a_ring_index_count() {
    let mut front_end = FrontEnd::negotiated();
    for index in [u32::from(QUEUES), 0x1_0000, 0xffff_ffff] {
        front_end.refused(Request::SetVringNum(VringState { index, num: 16 }));
        front_end.refused(Request::SetVringBase(VringState { index, num: 0 }));
        front_end.refused(Request::SetVringEnable(VringState { index, num: 1 }));
        let addresses = crate::driver::Queue::new(0).addresses(None);
        front_end.refused(Request::SetVringAddr(vvu_protocol::message::VringAddresses { index, ..addresses }));
    }
    for (index, descriptor) in [(QUEUES.to_le_bytes()[0], None), (255, None)] {
        front_end.refused(Request::SetVringCall(VringFile { index, descriptor }));
    }
    // GET_VRING_BASE has no refusal.
    front_end.send(Request::GetVringBase(VringState { index: 0x1_0000, num: 0 }), true);
    assert!(front_end.receive().is_none());
}

#[test]
fn numbers_that_cannot_be_are_refused() {
    let mut front_end = FrontEnd::negotiated();
    for num in [0, u32::from(MAX_QUEUE_SIZE) + 1, 0x1_0010] {
        front_end.refused(Request::SetVringNum(VringState { index: 0, num }));
    }
    front_end.refused(Request::SetVringBase(VringState { index: 0, num: 0x1_0000 }));
    front_end.refused(Request::SetVringEnable(VringState { index: 0, num: 2 }));
    let addresses = crate::driver::Queue::new(0).addresses(None);
    front_end.refused(Request::SetVringAddr(vvu_protocol::message::VringAddresses { flags: 2, ..addresses }));
    front_end.refused(Request::SetVringKick(VringFile { index: 0, descriptor: None }));
}

#[test]
fn cve_2019_14818_surplus_descriptors_are_closed_and_repetition_changes_nothing() {
    let (mut front_end, memory, mut queue) = running();
    for _ in 0..100 {
        front_end.done(Request::SetVringNum(VringState { index: 0, num: 16 }));
    }
    queue.echo(&memory, "still");
    // SET_VRING_NUM has no descriptor.
    let (sent, mut kept) = UnixStream::pair().unwrap();
    let payload = [0, 0, 0, 0, 16, 0, 0, 0].to_vec();
    front_end.send_raw(&RawMessage::request(8, true, payload, vec![sent.into()]));
    assert!(front_end.receive().is_none());
    assert!(matches!(front_end.outcome(), Err(SessionError::Malformed(_))));
    assert_eq!(kept.read(&mut [0]).unwrap(), 0, "closed");
}

#[test]
fn an_end_from_inside_is_in_order() {
    let (mut front_end, memory, mut queue) = running();
    queue.echo(&memory, "before");
    front_end.handle.end();
    assert!(front_end.receive().is_none());
    assert!(matches!(front_end.outcome(), Ok(Ending::Ended)));
    assert_eq!((memory.named.mappings(), memory.named.descriptors()), (1, 2), "the test's own");
}

/// Numbers without a pattern.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Small more often than not: as an index, a count or a kind it is more likely to be taken.
    fn number(&mut self) -> u64 {
        let number = self.next();
        match self.next() % 8 {
            0 => number,
            1 => number << 12,
            2 => u64::MAX - number % 3,
            _ => number % 4,
        }
    }

    fn message(&mut self) -> RawMessage<OwnedFd> {
        // Without 16: who takes the acknowledgements away waits for them in vain.
        let code = match u32::try_from(self.next() % 46).unwrap() {
            16 => 2,
            code => code,
        };
        let row = FRONT_END_REQUESTS.iter().find(|row| row.code == code);
        let count = if code == 5 { self.next() % 3 } else { row.map_or(0, |row| *row.descriptors.start() as u64) };
        let descriptors = (0..count).map(|_| self.descriptor()).collect();
        let len = match code {
            5 => 8 + 32 * usize::try_from(count).unwrap(),
            9 | 37 | 38 => 40,
            6 | 26 | 41 => 16,
            22 => 32,
            31 | 32 => 24,
            24 | 25 => 16,
            2 | 8 | 10..=14 | 18..=20 | 23 | 27 | 35 | 39 | 42 => 8,
            _ => 0,
        };
        let mut payload = (0..9).flat_map(|_| self.number().to_le_bytes()).collect::<Vec<_>>();
        match code {
            5 => payload[..8].copy_from_slice(&count.to_le_bytes()),
            // No descriptor comes with it.
            12..=14 => payload[..8].copy_from_slice(&((self.next() % 5) | (1 << 8)).to_le_bytes()),
            24 | 25 => payload[4..8].copy_from_slice(&4u32.to_le_bytes()),
            _ => {}
        }
        payload.truncate(if self.next().is_multiple_of(64) { len + 1 } else { len });
        RawMessage::request(code, true, payload, descriptors)
    }

    fn descriptor(&mut self) -> OwnedFd {
        match self.next() % 4 {
            0 => rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap(),
            1 => UnixStream::pair().unwrap().0.into(),
            _ => crate::front_end::NamedMemory::new(self.next() % 3 * 4096).fd(),
        }
    }
}

#[test]
fn whatever_a_front_end_sends_the_session_ends_in_order() {
    let mut answered = 0;
    for seed in 1..400 {
        let mut noise = Noise(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        let mut front_end = FrontEnd::negotiated();
        for _ in 0..40 {
            front_end.send_raw(&noise.message());
            if front_end.receive().is_none() {
                break;
            }
            answered += 1;
        }
        front_end.close();
        // A panic of the session or of a queue would come out here.
        let _outcome = front_end.outcome();
    }
    assert!(answered > 400, "only {answered} messages were answered: this proves little");
}
