//! qcow2 images, which nobody but the back-end in the appliance parses.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vvu_tests::backend::ServedImage;
use vvu_tests::driver_vm::{Disk, DriverVm, DriverVmPlan};
use vvu_tests::image_file::{sha256, sha256_of_part};
use vvu_tests::loss::{self, Loss};
use vvu_tests::process::output_of;
use vvu_tests::testbed::machine_test_alone;
use vvu_tests::vvu_run::VvuRun;
use vvu_tests::witness::{Load, Witness, check_kernel_log};

const MIB: u64 = 1 << 20;

/// What the disk is limited to for a while, in requests each second: fewer than a debug build under TCG does.
const LIMIT: u32 = 25;
/// How many requests the limited disk is watched for.
const LIMITED_REQUESTS: u32 = 75;

/// Path: new clusters, and their tables, for a load on an image whose backing file has the rest; the back-end killed, the
/// appliance killed, the appliance replaced, each under load; a limit of requests, set and lifted meanwhile. Then the image
/// as QEMU's tools find it: consistent, with all that was written, over a backing file that nobody has touched.
#[test]
fn a_qcow2_disk_survives_losses_and_keeps_to_limits() -> Result<()> {
    machine_test_alone("a_qcow2_disk_survives_losses_and_keeps_to_limits", |testbed| {
        let setup = testbed.setup();
        let base = testbed.folder().join("base.img");
        let mut base_file = File::create(&base)?;
        base_file.set_len(32 * MIB)?;
        // The witness finds zeroes in its part; behind it is what only the backing file has.
        base_file.seek(SeekFrom::Start(16 * MIB))?;
        io::copy(&mut File::open("/dev/urandom")?.take(16 * MIB), &mut base_file)?;
        let base_hash = sha256(&base)?;
        let image = testbed.folder().join("disk.qcow2");
        let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
        output_of(Command::new(&setup.qemu_img).args(create).arg(&base).arg(&image).arg("64M"))?;

        let backing = format!("raw:{}", base.display());
        let options = [&["--format", "qcow2", "--backing", backing.as_str()], loss::OPTIONS.as_slice()].concat();
        let mut run = VvuRun::start_with(testbed, "disk", &ServedImage::writable(&image), &options)?;
        let mut witness = Witness::new(testbed, "witness", 6, Load::default())?;
        let disk = Disk::at(run.socket()).reconnecting();
        let mut vm = DriverVmPlan::new(testbed, "driver").disk(disk).ledger(witness.ledger()).boot()?;
        let hash = vm.run("dd if=/dev/vda bs=1M skip=16 count=16 2>/dev/null | sha256sum")?;
        witness.start(&mut vm, "/dev/vda")?;
        for loss in [Loss::BackEnd, Loss::Appliance] {
            let event = || loss.strike(&mut run).and_then(|()| loss.await_repair(&mut run));
            let pause = witness.pause_of(&mut vm, event).with_context(|| loss.to_string())?;
            check_kernel_log(&mut vm).with_context(|| loss.to_string())?;
            eprintln!("{loss}: {pause:.0?}");
        }
        let pause = witness.pause_of(&mut vm, || run.upgrade().map(drop)).context("upgrade")?;
        eprintln!("upgrade: {pause:.0?}");
        keeps_to_a_limit(&run, &witness, &mut vm)?;
        witness.stop(&mut vm)?;
        vm.power_off()?;
        run.stop()?;

        // A cluster that was taken and not yet used at a kill is leaked, which is all that may be wrong.
        output_of(Command::new(&setup.qemu_img).args(["check", "-q", "-r", "leaks", "-f", "qcow2"]).arg(&image))?;
        let flat = testbed.folder().join("flat.img");
        let convert = ["convert", "-f", "qcow2", "-O", "raw"];
        output_of(Command::new(&setup.qemu_img).args(convert).arg(&image).arg(&flat))?;
        witness.verify_image(&flat)?;
        ensure!(sha256(&base)? == base_hash, "the backing file has changed");
        let expected = sha256_of_part(&base, 16 * MIB, 16 * MIB)?;
        ensure!(hash.contains(&expected), "the driver VM reads {hash}, the backing file has {expected}");
        for file in [base, image, flat] {
            std::fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
        }
        Ok(())
    })
}

/// As many requests take as long as the limit says, and less when it is lifted.
fn keeps_to_a_limit(run: &VvuRun, witness: &Witness, vm: &mut DriverVm) -> Result<()> {
    let mut time = || {
        let start = Instant::now();
        witness.await_requests(vm, LIMITED_REQUESTS.into())?;
        Ok::<_, anyhow::Error>(start.elapsed())
    };
    run.set_limit(0, &["--iops", &LIMIT.to_string()])?;
    let limited = time()?;
    run.set_limit(0, &["--iops", "0"])?;
    let free = time()?;
    eprintln!("{LIMITED_REQUESTS} requests: {limited:.1?} at {LIMIT}/s, {free:.1?} without a limit");
    // A limit holds a tenth of a second in store, and requests that it has let pass are under way when it is set.
    let expected = Duration::from_secs(1) * LIMITED_REQUESTS / LIMIT;
    ensure!(limited >= expected * 2 / 3, "{LIMITED_REQUESTS} requests took {limited:?} under a limit of {LIMIT}/s");
    ensure!(free < expected / 2, "{LIMITED_REQUESTS} requests took {free:?} without a limit");
    Ok(())
}
