//! Drivers of two ports of the switch, in lock-step with it: one sends to the other.

use std::path::Path;
use std::process::Command;

use anyhow::ensure;
use rustix::process::Signal;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vm_memory::{Bytes, GuestAddress};
use vvu_station::packet::{self, GSO_TCPV4, Header, NEEDS_CSUM, Station, TCP_CHECKSUM, TRANSPORT_START};
use vvu_test_driver::event::{wait_event, wait_until};
use vvu_test_driver::front_end::{FrontEnd, ORDINARY};
use vvu_test_driver::process::Process;
use vvu_test_driver::queue::Queue;
use vvu_test_driver::ring::{Desc, WRITE};

use crate::asleep::wait_asleep;
use crate::scenario::{Scenario, Work};

/// Feature bits (virtio 1.3, section 5.1.3): the control queue, which front-ends keep to themselves, and what lets a packet
/// pass that no wire would.
const CTRL_VQ: u64 = 1 << 17;
const GUEST_SEGMENTS: u64 = 1 << 7 | 1 << 8 | 1 << 54 | 1 << 55;

/// Length of each of the two memory regions.
const REGION_LEN: u64 = 32 << 20;

/// Where packets are that are sent, and how far from each other.
const SENT: u64 = 0x80_0000;
const SENT_LEN: u64 = 0x1_1000;

/// Where receive buffers are, and how far from each other.
const RECEIVED: u64 = 0x180_0000;
const RECEIVED_LEN: u64 = 4096;

/// Entries of a ring: those of QEMU's default.
const QUEUE_SIZE: u16 = 256;

/// Bytes of the headers of virtio, of Ethernet and IPv4 and TCP together, of a long packet's payload, and of one of its frames'.
const VIRTIO_HEADER: u64 = 12;
const HEADERS: u16 = 54;
const LONG_PAYLOAD: u16 = 60_000 - HEADERS;
const SEGMENT: u16 = 1448;

/// Addresses of the ports' devices.
const MACS: [[u8; 6]; 2] = [[0x52, 0x54, 0, 0, 0, 1], [0x52, 0x54, 0, 0, 0, 2]];

/// A switch with the drivers of its ports.
pub(crate) struct Network {
    process: Process,
    sender: Port,
    receiver: Port,
    depth: u16,
    /// Receive buffers that a batch fills, and bytes in them.
    expected: (u16, u64),
}

/// A port with its driver.
struct Port {
    front_end: FrontEnd,
    receive: Queue,
    transmit: Queue,
}

impl Network {
    /// Starts the back-end by `command`, which lacks its arguments, and all rings.
    pub(crate) fn start(mut command: Command, directory: &Path, scenario: Scenario) -> anyhow::Result<Self> {
        let sockets = ["port-0", "port-1"].map(|name| directory.join(name));
        for (socket, mac) in sockets.iter().zip(MACS) {
            let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
            command.arg("--port").arg(format!("socket={},mac={mac}", socket.display()));
        }
        command.args(["--poll", "off"]).env("RUST_LOG", "info");
        let process = Process::spawn_quietly(command);
        process.wait_for_line(|line| line.contains("listening"));
        let [sender, receiver] = sockets;
        let refused = if scenario.work == Work::CutSegment { GUEST_SEGMENTS } else { 0 };
        let (sender, mut receiver) = (Port::connect(&sender, 0), Port::connect(&receiver, refused));
        let buffer = receive_buffer(scenario.work);
        for head in 0..QUEUE_SIZE {
            let address = RECEIVED + u64::from(head) * RECEIVED_LEN;
            let desc = Desc { address, len: buffer, flags: WRITE, next: 0 };
            receiver.receive.put_desc(&receiver.front_end.memory, head, desc);
            receiver.receive.offer(&receiver.front_end.memory, head);
        }
        receiver.receive.publish(&receiver.front_end.memory);
        let packet = packet(scenario.work);
        for head in 0..scenario.depth {
            let address = SENT + u64::from(head) * SENT_LEN;
            sender.front_end.fill(address, &packet);
            let desc = Desc { address, len: u32::try_from(packet.len())?, flags: 0, next: 0 };
            sender.transmit.put_desc(&sender.front_end.memory, head, desc);
        }
        let expected = expected(scenario.work);
        let expected = (scenario.depth * expected.0, u64::from(scenario.depth) * expected.1);
        let mut network = Self { process, sender, receiver, depth: scenario.depth, expected };
        network.sender.announce();
        network.receiver.announce();
        wait_asleep(network.process.id())?;
        Ok(network)
    }

    /// Sends so many packets, and ends the back-end.
    pub(crate) fn run(mut self, requests: u32) -> anyhow::Result<()> {
        for _ in 0..requests / u32::from(self.depth) {
            self.run_batch()?;
        }
        self.process.signal(Signal::TERM);
        let status = self.process.wait();
        ensure!(status.success(), "vvu-net ended with {status}");
        Ok(())
    }

    fn run_batch(&mut self) -> anyhow::Result<()> {
        let (transmit, memory) = (&mut self.sender.transmit, &self.sender.front_end.memory);
        for head in 0..self.depth {
            transmit.offer(memory, head);
        }
        transmit.publish(memory);
        transmit.kick();
        let (receive, received_in) = (&mut self.receiver.receive, &self.receiver.front_end.memory);
        wait_event(&receive.call, "call");
        let filled = receive.used_seen.wrapping_add(self.expected.0);
        wait_until("packets", || {
            receive.used_index(received_in) == filled && transmit.used_index(memory) == transmit.avail_index
        });
        wait_asleep(self.process.id())?;
        // The sender wants no signal: it asks for none again.
        while transmit.ring.take_used(memory).is_some() {}
        let (mut len, former) = (0, receive.avail_index);
        while let Some((head, filled)) = receive.take_used(received_in) {
            len += u64::from(filled);
            receive.offer(received_in, head);
        }
        ensure!(len == self.expected.1, "{len} bytes were received, expected {}", self.expected.1);
        receive.publish(received_in);
        if wants_kick(receive, &self.receiver.front_end, former)? {
            receive.kick();
            wait_asleep(self.process.id())?;
        }
        Ok(())
    }
}

impl Port {
    fn connect(socket: &Path, refused: u64) -> Self {
        let choose = |offered| offered & ORDINARY & !CTRL_VQ & !refused;
        let front_end = FrontEnd::connect(socket, choose, VhostUserProtocolFeatures::empty(), REGION_LEN);
        let [receive, transmit] = [0, 1].map(|index| Queue::new(&front_end.memory, index, QUEUE_SIZE));
        Self { front_end, receive, transmit }
    }

    fn announce(&mut self) {
        self.receive.announce(&mut self.front_end, 0);
        self.transmit.announce(&mut self.front_end, 0);
    }
}

/// Whether the device wants to know of what was published since `former` (virtio 1.3, section 2.7.10.1).
fn wants_kick(queue: &Queue, front_end: &FrontEnd, former: u16) -> anyhow::Result<bool> {
    let event = queue.used + 4 + 8 * u64::from(queue.size);
    let event: u16 = front_end.memory.read_obj(GuestAddress(event))?;
    let now = queue.avail_index;
    Ok(now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(former))
}

/// Length of the receive buffers: those of Linux for what comes in frames and for what does not.
fn receive_buffer(work: Work) -> u32 {
    if work == Work::WholeSegment { 4096 } else { 1536 + 12 }
}

/// Receive buffers that a packet fills, and bytes in them.
fn expected(work: Work) -> (u16, u64) {
    let (frames, payload) = match work {
        Work::CutSegment => (LONG_PAYLOAD.div_ceil(SEGMENT), LONG_PAYLOAD),
        Work::WholeSegment => (1, LONG_PAYLOAD),
        Work::Frame(len) => (1, len - HEADERS),
        Work::DiskRead | Work::DiskWrite => (0, 0),
    };
    let bytes = u64::from(payload) + u64::from(frames) * (u64::from(HEADERS) + VIRTIO_HEADER);
    let buffers = if frames == 1 { bytes.div_ceil(u64::from(receive_buffer(work))) } else { u64::from(frames) };
    (u16::try_from(buffers).unwrap_or(u16::MAX), bytes)
}

/// A packet of TCP over IPv4 as Linux sends it: its checksum is left to the device.
fn packet(work: Work) -> Vec<u8> {
    let whole =
        Header { flags: NEEDS_CSUM, csum_start: TRANSPORT_START, csum_offset: TCP_CHECKSUM, ..Header::default() };
    let (header, payload) = match work {
        Work::Frame(len) => (whole, len - HEADERS),
        _ => (Header { gso_type: GSO_TCPV4, hdr_len: HEADERS, gso_size: SEGMENT, ..whole }, LONG_PAYLOAD),
    };
    let [from, to] = MACS;
    let from = Station { mac: from, address: [10, 0, 0, 1].into(), port: 12345 };
    let to = Station { mac: to, address: [10, 0, 0, 2].into(), port: 80 };
    let content: Vec<u8> = (0..payload).map(|index| index.to_le_bytes()[0]).collect();
    [&header.bytes()[..], &packet::unfinished_tcp(from, to, &content)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_has_the_length_that_its_name_says() {
        assert_eq!(packet(Work::Frame(60)).len(), 12 + 60);
        assert_eq!(packet(Work::WholeSegment).len(), 12 + 60_000);
    }

    #[test]
    fn what_arrives_is_known_before() {
        assert_eq!(expected(Work::Frame(1514)), (1, 1526));
        assert_eq!(expected(Work::WholeSegment), (15, 60_012));
        assert_eq!(expected(Work::CutSegment), (42, 59_946 + 42 * 66));
    }
}
