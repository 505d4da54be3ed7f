//! A front-end and a virtio-net driver, as small as they can be and with every knob that a test needs.

use std::ops::{Deref, DerefMut};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
pub(crate) use vvu_test_driver::event::{wait_event, wait_until};
use vvu_test_driver::front_end::FrontEnd;
pub(crate) use vvu_test_driver::front_end::{
    ACCESS_PLATFORM, EVENT_IDX, INDIRECT, LOG_ALL, ORDINARY as ALL, USER_BASE, VERSION_1,
};
use vvu_test_driver::queue::Queue as AnyQueue;
use vvu_test_driver::ring::Memory;
pub(crate) use vvu_test_driver::ring::{Desc, INDIRECT_FLAG, NEXT, WRITE};

use crate::program::{Program, ask};

pub(crate) const GUEST_CSUM: u64 = 1 << 1;
pub(crate) const GUEST_TSO4: u64 = 1 << 7;
pub(crate) const HOST_TSO4: u64 = 1 << 11;
pub(crate) const MRG_RXBUF: u64 = 1 << 15;
pub(crate) const CTRL_VQ: u64 = 1 << 17;
pub(crate) const MQ: u64 = 1 << 22;

/// What a front-end negotiates that keeps the control queue to itself, as QEMU does.
pub(crate) const DATA_ONLY: u64 = ALL & !CTRL_VQ;

/// Length of each of the two memory regions.
pub(crate) const REGION_LEN: u64 = 32 << 20;

/// Where the buffers of the queues are.
const DATA: u64 = 0x80_0000;

/// Memory of one queue for its buffers.
const QUEUE_DATA: u64 = 0x40_0000;

/// A front-end that is connected to a port.
pub(crate) struct Machine {
    front_end: FrontEnd,
    /// Tells how many receive queues are in service.
    receiving: Box<dyn Fn() -> u64>,
}

impl Deref for Machine {
    type Target = FrontEnd;

    fn deref(&self) -> &FrontEnd {
        &self.front_end
    }
}

impl DerefMut for Machine {
    fn deref_mut(&mut self) -> &mut FrontEnd {
        &mut self.front_end
    }
}

impl Machine {
    /// Connects to a port, and negotiates what `wanted` has of the offered features.
    pub(crate) fn connect(program: &Program, port: usize, wanted: u64) -> Self {
        Self::connect_for(program, port, wanted, VhostUserProtocolFeatures::empty())
    }

    /// The same with further protocol features.
    pub(crate) fn connect_for(
        program: &Program,
        port: usize,
        wanted: u64,
        protocol: VhostUserProtocolFeatures,
    ) -> Self {
        let front_end = FrontEnd::connect(&program.socket(port), |offered| offered & wanted, protocol, REGION_LEN);
        Self { front_end, receiving: receiving(program, port) }
    }

    /// Connects anew, with the same features and the same memory, as a front-end does whose back-end was lost.
    pub(crate) fn reconnect(&mut self, program: &Program, port: usize) {
        self.front_end.reconnect(&program.socket(port));
        self.receiving = receiving(program, port);
    }

    pub(crate) fn config(&mut self) -> Vec<u8> {
        self.front_end.config(24)
    }

    /// Length of the header before each packet.
    pub(crate) fn header_len(&self) -> usize {
        if self.features & (VERSION_1 | MRG_RXBUF) != 0 { 12 } else { 10 }
    }

    /// A queue with fresh rings that the device does not know yet.
    pub(crate) fn idle_queue(&self, index: usize, size: u16) -> Queue {
        Queue { queue: AnyQueue::new(&self.memory, index, size), header_len: self.header_len(), is_control: false }
    }

    /// Starts a queue with fresh rings.
    pub(crate) fn queue(&mut self, index: usize, size: u16) -> Queue {
        let mut queue = self.idle_queue(index, size);
        queue.start(self, 0);
        queue
    }

    /// The control queue, started with fresh rings.
    pub(crate) fn control_queue(&mut self, index: usize, size: u16) -> Queue {
        let mut queue = self.idle_control_queue(index, size);
        queue.start(self, 0);
        queue
    }

    /// The control queue with fresh rings, which the device does not know yet.
    pub(crate) fn idle_control_queue(&self, index: usize, size: u16) -> Queue {
        Queue { is_control: true, ..self.idle_queue(index, size) }
    }

    /// A pair of queues in service, with `count` receive buffers of `len` bytes.
    pub(crate) fn pair(&mut self, pair: usize, count: u16, len: u32) -> (Queue, Queue) {
        let mut receive = self.idle_queue(2 * pair, 256);
        for head in 0..count {
            receive.offer_buffer(&self.memory, head, len);
        }
        receive.publish(&self.memory);
        receive.start(self, 0);
        (receive, self.queue(2 * pair + 1, 256))
    }
}

fn receiving(program: &Program, port: usize) -> Box<dyn Fn() -> u64> {
    let control = program.control();
    Box::new(move || {
        ask(&control, &serde_json::json!({ "query": {} })).unwrap()["ports"][port]["receiving"].as_u64().unwrap()
    })
}

/// A packet as the driver gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) header: Vec<u8>,
    pub(crate) frame: Vec<u8>,
    /// Buffers that it came in.
    pub(crate) heads: Vec<u16>,
}

/// One queue, driver's side.
pub(crate) struct Queue {
    queue: AnyQueue,
    header_len: usize,
    is_control: bool,
}

impl Deref for Queue {
    type Target = AnyQueue;

    fn deref(&self) -> &AnyQueue {
        &self.queue
    }
}

impl DerefMut for Queue {
    fn deref_mut(&mut self) -> &mut AnyQueue {
        &mut self.queue
    }
}

impl Queue {
    /// Announces the ring to the back-end, which goes on at `base`. A receive ring is in service then: what is sent to the
    /// port arrives.
    pub(crate) fn start(&mut self, machine: &mut Machine, base: u16) {
        let before = (machine.receiving)();
        self.announce(machine, base);
        if self.index.is_multiple_of(2) && !self.is_control {
            wait_until("start of a receive queue", || (machine.receiving)() == before + 1);
        }
    }

    /// Announces the ring to the back-end, and does not wait for anything.
    pub(crate) fn announce(&self, machine: &mut Machine, base: u16) {
        self.ask_for_call(&machine.memory);
        self.queue.announce(machine, base);
    }

    /// First address of the queue's buffers.
    pub(crate) fn data(&self) -> u64 {
        DATA + self.index as u64 * QUEUE_DATA
    }

    fn buffer(&self, head: u16) -> u64 {
        // Odd addresses are as good as others.
        self.data() + u64::from(head) * 0x1_1000 % (QUEUE_DATA - 0x1_1000) + 1
    }

    /// Offers a receive buffer, which is one descriptor.
    pub(crate) fn offer_buffer(&mut self, memory: &Memory, head: u16, len: u32) {
        self.put_desc(memory, head, Desc { address: self.buffer(head), len, flags: WRITE, next: 0 });
        self.offer(memory, head);
    }

    /// Offers a packet in one buffer.
    pub(crate) fn offer_packet(&mut self, machine: &Machine, head: u16, header: &[u8], frame: &[u8]) {
        let bytes = [&header[..self.header_len], frame].concat();
        let address = self.buffer(head);
        machine.fill(address, &bytes);
        let desc = Desc { address, len: bytes.len() as u32, flags: 0, next: 0 };
        self.put_desc(&machine.memory, head, desc);
        self.offer(&machine.memory, head);
    }

    /// Sends a packet and waits until it was taken.
    pub(crate) fn send(&mut self, machine: &Machine, header: &[u8], frame: &[u8]) {
        self.offer_packet(machine, 0, header, frame);
        self.publish(&machine.memory);
        self.kick();
        assert_eq!(self.wait_used(&machine.memory), (0, 0));
    }

    /// Waits for a packet.
    pub(crate) fn receive(&mut self, machine: &Machine) -> Received {
        let first = self.wait_used(&machine.memory);
        self.gather(machine, first)
    }

    /// Takes a packet, if there is one.
    pub(crate) fn try_receive(&mut self, machine: &Machine) -> Option<Received> {
        let first = self.take_used(&machine.memory)?;
        Some(self.gather(machine, first))
    }

    fn gather(&mut self, machine: &Machine, first: (u16, u32)) -> Received {
        let mut bytes = machine.bytes(self.buffer(first.0), first.1 as usize);
        let mut heads = vec![first.0];
        let buffers = if self.header_len == 12 { u16::from_le_bytes([bytes[10], bytes[11]]) } else { 1 };
        for _ in 1..buffers {
            // All of them become visible at once.
            let (head, len) = self.take_used(&machine.memory).unwrap();
            bytes.extend(machine.bytes(self.buffer(head), len as usize));
            heads.push(head);
        }
        let frame = bytes.split_off(self.header_len);
        Received { header: bytes, frame, heads }
    }

    /// Gives the buffers of a packet to the device again.
    pub(crate) fn recycle(&mut self, machine: &Machine, received: &Received) {
        for head in &received.heads {
            self.offer(&machine.memory, *head);
        }
        self.publish(&machine.memory);
        self.kick();
    }

    /// Carries out a command of the control queue; the device's answer.
    pub(crate) fn command(&mut self, machine: &Machine, command: &[u8]) -> u8 {
        let (memory, address) = (&machine.memory, self.buffer(0));
        machine.fill(address, command);
        machine.fill(address + 0x8000, &[0xff]);
        self.put_desc(memory, 0, Desc { address, len: command.len() as u32, flags: NEXT, next: 1 });
        self.put_desc(memory, 1, Desc { address: address + 0x8000, len: 1, flags: WRITE, next: 0 });
        self.offer(memory, 0);
        self.publish(memory);
        self.kick();
        assert_eq!(self.wait_used(memory), (0, 1));
        machine.bytes(address + 0x8000, 1)[0]
    }
}
