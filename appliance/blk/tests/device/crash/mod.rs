//! The program is killed under load, again and again, and each time another one takes over with the same memory and the same
//! inflight buffer, as behind a bridge or a front-end that reconnects. The driver notices nothing: every request is completed
//! once, and the disk holds what the driver wrote last.

mod books;
#[cfg(target_arch = "x86_64")]
mod stepping;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

use self::books::{Driver, IMAGE_LEN, RING_SIZE};
#[cfg(target_arch = "x86_64")]
use self::stepping::SteppedThread;
use crate::driver::FrontEnd;
use crate::process::{ImageFile, Program};
use crate::qcow2::Qcow2Image;

/// An inflight buffer in the front-end's hands.
struct Buffer {
    description: VhostUserInflight,
    file: File,
}

impl Buffer {
    fn ask_for(front_end: &mut FrontEnd, queue_count: u16) -> Self {
        let wanted = VhostUserInflight { num_queues: queue_count, queue_size: RING_SIZE, ..Default::default() };
        let (description, file) = front_end.frontend.get_inflight_fd(&wanted).unwrap();
        Self { description, file }
    }
}

/// Sets the device up as a front-end does after it has lost the back-end. Stops half-way before the step with the number
/// `give_up`; false then.
fn set_up(driver: &mut Driver, buffer: &Buffer, give_up: u64) -> bool {
    let front_end = &mut driver.front_end;
    if give_up == 0 {
        return false;
    }
    front_end.announce_memory();
    if give_up == 1 {
        return false;
    }
    front_end.frontend.set_inflight_fd(&buffer.description, buffer.file.as_raw_fd()).unwrap();
    for (step, queue) in (2..).zip(&mut driver.queues) {
        if give_up == step {
            return false;
        }
        // The used ring is all that a front-end knows of a back-end that is gone.
        let base = queue.used_index(&front_end.memory);
        queue.start(front_end, base);
        queue.kick();
    }
    true
}

const WHOLE: u64 = u64::MAX;

fn start(image: &Path) -> Program {
    Program::start(image, &["--queues", "2"])
}

fn start_qcow2(image: &Path) -> Program {
    Program::start(image, &["--queues", "2", "--format", "qcow2"])
}

#[test]
fn kills_lose_and_repeat_nothing() {
    let image = ImageFile::new(IMAGE_LEN);
    let driver = kill_again_and_again(200, 20_000, || start(&image.path()));
    driver.check_disk(&image.path());
}

/// The same, while the tables of the image change, too.
#[test]
fn kills_lose_nothing_of_a_qcow2_image_and_leave_it_sound() {
    for cluster_size in ["4k", "64k"] {
        let image = Qcow2Image::create(IMAGE_LEN, &["-o", &format!("cluster_size={cluster_size}")]);
        let driver = kill_again_and_again(60, 200_000, || start_qcow2(&image.path()));
        driver.check_disk(&image.as_raw());
        image.check_but_for_leaks();
    }
}

/// Lets a driver work for up to `longest_us` between two kills. Returns it with nothing outstanding, and all of it in the image.
fn kill_again_and_again(kills: u32, longest_us: u64, start: impl Fn() -> Program) -> Driver {
    let begin = Instant::now();
    let mut program = start();
    let mut driver = Driver::new(&program, 2);
    let buffer = Buffer::ask_for(&mut driver.front_end, 2);
    driver.offer_everywhere();
    let mut killed_with_requests = 0;
    for _ in 0..kills {
        // One in eight dies while it is set up.
        let give_up = driver.random.below(8 * 4);
        if set_up(&mut driver, &buffer, give_up) {
            // Half of them die while they take over, the others at work.
            let limit_us = if driver.random.one_in(2) { 500 } else { longest_us };
            let limit = Duration::from_micros(driver.random.below(limit_us));
            driver.work(limit);
        }
        program.signal(Signal::KILL);
        program.wait();
        killed_with_requests += u32::from(driver.outstanding() > 0);
        // Half of the time the driver goes on offering while nobody is there.
        if driver.random.one_in(2) {
            driver.offer_everywhere();
        }
        program = start();
        driver.front_end.reconnect(&program.socket());
    }
    assert!(set_up(&mut driver, &buffer, WHOLE));
    driver.drain();
    for queue in &driver.queues {
        queue.stop(&driver.front_end);
    }
    eprintln!(
        "{kills} kills, {killed_with_requests} of them with requests outstanding, {} requests, {:?}",
        driver.completed,
        begin.elapsed()
    );
    assert!(killed_with_requests > kills / 2, "only {killed_with_requests} kills met requests");
    assert!(driver.completed > u64::from(kills) * 10, "only {} requests", driver.completed);
    driver
}

/// A kill hits the few instructions around the store of the used ring's index rarely. So this one goes there: it lets the
/// queue's thread run until the index was stored, then some instructions further, and kills it there.
#[cfg(target_arch = "x86_64")]
#[test]
fn kills_at_instructions_right_after_a_return_lose_and_repeat_nothing() {
    const KILLS: u32 = 60;
    let image = ImageFile::new(IMAGE_LEN);
    let mut program = start(&image.path());
    let mut driver = Driver::new(&program, 1);
    let buffer = Buffer::ask_for(&mut driver.front_end, 1);
    for _ in 0..KILLS {
        assert!(set_up(&mut driver, &buffer, WHOLE));
        driver.drain();
        let queue = &driver.queues[0];
        let index = program.address_of(driver.front_end.file(0), queue.used + 2);
        let before = queue.used_index(&driver.front_end.memory);
        let thread = SteppedThread::stop(program.id(), "queue 0");
        driver.offer_everywhere();
        thread.run_to_write(index).unwrap();
        assert_ne!(driver.queues[0].used_index(&driver.front_end.memory), before, "it has stopped elsewhere");
        // Dense right behind the store, thin further on, up to the notification of the driver.
        let reach = if driver.random.one_in(3) { 300 } else { 5000 };
        for _ in 0..driver.random.below(reach) {
            thread.step().unwrap();
        }
        program.signal(Signal::KILL);
        drop(thread);
        program.wait();
        program = start(&image.path());
        driver.front_end.reconnect(&program.socket());
    }
    assert!(set_up(&mut driver, &buffer, WHOLE));
    driver.drain();
    driver.check_disk(&image.path());
}
