//! The image changes its size while it is in use: the driver is told, and reaches what is new.

use std::process::Command;

use rustix::process::Signal;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::back_channel::BackChannel;
use crate::driver::{DATA, FrontEnd, Queue, Req, SPECIAL_FEATURES, noise};
use crate::process::{ImageFile, LoopDevice, Program};

const MIB: u64 = 1 << 20;

fn connect(program: &Program) -> FrontEnd {
    FrontEnd::connect_for(
        &program.socket(),
        |offered| offered & !SPECIAL_FEATURES,
        VhostUserProtocolFeatures::BACKEND_REQ,
    )
}

/// Reading and writing works up to the end of the disk and not beyond.
fn check_size(front_end: &mut FrontEnd, queue: &mut Queue, len: u64) {
    let sectors = len / 512;
    assert_eq!(front_end.config()[..8], sectors.to_le_bytes(), "capacity");
    let data = noise(4096, len);
    front_end.fill(DATA, &data);
    queue.run_ok(&front_end.memory, &Req::write(sectors - 8, DATA, 4096));
    queue.run_ok(&front_end.memory, &Req::read(sectors - 8, DATA + MIB, 4096));
    assert!(front_end.bytes(DATA + MIB, 4096) == data);
    for beyond in [sectors - 7, sectors, sectors + 4096] {
        assert_eq!(queue.run(&front_end.memory, &Req::read(beyond, DATA, 4096)).0, 1, "sector {beyond} of {sectors}");
        assert_eq!(queue.run(&front_end.memory, &Req::write(beyond, DATA, 4096)).0, 1, "sector {beyond} of {sectors}");
    }
}

#[test]
fn a_file_is_looked_at_again_on_sighup() {
    let image = ImageFile::new(MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = connect(&program);
    let mut channel = BackChannel::open(&mut front_end);
    // The ring runs all the time.
    let mut queue = front_end.queue(0, 64);
    check_size(&mut front_end, &mut queue, MIB);
    for len in [2 * MIB, 3 * MIB + 4096, MIB, 8 * MIB] {
        image.resize(len);
        program.signal(Signal::HUP);
        channel.expect_config_change();
        check_size(&mut front_end, &mut queue, len);
        assert_eq!(image.content().len() as u64, len, "writes beyond the end do not extend the file");
    }
    // No change, no notice: the next one is that of the last change.
    program.signal(Signal::HUP);
    program.counters();
    image.resize(4 * MIB);
    program.signal(Signal::HUP);
    channel.expect_config_change();
    check_size(&mut front_end, &mut queue, 4 * MIB);
}

#[test]
fn a_size_that_changes_between_front_ends_is_seen_by_the_next() {
    let image = ImageFile::new(MIB);
    let program = Program::start(&image.path(), &[]);
    for len in [2 * MIB, 3 * MIB] {
        image.resize(len);
        program.signal(Signal::HUP);
        program.wait_for_line(|line| {
            line.contains("capacity has changed") && line.contains(&format!("now={}", len / 512))
        });
        let mut front_end = connect(&program);
        let mut queue = front_end.queue(0, 64);
        check_size(&mut front_end, &mut queue, len);
    }
}

#[test]
fn a_block_device_tells_of_its_size_by_itself() {
    // Loop devices take the rights of root; the whole-machine tests serve block devices without.
    if !rustix::process::geteuid().is_root() {
        eprintln!("not root: no loop device, left to the whole-machine tests");
        return;
    }
    let image = ImageFile::new(4 * MIB);
    let device = LoopDevice::new(&image.path());
    let program = Program::start(device.path.as_ref(), &[]);
    let mut front_end = connect(&program);
    let mut channel = BackChannel::open(&mut front_end);
    let mut queue = front_end.queue(0, 64);
    check_size(&mut front_end, &mut queue, 4 * MIB);
    for len in [16 * MIB, 8 * MIB] {
        image.resize(len);
        let status = Command::new("losetup").args(["--set-capacity", &device.path]).status().unwrap();
        assert!(status.success());
        channel.expect_config_change();
        check_size(&mut front_end, &mut queue, len);
    }
}
