//! Prints what many devices cost on one host.

use std::fs;

use anyhow::Context;
use serde_json::json;
use vvu_tests::capacity::{DEVICE_LIMITS, Host, Measured, Model};

use crate::cli::Capacity;
use crate::workspace::Workspace;

/// Where the measured figures are, below the workspace.
const FIGURES: &str = "docs/capacity.json";

/// Prints the model's tables, or one JSON document.
pub(crate) fn run(workspace: &Workspace, options: &Capacity) -> anyhow::Result<()> {
    let path = options.figures.clone().unwrap_or_else(|| workspace.root.join(FIGURES));
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let measured: Measured = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not what `cargo xtask bench boot --json` writes", path.display()))?;
    let standard = Host::default();
    let host = Host {
        cpus: options.cpus.unwrap_or(standard.cpus),
        memory_bytes: options.memory.map_or(standard.memory_bytes, |gib| gib << 30),
        ..standard
    };
    let model = Model::new(&measured, host, options.window << 30);
    if options.json {
        let costs: Vec<_> = options.devices.iter().map(|devices| model.cost(*devices)).collect();
        let limits = json!({ "host": model.host_limits(), "device": DEVICE_LIMITS });
        println!("{}", json!({ "host": host, "measured": measured, "costs": costs, "limits": limits }));
    } else {
        print!("{}", model.markdown(&options.devices));
    }
    Ok(())
}
