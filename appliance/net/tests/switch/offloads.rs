//! Checksums and segmentation that one driver leaves to others: what the receiver does itself it gets as it was sent, all else
//! is done on the way.

use crate::driver::{DATA_ONLY, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF, Machine};
use crate::frames::{NO_OFFLOAD, between, header, is_right, tcp, udp};
use crate::program::{Program, mac};

#[test]
fn a_large_packet_arrives_whole_where_it_is_wanted() {
    let program = Program::with_ports(2);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let mut right = Machine::connect(&program, 1, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let (mut rx, _) = right.pair(0, 32, 4096);
    let payload: Vec<u8> = (0..65_000u32).map(|index| (index % 253) as u8).collect();
    let frame = tcp(mac(1), mac(0), &payload);
    tx.send(&left, &header(1, 1460, 34, 16), &frame);
    let received = rx.receive(&right);
    assert!(received.frame == frame);
    // The hint is that of the switch, and so is the number of buffers.
    assert_eq!(received.header, [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 16, 0]);
    assert_eq!(received.heads.len(), 16);
}

#[test]
fn a_large_packet_is_cut_for_a_driver_that_does_not_want_it() {
    let program = Program::with_ports(3);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    for features in [DATA_ONLY & !GUEST_TSO4, DATA_ONLY & !GUEST_CSUM, DATA_ONLY & !(GUEST_TSO4 | MRG_RXBUF)] {
        let mut right = Machine::connect(&program, 1, features);
        let (mut rx, _) = right.pair(0, 32, 2000);
        let payload: Vec<u8> = (0..20_000u32).map(|index| (index % 253) as u8).collect();
        tx.send(&left, &header(1, 1460, 34, 16), &tcp(mac(1), mac(0), &payload));
        let mut sequence = 0x1000;
        for chunk in payload.chunks(1460) {
            let received = rx.receive(&right);
            assert!(is_right(&received.frame));
            assert_eq!(received.frame[38..42], u32::to_be_bytes(sequence));
            assert!(received.frame[54..] == *chunk);
            assert_eq!(received.header[1..10], [0; 9], "nothing is left to do");
            sequence += 1460;
        }
        assert_eq!(rx.try_receive(&right), None);
    }
    assert_eq!(program.counter(1, "rx_segmented"), 3);
    // UDP is cut, too.
    let mut right = Machine::connect(&program, 1, DATA_ONLY & !GUEST_CSUM);
    let (mut rx, _) = right.pair(0, 32, 2000);
    tx.send(&left, &header(5, 1000, 34, 6), &udp(mac(1), mac(0), 9, &[7; 2500]));
    let frames = [0, 1, 2].map(|_| rx.receive(&right).frame);
    assert!(frames.iter().all(|frame| is_right(frame)));
    assert_eq!(frames.map(|frame| frame.len() - 42), [1000, 1000, 500]);
}

#[test]
fn a_checksum_is_completed_for_a_driver_that_does_not_do_it() {
    let program = Program::with_ports(2);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let frame = udp(mac(1), mac(0), 9, &[1, 2, 3]);
    for (features, is_complete) in [(DATA_ONLY, false), (DATA_ONLY & !GUEST_CSUM, true)] {
        let mut right = Machine::connect(&program, 1, features);
        let (mut rx, _) = right.pair(0, 4, 2000);
        tx.send(&left, &header(0, 0, 34, 6), &frame);
        let received = rx.receive(&right);
        assert_eq!(is_right(&received.frame), is_complete);
        let expected = if is_complete { [0; 10] } else { [1, 0, 0, 0, 0, 0, 34, 0, 6, 0] };
        assert_eq!(received.header[..10], expected);
    }
    assert_eq!(program.counter(1, "rx_checksums"), 1);
    // Nobody is to believe a driver that says that a checksum was found right.
    let mut right = Machine::connect(&program, 1, DATA_ONLY);
    let (mut rx, _) = right.pair(0, 4, 2000);
    tx.send(&left, &[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &frame);
    assert_eq!(rx.receive(&right).header[..10], [0; 10]);
}

#[test]
fn headers_that_are_not_true_of_the_packet_cost_the_packet_only() {
    let program = Program::with_ports(2);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let mut right = Machine::connect(&program, 1, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let (mut rx, _) = right.pair(0, 8, 4096);
    let frame = tcp(mac(1), mac(0), &[5; 1000]);
    let len = frame.len() as u16;
    let hostile = [
        header(0, 0, len, 0),
        header(0, 0, len - 17, 16),
        header(0, 0, 0xffff, 0xffff),
        header(1, 0, 34, 16),
        header(1, 500, 34, 6),
        header(1, 500, 0, 16),
        header(1, 1, 34, 16)[..]
            .try_into()
            .map(|mut bytes: [u8; 12]| {
                bytes[0] = 0;
                bytes
            })
            .unwrap(),
        header(4, 500, 34, 16),
        header(5, 500, 34, 16),
        header(3, 500, 34, 16),
        header(0x81, 500, 34, 16),
        header(0xff, 500, 34, 16),
    ];
    for header in &hostile {
        tx.send(&left, header, &frame);
    }
    // Too short to be a frame, and none at all.
    tx.send(&left, &NO_OFFLOAD, &frame[..13]);
    tx.send(&left, &NO_OFFLOAD, &[]);
    assert_eq!(rx.try_receive(&right), None);
    assert_eq!(program.counter(0, "tx_malformed"), hostile.len() as u64 + 2);
    tx.send(&left, &NO_OFFLOAD, &between(0, 1, 60));
    assert_eq!(rx.receive(&right).frame, between(0, 1, 60));
}

#[test]
fn an_offload_has_to_be_negotiated() {
    let program = Program::with_ports(2);
    let mut left = Machine::connect(&program, 0, DATA_ONLY & !HOST_TSO4);
    let mut right = Machine::connect(&program, 1, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let (mut rx, _) = right.pair(0, 8, 4096);
    tx.send(&left, &header(1, 500, 34, 16), &tcp(mac(1), mac(0), &[5; 1000]));
    tx.send(&left, &header(0, 0, 34, 16), &tcp(mac(1), mac(0), &[5; 1000]));
    assert_eq!(rx.receive(&right).frame.len(), 1054);
    assert_eq!((rx.try_receive(&right), program.counter(0, "tx_malformed")), (None, 1));
}
