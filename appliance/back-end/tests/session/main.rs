//! A whole session over a socket pair: a front-end of the test's own, message by message, against a device that copies what
//! it reads to what it may write. Tests that stand for an attack known from elsewhere bear its number.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets the unexpected is to fail right there, helpers included; numbers are the test's own"
)]

mod control;
mod driver;
mod echo;
mod front_end;
mod inflight;
mod iommu;
mod log;
mod memory;
mod rings;
