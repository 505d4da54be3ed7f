//! Figures, not verdicts: run with `cargo test --release -p vvu-net --test switch -- --ignored --nocapture speed`.

use std::time::{Duration, Instant};

use crate::driver::{DATA_ONLY, Machine, Queue, wait_event};
use crate::frames::{NO_OFFLOAD, between, header, tcp};
use crate::program::{Program, mac};

/// How long each figure is taken.
const TIME: Duration = Duration::from_secs(2);

/// Makes visible what was offered, and kicks if the device wants to know of it.
fn publish(queue: &Queue, machine: &Machine, published: &mut u16) {
    if queue.publish_and_look(&machine.memory, true, published) {
        queue.kick();
    }
}

/// Sends the same packet over and over, `depth` at a time, to receive buffers of `len` bytes; packets and signals per second.
fn measure(what: &str, header: &[u8], frame: &[u8], depth: u16, len: u32) {
    let program = Program::with_ports(2);
    let mut left = Machine::connect(&program, 0, DATA_ONLY);
    let mut right = Machine::connect(&program, 1, DATA_ONLY);
    let (_, mut tx) = left.pair(0, 0, 0);
    let (mut rx, _) = right.pair(0, 256, len);
    for head in 0..depth {
        tx.offer_packet(&left, head, header, frame);
    }
    let (start, mut bytes) = (Instant::now(), 0u64);
    let (mut tx_published, mut rx_published) = (0, rx.avail_index);
    while start.elapsed() < TIME {
        publish(&tx, &left, &mut tx_published);
        while let Some((head, len)) = rx.take_used(&right.memory) {
            bytes += u64::from(len);
            rx.offer(&right.memory, head);
        }
        publish(&rx, &right, &mut rx_published);
        let mut sent = false;
        while let Some((head, _)) = tx.take_used(&left.memory) {
            tx.offer(&left.memory, head);
            sent = true;
        }
        if !sent {
            wait_event(&tx.call, "call");
        }
    }
    let rate = |count: u64| count as f64 / start.elapsed().as_secs_f64();
    let counter = |port, name| rate(program.counter(port, name));
    println!(
        "{what}: {:.0} packets/s, {:.2} Gbit/s; dropped {:.0}/s; calls {:.0} + {:.0}/s, kicks {:.0}/s",
        counter(1, "rx_packets"),
        rate(bytes) * 8.0 / 1e9,
        counter(1, "rx_no_buffers"),
        counter(0, "calls"),
        counter(1, "calls"),
        counter(0, "kicks"),
    );
}

#[test]
#[ignore = "measures; says nothing about right or wrong"]
fn packets_from_port_to_port() {
    let large = tcp(mac(1), mac(0), &[5; 60_000]);
    measure("60 bytes, one at a time", &NO_OFFLOAD, &between(0, 1, 60), 1, 2000);
    measure("60 bytes", &NO_OFFLOAD, &between(0, 1, 60), 32, 2000);
    measure("1514 bytes", &NO_OFFLOAD, &between(0, 1, 1514), 32, 2000);
    measure("60 kB, not cut, to buffers of 4 KiB", &header(1, 1448, 34, 16), &large, 8, 4096);
}
