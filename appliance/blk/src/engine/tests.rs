//! Rings as kernels grant them that do not know the best one.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use clap::Parser;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vm_memory::{Bytes, GuestAddress};
use vvu_back_end::{Connection, Segment};
use vvu_test_driver::front_end::{FrontEnd, ORDINARY};
use vvu_test_driver::queue::Queue;
use vvu_test_driver::ring::{Desc, NEXT, WRITE};

use super::{Completion, Engine, SETUPS, Setup};
use crate::DriverMemory;
use crate::cli::Cli;
use crate::device::Device;
use crate::image::Image;
use crate::transfer::Direction;

/// Completions that wait for a thread, and a ring of any thread: every kernel refuses that.
const REFUSED: Setup = |ring| {
    ring.setup_defer_taskrun();
};

const HEADER: u64 = 0x20_0000;
const DATA: u64 = 0x30_0000;

/// A disk whose rings are the first of `setups` that the kernel grants, and its driver.
fn serve(directory: &Path, setups: &[Setup], poll: &str) -> (FrontEnd, Queue) {
    let (socket, image) = (directory.join("socket"), directory.join("image"));
    let words = ["vvu-blk", "--fd=3", "--poll", poll, "--image"].map(str::to_owned);
    let cli = Cli::try_parse_from(words.into_iter().chain([image.display().to_string()])).unwrap();
    let image = Arc::new(Image::open(&image, false, None).unwrap());
    let setup = Engine::find_setup(&image, setups).unwrap();
    let device = Arc::new(Device::new(image, None, setup, &cli.into_options().unwrap()));
    let listener = UnixListener::bind(&socket).unwrap();
    // Ends with the front-end.
    std::thread::spawn(move || Connection::new(listener.accept().unwrap().0, device).serve());
    let choose = |offered| offered & ORDINARY;
    let mut front_end = FrontEnd::connect(&socket, choose, VhostUserProtocolFeatures::empty(), 16 << 20);
    let queue = Queue::new(&front_end.memory, 0, 16);
    queue.announce(&mut front_end, 0);
    (front_end, queue)
}

/// Does a request with the first sector: a read (0) or a write (1).
fn request(front_end: &FrontEnd, queue: &mut Queue, kind: u32) {
    let (memory, data_flags) = (&front_end.memory, if kind == 0 { WRITE } else { 0 });
    memory.write_obj(u128::from(kind), GuestAddress(HEADER)).unwrap();
    memory.write_obj(0xff_u8, GuestAddress(HEADER + 16)).unwrap();
    let parts = [(HEADER, 16, NEXT), (DATA, 512, NEXT | data_flags), (HEADER + 16, 1, WRITE)];
    for (index, (address, len, flags)) in (0..).zip(parts) {
        queue.put_desc(memory, index, Desc { address, len, flags, next: index + 1 });
    }
    queue.offer(memory, 0);
    queue.publish(memory);
    queue.kick();
    queue.wait_used(memory);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(HEADER + 16)).unwrap(), 0);
}

#[test]
fn a_kernel_without_the_best_ring_serves_with_another_one() {
    for poll in ["off", "always"] {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("image"), [0; 4096]).unwrap();
        let (front_end, mut queue) = serve(directory.path(), &[REFUSED, SETUPS[1]], poll);
        for round in 0..100_u8 {
            front_end.memory.write_slice(&[round; 512], GuestAddress(DATA)).unwrap();
            request(&front_end, &mut queue, 1);
            front_end.memory.write_slice(&[0xff; 512], GuestAddress(DATA)).unwrap();
            request(&front_end, &mut queue, 0);
            let mut found = [0; 512];
            front_end.memory.read_slice(&mut found, GuestAddress(DATA)).unwrap();
            assert_eq!(found, [round; 512]);
        }
    }
}

/// Memory is registered anew as soon as an operation works on other memory, whatever waits to be submitted.
#[test]
fn operations_of_two_memories_go_to_the_kernel_together() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), [[1; 4096], [2; 4096], [3; 4096], [4; 4096]].concat()).unwrap();
    let image = Arc::new(Image::open(file.path(), true, None).unwrap());
    let mut engine = Engine::new(vec![image], 8, SETUPS[0]).unwrap();
    let memories = [(); 2].map(|()| Arc::new(DriverMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()));
    let place = |head: u16| (&memories[usize::from(head) % 2], GuestAddress(u64::from(head) * 4096));
    for head in 0..4 {
        let (memory, address) = place(head);
        let transfer = engine.idle_transfer(head).unwrap();
        transfer.map_segments(memory, &[Segment { address, len: 4096 }]).unwrap();
        engine.transfer(head, Direction::Read, u64::from(head) * 4096).unwrap();
    }
    let mut done = 0;
    while done < 4 {
        engine.wait(None).unwrap();
        while let Some(completion) = engine.next_completion().unwrap() {
            assert!(
                matches!(completion, Completion::Request { transferred: 4096, result: Ok(()), .. }),
                "{completion:?}"
            );
            done += 1;
        }
    }
    for (head, expected) in (0..4).zip(1_u8..) {
        let (memory, address) = place(head);
        let mut found = [0; 4096];
        memory.read_slice(&mut found, address).unwrap();
        assert_eq!(found, [expected; 4096], "head {head}");
    }
}

#[test]
fn a_kernel_without_any_ring_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let image = Arc::new(Image::open(file.path(), false, None).unwrap());
    let refusal = Engine::find_setup(&image, &[REFUSED, REFUSED]).unwrap_err();
    assert!(refusal.to_string().contains("Linux 5.19"), "{refusal}");
}
