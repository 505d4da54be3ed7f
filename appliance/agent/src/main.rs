//! appliance/agent

fn main() {}
