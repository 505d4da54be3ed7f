//! What is lost or replaced behind a driver VM's disk is a pause for it, never an error: whatever it has written is there,
//! and whatever it was waiting for is answered once.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vvu_tests::backend::ServedImage;
use vvu_tests::driver_vm::{Disk, DriverVmPlan};
use vvu_tests::image_file::create;
use vvu_tests::loss::{self, Loss};
use vvu_tests::testbed::machine_test_alone;
use vvu_tests::vvu_run::VvuRun;
use vvu_tests::witness::{Load, Witness, check_kernel_log};

const MIB: u64 = 1 << 20;

/// How much more of a pause than the bridge has measured the driver VM may see: its own way to the bridge and back, on a
/// busy machine without KVM.
const UNMEASURED: Duration = Duration::from_millis(1500);

/// Path: each part behind the socket is lost under load, twice, and comes back: the bridge keeps the front-end or the
/// front-end connects again, the state is replayed, requests that were in flight are submitted again. Then the appliance
/// VM is replaced by `vvu upgrade`, twice, drained first.
#[test]
fn every_loss_is_a_pause() -> Result<()> {
    machine_test_alone("every_loss_is_a_pause", |testbed| {
        let image = create(&testbed.folder().join("disk.img"), 64 * MIB)?;
        let mut run = VvuRun::start_with(testbed, "disk", &ServedImage::writable(&image), &loss::OPTIONS)?;
        let mut witness = Witness::new(testbed, "witness", 1, Load::default())?;
        let disk = Disk::at(run.socket()).reconnecting();
        let mut vm = DriverVmPlan::new(testbed, "driver").disk(disk).ledger(witness.ledger()).boot()?;
        witness.start(&mut vm, "/dev/vda")?;
        for round in 1..=2 {
            for loss in Loss::ALL {
                let event = || loss.strike(&mut run).and_then(|()| loss.await_repair(&mut run));
                let pause = witness.pause_of(&mut vm, event).with_context(|| format!("{loss}, time {round}"))?;
                check_kernel_log(&mut vm).with_context(|| format!("{loss}, time {round}"))?;
                eprintln!("{loss}: {pause:.0?}");
            }
        }
        for _ in 0..2 {
            let mut replaced = None;
            let seen = witness.pause_of(&mut vm, || {
                replaced = Some(run.upgrade()?);
                Ok(())
            })?;
            let replaced = replaced.context("an upgrade has an answer")?;
            let measured = replaced.pause()?;
            eprintln!("upgrade in {:.0?}: {measured:.0?}, seen {seen:.0?}", replaced.took());
            ensure!(measured <= seen && seen <= measured + UNMEASURED, "a pause of {measured:?}, seen as {seen:?}");
        }
        let stopped = witness.stop(&mut vm)?;
        ensure!(stopped.flushes > 0, "{stopped:?}");
        vm.power_off()?;
        witness.verify_image(&image)?;
        run.stop().map(drop)
    })
}
