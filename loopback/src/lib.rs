//! An appliance without a VM: a process of the host that connects to the three sockets of a bridge as the appliance's VMM
//! does, and runs the agent's session on the devices behind them.
//!
//! ```text
//!   front-end ◄──vhost-user──► vvu-bridge ◄──control, window, doorbell──► vvu-loopback ◄──vhost-user──► back-end
//! ```
//!
//! The bridge is the real one in its own process, and so is the back-end; front-end, bridge and back-end cannot tell the
//! difference. So it shows at native speed, where there is no KVM too, what bridge and agent cost, and lets tests play
//! against the bridge's own process in seconds. Tests and `vvu-bench` use it; it is part of no appliance.
//!
//! Two threads stand for VMM and guest. The one of [`vmm`] serves the sockets, one thing after the other as QEMU's main loop
//! does: [`device`] is a generic vhost-user device, [`doorbell`] takes the eventfds, [`window`] the mappings. The one of
//! [`guest`] is the agent: its registers, its doorbell and its window are [`registers`], [`doorbell::Doorbells`] and
//! [`window::MappedFiles`], and its back-end is a program that somebody else starts ([`back_end`]).
//!
//! | in an appliance | here |
//! | --- | --- |
//! | control queues in the VM's memory | in a sealed memory file |
//! | notification register, MSI-X | eventfds |
//! | window: a device-DAX node | the files themselves, each with its offset |
//! | doorbell: MSI-X vector → eventfd, eventfd → register | the bridge's eventfds themselves |
//! | back-end: started and supervised by the agent | connected to, and again when it is there again |
//!
//! It never touches a signal or driver memory, but for the index of a used ring that a session resumes at.

pub mod back_end;
pub mod device;
pub mod doorbell;
pub mod guest;
pub mod memory;
pub mod registers;
pub mod vmm;
pub mod window;
