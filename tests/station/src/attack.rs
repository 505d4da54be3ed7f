//! What a hostile driver does: rings that break the rules, headers that are not true of their packets, commands that are
//! none.

use std::net::SocketAddrV4;

use anyhow::{Context, Result, ensure};
use vvu_station::packet::{Header, NEEDS_CSUM, Station, TCP, TCP_CHECKSUM, TRANSPORT_START, ipv4, udp};

use crate::card::{CONTROL, Card, DATA, Desc, INDIRECT, NEXT, RECEIVE, RING_LEN, TRANSMIT, WRITE};
use crate::datagrams::MARK;

/// Where an indirect table is.
const TABLE: usize = DATA + 0x8_0000;

/// An address at which no machine of a test has memory.
const NOWHERE: u64 = 1 << 45;

/// Length of TCP's header.
const TCP_HEADER_LEN: usize = 20;

/// One way to break a ring.
struct Attack {
    queue: u16,
    descriptors: Vec<Desc>,
    /// An indirect table.
    table: Vec<Desc>,
    head: u16,
    /// Surplus of the available index.
    surplus: u16,
}

impl Attack {
    fn on(queue: u16, descriptors: Vec<Desc>) -> Self {
        Self { queue, descriptors, table: Vec::new(), head: 0, surplus: 0 }
    }
}

fn find(name: &str, card: &Card) -> Option<Attack> {
    let (here, table) = (card.address(DATA), card.address(TABLE));
    let desc = |address, len, flags, next| Desc { address, len, flags, next };
    let attack = match name {
        "loop" => Attack::on(TRANSMIT, vec![desc(here, 500, NEXT, 1), desc(here, 500, NEXT, 0)]),
        "wild-address" => Attack::on(TRANSMIT, vec![desc(NOWHERE, 500, 0, 0)]),
        "wrapping-address" => Attack::on(TRANSMIT, vec![desc(u64::MAX - 100, 500, 0, 0)]),
        "huge-length" => Attack::on(TRANSMIT, vec![desc(here, u32::MAX, 0, 0)]),
        "next-outside" => Attack::on(TRANSMIT, vec![desc(here, 500, NEXT, RING_LEN)]),
        "nested-table" => Attack {
            table: vec![desc(table, 16, INDIRECT, 0)],
            ..Attack::on(TRANSMIT, vec![desc(table, 16, INDIRECT, 0)])
        },
        "head-outside" => Attack { head: RING_LEN, ..Attack::on(TRANSMIT, vec![]) },
        "index-too-far" => Attack { surplus: RING_LEN, ..Attack::on(TRANSMIT, vec![]) },
        "half-a-header" => Attack::on(TRANSMIT, vec![desc(here, 11, 0, 0)]),
        "wild-buffer" => Attack::on(RECEIVE, vec![desc(NOWHERE, 2000, WRITE, 0)]),
        "command-loop" => Attack::on(CONTROL, vec![desc(here, 2, NEXT, 0)]),
        _ => return None,
    };
    Some(attack)
}

/// Breaks a rule, and leaves the device as it is then.
pub(crate) fn attack(device: &str, name: &str) -> Result<()> {
    let mut card = Card::take(device)?;
    let attack = find(name, &card).with_context(|| format!("no such attack: {name}"))?;
    for (index, desc) in (0..).zip(&attack.descriptors) {
        card.describe(attack.queue, index, *desc)?;
    }
    for (index, desc) in attack.table.iter().enumerate() {
        card.describe_at(TABLE + 16 * index, *desc)?;
    }
    card.offer(attack.queue, attack.head)?;
    card.skip(attack.queue, attack.surplus)?;
    card.kick(attack.queue)
}

/// Sends packets that a device must drop, all of which it must return, and at last one that it must not. To the device
/// the length of the headers (`hdr_len`) is a hint, so that of the last one is a lie, too.
pub(crate) fn malformed(device: &str, mac: &str, to: &str) -> Result<()> {
    let mut card = Card::take(device)?;
    let address: SocketAddrV4 = to.parse().with_context(|| format!("'{to}' is no address"))?;
    let to = Station { mac: mac_of(mac)?, address: *address.ip(), port: address.port() };
    // Of no network: what the other side answers goes nowhere.
    let from = Station { mac: card.mac()?, address: [192, 0, 2, 1].into(), port: 7 };
    let marked = |text: &str| udp(from, to, &[MARK, text.as_bytes()].concat());
    let frame_len = u16::try_from(marked("0").len())?;
    let segmented = ipv4(from, to, TCP, &[0; TCP_HEADER_LEN + 4000]);
    let plain = Header::default();
    let sum = |csum_start, csum_offset| Header { flags: NEEDS_CSUM, csum_start, csum_offset, ..plain };
    let segments = |gso_type, gso_size| Header { gso_type, gso_size, ..sum(TRANSPORT_START, TCP_CHECKSUM) };
    let packets = [
        ("a checksum behind the frame", sum(frame_len, 0), marked("1")),
        ("a checksum whose place is far away", sum(u16::MAX, u16::MAX), marked("2")),
        ("segments of nothing", segments(1, 0), segmented.clone()),
        ("too many segments", segments(1, 1), segmented.clone()),
        ("segments without a checksum", Header { flags: 0, ..segments(1, 1000) }, segmented.clone()),
        ("segments of another protocol", segments(1, 1000), marked("3")),
        ("segments of a type that was not offered", segments(3, 1000), segmented.clone()),
        ("segments of no type", segments(0x7f, 1000), segmented),
        ("half an Ethernet header", plain, marked("4").into_iter().take(9).collect()),
        ("an empty packet", plain, Vec::new()),
        ("more than a network carries", plain, udp(from, to, &[&b"mark 5"[..], &[0; 20_000]].concat())),
        ("somebody else's address", plain, udp(Station { mac: to.mac, ..from }, to, b"mark 6")),
        ("a group as source", plain, udp(Station { mac: [1, 0, 0x5e, 0, 0, 1], ..from }, to, b"mark 7")),
        ("a datagram", Header { hdr_len: u16::MAX, gso_size: u16::MAX, ..plain }, marked("end")),
    ];
    for (what, header, frame) in packets {
        let packet = [&header.bytes()[..], &frame].concat();
        card.memory().write_bytes(DATA, &packet)?;
        let desc = Desc { address: card.address(DATA), len: u32::try_from(packet.len())?, flags: 0, next: 0 };
        card.describe(TRANSMIT, 0, desc)?;
        card.offer(TRANSMIT, 0)?;
        card.kick(TRANSMIT)?;
        card.await_all_used(TRANSMIT).context(what)?;
    }
    Ok(())
}

/// Gives commands that are none, each of which must be refused, and at last one that must be taken.
pub(crate) fn commands(device: &str) -> Result<()> {
    const TAKEN: u8 = 0;
    const REFUSED: u8 = 1;
    const NO_ANSWER: u8 = 0xff;
    let mut card = Card::take(device)?;
    let long = [&[1, 0][..], &[0xff; 60_000]].concat();
    let cases: [(&str, &[u8], u8); 10] = [
        ("nothing", &[], REFUSED),
        ("half a command", &[0], REFUSED),
        ("without data", &[0, 0], REFUSED),
        ("a switch that is neither on nor off", &[0, 0, 7], REFUSED),
        ("more data than there may be", &[0, 0, 1, 1], REFUSED),
        ("a class that there is not", &[99, 0, 1], REFUSED),
        ("a list that is longer than the command", &[1, 0, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1], REFUSED),
        ("a list without end", &long, REFUSED),
        ("pairs of queues, which were not negotiated", &[4, 0, 2, 0], REFUSED),
        ("promiscuous mode", &[0, 0, 1], TAKEN),
    ];
    let answer = DATA + 0x7_0000;
    for (what, command, expected) in cases {
        card.memory().write_bytes(DATA, command)?;
        card.memory().write(answer, NO_ANSWER)?;
        let to_device = Desc { address: card.address(DATA), len: u32::try_from(command.len())?, flags: NEXT, next: 1 };
        let to_driver = Desc { address: card.address(answer), len: 1, flags: WRITE, next: 0 };
        let chain = if command.is_empty() { vec![to_driver] } else { vec![to_device, to_driver] };
        for (index, desc) in (0..).zip(chain) {
            card.describe(CONTROL, index, desc)?;
        }
        card.offer(CONTROL, 0)?;
        card.kick(CONTROL)?;
        card.await_all_used(CONTROL).context(what)?;
        let answered: u8 = card.memory().read(answer)?;
        ensure!(answered == expected, "{what}: answered with {answered}");
    }
    Ok(())
}

fn mac_of(text: &str) -> Result<[u8; 6]> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|part| u8::from_str_radix(part, 16)).collect();
    bytes.ok().and_then(|bytes| bytes.try_into().ok()).with_context(|| format!("'{text}' is no MAC address"))
}
