//! A vhost-user-blk back-end on io_uring: serves a raw image, a block device or a qcow2 image to the driver of a virtual
//! machine.
//!
//! It runs in the appliance VM, where driver memory is the window, and just as well by itself on a host. Data goes straight
//! between storage and driver memory. The driver and the front-end are hostile: what they write is copied before it is
//! checked, everything they can ask for is bounded, and the worst that they achieve is a ring that stops.
//!
//! What it never does: guess an image's format, open anything but the files that it was given, or serve two front-ends at a
//! time.
//!
//! # Map
//! - pure: `config_space`, `request`, `driver_data`, `bounce`
//! - unsafe: `engine` (io_uring, with `transfer`)
//! - one queue: `worker` (its thread), `execution` (its requests)
//! - images in a format: `qcow2`
//! - the device: `device`, `image`, `write_gate`, `counters`
//! - the program: `cli`, `daemon`, `control`, `size_events`
//!
//! Messages, rings and what keeps requests from being lost are those of `vvu-back-end`, as are listening, signals and lost memory.

mod aligned_buffer;
mod bounce;
pub mod cli;
mod config_space;
mod control;
mod counters;
pub mod daemon;
mod device;
mod driver_data;
mod engine;
mod execution;
mod image;
mod qcow2;
mod request;
mod size_events;
mod transfer;
mod worker;
mod write_gate;

pub use image::{Format, ImageError};
pub use qcow2::disk::LayerError;
pub use qcow2::header::HeaderError;

use vvu_back_end::Memory as DriverMemory;
