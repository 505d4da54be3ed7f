//! The witness: a program that loads a disk inside a driver VM and knows what the disk must hold, whatever happens to the
//! machines around it.
//!
//! The program writes blocks that say which block they are and how many times it has been written ([`mod@block`]), reads
//! them back, and flushes. What was begun, acknowledged and made durable stands in a [`mod@ledger`]: memory that the driver
//! VM shares with the host (QEMU's `ivshmem-plain`), so that the host knows it to the last store even if the driver
//! VM is killed. Used by the whole-machine tests; the library half is what both sides agree on.
//!
//! It never touches a byte of the disk outside the blocks that the ledger names, and never forgives: the first I/O error
//! or wrong content ends it.

pub mod block;
pub mod dice;
pub mod ledger;
