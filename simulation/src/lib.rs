//! What the simulation of bridge and agent is made of that knows nothing of them: chance with a seed ([`random`]), and the
//! account of what was covered ([`coverage`]).
//!
//! The simulation itself is the test `simulation` of this crate; its text says how it works. It never starts a process or a
//! VM, and time in it is what tokio's paused clock says.

pub mod coverage;
pub mod random;
