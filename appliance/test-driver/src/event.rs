//! Waits for events, and for what no event tells of.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd;

/// Longest wait for anything. Only a failure takes this long.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Waits for what no event tells of.
pub fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !happened() {
        assert!(Instant::now() < deadline, "{what} did not happen within {LIMIT:?}");
        std::thread::yield_now();
    }
}

/// Waits for an eventfd and takes its events; their number.
pub fn wait_event(event: &EventFd, what: &str) -> u64 {
    wait_readable(descriptor(event), what);
    event.read().unwrap()
}

/// Whether an eventfd is signalled within so many seconds.
#[must_use]
pub fn is_signalled(event: &EventFd, limit_s: u64) -> bool {
    is_readable(descriptor(event), Duration::from_secs(limit_s))
}

/// Waits until a descriptor is readable.
pub fn wait_readable(descriptor: impl AsFd, what: &str) {
    assert!(is_readable(descriptor, LIMIT), "no {what} within {LIMIT:?}");
}

fn is_readable(descriptor: impl AsFd, limit: Duration) -> bool {
    let limit = Timespec::try_from(limit).unwrap();
    poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&limit)).unwrap() == 1
}

#[expect(unsafe_code, reason = "vmm_sys_util's EventFd lends its descriptor as a number only")]
fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: open as long as the event is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
