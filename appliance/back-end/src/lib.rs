//! vhost-user back-ends: one connection of a front-end, its rings and their threads, and all that keeps a request from being
//! lost when the back-end is restarted, the driver VM migrates or has an IOMMU.
//!
//! A device implements [`Device`], and takes its requests from a [`Ring`]. A program hands each connection to a
//! [`Connection`] and calls [`Connection::serve`]. Our back-ends use it, in the appliance VM as well as on a host; it knows
//! nothing of either. It is what `vhost-user-backend` is, with inflight tracking, IOTLB, memory slots and a dirty log that
//! covers whatever is written.
//!
//! What it never does: a device's own work, or packed rings.
//!
//! # Map
//! - one connection: `session` (messages), `device` (what a device is to it), `notices` (what other threads want of it)
//! - one ring: `vring` (its life between two threads), `ring` with `ring_error` (the split ring), `chain`
//!   (descriptors)
//! - memory: `memory` (the table), `view` (what a ring sees of it), `place`, `iommu` with [`iotlb`]
//! - shared with the front-end: [`inflight`], [`dirty_log`], on `shared_mapping` (unsafe)
//! - the program around it: [`program`], [`listener`], [`signals`] and [`lost_memory`] (both unsafe), `descriptors` (unsafe)
//! - for operators: [`rate_limit`] (pure), [`control_channel`]
//! - threads: [`polling`] (pure), [`cpus`], [`threads`] (both as options), [`wakeup`]
//! - [`log_limit`], [`in_one_line()`]

mod chain;
pub mod control_channel;
pub mod cpus;
mod descriptors;
mod device;
pub mod dirty_log;
mod in_one_line;
pub mod inflight;
mod iommu;
pub mod iotlb;
pub mod listener;
pub mod log_limit;
pub mod lost_memory;
mod memory;
mod notices;
mod place;
pub mod polling;
pub mod program;
pub mod rate_limit;
mod ring;
mod ring_error;
mod session;
mod shared_mapping;
pub mod signals;
pub mod threads;
mod view;
mod vring;
pub mod wakeup;

pub use chain::{Chain, ChainError, total_len};
pub use device::{ConfigWriter, Device, DeviceError};
pub use in_one_line::in_one_line;
pub use iotlb::Miss;
pub use memory::{MAX_MEMORY_SLOTS, Memory, TableError};
pub use ring::Ring;
pub use ring_error::{Pause, RingError};
pub use session::{Connection, Ending, Handle, Refusal, SessionError};
pub use view::{AccessError, Segment, View};
pub use vring::{Changes, RingSignals, Service};
