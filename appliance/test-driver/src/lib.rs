//! For tests of vhost-user back-ends: the other side, as small as it can be and with every knob that a test needs.
//!
//! - [`ring`]: a split ring as the driver builds it, descriptor by descriptor, in memory of the test's own;
//! - [`front_end`]: a connection with the `vhost` crate's messages, and memory that is announced over it;
//! - [`queue`]: a ring with its events, and how it is started and stopped;
//! - [`process`]: the back-end as a program, with its log;
//! - [`event`]: waits, each with a limit that only a failure reaches;
//! - [`pauses`]: time between requests;
//! - [`allocations`]: how often memory is allocated.
//!
//! The tests of `vvu-back-end`, `vvu-blk` and `vvu-net` use it, and add what their devices' drivers do. It never checks a
//! device, knows no device class, and is no part of any program.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that meets the unexpected is to fail right there, helpers included; numbers are the test's own"
)]

pub mod allocations;
pub mod event;
pub mod front_end;
pub mod pauses;
pub mod process;
pub mod queue;
pub mod ring;
