//! How `vvu run` watches its children: who dies with whom, in which order, what comes back, what is left behind, and what
//! an operator can do with a run.
//!
//! The children are played by scripts, since only they can be made to die at a wanted moment: a role of this program speaks
//! the notification protocol as the bridge does, the tests add to it what a bridge would say later, and a shell script
//! stands for the appliance VM's QEMU. The questions before the start go to the real QEMU of the set-up (`cargo xtask
//! setup`). Whole machines are tested in the crate `vvu-tests`.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test program; the lint's own exception covers test functions only"
)]

mod endings;
mod image_use;
mod operator;
mod ports;
mod programs;
mod restarts;
mod stage;
