//! A load for vhost-user back-ends: front-end and driver in one program, as small as they can be, so that what is measured is
//! the back-end and the way to it.
//!
//! The same program runs against every back-end and over every way to it: on the host, behind bridge and appliance, of our own
//! and of others. It allocates nothing for a request, makes one system call for a kick and one for a wait, and reads the clock
//! once for each batch.
//!
//! - [`connection`]: the messages of a front-end, and the signals of a queue;
//! - [`memory`], [`ring`]: what driver and device share;
//! - [`disk`]: virtio-blk requests, in numbers; [`bare`]: the same reads without a back-end;
//! - [`packets`]: virtio-net frames from one port of a switch to another;
//! - [`messages`]: control messages; [`hop`]: what the system itself takes for a signal;
//! - [`latency`], [`processes`], [`outcome`]: what is measured;
//! - [`report`]: what is left of a benchmark: JSON, Markdown, SVG;
//! - [`cli`]: the command line.
//!
//! `vvu-tests` starts it for the figures, and `xtask` for counts of instructions. It checks that requests succeed, but not what
//! they read: the tests of the back-ends do that, with `vvu-test-driver`, which can break every rule, fails where it meets the
//! unexpected, and is slower for it.

pub mod bare;
pub mod cli;
pub mod connection;
pub mod disk;
pub mod error;
pub mod hop;
pub mod latency;
pub mod memory;
pub mod messages;
pub mod outcome;
pub mod packets;
pub mod processes;
pub mod report;
pub mod ring;
