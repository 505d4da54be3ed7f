//! The real program against a real front-end: the `vhost` crate's messages over a unix socket, memory of the test's own,
//! and a driver that builds its rings descriptor by descriptor. Content is compared with the image file itself, and with
//! what qemu-io reads from it where that is installed.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test that meets the unexpected is to fail right there, helpers included; numbers are the test's own"
)]

mod back_channel;
mod crash;
mod dirty_log;
mod driver;
mod hostile;
mod inflight;
mod iommu;
mod lifecycle;
mod limits;
mod null_disk;
mod process;
mod qcow2;
mod requests;
mod resize;
mod slots;
mod speed;
mod storage;
mod wakeups;
