//! appliance/blk

fn main() {}
