//! Sessions of a device set, without a VM: the real session, supervisor and back-end link, between a control device made of
//! channels, whose other end plays the bridge, and a vhost-user back-end that is a process of its own.
//!
//! `bridge` is the control device's other end, `stage` what all tests start with. Back-ends: `back_end` keeps to a script and
//! to each `command`, `foreign` is an unmodified one of the crate `vhost-user-backend`. The tests: `stories` of sessions, `memory`,
//! `replay`, `log`, `back_channel`, `device_state`, `restart`, `shared`, and those of `foreign`.

#[cfg(test)]
#[path = "session/back_channel.rs"]
mod back_channel;
#[cfg(test)]
#[path = "session/back_end.rs"]
mod back_end;
#[cfg(test)]
#[path = "session/bridge.rs"]
mod bridge;
#[cfg(test)]
#[path = "session/command.rs"]
mod command;
#[cfg(test)]
#[path = "session/device_state.rs"]
mod device_state;
#[cfg(test)]
#[path = "session/foreign.rs"]
mod foreign;
#[cfg(test)]
#[path = "session/log.rs"]
mod log;
#[cfg(test)]
#[path = "session/memory.rs"]
mod memory;
#[cfg(test)]
#[path = "session/replay.rs"]
mod replay;
#[cfg(test)]
#[path = "session/restart.rs"]
mod restart;
#[cfg(test)]
#[path = "session/shared.rs"]
mod shared;
#[cfg(test)]
#[path = "session/stage.rs"]
mod stage;
#[cfg(test)]
#[path = "session/stories.rs"]
mod stories;
