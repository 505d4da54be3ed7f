//! Dependencies between the workspace's crates point one way: what is below knows nothing of what is above.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::workspace::Workspace;

/// Which crates of the workspace a crate may use. Tests of a crate (dev-dependencies) are free.
const ALLOWED: [(&str, &[&str]); 20] = [
    ("vvu-protocol", &[]),
    ("vvu-socket", &["vvu-protocol"]),
    ("vvu-bridge", &["vvu-protocol", "vvu-socket"]),
    ("vvu-appliance-config", &[]),
    ("vvu-back-end", &["vvu-protocol", "vvu-socket"]),
    // A back-end is an ordinary vhost-user program: it knows nothing of appliances.
    ("vvu-blk", &["vvu-back-end", "vvu-protocol"]),
    ("vvu-net", &["vvu-back-end", "vvu-protocol"]),
    // For tests alone.
    ("vvu-test-driver", &[]),
    // Measures programs over their sockets, from outside.
    ("vvu-bench", &[]),
    ("vvu-instructions", &["vvu-setup", "vvu-station", "vvu-test-driver"]),
    ("vvu-agent", &["vvu-appliance-config", "vvu-protocol", "vvu-socket"]),
    // The agent on devices without a VM: for tests and benchmarks.
    ("vvu-loopback", &["vvu-agent", "vvu-protocol", "vvu-socket"]),
    // Other parts are programs to it, as they are to an operator.
    ("vvu", &["vvu-appliance-config", "vvu-protocol"]),
    ("vvu-setup", &[]),
    ("vvu-guest-image", &["vvu-setup"]),
    ("vvu-simulation", &[]),
    // They run in a driver VM, alone; what packets they send is a library for others.
    ("vvu-station", &[]),
    ("vvu-witness", &[]),
    ("vvu-tests", &["vvu-bench", "vvu-guest-image", "vvu-setup", "vvu-witness"]),
    ("xtask", &["vvu-guest-image", "vvu-setup", "vvu-tests"]),
];

/// The part of `cargo metadata` that matters here.
#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    /// Nothing for an ordinary one, else `dev` or `build`.
    kind: Option<String>,
    /// Only crates of the workspace have one.
    path: Option<String>,
}

/// Checks all crates of the workspace.
pub(crate) fn check(workspace: &Workspace) -> anyhow::Result<()> {
    let output = workspace
        .cargo(&["metadata", "--no-deps", "--format-version", "1"])
        .output()
        .context("cannot start cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("cargo metadata is not as expected")?;
    let faults = faults(&metadata);
    if !faults.is_empty() {
        bail!("{}", faults.join("\n"));
    }
    Ok(())
}

fn faults(metadata: &Metadata) -> Vec<String> {
    let allowed = BTreeMap::from(ALLOWED);
    let mut faults = Vec::new();
    for package in &metadata.packages {
        let Some(allowed) = allowed.get(package.name.as_str()) else {
            faults.push(format!("{} is not in the table of allowed dependencies", package.name));
            continue;
        };
        let own = package.dependencies.iter().filter(|d| d.path.is_some() && d.kind.as_deref() != Some("dev"));
        for dependency in own.filter(|dependency| !allowed.contains(&dependency.name.as_str())) {
            faults.push(format!("{} must not depend on {}", package.name, dependency.name));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dependency_upwards_is_found_and_one_of_tests_is_free() {
        let metadata: Metadata = serde_json::from_value(serde_json::json!({ "packages": [
            { "name": "vvu-protocol", "dependencies": [
                { "name": "vvu-socket", "kind": null, "path": "/x/socket" },
                { "name": "vvu-setup", "kind": "dev", "path": "/x/setup" },
                { "name": "bitflags", "kind": null },
            ] },
            { "name": "newcomer", "dependencies": [] },
        ] }))
        .unwrap();
        assert_eq!(
            faults(&metadata),
            ["vvu-protocol must not depend on vvu-socket", "newcomer is not in the table of allowed dependencies"]
        );
    }
}
