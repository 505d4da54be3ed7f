//! The tests, by subject.

mod acknowledgements;
mod hostile_appliance;
mod hostile_front_end;
mod memory;
mod process;
mod sessions;
mod signals;
mod start;
