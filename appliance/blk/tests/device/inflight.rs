//! Inflight buffers that a hostile front-end sends, and those of an orderly one. Crashes are in `crash`.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

use crate::driver::{DATA, FrontEnd, LOG_ALL, Req, SPECIAL_FEATURES, memfd, noise, wait_event};
use crate::process::{ImageFile, Program};

const MIB: u64 = 1 << 20;

fn connect(program: &Program) -> FrontEnd {
    let protocol = VhostUserProtocolFeatures::INFLIGHT_SHMFD | VhostUserProtocolFeatures::LOG_SHMFD;
    FrontEnd::connect_for(&program.socket(), |offered| offered & !SPECIAL_FEATURES | LOG_ALL, protocol)
}

fn described(queue_count: u16, queue_size: u16, mmap_offset: u64, mmap_size: u64) -> VhostUserInflight {
    VhostUserInflight { mmap_size, mmap_offset, num_queues: queue_count, queue_size }
}

/// A buffer of the front-end's own, as a bridge makes it: longer than needed.
fn own_buffer() -> (File, VhostUserInflight) {
    (memfd(4 * MIB), described(1, 64, 2 * MIB, 2 * MIB))
}

#[test]
fn wrong_descriptions_are_refused() {
    let image = ImageFile::new(MIB);
    let mut program = Program::start(&image.path(), &[]);
    let (file, _) = own_buffer();
    for description in [
        described(u16::MAX, 1024, 0, 2 * MIB),
        described(1, 32769, 0, 2 * MIB),
        described(1, u16::MAX, 0, 2 * MIB),
        described(1, 64, 1, MIB),
        described(1, 64, 4 * MIB, MIB),
        described(1, 64, u64::MAX - 4095, MIB),
        described(1, 64, 0, 1),
        described(1, 64, 0, u64::MAX),
        described(1, 64, 0, 1 << 40),
    ] {
        let mut front_end = connect(&program);
        front_end.frontend.set_inflight_fd(&description, file.as_raw_fd()).unwrap_err();
        drop(front_end);
        assert!(program.is_alive());
    }
    let mut front_end = connect(&program);
    for (queue_count, queue_size) in [(0, 64), (1, 0), (1, 32769), (u16::MAX, u16::MAX)] {
        let wanted = described(queue_count, queue_size, 0, 0);
        assert!(front_end.frontend.get_inflight_fd(&wanted).is_err(), "{queue_count} {queue_size}");
        front_end.reconnect(&program.socket());
    }
    assert!(program.is_alive());
}

/// CVE-2020-10726 (DPDK): each message left a descriptor and a mapping behind.
#[test]
fn repeated_buffers_leave_nothing_behind() {
    let image = ImageFile::new(MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = connect(&program);
    let mut share = |rounds: u32| {
        for _ in 0..rounds {
            let (description, file) = front_end.frontend.get_inflight_fd(&described(1, 64, 0, 0)).unwrap();
            front_end.frontend.set_inflight_fd(&description, file.as_raw_fd()).unwrap();
        }
        // Answered when all before it has been carried out.
        front_end.frontend.get_features().unwrap();
        (program.open_descriptors(), program.mappings())
    };
    let (before, now) = (share(2), share(100));
    assert_eq!(now.0, before.0, "descriptors");
    // The allocator maps memory as well, now and then.
    assert!(now.1 < before.1 + 50, "{} mappings after 100 buffers, {} before", now.1, before.1);
}

#[test]
fn garbage_in_the_buffer_harms_nobody_else() {
    let image = ImageFile::new(MIB);
    let mut program = Program::start(&image.path(), &[]);
    for (round, pattern) in [0x01_u8, 0xff, 0x00, 0x55].into_iter().enumerate() {
        for version in [0_u16, 1, 2] {
            let (file, description) = own_buffer();
            let mut content = if round == 3 { noise(16384, u64::from(version) + 1) } else { vec![pattern; 16384] };
            content[..8].fill(0);
            content[8..10].copy_from_slice(&version.to_le_bytes());
            file.write_all_at(&content, 2 * MIB).unwrap();
            let mut front_end = connect(&program);
            front_end.frontend.set_inflight_fd(&description, file.as_raw_fd()).unwrap();
            let mut queue = front_end.idle_queue(0, 64);
            queue.start(&mut front_end, 0);
            if version == 2 {
                wait_event(&queue.error, "err");
            } else {
                // Nothing was offered, so nothing can be in flight, whatever the buffer says.
                queue.run_ok(&front_end.memory, &Req::read(0, DATA, 4096));
                assert_eq!(queue.used_index(&front_end.memory), 1);
            }
            queue.stop(&front_end);
            // And the one that comes after a crash is not misled.
            let mut content = [0; 64 * 16];
            file.read_exact_at(&mut content, 2 * MIB + 16).unwrap();
            assert!(version == 2 || content.chunks(16).all(|entry| entry[0] != 1), "{pattern:#x} {version}");
            drop(front_end);
            assert!(program.is_alive());
        }
    }
}

/// A stop in order leaves nothing in flight, whatever position the next start is at.
#[test]
fn a_buffer_is_empty_after_a_stop() {
    let image = ImageFile::new(MIB);
    let program = Program::start(&image.path(), &[]);
    let (file, description) = own_buffer();
    let mut front_end = connect(&program);
    front_end.frontend.set_inflight_fd(&description, file.as_raw_fd()).unwrap();
    let mut queue = front_end.queue(0, 64);
    for round in 0..5_u16 {
        for index in 0..20 {
            front_end.fill(DATA, &[u8::try_from(round * 20 + index).unwrap(); 4096]);
            queue.run_ok(&front_end.memory, &Req::write(8, DATA, 4096));
        }
        let base = queue.stop(&front_end);
        assert_eq!(base, (round % 2 + 1) * 20);
        let mut content = [0; 16 + 64 * 16];
        file.read_exact_at(&mut content, 2 * MIB).unwrap();
        assert_eq!(content[8..12], [1, 0, 64, 0], "version and size");
        assert_eq!(content[14..16], base.to_le_bytes(), "used_idx");
        assert!(content[16..].chunks(16).all(|entry| entry[0] == 0), "in flight after a stop");
        front_end.reconnect(&program.socket());
        front_end.announce_memory();
        front_end.frontend.set_inflight_fd(&description, file.as_raw_fd()).unwrap();
        // Every other time with rings that begin anew, as after a reset of the driver VM.
        if round % 2 == 1 {
            queue.clear(&front_end.memory);
        }
        queue.start(&mut front_end, if round % 2 == 1 { 0 } else { base });
    }
}

/// Only the front-end can cut its files, and so it harms its own device; but not the process.
#[test]
fn a_buffer_or_a_log_that_is_cut_breaks_the_rings_only() {
    let image = ImageFile::new(MIB);
    let mut program = Program::start(&image.path(), &[]);
    for cut_log in [false, true] {
        let (file, description) = own_buffer();
        let log = memfd(MIB);
        let mut front_end = connect(&program);
        front_end.frontend.set_inflight_fd(&description, file.as_raw_fd()).unwrap();
        let region = VhostUserDirtyLogRegion { mmap_size: MIB, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
        front_end.frontend.set_log_base(0, Some(region)).unwrap();
        let mut queue = front_end.queue(0, 64);
        queue.run_ok(&front_end.memory, &Req::read(0, DATA, 4096));
        if cut_log {
            log.set_len(0).unwrap()
        } else {
            file.set_len(0).unwrap()
        }
        queue.offer_request(&front_end.memory, 0, &Req::read(0, DATA, 4096));
        queue.publish(&front_end.memory);
        queue.kick();
        wait_event(&queue.error, "err");
        queue.stop(&front_end);
        drop(front_end);
        assert!(program.is_alive());
    }
}
