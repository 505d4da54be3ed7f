//! launcher

fn main() {}
