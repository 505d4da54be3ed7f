//! The host bridge: one process that relays one vhost-user device into one appliance VM.
//!
//! ```text
//!   front-end ──vhost-user──► [front_end] ─► [session] ─► [appliance::control] ──virtqueues──► agent
//!   (driver VM's VMM)             │          [translate]   [appliance::window]  ──SHMEM_MAP──► appliance's VMM
//!                             [doorbells] ◄──eventfds──►   [appliance::doorbell]──ivshmem────► appliance's VMM
//! ```
//!
//! - [`life`] is the life cycle as a table: who is there, what happens, what follows;
//! - [`bridge`] waits for what happens, and does what follows; `announcement` tells the parent process of it;
//! - [`session`] is the life of a front-end's connection: it takes its requests, one after the other, says for each who
//!   answers it, and brings the next back-end to the state that the front-end has set;
//! - `translate` is the one place where a file descriptor becomes a handle;
//! - `doorbells` is the one place where the eventfds of kicks and calls are chosen, and relays them;
//! - [`log_limit`] bounds what peers can make the bridge log;
//! - [`appliance`] is the appliances: the device set of each, towards its VMM.
//!
//! Never here: device code, parsing of images or packets, a mapping of driver memory, a disk, a network. The only memory that
//! it maps is the appliance's own, for the two queues of the control device, and one page of a dirty log whose file ends
//! within a page.

mod announcement;
pub mod appliance;
pub mod bridge;
pub mod cli;
pub mod doorbells;
pub mod front_end;
pub mod life;
pub mod log_limit;
pub mod session;
mod translate;
