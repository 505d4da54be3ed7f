//! A disk and a network once more, with appliances whose kernel has nothing in it but what they need.

use std::path::PathBuf;

use anyhow::Result;
use vvu_guest_image::KernelFlavour;
use vvu_tests::backend::ServedImage;
use vvu_tests::driver_vm::{Disk, DriverVmPlan};
use vvu_tests::files::Files;
use vvu_tests::image_file::create;
use vvu_tests::network::Port;
use vvu_tests::testbed::{machine_test, machine_test_of, target_dir};
use vvu_tests::vvu_run::{VvuRun, appliance_dir, kernel_release};
use vvu_tests::witness::{Load, Witness, check_kernel_log};

use crate::network_uplink::{reach_the_host, start_with_uplink};

const DISK_LEN: u64 = 64 << 20;

/// The image, if somebody has built it: its kernel takes too long for every run of the tests.
fn minimal_appliance() -> Result<Option<PathBuf>> {
    let appliance = target_dir()?.join(KernelFlavour::Minimal.directory());
    if appliance.exists() {
        return Ok(Some(appliance));
    }
    eprintln!("skipped: build its image first, with: cargo xtask image --kernel minimal");
    Ok(None)
}

/// Path: one driver VM whose disk and network card are two appliances'; a file system that survives a reboot, and the uplink's
/// way through TAP, bridge and network card of the appliance. Then the image as the host reads it.
#[test]
fn the_minimal_kernel_serves_a_disk_and_an_uplink() -> Result<()> {
    let Some(appliance) = minimal_appliance()? else { return Ok(()) };
    machine_test_of(appliance, "the_minimal_kernel_serves_a_disk_and_an_uplink", |testbed| {
        let image = create(&testbed.folder().join("disk.img"), DISK_LEN)?;
        let disk = VvuRun::start(testbed, "disk", &ServedImage::writable(&image))?;
        let port = Port::new(testbed, 1);
        let network = start_with_uplink(testbed, &port)?;
        let plan = DriverVmPlan::new(testbed, "driver").disk(Disk::at(disk.socket())).network(port.card());
        let mut vm = plan.boot()?;
        let files = Files::write_on_new_file_system(&mut vm, "/dev/vda")?;
        reach_the_host(&mut vm)?;
        Files::unmount(&mut vm)?;
        vm.reboot()?;
        files.mount_and_verify(&mut vm, "/dev/vda")?;
        Files::unmount(&mut vm)?;
        vm.power_off()?;
        network.stop()?;
        disk.stop()?;
        files.verify_in_image(testbed.setup(), &image, testbed.folder())
    })
}

/// Path: a disk under load goes from the stock kernel to the minimal one and back, and each appliance says which it has.
#[test]
fn an_upgrade_changes_the_kernel_under_load() -> Result<()> {
    let Some(minimal) = minimal_appliance()? else { return Ok(()) };
    machine_test("an_upgrade_changes_the_kernel_under_load", |testbed| {
        let image = create(&testbed.folder().join("disk.img"), DISK_LEN)?;
        let mut run = VvuRun::start(testbed, "disk", &ServedImage::writable(&image))?;
        let mut witness = Witness::new(testbed, "witness", 1, Load::default())?;
        let disk = Disk::at(run.socket());
        let mut vm = DriverVmPlan::new(testbed, "driver").disk(disk).ledger(witness.ledger()).boot()?;
        witness.start(&mut vm, "/dev/vda")?;
        for next in [minimal, appliance_dir()?] {
            let pause = witness.pause_of(&mut vm, || run.upgrade_to(&next).map(drop))?;
            let line = run.await_console(&["agent starts", &format!("kernel={}", kernel_release(&next)?)])?;
            eprintln!("{pause:.0?} until: {line}");
        }
        check_kernel_log(&mut vm)?;
        witness.stop(&mut vm)?;
        vm.power_off()?;
        witness.verify_image(&image)?;
        run.stop().map(drop)
    })
}
