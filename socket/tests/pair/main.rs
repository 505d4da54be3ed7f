//! Pair tests over real sockets: our codec on one end, the vhost crate as it is on the other.
//!
//! - `front_end`: we are the front-end of the crate's back-end;
//! - `back_end`: we are the back-end of the crate's front-end;
//! - `back_end_channel`: requests of the back-end, in both of these.
//!
//! Each walks through a session and compares what one end said with what the other end understood. `recorder` is the device
//! behind the crate's back-end, `session` has the values of a session and our ends of it, `descriptor` tells whether two
//! descriptors are the same thing.

#[cfg(test)]
mod back_end;
#[cfg(test)]
mod back_end_channel;
#[cfg(test)]
mod descriptor;
#[cfg(test)]
mod front_end;
#[cfg(test)]
mod recorder;
#[cfg(test)]
mod session;
