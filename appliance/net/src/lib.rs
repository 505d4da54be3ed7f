//! A vhost-user-net back-end: a switch whose ports are network devices of virtual machines, with at most one TAP interface as
//! its uplink.
//!
//! It runs in the appliance VM, where driver memory is the window, and just as well by itself on a host. A packet goes from
//! one driver's memory to the other's in one copy, made by the thread that serves the sender. Drivers and front-ends are
//! hostile: headers are copied before they are checked, everything that can be asked for is bounded, and the worst that one of
//! them achieves is that its own port stops.
//!
//! What it never does: run an IP stack, reassemble or answer packets, make or configure interfaces, or let one port's driver
//! wait for another's.
//!
//! # Map
//! - pure, what is in a frame: `ethernet`, `layers`, `net_header`, `checksum`, `segment`, `rarp`
//! - pure, what is set and known: `features`, `offloads`, `config_space`, `driver_state`, `filter`, `forwarding`
//! - unsafe: `bell` (signals by io_uring), `tap` (ioctls)
//! - one packet: `packet`, `driver_data` (copies), `outbox` (what its thread has at hand)
//! - one queue: `receiver`, `transmitter`, `control_queue`, with `waiting` and `fault`
//! - the device: `port`, `device`, `counters`; between them `switch`, `uplink`
//! - the program: `cli`, `daemon`, `control_requests`
//!
//! Messages, rings, rate limits and the control channel are those of `vvu-back-end`.

mod bell;
mod checksum;
pub mod cli;
mod config_space;
mod control_queue;
mod control_requests;
mod counters;
pub mod daemon;
mod device;
mod driver_data;
mod driver_state;
mod ethernet;
mod fault;
mod features;
mod filter;
mod forwarding;
mod layers;
mod net_header;
mod offloads;
mod outbox;
mod packet;
mod port;
mod rarp;
mod receiver;
#[cfg(test)]
mod sample;
mod segment;
mod switch;
mod tap;
mod transmitter;
mod uplink;
mod waiting;

pub use ethernet::{MacAddress, MacError};
pub use filter::{FilterError, PortFilter};
pub use port::PortSettings;

use vvu_back_end::Memory as DriverMemory;
