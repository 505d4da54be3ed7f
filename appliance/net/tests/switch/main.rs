//! The real program against real front-ends: the `vhost` crate's messages over unix sockets, memory of the test's own, and
//! drivers that build their rings descriptor by descriptor. What arrives is compared byte by byte with what was sent.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test that meets the unexpected is to fail right there, helpers included; numbers are the test's own"
)]

mod control;
mod driver;
mod exchange;
mod frames;
mod hostile;
mod iommu;
mod lifecycle;
mod migration;
mod offloads;
mod program;
mod queues;
mod speed;
mod uplink;
mod wakeups;
