//! PID 1 of the appliance VM: the half of the proxy that speaks to the back-end.
//!
//! For each device set it drives the control device and the doorbell device by way of VFIO, opens the window, keeps the
//! back-end running as a process of its own without privileges, and is the front-end on the back-end's socket: a frame
//! from the bridge becomes a vhost-user message, its handles become file descriptors, and the back-end's reply becomes a
//! frame. What a back-end needs besides it prepares: disks and directories of its own ([`programs`]), a TAP on the appliance's
//! network card ([`network`]), byte streams to the host ([`channel`]), the length of the window ([`node_size`]), users to serve
//! files to ([`user_namespace`]). The binary `vvu-agent` runs it. Devices are behind
//! three small traits, [`control::Registers`], [`doorbell::Doorbell`] and [`window::Window`]: tests, and the crate `vvu-loopback`, run
//! [`session`] against devices of their own.
//!
//! It never looks at a device's data or at the bytes of a channel, signals nothing itself while a device runs, and has no device
//! code. Of driver memory it reads one number: the index of a used ring, when a back-end was lost
//! ([`window::Window::read_u16`]). It trusts neither the bridge nor the back-end to follow the rules.
//!
//! Pure: [`regions`], [`memory_map`], [`restarts`], the staging of [`modules`], the rules of [`ring`] and [`translate`], the
//! arguments of [`programs`]. Unsafe: the ioctls of [`vfio`] and [`network`], what [`node_size`] and [`user_namespace`] do before a
//! program begins, and the waiting of [`watch`]. Waiting: [`session`], [`supervisor`], [`process`], [`back_end`], [`channel`], [`reaper`],
//! [`orderly_end`].

pub mod back_end;
pub mod boot;
pub mod channel;
pub mod control;
pub mod device_sets;
pub mod dma;
pub mod doorbell;
pub mod listening;
pub mod memory_map;
pub mod modules;
pub mod network;
pub mod node_size;
pub mod orderly_end;
pub mod output;
pub mod pci;
pub mod process;
pub mod process_table;
pub mod programs;
pub mod reaper;
pub mod regions;
pub mod restarts;
pub mod ring;
pub mod session;
pub mod supervisor;
pub mod translate;
pub mod user;
pub mod user_namespace;
pub mod uuid;
pub mod vfio;
pub mod virtio_pci;
pub mod watch;
pub mod window;

use std::error::Error;

/// An error and its causes, in one line.
pub(crate) fn in_one_line(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |error| (*error).source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
