//! Whole machines: driver VMs, bridge and appliance VM together, as users run them.
//!
//! One program for all of them, so that two tests at a time keep the machine's cores busy.

mod back_ends;
mod disk;
mod driver_vm_life;
mod front_end;
mod life_cycle;
mod migration;
mod minimal_kernel;
mod network;
mod network_features;
mod network_losses;
mod network_ports;
mod network_uplink;
mod qcow2;
mod recovery;
mod soak;
mod storage_failures;
