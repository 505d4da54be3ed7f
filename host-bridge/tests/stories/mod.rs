//! The tests, by subject.

mod acknowledgements;
mod appliances;
mod back_channel;
mod device_state;
mod dirty_log;
mod hand_over;
mod hostile_appliance;
mod hostile_front_end;
mod inflight;
mod memory;
mod memory_slots;
mod messages;
mod process;
mod replay;
mod sessions;
mod signals;
mod standby;
mod start;
