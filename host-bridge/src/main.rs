//! vvu-bridge

fn main() {}
