//! A vhost-user-blk back-end on io_uring: serves a raw image or a block device to the driver of a virtual machine.
//!
//! It runs in the appliance VM, where driver memory is the window, and just as well by itself on a host. Data goes straight
//! between storage and driver memory. The driver and the front-end are hostile: what they write is copied before it is
//! checked, everything they can ask for is bounded, and the worst that they achieve is a ring that stops.
//!
//! What it never does: understand image formats or backing files, open anything but the image, or serve two front-ends at
//! a time.
//!
//! # Map
//! - pure: `config_space`, `chain`, `request`, `driver_data`, `bounce`
//! - unsafe: `engine` (io_uring, with `transfer`), `descriptors`, `signals`, `lost_memory`
//! - one queue: `vring` (start and stop), `ring` (the split ring), `worker` (its thread), `execution` (its requests)
//! - the device: `device`, `image`, `write_gate`, `counters`
//! - the program: `cli`, `daemon`, `listener`, `backend` (one connection)

mod aligned_buffer;
mod backend;
mod bounce;
mod chain;
pub mod cli;
mod config_space;
mod counters;
pub mod daemon;
mod descriptors;
mod device;
mod driver_data;
mod engine;
mod execution;
mod image;
mod listener;
mod log_limit;
mod lost_memory;
mod request;
mod ring;
mod signals;
mod transfer;
mod vring;
mod wakeup;
mod worker;
mod write_gate;

pub use image::ImageError;
pub use listener::{Endpoint, ListenerError};

/// Memory of the driver VM. Without a dirty bitmap: migration of the driver VM is not offered.
type DriverMemory = vm_memory::GuestMemoryMmap<()>;
