//! Set-up and image, as every other command needs them; and the check that an image is what its inputs make it.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, bail};
use vvu_guest_image::{
    ApplianceFiles, KernelFlavour, Overlay, appliance_initramfs, build_appliance_image, build_driver_binaries,
};
use vvu_setup::Setup;

use crate::workspace::Workspace;

/// The set-up, which is made now if there is none.
pub(crate) fn ensure_setup() -> anyhow::Result<Setup> {
    match Setup::load() {
        Ok(setup) => Ok(setup),
        Err(why) => {
            eprintln!("setup: {why}; doing so");
            Ok(vvu_setup::run(&vvu_setup::SetupOptions::default())?)
        }
    }
}

/// Builds the appliance image, and the programs of the driver VM that tests start.
pub(crate) fn build(workspace: &Workspace, flavour: KernelFlavour) -> anyhow::Result<ApplianceFiles> {
    let setup = ensure_setup()?;
    build_driver_binaries(&workspace.root, &workspace.target)?;
    Ok(build_appliance_image(&setup, flavour, &workspace.root, &workspace.target)?)
}

/// Makes a directory for `vvu run exec --overlay` and says what is in it and how it is called.
pub(crate) fn build_overlay(overlay: Overlay, directory: &Path) -> anyhow::Result<()> {
    let files = vvu_guest_image::build_overlay(&overlay.root()?, &overlay.files(), directory)?;
    let bytes: u64 = files.iter().map(|file| file.size_bytes).sum();
    println!("{}: {} files, {} MB", directory.display(), files.len(), bytes.div_ceil(1_000_000));
    println!("use: vvu run exec --socket SOCKET --overlay {} -- {} ...", directory.display(), overlay.program());
    Ok(())
}

/// Assembles the initramfs again and compares; and looks for paths of this machine in it.
pub(crate) fn check_reproducible(workspace: &Workspace) -> anyhow::Result<()> {
    let setup = ensure_setup()?;
    let image = build_appliance_image(&setup, KernelFlavour::Stock, &workspace.root, &workspace.target)?;
    let first = fs::read(&image.initrd).with_context(|| format!("cannot read {}", image.initrd.display()))?;
    let (again, _) = appliance_initramfs(&setup.modules, &image.binaries)?;
    if again.finish()? != first {
        bail!("the same input gave two different initramfs");
    }
    let home = PathBuf::from(env::var_os("HOME").unwrap_or_default());
    let below_home = |variable, name| env::var_os(variable).map_or_else(|| home.join(name), PathBuf::from);
    let places = [workspace.root.clone(), below_home("CARGO_HOME", ".cargo"), below_home("RUSTUP_HOME", ".rustup")];
    for place in places {
        if contains(&first, &place) {
            bail!("the initramfs has the path {} of this machine in it", place.display());
        }
    }
    Ok(())
}

fn contains(bytes: &[u8], path: &Path) -> bool {
    let text = format!("{}/", path.display()).into_bytes();
    bytes.windows(text.len()).any(|window| window == text)
}
