//! Packets as tests make them: what the program `vvu-station` sends from a driver VM's network card, and what tests of a
//! back-end send without one.
//!
//! It never sends anything by itself, and takes no packet apart.

pub mod packet;
