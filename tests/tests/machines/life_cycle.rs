//! The processes of `vvu run`: how they come, how they go, and what is left when one of them is killed.

use std::io::Read;
use std::os::unix::net::UnixStream;

use anyhow::{Result, ensure};
use rustix::process::Signal;
use vvu_tests::backend::ServedImage;
use vvu_tests::driver_vm::{Disk, DriverVmPlan};
use vvu_tests::files::Files;
use vvu_tests::image_file::create;
use vvu_tests::process::readable_within;
use vvu_tests::testbed::{Testbed, machine_test};
use vvu_tests::vvu_run::{END_PATIENCE, VvuRun};

fn run(testbed: &Testbed) -> Result<VvuRun> {
    run_with(testbed, &[])
}

fn run_with(testbed: &Testbed, options: &[&str]) -> Result<VvuRun> {
    let image = create(&testbed.folder().join("disk.img"), 128 << 20)?;
    VvuRun::start_with(testbed, "disk", &ServedImage::writable(&image), options)
}

/// The first death ends the run.
const NEVER_RESTART: [&str; 2] = ["--restart", "never"];

/// Path: a driver VM whose VMM is killed with SIGKILL under load, a second front-end while one is served, the next driver
/// VM on the same device, and the end of the run in order.
#[test]
fn front_ends_come_and_go() -> Result<()> {
    machine_test("front_ends_come_and_go", |testbed| {
        let run = run(testbed)?;
        let plan = DriverVmPlan::new(testbed, "first").disk(Disk::at(run.socket()));
        let mut vm = plan.boot()?;
        let files = Files::write_on_new_file_system(&mut vm, "/dev/vda")?;

        // A second front-end is turned away (end of file) or waits for its turn; the first one never notices.
        let mut second = UnixStream::connect(run.socket())?;
        files.verify_mounted(&mut vm)?;
        if readable_within(&second, std::time::Duration::ZERO)? {
            let len = second.read(&mut [0; 16])?;
            ensure!(len == 0, "a second front-end was answered while another one is served");
        }
        drop(second);

        vm.run("(while true; do dd if=/dev/zero of=/mnt/filler bs=1M count=16 oflag=direct; done) > /dev/null 2>&1 &")?;
        vm.kill()?;
        let mut vm = DriverVmPlan::new(testbed, "second").disk(Disk::at(run.socket())).boot()?;
        files.mount_and_verify(&mut vm, "/dev/vda")?;
        Files::unmount(&mut vm)?;
        vm.run("e2fsck -f -n /dev/vda")?;
        vm.power_off()?;
        let ended = run.stop()?;
        ensure!(ended.reason == "signal", "{ended:?}");
        Ok(())
    })
}

/// Path: SIGTERM while a driver VM is connected ends bridge, appliance and `vvu`, with exit code 0.
#[test]
fn sigterm_ends_a_device_in_use() -> Result<()> {
    machine_test("sigterm_ends_a_device_in_use", |testbed| {
        let run = run(testbed)?;
        let vm = DriverVmPlan::new(testbed, "driver").disk(Disk::at(run.socket())).boot()?;
        let ended = run.stop()?;
        ensure!(ended.reason == "signal", "{ended:?}");
        vm.kill()
    })
}

/// Path: the bridge is killed; the appliance VM, whose maps nobody controls any more, goes with it and `vvu` says so.
#[test]
fn a_killed_bridge_takes_its_appliance_along() -> Result<()> {
    machine_test("a_killed_bridge_takes_its_appliance_along", |testbed| {
        let run = run_with(testbed, &NEVER_RESTART)?;
        run.bridge().signal(Signal::KILL)?;
        run.appliance().await_end(END_PATIENCE)?;
        let (status, ended) = run.await_end()?;
        ensure!(status.code().is_some_and(|code| code != 0), "vvu ended with {status}");
        ensure!(ended.reason == "bridge-ended", "{ended:?}");
        Ok(())
    })
}

/// Path: the appliance's QEMU is killed under a connected driver VM, and the operator wants no restart: `vvu` says so, and
/// ends.
#[test]
fn a_killed_appliance_ends_the_run() -> Result<()> {
    machine_test("a_killed_appliance_ends_the_run", |testbed| {
        let run = run_with(testbed, &NEVER_RESTART)?;
        let vm = DriverVmPlan::new(testbed, "driver").disk(Disk::at(run.socket())).boot()?;
        run.appliance().signal(Signal::KILL)?;
        run.bridge().await_end(END_PATIENCE)?;
        let (status, ended) = run.await_end()?;
        ensure!(status.code().is_some_and(|code| code != 0), "vvu ended with {status}");
        ensure!(ended.reason == "appliance-ended", "{ended:?}");
        ensure!(!vm.qemu().has_ended()?, "the driver VM's QEMU died with its disk");
        vm.kill()
    })
}

/// Path: `vvu` itself is killed with SIGKILL and cannot end anything in order; bridge and appliance end all the same.
#[test]
fn a_killed_vvu_leaves_no_process() -> Result<()> {
    machine_test("a_killed_vvu_leaves_no_process", |testbed| run(testbed)?.kill_vvu())
}
