//! The bridge as a process, between two scripted halves and without a VM.
//!
//! `scripted` plays what stands around the bridge: the appliance's VMM with its three devices, the agent behind the two
//! queues of the control device, and the front-end. `stories` has the tests, by subject. Whatever is awaited is awaited
//! with a limit, and the text of the limit says what was missing.

#[cfg(test)]
mod scripted;
#[cfg(test)]
mod stories;
