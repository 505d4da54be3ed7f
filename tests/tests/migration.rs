//! Live migration of a driver VM between two hosts' worth of `vvu`: two bridges and two appliances on one image, as on
//! shared storage.

use std::time::Duration;

use anyhow::{Result, ensure};
use vvu_tests::backend::{Backend, Served, ServedImage};
use vvu_tests::driver_vm::{Disk, DriverVm, DriverVmPlan};
use vvu_tests::image_file::create;
use vvu_tests::testbed::{Testbed, machine_test};
use vvu_tests::witness::{Load, Witness, check_kernel_log};

const MIB: u64 = 1 << 20;

/// A machine whose memory is clean is moved in less; one whose log never comes to rest is not moved at all.
const MIGRATION_PATIENCE: Duration = Duration::from_secs(120);

/// Writers of a load that keeps a queue of QEMU's size (128) busy: their requests are in flight when the machine stops.
const DEEP: u64 = 64;

/// A machine under load, and where it may move to.
struct Moving<'a> {
    testbed: &'a Testbed,
    vm: DriverVm,
    witness: Witness,
    moves: u32,
}

impl Moving<'_> {
    /// Moves the machine to the side that serves `to`, under its load.
    fn move_to(mut self, to: &Served) -> Result<Self> {
        self.moves += 1;
        let name = format!("driver-{}", self.moves);
        let ledger = self.witness.next_ledger(self.testbed, &name)?;
        let incoming = plan(self.testbed, &name, to).ledger(&ledger).await_migration()?;
        let (vm, migration) = self.vm.migrate(incoming)?;
        self.vm = vm;
        self.witness.follow(&ledger)?;
        ensure!(migration.total < MIGRATION_PATIENCE, "{migration:?}");
        self.witness.await_turnover(&mut self.vm)?;
        check_kernel_log(&mut self.vm)?;
        eprintln!("{migration:?}, longest gap {:.0?}", self.witness.take_longest_gap()?);
        Ok(self)
    }
}

fn plan<'a>(testbed: &'a Testbed, name: &str, served: &Served) -> DriverVmPlan<'a> {
    DriverVmPlan::new(testbed, name).disk(Disk::at(served.socket()))
}

/// Path: dirty logging from the device through the appliance's window into QEMU's log, drained rings and their exact
/// positions, to another bridge and appliance, and back; before that a migration that is cancelled, so that logging is
/// switched on and off under load. The image at the end is what the machine has written.
#[test]
fn a_driver_vm_migrates_there_and_back_under_load() -> Result<()> {
    machine_test("a_driver_vm_migrates_there_and_back_under_load", |testbed| {
        let image = create(&testbed.folder().join("disk.img"), 256 * MIB)?;
        let served = ServedImage::writable(&image).shared();
        let serve = |name| Backend::chosen()?.serve(testbed, name, &served);
        let (here, there) = (serve("a")?, serve("b")?);
        let mut witness = Witness::new(testbed, "witness", 5, Load { writers: DEEP, ..Load::default() })?;
        let mut vm = plan(testbed, "driver", &here).ledger(witness.ledger()).boot()?;
        witness.start(&mut vm, "/dev/vda")?;
        vm.cancel_migration(testbed, |vm| witness.await_turnover(vm))?;
        witness.await_turnover(&mut vm)?;

        let moving = Moving { testbed, vm, witness, moves: 0 }.move_to(&there)?.move_to(&here)?;
        let Moving { mut vm, mut witness, .. } = moving;
        witness.stop(&mut vm)?;
        vm.power_off()?;
        witness.verify_image(&image)?;
        here.stop()?;
        there.stop()
    })
}
