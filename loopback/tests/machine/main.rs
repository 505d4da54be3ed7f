//! The bridge's own process, with a disk behind it: `vvu-bridge`, `vvu-loopback` and `vvu-blk`, and a driver.
//!
//! What a whole machine shows in a minute is shown here in a second, but for what only two VMs can show. The programs have to be
//! built: `cargo build -p vvu-bridge -p vvu-blk`.

#[cfg(test)]
mod disk;
#[cfg(test)]
mod hand_over;
#[cfg(test)]
mod life;
#[cfg(test)]
mod stage;
