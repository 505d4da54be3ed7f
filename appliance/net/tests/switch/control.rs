//! What the operator sets at the start and while the switch works.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use serde_json::json;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::driver::{DATA_ONLY, Machine};
use crate::frames::{BROADCAST, NO_OFFLOAD, between, plain, tagged};
use crate::program::{LIMIT, Program, mac};

#[test]
fn a_link_that_is_down_carries_nothing() {
    let program = Program::start(&["link=down", ""], &[]);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let mut right = Machine::connect(&program, 1, DATA_ONLY);
    let (mut left_rx, mut left_tx) = left.pair(0, 8, 2000);
    let (mut right_rx, mut right_tx) = right.pair(0, 8, 2000);
    assert_eq!((left.config()[6], right.config()[6]), (0, 1));
    left_tx.send(&left, &NO_OFFLOAD, &between(0, 1, 60));
    right_tx.send(&right, &NO_OFFLOAD, &between(1, 0, 60));
    assert_eq!((left_rx.try_receive(&left), right_rx.try_receive(&right)), (None, None));
    assert_eq!((program.counter(0, "tx_link_down"), program.counter(0, "rx_link_down")), (1, 1));

    assert_eq!(program.ask(&json!({ "set-link": { "port": 0, "up": true } })), Ok(json!({})));
    assert_eq!(left.config()[6], 1);
    left_tx.send(&left, &NO_OFFLOAD, &between(0, 1, 60));
    assert_eq!(right_rx.receive(&right).frame, between(0, 1, 60));
    program.ask(&json!({ "set-link": { "port": 0, "up": false } })).unwrap();
    left_tx.send(&left, &NO_OFFLOAD, &between(0, 1, 60));
    assert_eq!(right_rx.try_receive(&right), None);
}

#[test]
fn a_change_of_the_link_is_told() {
    let program = Program::with_ports(1);
    let mut machine = Machine::connect_for(&program, 0, DATA_ONLY, VhostUserProtocolFeatures::BACKEND_REQ);
    let (mut channel, theirs) = UnixStream::pair().unwrap();
    channel.set_read_timeout(Some(LIMIT)).unwrap();
    machine.frontend.set_backend_request_fd(&theirs).unwrap();
    for (up, status) in [(false, 0), (true, 1)] {
        program.ask(&json!({ "set-link": { "up": up } })).unwrap();
        let mut message = [0; 12];
        channel.read_exact(&mut message).unwrap();
        // CONFIG_CHANGE, which wants an answer.
        assert_eq!(message[..8], [2, 0, 0, 0, 9, 0, 0, 0]);
        assert_eq!(machine.config()[6], status);
        channel.write_all(&[2, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    }
    // No change, nothing to tell.
    program.ask(&json!({ "set-link": { "up": true } })).unwrap();
    machine.config();
    channel.set_nonblocking(true).unwrap();
    assert_eq!(channel.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn the_filter_of_a_port_can_be_changed() {
    let own = "52:54:00:00:00:00";
    let program = Program::start(&[&format!("macs={own},vlans=0;7"), ""], &[]);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let mut right = Machine::connect(&program, 1, DATA_ONLY);
    let (mut left_rx, mut left_tx) = left.pair(0, 32, 2000);
    let (mut right_rx, mut right_tx) = right.pair(0, 32, 2000);
    let forged = plain(mac(1), [0x52, 0x54, 0, 0, 6, 6], 60);
    let mut passes = |frame: &[u8]| {
        left_tx.send(&left, &NO_OFFLOAD, frame);
        let received = right_rx.try_receive(&right);
        right_tx.send(&right, &NO_OFFLOAD, &[&frame[6..12], &mac(1), &frame[12..]].concat());
        (received.is_some(), left_rx.try_receive(&left).is_some())
    };
    let frame = between(0, 1, 60);
    assert_eq!(passes(&frame), (true, true));
    assert_eq!(passes(&tagged(7, &frame)), (true, true));
    assert_eq!(passes(&tagged(8, &frame)), (false, false));
    assert!(!passes(&forged).0);
    program.ask(&json!({ "set-filter": { "port": 0, "macs": [], "vlans": [8] } })).unwrap();
    assert_eq!(passes(&frame), (false, false));
    assert_eq!(passes(&tagged(8, &frame)), (true, true));
    assert!(passes(&tagged(8, &forged)).0);
    let expected = json!({ "macs": [], "vlans": [8] });
    assert_eq!(program.port(0)["filter"], expected);
}

#[test]
fn a_rate_limit_holds_for_the_sender_and_the_receiver() {
    let program = Program::start(&["iops=100", "iops=1"], &[]);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let mut right = Machine::connect(&program, 1, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let (mut rx, _) = right.pair(0, 32, 2000);
    let start = Instant::now();
    // The sender has to wait for all but the first ten, which are a tenth of a second's.
    for _ in 0..40 {
        tx.send(&left, &NO_OFFLOAD, &between(0, 1, 60));
    }
    let elapsed = start.elapsed();
    assert!(elapsed.as_millis() >= 290 && elapsed < LIMIT, "{elapsed:?}");
    // The receiver loses what is too much for it: all but one in a second.
    let mut received = 0;
    while rx.try_receive(&right).is_some() {
        received += 1;
    }
    assert!((1..=start.elapsed().as_secs() + 2).contains(&received), "{received}");
    assert_eq!(program.counter(1, "rx_limited"), 40 - received);
    let limits = json!({ "set-limits": { "port": 0, "operations_per_second": 0, "bytes_per_second": 0 } });
    program.ask(&limits).unwrap();
    program.ask(&json!({ "set-limits": { "port": 1, "operations_per_second": 0, "bytes_per_second": 0 } })).unwrap();
    let waits = program.counter(0, "tx_waits");
    for _ in 0..40 {
        tx.send(&left, &NO_OFFLOAD, &plain(BROADCAST, mac(0), 60));
    }
    assert_eq!(program.counter(0, "tx_waits"), waits);
}

#[test]
fn mistakes_of_the_operator_are_named() {
    let program = Program::with_ports(1);
    for (request, expected) in [
        (json!({ "set-link": { "port": 1, "up": true } }), "no port 1"),
        (json!({ "set-link": { "up": 7 } }), "not a request"),
        (json!({ "set-filter": { "macs": ["x"], "vlans": [] } }), "MAC address"),
        (json!({ "set-filter": { "macs": [], "vlans": [4095] } }), "VLAN 4095"),
        (json!({ "open-sesame": {} }), "not a request"),
    ] {
        let error = program.ask(&request).unwrap_err();
        assert!(error.contains(expected), "{request}: {error}");
    }
    assert_eq!(program.port(0)["link"], true);
}
