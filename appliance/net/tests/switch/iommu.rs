//! A driver behind an IOMMU: every address is translated by mappings that the front-end is asked for.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{ACCESS_PLATFORM, ALL, DATA_ONLY, Desc, Machine, Queue, USER_BASE, WRITE, wait_event};
use crate::frames::{NO_OFFLOAD, between};
use crate::program::{LIMIT, Program};

/// Difference of I/O addresses to guest-physical ones.
const IO_BASE: u64 = 0x10_0000_0000;

const PAGE: u64 = 4096;

/// Types of IOTLB messages.
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;

fn iotlb(iova: u64, size: u64, user: u64, kind: u8) -> Vec<u8> {
    [&iova.to_le_bytes()[..], &size.to_le_bytes(), &user.to_le_bytes(), &[3, kind, 0, 0, 0, 0, 0, 0]].concat()
}

/// The front-end's part: answers what it is asked for, a page at a time.
struct Translator {
    channel: UnixStream,
    main: UnixStream,
}

impl Translator {
    fn new(machine: &mut Machine) -> Self {
        let (channel, theirs) = UnixStream::pair().unwrap();
        channel.set_read_timeout(Some(LIMIT)).unwrap();
        machine.frontend.set_backend_request_fd(&theirs).unwrap();
        Self { channel, main: machine.stream.try_clone().unwrap() }
    }

    /// Answers one question; the address that was asked for.
    fn answer(&mut self) -> u64 {
        let mut message = [0; 44];
        self.channel.read_exact(&mut message).unwrap();
        assert_eq!((message[0], message[36 + 1]), (1, 1), "an IOTLB message, a miss");
        let iova = u64::from_le_bytes(message[12..20].try_into().unwrap());
        let page = iova / PAGE * PAGE;
        self.send(&iotlb(page, PAGE, page - IO_BASE + USER_BASE, UPDATE));
        self.channel.write_all(&[1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        iova
    }

    /// Sends an IOTLB message and waits until it has taken effect.
    fn send(&mut self, payload: &[u8]) {
        let header = [22, 1, 32u32].map(u32::to_le_bytes).concat();
        self.main.write_all(&[&header[..], payload].concat()).unwrap();
        let mut answer = [0; 20];
        self.main.read_exact(&mut answer).unwrap();
        assert_eq!(answer[12..], [0; 8]);
    }
}

fn receive_queue(machine: &mut Machine) -> Queue {
    let mut queue = machine.idle_queue(0, 256);
    queue.address_base = IO_BASE;
    for head in 0..8 {
        let address = IO_BASE + queue.data() + u64::from(head) * 0x1_1000 + 1;
        queue.put_desc(&machine.memory, head, Desc { address, len: 1000, flags: WRITE, next: 0 });
        queue.offer(&machine.memory, head);
    }
    queue.publish(&machine.memory);
    queue
}

#[test]
fn buffers_behind_an_iommu_are_asked_for_before_they_are_needed() {
    let program = Program::with_ports(2);
    let mut sender = Machine::connect(&program, 0, DATA_ONLY);
    let (_, mut tx) = sender.pair(0, 0, 0);
    let features = (ALL | ACCESS_PLATFORM) & DATA_ONLY | ACCESS_PLATFORM;
    let mut machine = Machine::connect_for(&program, 1, features, VhostUserProtocolFeatures::BACKEND_REQ);
    let mut translator = Translator::new(&mut machine);
    let mut rx = receive_queue(&mut machine);
    rx.announce(&mut machine, 0);
    // The three parts of the ring, of which two lie in one page each, and eight buffers.
    let asked: Vec<_> = (0..11).map(|_| translator.answer()).collect();
    for head in 0..8 {
        let page = (IO_BASE + rx.data() + head * 0x1_1000) / PAGE;
        assert!(asked.iter().any(|iova| iova / PAGE == page), "buffer {head} in {asked:x?}");
    }
    crate::driver::wait_until("service", || program.port(1)["receiving"] == 1);
    for len in [60, 1514, 500] {
        tx.send(&sender, &NO_OFFLOAD, &between(0, 1, len));
        assert_eq!(rx.receive(&machine).frame, between(0, 1, len));
    }
    assert_eq!(program.counter(1, "rx_no_driver"), 0);

    // A mapping is taken back: the next packet finds it missing and is lost, and after the answer it goes on.
    translator.send(&iotlb(IO_BASE, 1 << 40, 0, INVALIDATE));
    tx.send(&sender, &NO_OFFLOAD, &between(0, 1, 100));
    for _ in 0..3 + 4 {
        translator.answer();
    }
    program.wait_for_counter(1, "rx_no_driver", 1);
    crate::driver::wait_until("a packet that arrives", || {
        tx.send(&sender, &NO_OFFLOAD, &between(0, 1, 100));
        rx.try_receive(&machine).is_some_and(|received| received.frame == between(0, 1, 100))
    });
}

#[test]
fn a_front_end_that_has_no_mapping_breaks_the_ring() {
    let mut program = Program::with_ports(1);
    let features = DATA_ONLY | ACCESS_PLATFORM;
    let mut machine = Machine::connect_for(&program, 0, features, VhostUserProtocolFeatures::BACKEND_REQ);
    let mut translator = Translator::new(&mut machine);
    let rx = receive_queue(&mut machine);
    let memory = &machine.memory;
    memory.write_obj(0xdead_0000_0000u64, GuestAddress(rx.desc)).unwrap();
    rx.announce(&mut machine, 0);
    // It answers, but has nothing for this address.
    let mut message = [0; 44];
    while {
        translator.channel.read_exact(&mut message).unwrap();
        let iova = u64::from_le_bytes(message[12..20].try_into().unwrap());
        if iova < 0xdead_0000_0000 {
            let page = iova / PAGE * PAGE;
            translator.send(&iotlb(page, PAGE, page - IO_BASE + USER_BASE, UPDATE));
        }
        translator.channel.write_all(&[1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        iova < 0xdead_0000_0000
    } {}
    // Asked once more, as the answer may have overtaken the mapping.
    translator.channel.read_exact(&mut message).unwrap();
    translator.channel.write_all(&[1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    wait_event(&rx.error, "err");
    program.wait_for_line(|line| line.contains("IOMMU has no mapping"));
    assert!(program.is_alive());
}
