//! Tells the compiler of the one `cfg` that this crate knows: with it, tokio's scheduler takes a seed, so that a schedule can
//! be played again exactly.

fn main() {
    println!("cargo::rustc-check-cfg=cfg(tokio_unstable)");
    println!("cargo::rerun-if-changed=build.rs");
}
