//! Every request type, ring feature and configuration field, with content compared to the image.

use std::os::unix::fs::FileExt;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{
    CONFIG_WCE, DATA, EVENT_IDX, FLUSH, FrontEnd, READ_ONLY, REGION_LEN, Req, is_signalled, noise, wait_event,
    wait_until,
};
use crate::process::{ImageFile, Program};

const MIB: u64 = 1 << 20;

#[test]
fn what_is_written_is_in_the_image_and_what_is_in_the_image_is_read() {
    let image = ImageFile::new(8 * MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 128);

    let written = noise(64 * 1024, 1);
    front_end.fill(DATA, &written);
    queue.run_ok(&front_end.memory, &Req::write(2048, DATA, 64 * 1024));
    queue.run_ok(&front_end.memory, &Req::flush());
    assert_eq!(image.content()[MIB as usize..][..written.len()], written);

    let (status, len) = queue.run(&front_end.memory, &Req::read(2048, DATA + MIB, 64 * 1024));
    assert_eq!((status, len), (0, 64 * 1024 + 1));
    assert_eq!(front_end.bytes(DATA + MIB, written.len()), written);

    front_end.fill(DATA, &[0xa5; 4096]);
    queue.run_ok(&front_end.memory, &Req::write(0, DATA, 4096));
    image.check_by_qemu(0xa5, 0, 4096);
    image.check_by_qemu(0, 4096, MIB - 4096);

    let total = program.counters();
    assert_eq!(total["writes"], 2);
    assert_eq!(total["reads"], 1);
    assert_eq!(total["flushes"], 1);
    assert_eq!(total["bytes_written"], 68 * 1024);
    assert_eq!(total["bytes_read"], 64 * 1024);
    assert_eq!(total["bounced_bytes"], 0);
    if program.count_lines("direct=true") > 0 {
        assert_eq!(total["zero_copy_bytes"], 132 * 1024);
    }
}

#[test]
fn the_configuration_describes_the_disk() {
    let image = ImageFile::new(10 * MIB + 700);
    let program = Program::start(&image.path(), &["--queues", "5"]);
    let mut front_end = FrontEnd::connect(&program);
    // Only what works.
    let protocol = front_end.frontend.get_protocol_features().unwrap();
    let working = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    assert_eq!(protocol, working);
    let config = front_end.config();
    assert_eq!(config[..8], (20480u64 + 1).to_le_bytes(), "capacity counts whole sectors");
    assert_eq!(config[12..16], 126u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[32], 1, "writeback");
    assert_eq!(config[34..36], [5, 0]);
    assert_eq!(config[60..], [0; 36], "fields that are newer than ours");
}

#[test]
fn an_odd_disk_ends_at_its_last_whole_sector() {
    let image = ImageFile::new(MIB + 3 * 512 + 100);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    let last = 2048 + 2;
    front_end.fill(DATA, &[7; 512]);
    queue.run_ok(&front_end.memory, &Req::write(last, DATA, 512));
    queue.run_ok(&front_end.memory, &Req::read(last, DATA + 4096, 512));
    assert_eq!(front_end.bytes(DATA + 4096, 512), [7; 512]);
    for beyond in [Req::write(last + 1, DATA, 512), Req::read(last, DATA, 1024), Req::read(u64::MAX, DATA, 512)] {
        assert_eq!(queue.run(&front_end.memory, &beyond).0, 1, "{beyond:?}");
    }
    assert_eq!(image.content().len() as u64, MIB + 3 * 512 + 100, "the file keeps its length");
    image.check_by_qemu(7, last * 512, 512);
}

#[test]
fn large_requests_cross_memory_regions_in_place() {
    let image = ImageFile::new(16 * MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 128);
    // 1 MiB in one descriptor that lies in both regions, then 8 MiB in eight.
    let across = REGION_LEN - 300 * 1024;
    let written = noise(MIB as usize, 2);
    front_end.fill(across, &written);
    queue.run_ok(&front_end.memory, &Req::write(8, across, MIB as u32));
    assert_eq!(image.content()[4096..][..written.len()], written);
    front_end.fill(across, &vec![0; written.len()]);
    queue.run_ok(&front_end.memory, &Req::read(8, across, MIB as u32));
    assert_eq!(front_end.bytes(across, written.len()), written);

    let scattered: Vec<_> = (0..8).map(|index| (DATA + index * 3 * MIB, MIB as u32)).collect();
    let read = Req { data: scattered.clone(), ..Req::read(8, 0, 0) };
    queue.run_ok(&front_end.memory, &read);
    let content = image.content();
    for (index, (address, len)) in scattered.into_iter().enumerate() {
        let expected = &content[4096 + index * MIB as usize..][..len as usize];
        assert_eq!(front_end.bytes(address, len as usize), expected);
    }
    assert_eq!(program.counter("bounced_bytes"), 0);
}

#[test]
fn unaligned_memory_is_bounced_and_right() {
    let image = ImageFile::new(4 * MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 128);
    // Segments of odd length at odd addresses, together a multiple of a sector and more than one bounce buffer.
    let lens = [1, 511, 100_000, 12_345, 150_000 + 311];
    let total: u32 = lens.iter().sum();
    assert_eq!(total % 512, 0);
    let mut data = Vec::new();
    let mut address = DATA + 3;
    for len in lens {
        data.push((address, len));
        address += u64::from(len) + 77;
    }
    let written = noise(total as usize, 3);
    let mut position = 0;
    for (address, len) in &data {
        front_end.fill(*address, &written[position..][..*len as usize]);
        position += *len as usize;
    }
    queue.run_ok(&front_end.memory, &Req { data: data.clone(), ..Req::write(16, 0, 0) });
    assert_eq!(image.content()[8192..][..written.len()], written);
    for (address, len) in &data {
        front_end.fill(*address, &vec![0; *len as usize]);
    }
    queue.run_ok(&front_end.memory, &Req { data: data.clone(), ..Req::read(16, 0, 0) });
    let read: Vec<u8> = data.iter().flat_map(|(address, len)| front_end.bytes(*address, *len as usize)).collect();
    assert!(read == written);
    if program.count_lines("direct=true") > 0 {
        assert_eq!(program.counter("bounced_bytes"), 2 * u64::from(total));
    }
}

#[test]
fn many_bounced_requests_share_few_buffers() {
    let image = ImageFile::new(64 * MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 256);
    let count = 64u16;
    for index in 0..count {
        let address = DATA + 1 + u64::from(index) * 256 * 1024;
        front_end.fill(address, &noise(200 * 1024, u64::from(index)));
        queue.offer_request(&front_end.memory, index * 3, &Req::write(u64::from(index) * 1024, address, 200 * 1024));
    }
    queue.publish(&front_end.memory);
    queue.kick();
    for _ in 0..count {
        let (head, _) = queue.wait_used(&front_end.memory);
        assert_eq!(queue.status(&front_end.memory, head), 0);
    }
    let content = image.content();
    for index in 0..usize::from(count) {
        assert!(content[index * 512 * 1024..][..200 * 1024] == noise(200 * 1024, index as u64), "request {index}");
    }
}

#[test]
fn the_serial_number_is_told_and_cut() {
    let image = ImageFile::new(MIB);
    let program = Program::start(&image.path(), &["--serial", "disk of the driver"]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 16);
    front_end.fill(DATA, &[0xee; 32]);
    let (status, len) = queue.run(&front_end.memory, &Req::get_id(DATA));
    assert_eq!((status, len), (0, 21));
    assert_eq!(front_end.bytes(DATA, 21), b"disk of the driver\0\0\xee");
    queue.run_ok(&front_end.memory, &Req { data: vec![(DATA + 100, 4)], ..Req::get_id(0) });
    assert_eq!(front_end.bytes(DATA + 100, 5), b"disk\0");
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [sector.to_le_bytes().as_slice(), &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn fill_disk(image: &ImageFile, len: u64) {
    std::fs::OpenOptions::new()
        .write(true)
        .open(image.path())
        .unwrap()
        .write_all_at(&noise(len as usize, 9), 0)
        .unwrap();
}

#[test]
fn discard_and_write_zeroes_free_or_clear_what_they_name() {
    let image = ImageFile::new(4 * MIB);
    fill_disk(&image, 4 * MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 16);
    let before = image.content();
    let allocated = image.allocated();

    // Two ranges in one DISCARD.
    front_end.fill(DATA, &[range(0, 1024, 0), range(4096, 1024, 0)].concat());
    queue.run_ok(&front_end.memory, &Req::ranges(11, DATA, 32));
    queue.run_ok(&front_end.memory, &Req::flush());
    assert!(image.allocated() + MIB <= allocated, "{} then {}", allocated, image.allocated());

    // Zeroes, with and without the permission to deallocate; one range is no multiple of 4096.
    front_end.fill(DATA, &[range(1024, 1024, 1), range(2049, 77, 0), range(0, 0, 0)].concat());
    queue.run_ok(&front_end.memory, &Req::ranges(13, DATA, 48));

    let mut expected = before;
    for (sector, sectors) in [(0, 1024), (4096, 1024), (1024, 1024), (2049, 77)] {
        expected[sector * 512..][..sectors * 512].fill(0);
    }
    assert!(image.content() == expected);
    image.check_by_qemu(0, 2049 * 512, 77 * 512);
}

#[test]
fn wrong_ranges_change_nothing() {
    let image = ImageFile::new(MIB);
    fill_disk(&image, MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 16);
    let before = image.content();
    let many: Vec<u8> = (0..17).flat_map(|_| range(0, 8, 0)).collect();
    for (name, kind, payload, status) in [
        ("beyond the capacity", 11, range(2040, 9, 0), 1),
        ("beyond the capacity behind a good one", 13, [range(0, 8, 0), range(2048, 1, 0)].concat(), 1),
        ("sector that overflows", 13, range(u64::MAX, 8, 0), 1),
        ("longer than allowed", 13, range(0, 1 << 30, 0), 1),
        ("unmap is no flag of DISCARD", 11, range(0, 8, 1), 2),
        ("unknown flag", 13, range(0, 8, 2), 2),
        ("too many", 13, many, 1),
        ("cut short", 13, range(0, 8, 0)[..15].to_vec(), 1),
    ] {
        front_end.fill(DATA, &payload);
        let request = Req::ranges(kind, DATA, u32::try_from(payload.len()).unwrap());
        assert_eq!(queue.run(&front_end.memory, &request).0, status, "{name}");
    }
    assert!(image.content() == before);
    assert!(queue.run(&front_end.memory, &Req { kind: 77, ..Req::flush() }) == (2, 1), "unknown request type");
    assert_eq!(queue.run(&front_end.memory, &Req::read(0, DATA, 100)).0, 1, "part of a sector");
}

#[test]
fn a_read_only_disk_reads_and_refuses_to_change() {
    let image = ImageFile::new(MIB);
    fill_disk(&image, MIB);
    let program = Program::start(&image.path(), &["--read-only"]);
    let mut front_end = FrontEnd::connect(&program);
    assert_ne!(front_end.features & READ_ONLY, 0);
    let mut queue = front_end.queue(0, 16);
    let before = image.content();
    queue.run_ok(&front_end.memory, &Req::read(1, DATA, 4096));
    assert_eq!(front_end.bytes(DATA, 4096), before[512..][..4096]);
    front_end.fill(DATA + MIB, &range(0, 8, 0));
    for change in [Req::write(0, DATA, 512), Req::ranges(11, DATA + MIB, 16), Req::ranges(13, DATA + MIB, 16)] {
        assert_eq!(queue.run(&front_end.memory, &change).0, 1, "{change:?}");
    }
    queue.run_ok(&front_end.memory, &Req::flush());
    assert!(image.content() == before);
}

#[test]
fn without_a_write_cache_each_write_is_synced() {
    let image = ImageFile::new(MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect_with(&program.socket(), |offered| offered & !(FLUSH | CONFIG_WCE));
    let mut queue = front_end.queue(0, 16);
    front_end.fill(DATA, &[1; 4096]);
    queue.run_ok(&front_end.memory, &Req::write(0, DATA, 4096));
    assert_eq!(queue.run(&front_end.memory, &Req::flush()).0, 2, "FLUSH was not negotiated");
    drop((queue, front_end));
    program.wait_for_line(|line| line.contains("front-end disconnected"));

    // The driver may switch the cache off in the configuration, if it negotiated that it can.
    let mut front_end = FrontEnd::connect(&program);
    let flags = VhostUserConfigFlags::WRITABLE;
    front_end.frontend.set_config(32, flags, &[0]).unwrap();
    assert_eq!(front_end.config()[32], 0);
    let mut queue = front_end.queue(0, 16);
    queue.run_ok(&front_end.memory, &Req::write(0, DATA, 4096));
    queue.run_ok(&front_end.memory, &Req::flush());
    let capacity = front_end.config()[..8].to_vec();
    front_end.frontend.set_config(0, flags, &[9; 8]).unwrap();
    assert_eq!(front_end.config()[..8], capacity, "the rest is not the driver's to change");
}

#[test]
fn indirect_tables_carry_long_chains() {
    let image = ImageFile::new(4 * MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    // A table longer than the queue, as drivers build them by seg_max.
    let mut queue = front_end.queue(0, 16);
    queue.use_indirect = true;
    let pieces: Vec<_> = (0..126).map(|index| (DATA + index * 8192, 4096)).collect();
    for (index, (address, len)) in pieces.iter().enumerate() {
        front_end.fill(*address, &noise(*len as usize, index as u64));
    }
    queue.run_ok(&front_end.memory, &Req { data: pieces.clone(), ..Req::write(0, 0, 0) });
    let content = image.content();
    for index in 0..126 {
        assert_eq!(content[index * 4096..][..4096], noise(4096, index as u64));
    }
    queue.run_ok(&front_end.memory, &Req { data: vec![(DATA, 4096)], ..Req::read(125 * 8, 0, 0) });
    assert_eq!(front_end.bytes(DATA, 4096), noise(4096, 125));
}

#[test]
fn header_and_status_may_lie_anywhere() {
    use crate::driver::{Desc, NEXT, WRITE};
    let image = ImageFile::new(MIB);
    fill_disk(&image, MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    // The header byte by byte; data and status in one descriptor.
    let header = [[0u8; 8].as_slice(), &3u64.to_le_bytes()].concat();
    for (index, byte) in (0u16..).zip(&header) {
        let address = DATA + u64::from(index) * 100;
        front_end.memory.write_obj(*byte, GuestAddress(address)).unwrap();
        queue.put_desc(&front_end.memory, index, Desc { address, len: 1, flags: NEXT, next: index + 1 });
    }
    let target = DATA + MIB;
    queue.put_desc(&front_end.memory, 16, Desc { address: target, len: 513, flags: WRITE, next: 0 });
    front_end.memory.write_obj(0xffu8, GuestAddress(target + 512)).unwrap();
    queue.offer(&front_end.memory, 0);
    queue.publish(&front_end.memory);
    queue.kick();
    assert_eq!(queue.wait_used(&front_end.memory), (0, 513));
    let got = front_end.bytes(target, 513);
    assert_eq!(got[..512], image.content()[3 * 512..][..512]);
    assert_eq!(got[512], 0);
}

#[test]
fn queues_work_side_by_side() {
    let image = ImageFile::new(64 * MIB);
    let program = Program::start(&image.path(), &["--queues", "4"]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queues: Vec<_> = (0..4).map(|index| front_end.queue(index, 128)).collect();
    for queue in &mut queues {
        for request in 0..32u16 {
            let seed = queue.index as u64 * 100 + u64::from(request);
            let address = DATA + seed * 16384;
            front_end.fill(address, &noise(16384, seed));
            queue.offer_request(&front_end.memory, request * 3, &Req::write(seed * 32, address, 16384));
        }
        queue.publish(&front_end.memory);
        queue.kick();
    }
    for queue in &mut queues {
        for _ in 0..32 {
            let (head, _) = queue.wait_used(&front_end.memory);
            assert_eq!(queue.status(&front_end.memory, head), 0);
        }
    }
    let content = image.content();
    for seed in (0..4).flat_map(|queue| (0..32).map(move |request| queue * 100 + request)) {
        assert!(content[seed * 16384..][..16384] == noise(16384, seed as u64), "write {seed}");
    }
    for queue in 0..4 {
        assert_eq!(program.counters_of(queue)["writes"], 32);
    }
}

#[test]
fn event_idx_asks_and_is_asked_for_notifications() {
    let image = ImageFile::new(MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    assert_ne!(front_end.features & EVENT_IDX, 0);
    let mut queue = front_end.queue(0, 16);
    // The driver wants to hear only of the fourth completion: used_event = 3.
    let used_event = GuestAddress(queue.avail + 4 + 2 * 16);
    front_end.memory.write_obj(3u16, used_event).unwrap();
    for request in 0..4u16 {
        queue.offer_request(&front_end.memory, request * 3, &Req::read(0, DATA, 512));
        queue.publish(&front_end.memory);
        queue.kick();
        if request == 3 {
            break;
        }
        // Without an interrupt there is only the used index to look at.
        wait_until("completion", || queue.used_index(&front_end.memory) == request + 1);
        assert!(!is_signalled(&queue.call, 0), "notified of completion {request}");
    }
    wait_event(&queue.call, "call");
    assert_eq!(queue.used_index(&front_end.memory), 4);
    // And the device told up to where it has looked: avail_event.
    let avail_event: u16 = front_end.memory.read_obj(GuestAddress(queue.used + 4 + 8 * 16)).unwrap();
    assert_eq!(avail_event, 4);
}

#[test]
fn without_event_idx_the_interrupt_flag_counts() {
    let image = ImageFile::new(MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect_with(&program.socket(), |offered| offered & !EVENT_IDX);
    let mut queue = front_end.queue(0, 16);
    // Without the flag each completion is notified. The event is awaited before the flag is set: it belongs to the first.
    queue.offer_request(&front_end.memory, 0, &Req::read(0, DATA, 512));
    queue.publish(&front_end.memory);
    queue.kick();
    wait_event(&queue.call, "call");
    assert!(queue.take_used(&front_end.memory).is_some());
    front_end.memory.write_obj(1u16, GuestAddress(queue.avail)).unwrap();
    queue.offer_request(&front_end.memory, 0, &Req::read(0, DATA, 512));
    queue.publish(&front_end.memory);
    queue.kick();
    wait_until("completion", || queue.take_used(&front_end.memory).is_some());
    // GET_VRING_BASE is answered after the last notification would have been sent.
    assert_eq!(queue.stop(&front_end), 2);
    assert!(!is_signalled(&queue.call, 0));
}
