//! Sessions of a device set, without a VM: the real session, supervisor and back-end link, between a control device made of
//! channels, whose other end plays the bridge, and a scripted vhost-user back-end that is a process of its own.
//!
//! `bridge` is the control device's other end, `back_end` the scripted program, `stories` has the tests.

#[cfg(test)]
#[path = "session/back_end.rs"]
mod back_end;
#[cfg(test)]
#[path = "session/bridge.rs"]
mod bridge;
#[cfg(test)]
#[path = "session/stories.rs"]
mod stories;
