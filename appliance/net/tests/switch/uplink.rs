//! The uplink: a TAP interface in a network namespace of its own, with the kernel's IP stack on its other side.

use std::net::UdpSocket;
use std::process::Command;

use serde_json::json;

use crate::driver::{DATA_ONLY, GUEST_CSUM, Machine, Received, wait_until};
use crate::frames::{NO_OFFLOAD, header, is_right, plain, udp};
use crate::program::{LIMIT, Program, mac};

/// Set for the tests that may make interfaces.
const IN_NAMESPACE: &str = "VVU_NET_IN_NAMESPACE";

/// Runs one of the tests below where it can make interfaces. What it prints is shown if it fails.
fn in_a_namespace(test: &str) {
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("uplink::{test}"), "--ignored", "--nocapture"])
        .env(IN_NAMESPACE, "1")
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success() && text.contains("1 passed"), "{test}: {}\n{text}", output.status);
}

#[test]
fn packets_go_out_and_come_in() {
    in_a_namespace("inside_packets_go_out_and_come_in");
}

#[test]
fn packets_wait_in_the_interface_of_a_wire() {
    in_a_namespace("inside_packets_wait_in_the_interface_of_a_wire");
}

#[test]
fn one_port_does_not_hold_up_the_packets_of_another() {
    in_a_namespace("inside_one_port_does_not_hold_up_the_packets_of_another");
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The program with the interface. The kernel drops what it is to send until it has noticed that somebody is there.
fn start(ports: &[&str]) -> Program {
    let program = Program::start(ports, &["--tap", "vvu0"]);
    wait_until("carrier of the interface", || ip("link show dev vvu0").contains("state UP"));
    program
}

/// The interface `vvu0`, with address 10.0.0.1, and stations 10.0.0.2 and 10.0.0.3 that are ports 0 and 1.
fn make_interface() -> [u8; 6] {
    assert!(std::env::var_os(IN_NAMESPACE).is_some(), "to be run by the test without 'inside'");
    ip("tuntap add dev vvu0 mode tap multi_queue vnet_hdr");
    std::fs::write("/proc/sys/net/ipv6/conf/vvu0/disable_ipv6", "1").unwrap();
    ip("link set vvu0 address 52:54:00:00:07:07 up");
    ip("address add 10.0.0.1/24 dev vvu0");
    ip("neighbour add 10.0.0.2 lladdr 52:54:00:00:00:00 dev vvu0");
    ip("neighbour add 10.0.0.3 lladdr 52:54:00:00:00:01 dev vvu0");
    [0x52, 0x54, 0, 0, 7, 7]
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("10.0.0.1:9").unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

/// The payload of a datagram that has come; other frames of the kernel's are left out.
fn datagram(received: &Received) -> Option<&[u8]> {
    (received.frame[12..14] == [8, 0] && received.frame[23] == 17).then(|| &received.frame[42..])
}

#[test]
#[ignore = "runs in a namespace of its own"]
fn inside_packets_go_out_and_come_in() {
    let interface = make_interface();
    let program = start(&["queues=2", ""]);
    let socket = socket();
    for features in [DATA_ONLY, DATA_ONLY & !GUEST_CSUM] {
        let mut machine = Machine::connect(&program, 0, features);
        let (mut rx, mut tx) = machine.pair(0, 32, 2000);
        // Out: the kernel completes the checksum, and cuts what is to be cut, or has it cut.
        tx.send(&machine, &header(0, 0, 34, 6), &udp(interface, mac(0), 9, b"out"));
        let mut buffer = [0; 2000];
        let (len, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..len], from.to_string()), (&b"out"[..], "10.0.0.2:12345".to_owned()));
        tx.send(&machine, &header(5, 1000, 34, 6), &udp(interface, mac(0), 9, &[7; 2500]));
        let lens = [0; 3].map(|_: i32| socket.recv(&mut buffer).unwrap());
        assert_eq!(lens, [1000, 1000, 500]);
        // In: the kernel leaves the checksum to the driver, which has it done if it does not do it itself.
        socket.send_to(b"in", "10.0.0.2:77").unwrap();
        let received = loop {
            let received = rx.receive(&machine);
            if datagram(&received).is_some() {
                break received;
            }
        };
        assert_eq!(datagram(&received), Some(&b"in"[..]));
        assert_eq!(is_right(&received.frame), features & GUEST_CSUM == 0);
        assert_eq!(received.frame[..12], [mac(0), interface].concat());
    }
    // A frame for another port does not go out.
    let uplink = |program: &Program| program.ask(&json!({ "query": {} })).unwrap()["uplink"]["rx_packets"].clone();
    let mut machine = Machine::connect(&program, 0, DATA_ONLY);
    let mut other = Machine::connect(&program, 1, DATA_ONLY);
    let (_, mut tx) = machine.pair(0, 32, 2000);
    let (mut rx, _) = other.pair(0, 32, 2000);
    let before = uplink(&program);
    tx.send(&machine, &NO_OFFLOAD, &plain(mac(1), mac(0), 60));
    assert_eq!(rx.receive(&other).frame, plain(mac(1), mac(0), 60));
    assert_eq!(uplink(&program), before);
}

#[test]
#[ignore = "runs in a namespace of its own"]
fn inside_packets_wait_in_the_interface_of_a_wire() {
    make_interface();
    let program = start(&[""]);
    let socket = socket();
    for features in [DATA_ONLY, DATA_ONLY & !crate::driver::EVENT_IDX] {
        let mut machine = Machine::connect(&program, 0, features);
        let (mut rx, _) = machine.pair(0, 1, 2000);
        for number in 0..20u8 {
            socket.send_to(&[number; 100], "10.0.0.2:77").unwrap();
        }
        // One buffer, which comes back again and again: nothing is lost.
        for number in 0..20u8 {
            let received = rx.receive(&machine);
            assert_eq!(datagram(&received), Some(&[number; 100][..]));
            rx.recycle(&machine, &received);
        }
        assert_eq!(program.counter(0, "rx_no_buffers"), 0);
        // A driver that gives no more of them does not keep the program from ending the connection.
        let received = rx.stop(&machine);
        assert_eq!(received, 20);
    }
}

#[test]
#[ignore = "runs in a namespace of its own"]
fn inside_one_port_does_not_hold_up_the_packets_of_another() {
    make_interface();
    let mut program = start(&["", ""]);
    let socket = socket();
    let mut idle = Machine::connect(&program, 0, DATA_ONLY);
    let mut machine = Machine::connect(&program, 1, DATA_ONLY);
    let (_idle_rx, _) = idle.pair(0, 0, 0);
    let (mut rx, _) = machine.pair(0, 32, 2000);
    for number in 0..20u8 {
        socket.send_to(&[number; 100], "10.0.0.2:77").unwrap();
        socket.send_to(&[number; 100], "10.0.0.3:77").unwrap();
    }
    for number in 0..20u8 {
        assert_eq!(datagram(&rx.receive(&machine)), Some(&[number; 100][..]));
    }
    program.wait_for_counter(0, "rx_no_buffers", 20);
    program.signal(rustix::process::Signal::TERM);
    assert!(program.wait().success());
}
