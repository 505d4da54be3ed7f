//! The bytes and rules of vvu.
//!
//! - [`message`]: every message of the vhost-user protocol, generic over what stands for a file descriptor: an owned
//!   descriptor on a socket, a [`control::Handle`] between the VMs, a plain number in a test;
//! - [`features`]: feature bits as types;
//! - [`memory`]: the memory table of a front-end, free of overlap and overflow;
//! - [`window`]: where driver memory lies in the appliance's window;
//! - [`carriage`]: which messages cross to the appliance, and why the others do not;
//! - [`dax`]: the device-DAX header at the start of the window;
//! - [`doorbell`]: the ivshmem protocol;
//! - [`control`]: configuration space and frames of the control device;
//! - [`state`]: the messages that carry the state of a device between the VMs.
//!
//! Host bridge and appliance agent build on it, and so do their tests. Nothing here opens, waits, allocates by a peer's
//! word, or is unsafe: input is a byte slice and output is a value or an error that says what was expected and what came.

pub mod address;
pub mod carriage;
pub mod control;
pub mod dax;
pub mod doorbell;
mod error;
pub mod features;
pub mod memory;
pub mod message;
mod payload;
pub mod state;
pub mod window;

pub use error::DecodeError;
