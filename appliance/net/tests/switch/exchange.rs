//! Frames from one port to others: where they go, and that they arrive as they were.

use crate::driver::{ALL, DATA_ONLY, Desc, EVENT_IDX, INDIRECT, INDIRECT_FLAG, MRG_RXBUF, Machine, NEXT, VERSION_1};
use crate::frames::{BROADCAST, NO_OFFLOAD, between, plain, tagged};
use crate::program::{Program, mac};

#[test]
fn two_ports_exchange_frames_whatever_is_negotiated() {
    let program = Program::with_ports(2);
    for features in [
        DATA_ONLY,
        DATA_ONLY & !EVENT_IDX,
        DATA_ONLY & !MRG_RXBUF,
        DATA_ONLY & !(EVENT_IDX | MRG_RXBUF | INDIRECT),
        // A legacy driver, whose header is shorter.
        DATA_ONLY & !(VERSION_1 | MRG_RXBUF),
        0,
    ] {
        // Both ways, and one of the two with everything.
        let mut left = Machine::connect(&program, 0, features);
        let mut right = Machine::connect(&program, 1, DATA_ONLY);
        let (mut left_rx, mut left_tx) = left.pair(0, 4, 2000);
        let (mut right_rx, mut right_tx) = right.pair(0, 4, 2000);
        for len in [14, 60, 255, 256, 257, 300, 1514] {
            let frame = between(0, 1, len);
            left_tx.send(&left, &NO_OFFLOAD, &frame);
            let received = right_rx.receive(&right);
            assert_eq!(received.frame, frame, "{features:#x}");
            assert_eq!(received.header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            right_rx.recycle(&right, &received);

            let frame = between(1, 0, len);
            right_tx.send(&right, &NO_OFFLOAD, &frame);
            let received = left_rx.receive(&left);
            assert_eq!(received.frame, frame, "{features:#x}");
            assert_eq!(received.header.len(), left.header_len());
            left_rx.recycle(&left, &received);
        }
    }
}

#[test]
fn a_frame_goes_to_one_port_if_its_station_is_known_and_else_to_all_others() {
    let program = Program::with_ports(3);
    let mut machines = [0, 1, 2].map(|port| Machine::connect(&program, port, DATA_ONLY));
    let mut pairs: Vec<_> = machines.iter_mut().map(|machine| machine.pair(0, 32, 2000)).collect();
    let far = [0x52, 0x54, 0, 0, 9, 9];
    let mut sent = |from: usize, frame: &[u8], expected: &[usize]| {
        pairs[from].1.send(&machines[from], &NO_OFFLOAD, frame);
        // The sender has its buffer back when all others have the frame.
        for (port, pair) in pairs.iter_mut().enumerate() {
            let received = pair.0.try_receive(&machines[port]).map(|received| received.frame);
            let wanted = expected.contains(&port).then(|| frame.to_vec());
            assert_eq!(received, wanted, "port {port}, from {from} to {expected:?}");
        }
    };
    sent(0, &plain(BROADCAST, mac(0), 60), &[1, 2]);
    sent(0, &plain([0x33, 0x33, 0, 0, 0, 1], mac(0), 60), &[1, 2]);
    // Devices' own addresses are known without a frame of theirs.
    sent(0, &between(0, 2, 60), &[2]);
    // Another station, behind port 1: not known before it was heard.
    sent(0, &plain(far, mac(0), 60), &[1, 2]);
    sent(1, &plain(mac(0), far, 60), &[0]);
    sent(0, &plain(far, mac(0), 60), &[1]);
    // It moves.
    sent(2, &plain(BROADCAST, far, 60), &[0, 1]);
    sent(0, &plain(far, mac(0), 60), &[2]);
    // Behind the port that it comes from: it has seen it already.
    sent(2, &plain(far, mac(2), 60), &[]);
    sent(0, &tagged(5, &between(0, 1, 60)), &[1]);
    // Not for the neighbours of a switch, from a group, or from another port's device.
    sent(0, &plain([0x01, 0x80, 0xc2, 0, 0, 0x0e], mac(0), 60), &[]);
    sent(0, &plain(BROADCAST, [0x03, 0, 0, 0, 0, 1], 60), &[]);
    sent(0, &plain(BROADCAST, mac(1), 60), &[]);
    assert_eq!((program.counter(0, "tx_filtered"), program.counter(0, "tx_spoofed")), (2, 1));
}

#[test]
fn a_packet_may_lie_in_many_pieces() {
    let program = Program::with_ports(2);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let mut right = Machine::connect(&program, 1, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let (mut rx, _) = right.pair(0, 8, 2000);
    let frame = between(0, 1, 900);
    let bytes = [&NO_OFFLOAD[..], &frame].concat();
    for piece in [1, 3, 11, 12, 13, 250, 268] {
        for indirect in [false, true] {
            let data = tx.data();
            let count = bytes.len().div_ceil(piece).min(64);
            for (index, chunk) in (0..count).map(|index| (index, index * piece)).map(|(index, start)| {
                let end = if index + 1 == count { bytes.len() } else { start + piece };
                (index, &bytes[start..end])
            }) {
                // Each piece in a page of its own.
                let address = data + index as u64 * 4096 + 7;
                left.fill(address, chunk);
                let last = index + 1 == count;
                let desc = Desc {
                    address,
                    len: chunk.len() as u32,
                    flags: if last { 0 } else { NEXT },
                    next: if last { 0 } else { index as u16 + 1 },
                };
                if indirect {
                    left.fill(data + 0x20_0000 + 16 * index as u64, &desc.bytes());
                } else {
                    tx.put_desc(&left.memory, index as u16, desc);
                }
            }
            if indirect {
                let desc = Desc { address: data + 0x20_0000, len: 16 * count as u32, flags: INDIRECT_FLAG, next: 0 };
                tx.put_desc(&left.memory, 0, desc);
            }
            tx.offer(&left.memory, 0);
            tx.publish(&left.memory);
            tx.kick();
            assert_eq!(tx.wait_used(&left.memory), (0, 0));
            let received = rx.receive(&right);
            assert!(received.frame == frame, "pieces of {piece}, indirect: {indirect}");
            rx.recycle(&right, &received);
        }
    }
}

#[test]
fn a_driver_without_buffers_loses_packets_and_nobody_waits() {
    let program = Program::with_ports(2);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let mut right = Machine::connect(&program, 1, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let (mut rx, _) = right.pair(0, 2, 2000);
    let frame = between(0, 1, 500);
    for _ in 0..5 {
        tx.send(&left, &NO_OFFLOAD, &frame);
    }
    let (first, second) = (rx.receive(&right), rx.receive(&right));
    assert_eq!((&first.frame, &second.frame), (&frame, &frame));
    assert_eq!(rx.try_receive(&right), None);
    assert_eq!(program.counter(1, "rx_no_buffers"), 3);
    // A frame that needs two buffers takes none if there is one.
    rx.recycle(&right, &first);
    tx.send(&left, &NO_OFFLOAD, &between(0, 1, 3000)[..1514]);
    let received = rx.receive(&right);
    assert_eq!(received.frame.len(), 1514);
    rx.recycle(&right, &received);
    rx.recycle(&right, &second);
    tx.send(&left, &NO_OFFLOAD, &frame);
    assert_eq!(rx.receive(&right).frame, frame);
    assert_eq!(rx.used_index(&right.memory), 4);
}

#[test]
fn a_frame_takes_as_many_buffers_as_it_needs_or_none() {
    let program = Program::start(&["", ""], &["--mtu", "9000"]);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let mut right = Machine::connect(&program, 1, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let (mut rx, _) = right.pair(0, 8, 1000);
    let frame = between(0, 1, 9014);
    // 9026 bytes with the header: eight buffers do not hold them, ten do.
    tx.send(&left, &NO_OFFLOAD, &frame);
    assert_eq!((rx.try_receive(&right), program.counter(1, "rx_no_buffers")), (None, 1));
    rx.offer_buffer(&right.memory, 8, 1000);
    rx.offer_buffer(&right.memory, 9, 1000);
    rx.publish(&right.memory);
    tx.send(&left, &NO_OFFLOAD, &frame);
    let received = rx.receive(&right);
    assert!(received.frame == frame);
    assert_eq!((received.heads.len(), &received.header[10..]), (10, &[10, 0][..]));
    // Without mergeable buffers it never fits.
    drop(right);
    let mut right = Machine::connect(&program, 1, ALL & DATA_ONLY & !MRG_RXBUF);
    let (mut rx, _) = right.pair(0, 32, 1000);
    tx.send(&left, &NO_OFFLOAD, &frame);
    assert_eq!((rx.try_receive(&right), program.counter(1, "rx_too_large")), (None, 1));
    tx.send(&left, &NO_OFFLOAD, &frame[..500]);
    assert_eq!(rx.receive(&right).frame, frame[..500]);
    // What is larger than the MTU goes nowhere.
    tx.send(&left, &NO_OFFLOAD, &between(0, 1, 9015));
    assert_eq!(program.counter(0, "tx_oversized"), 1);
}
