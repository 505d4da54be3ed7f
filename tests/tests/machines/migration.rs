//! Live migration of a driver VM between two hosts' worth of `vvu`: two bridges and two appliances on one image, as on
//! shared storage.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use vvu_tests::backend::{Backend, Served, ServedImage};
use vvu_tests::driver_vm::{Disk, DriverVm, DriverVmPlan};
use vvu_tests::image_file::{create, sha256_of_part};
use vvu_tests::testbed::{Testbed, machine_test_alone};
use vvu_tests::witness::{Load, Witness, check_kernel_log};

const MIB: u64 = 1 << 20;

/// A machine whose memory is clean is moved in less; one whose log never comes to rest is not moved at all.
const MIGRATION_PATIENCE: Duration = Duration::from_secs(120);

/// Length of the image in bytes.
const IMAGE_LEN: u64 = 256 * MIB;
/// Where the part of the image begins that the witness does not use, and how much of it each move reads.
const STILL_START: u64 = 192 * MIB;
const STILL_LEN: u64 = 8 * MIB;
const MOVES: u64 = 2;

/// Writers of a load that keeps a queue busy: their requests are in flight when the machine stops.
const DEEP: u64 = 64;

/// A machine under load, and where it may move to.
struct Moving<'a> {
    testbed: &'a Testbed,
    vm: DriverVm,
    witness: Witness,
    image: PathBuf,
    moves: u32,
}

impl Moving<'_> {
    /// Moves the machine to the side that serves `to`, under its load.
    fn move_to(mut self, to: &Served) -> Result<Self> {
        self.moves += 1;
        let name = format!("driver-{}", self.moves);
        let ledger = self.witness.next_ledger(self.testbed, &name)?;
        let incoming = plan(self.testbed, &name, to).ledger(&ledger).await_migration()?;
        let mut read = String::new();
        let (vm, migration) = self.vm.migrate_after(incoming, |vm| {
            // Other pages each time: the ones of the last move are in memory already.
            read = vm.run(&still_part(self.moves))?;
            Ok(())
        })?;
        self.vm = vm;
        // Now from the same pages: the disk is not asked again.
        let (kept, stored) =
            (self.vm.run(&still_part(self.moves))?, sha256_of_part(&self.image, still_start(self.moves), STILL_LEN)?);
        ensure!(read.contains(&stored), "the disk has {stored}, the machine read {read}");
        ensure!(kept.contains(&stored), "the disk has {stored}, the machine keeps {kept} after its move");
        self.witness.follow(&ledger)?;
        ensure!(migration.total < MIGRATION_PATIENCE, "{migration:?}");
        self.witness.await_turnover(&mut self.vm)?;
        let gap = self.witness.take_longest_gap()?;
        self.witness.verify(&mut self.vm)?;
        check_kernel_log(&mut self.vm)?;
        let restored = self.witness.words_restored()?;
        eprintln!("{migration:?}, longest gap {gap:.0?}, words of the ledger that QEMU has lost so far: {restored}");
        Ok(self)
    }
}

/// Makes the image: zeroes for the witness, then bytes for each move that nobody writes to.
fn image(testbed: &Testbed) -> Result<PathBuf> {
    let image = create(&testbed.folder().join("disk.img"), IMAGE_LEN)?;
    let mut still = Vec::new();
    File::open("/dev/urandom")?.take(MOVES * STILL_LEN).read_to_end(&mut still)?;
    File::options().write(true).open(&image)?.write_all_at(&still, STILL_START)?;
    Ok(image)
}

/// Where the bytes of this move begin.
fn still_start(moves: u32) -> u64 {
    STILL_START + u64::from(moves - 1) * STILL_LEN
}

/// The command that hashes these bytes, and reads what is not in memory yet.
fn still_part(moves: u32) -> String {
    let (skip, count) = (still_start(moves) / MIB, STILL_LEN / MIB);
    format!("dd if=/dev/vda bs=1M skip={skip} count={count} 2>/dev/null | sha256sum")
}

fn plan<'a>(testbed: &'a Testbed, name: &str, served: &Served) -> DriverVmPlan<'a> {
    DriverVmPlan::new(testbed, name).disk(Disk::at(served.socket()).long_rings())
}

/// Path: dirty logging from the device through the appliance's window into QEMU's log (what the device writes after memory
/// was sent once is on the other side as the disk has it), drained rings and their exact
/// positions, to another bridge and appliance, and back; before that a migration that is cancelled, so that logging is
/// switched on and off under load. The image at the end is what the machine has written.
///
/// The ledger is a block of the machine's memory beside the first one, where QEMU under TCG loses stores of CPUs
/// (docs/front-ends.md, "Live migration under TCG"). So the witness knows by heart what it has done, and puts the ledger
/// right after each move. What the device writes, used rings and data, is in the first block.
#[test]
fn a_driver_vm_migrates_there_and_back_under_load() -> Result<()> {
    machine_test_alone("a_driver_vm_migrates_there_and_back_under_load", |testbed| {
        let image = image(testbed)?;
        let served = ServedImage::writable(&image).shared();
        let serve = |name| Backend::chosen()?.serve(testbed, name, &served);
        let (here, there) = (serve("a")?, serve("b")?);
        let mut witness = Witness::new(testbed, "witness", 5, Load { writers: DEEP, ..Load::default() })?;
        let mut vm = plan(testbed, "driver", &here).ledger(witness.ledger()).boot()?;
        witness.start(&mut vm, "/dev/vda")?;
        vm.cancel_migration(testbed, |vm| witness.await_turnover(vm))?;
        witness.await_turnover(&mut vm)?;

        let moving = Moving { testbed, vm, witness, image: image.clone(), moves: 0 }.move_to(&there)?.move_to(&here)?;
        let Moving { mut vm, mut witness, .. } = moving;
        witness.stop(&mut vm)?;
        vm.power_off()?;
        witness.verify_image(&image)?;
        here.stop()?;
        there.stop()
    })
}
