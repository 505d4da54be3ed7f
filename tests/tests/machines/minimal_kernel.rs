//! A disk and a network once more, with appliances whose kernel has nothing in it but what they need.

use anyhow::Result;
use vvu_guest_image::KernelFlavour;
use vvu_tests::backend::ServedImage;
use vvu_tests::driver_vm::{Disk, DriverVmPlan};
use vvu_tests::files::Files;
use vvu_tests::image_file::create;
use vvu_tests::network::Port;
use vvu_tests::testbed::{machine_test_of, target_dir};
use vvu_tests::vvu_run::VvuRun;

use crate::network_uplink::{reach_the_host, start_with_uplink};

const DISK_LEN: u64 = 64 << 20;

/// Path: one driver VM whose disk and network card are two appliances'; a file system that survives a reboot, and the uplink's
/// way through TAP, bridge and network card of the appliance. Then the image as the host reads it.
#[test]
fn the_minimal_kernel_serves_a_disk_and_an_uplink() -> Result<()> {
    let appliance = target_dir()?.join(KernelFlavour::Minimal.directory());
    if !appliance.exists() {
        eprintln!("skipped: build its image first, with: cargo xtask image --kernel minimal");
        return Ok(());
    }
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
