//! The witness in a driver VM, as the host sees and steers it through the ledger that both share (`vvu_witness`).
//!
//! A [`Witness`] belongs to one disk image. It may go through several driver VMs, one after the other: the ledger says
//! what the image must hold when the next machine finds it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vvu_witness::block::{BLOCK_LEN, Block, Content};
use vvu_witness::dice::Dice;
use vvu_witness::ledger::{BLOCKS_MAX, Control, LEDGER_LEN, MAGIC, Record, State, WORD_LEN};

use crate::driver_vm::DriverVm;
use crate::testbed::Testbed;

/// How long the disk may stand still, and how long reading all blocks may take.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The ledger is memory of two machines: nobody tells when a word changes, so it is looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// What the witness says goes here in the driver VM.
const LOG: &str = "/tmp/witness.log";

/// What the driver VM's kernel says when a disk has failed it.
const KERNEL_COMPLAINTS: &str =
    "I/O error|blk_update_request|critical .* error|Buffer I/O|blocked for more than|BUG|WARNING";

/// How the disk is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Blocks of 4 KiB in use, from the start of the disk.
    pub blocks: u64,
    /// Requests in flight.
    pub writers: u64,
    /// One of how many requests is a FLUSH.
    pub flush_one_in: u64,
}

impl Default for Load {
    fn default() -> Self {
        Self { blocks: 2048, writers: 16, flush_one_in: 64 }
    }
}

/// Counts of a load that has stopped well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped {
    /// Requests completed since the load started.
    pub requests: u64,
    /// FLUSH requests among them.
    pub flushes: u64,
}

/// One disk's witness.
#[derive(Debug)]
pub struct Witness {
    load: Load,
    seed: u64,
    order: Dice,
    path: PathBuf,
    ledger: File,
}

impl Witness {
    /// A witness of an image that is all zero. The content of its blocks and the order of its requests follow from `seed`.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn new(testbed: &Testbed, name: &str, seed: u64, load: Load) -> Result<Self> {
        Self::at(testbed.socket(&format!("{name}.ledger")), seed, load)
    }

    fn at(path: PathBuf, seed: u64, load: Load) -> Result<Self> {
        ensure!(load.blocks <= BLOCKS_MAX, "a ledger has room for {BLOCKS_MAX} blocks");
        let ledger = new_ledger(&path)?;
        Ok(Self { load, seed, order: Dice::new(seed), path, ledger })
    }

    /// Bytes of the disk that the witness uses.
    pub fn disk_len(&self) -> u64 {
        self.load.blocks * BLOCK_LEN as u64
    }

    /// File that the driver VM shares (`DriverVmPlan::ledger`).
    pub fn ledger(&self) -> &Path {
        &self.path
    }

    /// Starts the load on `device` and waits until it runs: every block has been read and is as the ledger says.
    ///
    /// # Errors
    /// If a block is not as it must be, or the load does not start.
    pub fn start(&mut self, vm: &mut DriverVm, device: &str) -> Result<()> {
        for (control, value) in [
            (Control::Seed, self.seed),
            (Control::Order, self.order.roll()),
            (Control::Blocks, self.load.blocks),
            (Control::Writers, self.load.writers),
            (Control::FlushOneIn, self.load.flush_one_in),
            (Control::VerifyAsked, 0),
            (Control::SharesVerified, 0),
            (Control::WordsRestored, 0),
            (Control::Stop, 0),
            (Control::State, State::Idle as u64),
            (Control::Completions, 0),
            (Control::Flushes, 0),
            (Control::Failure, 0),
            (Control::Magic, MAGIC),
        ] {
            self.set(control, value)?;
        }
        vm.run(&format!("vvu-witness {device} > {LOG} 2>&1 < /dev/null &"))?;
        self.await_state(vm, State::Running)
    }

    /// Requests completed since the load started.
    ///
    /// # Errors
    /// If the ledger cannot be read.
    pub fn completions(&self) -> Result<u64> {
        self.get(Control::Completions)
    }

    /// Waits until `more` requests have completed from now.
    ///
    /// # Errors
    /// If the witness has found something wrong, or the disk stands still for [`PATIENCE`].
    pub fn await_requests(&self, vm: &mut DriverVm, more: u64) -> Result<()> {
        let target = self.completions()? + more;
        self.await_while_it_runs(vm, || Ok(self.completions()? >= target))
    }

    /// Has every block read and compared while the load goes on, and the ledger put right before.
    ///
    /// # Errors
    /// As [`Witness::await_requests`].
    pub fn verify(&self, vm: &mut DriverVm) -> Result<()> {
        let asked = self.get(Control::VerifyAsked)? + 1;
        self.set(Control::VerifyAsked, asked)?;
        self.await_while_it_runs(vm, || Ok(self.get(Control::SharesVerified)? >= asked * self.load.writers))
    }

    fn await_while_it_runs(&self, vm: &mut DriverVm, mut reached: impl FnMut() -> Result<bool>) -> Result<()> {
        let mut seen = self.completions()?;
        let mut deadline = Instant::now() + PATIENCE;
        while !reached()? {
            std::thread::sleep(LOOK_EVERY);
            self.check(vm)?;
            let now = self.completions()?;
            if now > seen {
                (seen, deadline) = (now, Instant::now() + PATIENCE);
            } else if Instant::now() > deadline {
                let said = vm.run(&format!("cat {LOG}")).unwrap_or_default();
                bail!("no request has completed for {PATIENCE:.0?}\n{said}\n{}", vm.blocked_tasks());
            }
        }
        Ok(())
    }

    /// Waits until every request that was under way now has been answered: more than one writer may be slow, so each of
    /// them must have had its turn several times.
    ///
    /// # Errors
    /// As [`Witness::await_requests`].
    pub fn await_turnover(&self, vm: &mut DriverVm) -> Result<()> {
        self.await_requests(vm, self.load.writers * 8)
    }

    /// The longest time without a completed request since the last call, or since the load started.
    ///
    /// # Errors
    /// If the ledger cannot be read or written.
    pub fn take_longest_gap(&self) -> Result<Duration> {
        let gap = self.get(Control::LongestGap)?;
        self.set(Control::LongestGap, 0)?;
        Ok(Duration::from_nanos(gap))
    }

    /// Does something to the disk under load, and returns the longest time in which the driver VM saw no request
    /// completed.
    ///
    /// # Errors
    /// What `event` returns, and as [`Witness::await_requests`].
    pub fn pause_of(&self, vm: &mut DriverVm, event: impl FnOnce() -> Result<()>) -> Result<Duration> {
        self.await_turnover(vm)?;
        self.take_longest_gap()?;
        event()?;
        self.await_turnover(vm)?;
        self.take_longest_gap()
    }

    /// Stops the load; the witness reads every block once more. Nothing was wrong, and the kernel has not complained.
    ///
    /// # Errors
    /// If something was wrong.
    pub fn stop(&mut self, vm: &mut DriverVm) -> Result<Stopped> {
        self.set(Control::Stop, 1)?;
        self.await_state(vm, State::Stopped)?;
        check_kernel_log(vm)?;
        Ok(Stopped { requests: self.completions()?, flushes: self.get(Control::Flushes)? })
    }

    /// Compares the image with the ledger, on the host, while nobody writes: each block holds, as a whole, a write that was
    /// begun, not older than the last one acknowledged. The ledger then says what was found, for the next driver VM.
    ///
    /// The last write acknowledged before a FLUSH is among those; newer ones need no FLUSH here, because the host has not
    /// failed.
    ///
    /// # Errors
    /// If a block is not as it must be; the text names all of them.
    pub fn verify_image(&mut self, image: &Path) -> Result<()> {
        let disk = File::open(image).with_context(|| format!("cannot read {}", image.display()))?;
        let mut wrong = Vec::new();
        let mut content = Block::default();
        for block in 0..self.load.blocks {
            disk.read_exact_at(&mut content.0, block * BLOCK_LEN as u64)?;
            let record = self.record(block)?;
            let found = content.content(self.seed, block);
            match found {
                Content::Generation(generation) if (record.acknowledged..=record.begun).contains(&generation) => {
                    self.set_record(block, Record { acknowledged: generation, durable: generation, ..record })?;
                }
                _ => wrong.push(format!("block {block}: {record:?}, found {found:?}")),
            }
        }
        ensure!(wrong.is_empty(), "{} of {} blocks are wrong:\n{}", wrong.len(), self.load.blocks, wrong.join("\n"));
        Ok(())
    }

    /// Words of the ledger that a migration has lost and [`Witness::verify`] has found and put back, since the load started.
    ///
    /// # Errors
    /// If the ledger cannot be read.
    pub fn words_restored(&self) -> Result<u64> {
        self.get(Control::WordsRestored)
    }

    /// Makes a new ledger, for a machine to which this one migrates: QEMU brings the content along.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn next_ledger(&self, testbed: &Testbed, name: &str) -> Result<PathBuf> {
        let path = testbed.socket(&format!("{name}.ledger"));
        new_ledger(&path).map(|_| path)
    }

    /// Reads from `ledger` from now on: the machine has migrated.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn follow(&mut self, ledger: &Path) -> Result<()> {
        self.ledger = open_ledger(File::options().read(true).write(true), ledger)?;
        ledger.clone_into(&mut self.path);
        Ok(())
    }

    fn await_state(&self, vm: &mut DriverVm, awaited: State) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.check(vm)?;
            let state = State::from_word(self.get(Control::State)?).context("the ledger has no such state")?;
            if state == awaited {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the witness is still {state:?}, not {awaited:?}\n{}", vm.blocked_tasks());
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Fails if the witness has found something wrong; its log says what.
    fn check(&self, vm: &mut DriverVm) -> Result<()> {
        if self.get(Control::State)? == State::Failed as u64 || self.get(Control::Failure)? != 0 {
            let said = vm.run(&format!("cat {LOG}; dmesg | tail -n 20"))?;
            bail!("the witness found something wrong:\n{said}");
        }
        Ok(())
    }

    fn get(&self, control: Control) -> Result<u64> {
        self.word(control.word())
    }

    fn set(&self, control: Control, value: u64) -> Result<()> {
        self.set_word(control.word(), value)
    }

    fn record(&self, block: u64) -> Result<Record> {
        let first = Record::first_word(block);
        Ok(Record { begun: self.word(first)?, acknowledged: self.word(first + 1)?, durable: self.word(first + 2)? })
    }

    fn set_record(&self, block: u64, record: Record) -> Result<()> {
        let first = Record::first_word(block);
        self.set_word(first + 1, record.acknowledged)?;
        self.set_word(first + 2, record.durable)
    }

    fn word(&self, index: u64) -> Result<u64> {
        let mut bytes = [0; size_of::<u64>()];
        self.ledger.read_exact_at(&mut bytes, index * WORD_LEN).context("cannot read the ledger")?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn set_word(&self, index: u64, value: u64) -> Result<()> {
        self.ledger.write_all_at(&value.to_le_bytes(), index * WORD_LEN).context("cannot write the ledger")
    }
}

/// Fails if the driver VM's kernel has complained about a disk, or about anything of that kind.
///
/// # Errors
/// As said; the text has the complaints.
pub fn check_kernel_log(vm: &mut DriverVm) -> Result<()> {
    let complaints = vm.run(&format!("dmesg | grep -E '{KERNEL_COMPLAINTS}' || true"))?;
    ensure!(complaints.trim().is_empty(), "the driver VM's kernel complains:\n{complaints}");
    Ok(())
}

fn new_ledger(path: &Path) -> Result<File> {
    let file = open_ledger(File::options().read(true).write(true).create(true).truncate(true), path)?;
    file.set_len(LEDGER_LEN).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(file)
}

fn open_ledger(options: &std::fs::OpenOptions, path: &Path) -> Result<File> {
    options.open(path).with_context(|| format!("cannot open {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ledger of three blocks and an image in which block 0 was never written, block 1 holds `generation`, and block 2
    /// holds its first write.
    fn killed_at(record: Record, generation: u64) -> (tempfile::TempDir, Witness, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let load = Load { blocks: 3, ..Load::default() };
        let witness = Witness::at(folder.path().join("ledger"), 77, load).unwrap();
        let first = Record::first_word(1);
        for (index, value) in [record.begun, record.acknowledged, record.durable].into_iter().enumerate() {
            witness.set_word(first + index as u64, value).unwrap();
        }
        witness.set_word(Record::first_word(2), 1).unwrap();
        let image = folder.path().join("disk.img");
        let file = File::create(&image).unwrap();
        let mut block = Block::default();
        file.write_all_at(&block.0, 0).unwrap();
        block.fill(77, 1, generation);
        file.write_all_at(&block.0, 4096).unwrap();
        block.fill(77, 2, 1);
        file.write_all_at(&block.0, 8192).unwrap();
        (folder, witness, image)
    }

    const RECORD: Record = Record { begun: 9, acknowledged: 8, durable: 5 };

    #[test]
    fn an_image_holds_what_was_acknowledged_or_begun_later() {
        for generation in [8, 9] {
            let (_folder, mut witness, image) = killed_at(RECORD, generation);
            witness.verify_image(&image).unwrap();
            let expected = Record { begun: 9, acknowledged: generation, durable: generation };
            assert_eq!(witness.record(1).unwrap(), expected);
            assert_eq!(witness.record(2).unwrap(), Record { begun: 1, acknowledged: 1, durable: 1 });
        }
    }

    #[test]
    fn a_lost_an_unknown_and_a_torn_write_are_found() {
        for generation in [7, 10] {
            let (_folder, mut witness, image) = killed_at(RECORD, generation);
            let error = witness.verify_image(&image).unwrap_err().to_string();
            assert!(error.contains("1 of 3 blocks") && error.contains("block 1:"), "{error}");
        }
        let (_folder, mut witness, image) = killed_at(RECORD, 9);
        File::options().write(true).open(&image).unwrap().write_all_at(&[1], 5000).unwrap();
        assert!(witness.verify_image(&image).is_err());
    }
}
