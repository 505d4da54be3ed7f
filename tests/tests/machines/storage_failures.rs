//! What a driver VM sees when the host's storage fails: an error for the request, and a device that goes on.

use std::fs;
use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Result, ensure};
use vvu_tests::backend::{Backend, ServedImage};
use vvu_tests::driver_vm::{Disk, DriverVmPlan};
use vvu_tests::image_file::create;
use vvu_tests::surroundings::{Surroundings, vanish};
use vvu_tests::testbed::machine_test;

const MIB: u64 = 1 << 20;

/// Path: ENOSPC on the host, through the appliance's disk, to an I/O error of the write that hit it; reads and writes of
/// what has its place go on, and after a discard there is place again.
#[test]
fn a_full_host_file_system_is_an_error_of_the_write() -> Result<()> {
    machine_test("a_full_host_file_system_is_an_error_of_the_write", |testbed| {
        let mount_point = testbed.folder().join("small");
        fs::create_dir(&mount_point)?;
        let small = Surroundings::small_file_system(&mount_point, 24 * MIB, "disk.img", 64 * MIB);
        let image = ServedImage::writable(&mount_point.join("disk.img")).in_surroundings(small);
        let served = Backend::chosen()?.serve(testbed, "disk", &image)?;
        let mut vm = DriverVmPlan::new(testbed, "driver").disk(Disk::at(served.socket())).boot()?;

        vm.run("dd if=/dev/urandom of=/dev/vda bs=1M count=8 oflag=direct")?;
        let first = vm.run("dd if=/dev/vda bs=1M count=8 iflag=direct 2>/dev/null | sha256sum")?;
        let refusal = vm.run_refused("dd if=/dev/zero of=/dev/vda bs=1M seek=8 count=48 oflag=direct")?;
        ensure!(refusal.contains("Input/output error") || refusal.contains("I/O error"), "dd says {refusal}");
        let again = vm.run("dd if=/dev/vda bs=1M count=8 iflag=direct 2>/dev/null | sha256sum")?;
        ensure!(first == again, "what was written before the disk was full reads differently");
        vm.run("dd if=/dev/urandom of=/dev/vda bs=1M count=8 oflag=direct")?;
        vm.run("/usr/sbin/blkdiscard --offset 8MiB --length 56MiB /dev/vda")?;
        vm.run("dd if=/dev/urandom of=/dev/vda bs=1M seek=40 count=8 oflag=direct")?;
        vm.power_off()?;
        served.stop()
    })
}

/// Path: an image that is gone (its file system's daemon was killed under load), through the appliance's disk, to I/O
/// errors in the driver VM. No request hangs, and the device still answers: capacity, identity, a reboot.
#[test]
fn a_vanished_image_is_an_error_of_every_request() -> Result<()> {
    machine_test("a_vanished_image_is_an_error_of_every_request", |testbed| {
        let backing = create(&testbed.folder().join("backing.img"), 64 * MIB)?;
        File::options().write(true).open(&backing)?.write_all_at(&[0x77; 4096], 0)?;
        let mount_point = create(&testbed.folder().join("disk.img"), 0)?;
        let pid_file = testbed.folder().join("daemon.pid");
        let daemon = Surroundings::served_by_a_daemon(testbed.setup(), &mount_point, &backing, &pid_file);
        let image = ServedImage::writable(&mount_point).in_surroundings(daemon);
        let served = Backend::chosen()?.serve(testbed, "disk", &image)?;
        let mut vm = DriverVmPlan::new(testbed, "driver").disk(Disk::at(served.socket())).boot()?;
        vm.run("dd if=/dev/vda bs=4k count=1 iflag=direct | cmp -n 4096 - /dev/zero && exit 1; true")?;
        vm.run("dd if=/dev/urandom of=/dev/vda bs=1M count=8 oflag=direct")?;

        let load =
            vm.start("while dd if=/dev/zero of=/dev/vda bs=64k count=64 oflag=direct; do :; done; echo failed")?;
        vanish(&pid_file)?;
        let (_, end) = vm.finish(load, vvu_tests::driver_vm::COMMAND_PATIENCE)?;
        ensure!(end.trim_end().ends_with("failed"), "the load under which the image vanished says {end}");
        let read = vm.run_refused("dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct")?;
        ensure!(read.contains("Input/output error") || read.contains("I/O error"), "dd says {read}");
        vm.run_refused("dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct conv=fsync")?;
        vm.reboot()?;
        ensure!(vm.run("cat /sys/block/vda/size")?.trim() == (64 * MIB / 512).to_string());
        vm.run_refused("dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct")?;
        vm.power_off()?;
        served.stop()
    })
}
