//! Storage that is peculiar or fails: the driver gets an answer, and the right one.

use std::os::unix::fs::FileExt;

use crate::driver::{DATA, FrontEnd, Req, noise};
use crate::process::{ImageFile, LoopDevice, Program, disk_directory};

const MIB: u64 = 1 << 20;

#[test]
fn an_image_that_shrinks_gives_errors_and_no_hang() {
    let image = ImageFile::new(4 * MIB);
    let mut program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    queue.run_ok(&front_end.memory, &Req::read(4096, DATA, 65536));
    std::fs::OpenOptions::new().write(true).open(image.path()).unwrap().set_len(MIB).unwrap();
    assert_eq!(queue.run(&front_end.memory, &Req::read(4096, DATA, 65536)).0, 1, "all of it is gone");
    assert_eq!(queue.run(&front_end.memory, &Req::read(2048 - 8, DATA, 8192)).0, 1, "half of it is gone");
    queue.run_ok(&front_end.memory, &Req::read(0, DATA, 65536));
    // In place, by a bounce buffer and after it: the same.
    assert_eq!(queue.run(&front_end.memory, &Req::read(4096, DATA + 1, 65536)).0, 1);
    std::fs::remove_file(image.path()).unwrap();
    queue.run_ok(&front_end.memory, &Req::read(0, DATA + 1, 65536));
    assert_eq!(program.counter("io_errors"), 3);
    assert!(program.is_alive());
}

#[test]
fn a_full_file_system_gives_errors_and_reading_goes_on() {
    // A sparse image of 16 MiB on a file system of 1 MiB, in a mount namespace of the program's own.
    let directory = disk_directory();
    let mount = directory.path().display().to_string();
    let prelude = format!("mount -t tmpfs -o size=1m none '{mount}' && truncate -s 16M '{mount}/disk.img'");
    let mut program = Program::start_in(&prelude, &directory.path().join("disk.img"), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    front_end.fill(DATA, &[3; MIB as usize]);
    queue.run_ok(&front_end.memory, &Req::write(0, DATA, 512 * 1024));
    let mut failed = 0;
    for index in 1..16 {
        failed += u32::from(queue.run(&front_end.memory, &Req::write(index * 2048, DATA, MIB as u32)).0 == 1);
    }
    assert!(failed >= 14, "only {failed} of 15 writes failed");
    queue.run_ok(&front_end.memory, &Req::read(0, DATA + 4 * MIB, 512 * 1024));
    assert_eq!(front_end.bytes(DATA + 4 * MIB, 512 * 1024), vec![3; 512 * 1024]);
    // Room that is given back can be used.
    front_end.fill(DATA + 8 * MIB, &[0u64.to_le_bytes(), (1024u64 * 31).to_le_bytes()].concat());
    queue.run_ok(&front_end.memory, &Req::ranges(11, DATA + 8 * MIB, 16));
    queue.run_ok(&front_end.memory, &Req::write(2048, DATA, 256 * 1024));
    assert!(program.is_alive());
}

/// Threads that the kernel has made for the program's io_urings.
fn kernel_threads(program: &Program) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", program.id())).unwrap().flatten();
    let names = tasks.map(|task| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default());
    names.filter(|name| name.starts_with("iou-wrk")).count()
}

#[test]
fn an_image_in_memory_is_copied_by_the_thread_of_the_queue() {
    const LONG: u64 = 128 * 1024;
    let directory = disk_directory();
    let mount = directory.path().display().to_string();
    let prelude = format!("mount -t tmpfs none '{mount}' && truncate -s 16M '{mount}/disk.img'");
    let mut program = Program::start_in(&prelude, &directory.path().join("disk.img"), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    let content = noise((4 * MIB) as usize, 11);
    front_end.fill(DATA, &content);
    queue.run_ok(&front_end.memory, &Req::write(0, DATA, MIB as u32));
    queue.run_ok(&front_end.memory, &Req::read(8, DATA + 8 * MIB, LONG as u32));
    assert_eq!(front_end.bytes(DATA + 8 * MIB, LONG as usize), content[4096..4096 + LONG as usize]);
    assert_eq!(kernel_threads(&program), 0, "one request at a time");

    // Many at a time, long ones and short ones: more than one submission takes.
    let requests: Vec<_> = (0..16u64).map(|n| (n * LONG, if n % 3 == 2 { 4096 } else { LONG })).collect();
    for write in [true, false] {
        for (index, (offset, len)) in (0u16..).zip(&requests) {
            let request = match write {
                true => Req::write(offset / 512, DATA + offset, *len as u32),
                false => Req::read(offset / 512, DATA + 8 * MIB + offset, *len as u32),
            };
            queue.offer_request(&front_end.memory, index * 4, &request);
        }
        queue.publish(&front_end.memory);
        queue.kick();
        for _ in &requests {
            let (head, _) = queue.wait_used(&front_end.memory);
            assert_eq!(queue.status(&front_end.memory, head), 0, "head {head}");
        }
    }
    for (offset, len) in requests {
        let range = offset as usize..(offset + len) as usize;
        assert!(front_end.bytes(DATA + 8 * MIB + offset, len as usize) == content[range], "{offset:#x}");
    }
    assert!(program.is_alive());
}

#[test]
fn a_file_size_limit_is_an_error_of_the_request() {
    let image = ImageFile::new(4 * MIB);
    // In units of 512 bytes in a POSIX shell: 2 MiB.
    let mut program = Program::start_in("ulimit -f 4096", &image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    queue.run_ok(&front_end.memory, &Req::write(0, DATA, MIB as u32));
    assert_eq!(queue.run(&front_end.memory, &Req::write(6144, DATA, 65536)).0, 1);
    assert!(program.is_alive());
}

#[test]
fn zeroes_are_written_where_storage_cannot_make_them() {
    // tmpfs knows no FALLOC_FL_ZERO_RANGE.
    let image = ImageFile::in_directory(tempfile::tempdir_in("/dev/shm").unwrap(), 64 * MIB);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(image.path()).unwrap();
    file.write_all_at(&noise(48 * MIB as usize, 4), 0).unwrap();
    let program = Program::start(&image.path(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    // More than one step of zeroes: 40 MiB from sector 3 on.
    let sectors = 40u32 * 2048;
    front_end.fill(DATA, &[3u64.to_le_bytes().as_slice(), &sectors.to_le_bytes(), &[0; 4]].concat());
    let allocated = image.allocated();
    queue.run_ok(&front_end.memory, &Req::ranges(13, DATA, 16));
    let mut expected = noise(48 * MIB as usize, 4);
    expected[3 * 512..][..sectors as usize * 512].fill(0);
    assert!(image.content()[..expected.len()] == expected);
    assert_eq!(image.allocated(), allocated, "without unmap, room is kept");
}

#[test]
fn blocks_larger_than_a_sector_are_read_modified_and_written() {
    let image = ImageFile::new(2 * MIB + 512);
    let before = noise(2 * MIB as usize + 512, 6);
    std::fs::write(image.path(), &before).unwrap();
    let program = Program::start(&image.path(), &["--io-alignment", "4096", "--queues", "2"]);
    if program.count_lines("direct=false") > 0 {
        panic!("the build directory's file system has no direct I/O; set CARGO_TARGET_DIR to one that has");
    }
    let mut front_end = FrontEnd::connect(&program);
    let mut queues = [front_end.queue(0, 128), front_end.queue(1, 128)];
    let mut expected = before;
    // Both queues write every other sector of the same blocks at the same time.
    for (parity, queue) in queues.iter_mut().enumerate() {
        for index in 0..40u16 {
            let sector = usize::from(index) * 2 + parity;
            let data = noise(512, sector as u64 + 1000);
            let address = DATA + sector as u64 * 512;
            front_end.fill(address, &data);
            expected[sector * 512..][..512].copy_from_slice(&data);
            queue.offer_request(&front_end.memory, index * 3, &Req::write(sector as u64, address, 512));
        }
        queue.publish(&front_end.memory);
    }
    queues.iter().for_each(|queue| queue.kick());
    for queue in &mut queues {
        for _ in 0..40 {
            let (head, _) = queue.wait_used(&front_end.memory);
            assert_eq!(queue.status(&front_end.memory, head), 0);
        }
    }
    let [queue, other] = &mut queues;
    // A long write that begins and ends inside of blocks, and whole blocks in place.
    let long = noise(300 * 1024 + 512, 7);
    front_end.fill(DATA + MIB, &long);
    queue.run_ok(&front_end.memory, &Req::write(1001, DATA + MIB, long.len() as u32));
    expected[1001 * 512..][..long.len()].copy_from_slice(&long);
    other.run_ok(&front_end.memory, &Req::write(2048, DATA + MIB, 8192));
    expected[2048 * 512..][..8192].copy_from_slice(&long[..8192]);
    // Zeroes that begin and end inside of blocks.
    front_end.fill(DATA, &[2101u64.to_le_bytes().as_slice(), &9u32.to_le_bytes(), &[0; 4]].concat());
    queue.run_ok(&front_end.memory, &Req::ranges(13, DATA, 16));
    expected[2101 * 512..][..9 * 512].fill(0);
    // The last sector lies in a block that the file has only a part of.
    front_end.fill(DATA, &[8; 512]);
    queue.run_ok(&front_end.memory, &Req::write(4096, DATA, 512));
    expected[4096 * 512..].fill(8);
    queue.run_ok(&front_end.memory, &Req::read(4095, DATA + MIB, 1024));
    assert!(front_end.bytes(DATA + MIB, 1024) == expected[4095 * 512..]);

    assert!(image.content()[..expected.len()] == expected);
    assert!(program.counter("bounced_bytes") > 0);
    assert_eq!(program.counter("zero_copy_bytes"), 8192);
}

#[test]
fn a_block_device_is_served_by_its_own_block_size() {
    // Loop devices take the rights of root; the whole-machine tests serve block devices without.
    if !rustix::process::geteuid().is_root() {
        eprintln!("not root: no loop device, left to the whole-machine tests");
        return;
    }
    let image = ImageFile::new(8 * MIB);
    let device = LoopDevice::new(&image.path());
    let program = Program::start(device.path.as_ref(), &[]);
    let mut front_end = FrontEnd::connect(&program);
    let config = front_end.config();
    assert_eq!(config[..8], (16384u64).to_le_bytes(), "capacity");
    assert_eq!(config[20..24], 4096u32.to_le_bytes(), "blk_size");
    let mut queue = front_end.queue(0, 64);
    let data = noise(65536, 8);
    front_end.fill(DATA, &data);
    queue.run_ok(&front_end.memory, &Req::write(16, DATA, 65536));
    queue.run_ok(&front_end.memory, &Req::write(1025, DATA, 512));
    queue.run_ok(&front_end.memory, &Req::flush());
    front_end.fill(DATA + MIB, &[24u64.to_le_bytes().as_slice(), &8u32.to_le_bytes(), &[0; 4]].concat());
    queue.run_ok(&front_end.memory, &Req::ranges(13, DATA + MIB, 16));
    queue.run_ok(&front_end.memory, &Req::flush());
    let content = image.content();
    assert!(content[8192..][..4096] == data[..4096] && content[16384..][..57344] == data[8192..]);
    assert_eq!(content[12288..][..4096], [0; 4096], "zeroed");
    assert_eq!(content[1025 * 512..][..512], data[..512]);
    assert_eq!(program.counter("zero_copy_bytes"), 65536);
}
