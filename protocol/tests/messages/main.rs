//! Tests of the vhost-user messages from outside, through the public interface of the crate.
//!
//! - `front_end_requests`, `back_end_requests`, `replies`: golden bytes of every message, written down by hand from the
//!   specification's structures;
//! - `round_trip`: every message with arbitrary content survives encoding and decoding;
//! - `never_panics`: no bytes at all make a decoder panic;
//! - `strictness`: wrong lengths, descriptors, flags and values are errors, unknown requests are values;
//! - `names`, `second_opinion`: codes, names, feature bits and payloads as the vhost crate has them.
//!
//! `golden` and `values` are what they share: the form of a row, and strategies for arbitrary messages. A file descriptor
//! is a plain number here.

#[cfg(test)]
mod back_end_requests;
#[cfg(test)]
mod front_end_requests;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod names;
#[cfg(test)]
mod never_panics;
#[cfg(test)]
mod replies;
#[cfg(test)]
mod round_trip;
#[cfg(test)]
mod second_opinion;
#[cfg(test)]
mod strictness;
#[cfg(test)]
mod values;
