//! The first iterations of `cargo xtask soak`, with a seed that never changes.

use anyhow::Result;
use vvu_tests::soak::{SoakOptions, run};

/// Path: any part of the whole, lost at any moment, and once more while it is repaired.
#[test]
fn random_losses_leave_no_trace() -> Result<()> {
    run(&SoakOptions { iterations: 20, seed: 3, json: false })
}
