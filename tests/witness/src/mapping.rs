//! The ledger as the witness sees it: a PCI memory region of the driver VM, mapped into this process.

#![expect(unsafe_code, reason = "maps a PCI device's memory, which the host reads and writes at the same time")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use vvu_witness::ledger::{Control, LEDGER_LEN, MAGIC, Record, WORD_LEN};

/// Vendor and device number of `ivshmem-plain` (QEMU, docs/specs/ivshmem-spec.rst), as sysfs writes them.
const IVSHMEM: (&str, &str) = ("0x1af4", "0x1110");

/// The device's shared memory is its BAR 2 (the same document).
const MEMORY_FILE: &str = "resource2";

/// The mapped words. The mapping lasts as long as the process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ledger {
    words: &'static [AtomicU64],
}

impl Ledger {
    /// Finds the device, enables it and maps its memory.
    pub(crate) fn open() -> Result<Self> {
        let device = find()?;
        fs::write(device.join("enable"), "1").context("cannot enable the ledger's device")?;
        let path = device.join(MEMORY_FILE);
        let file = File::options().read(true).write(true).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        if file.metadata()?.len() != LEDGER_LEN {
            bail!("{} is no ledger: it has {} bytes", path.display(), file.metadata()?.len());
        }
        let len = usize::try_from(LEDGER_LEN)?;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe {
            mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
                .context("cannot map the ledger")?
        };
        let count = usize::try_from(LEDGER_LEN / WORD_LEN)?;
        // SAFETY: the mapping has `count` words, is aligned to a page, and is never unmapped. The host changes the
        // words at the same time, by stores of whole words; they are only used as atomics.
        let words = unsafe { std::slice::from_raw_parts(start.cast::<AtomicU64>(), count) };
        let ledger = Self { words };
        if ledger.load(Control::Magic) != MAGIC {
            bail!("the ledger was not prepared");
        }
        Ok(ledger)
    }

    pub(crate) fn control(&self, control: Control) -> &'static AtomicU64 {
        self.word(control.word())
    }

    pub(crate) fn load(&self, control: Control) -> u64 {
        self.control(control).load(Ordering::SeqCst)
    }

    pub(crate) fn store(&self, control: Control, value: u64) {
        self.control(control).store(value, Ordering::SeqCst);
    }

    pub(crate) fn record(&self, block: u64) -> Record {
        let first = Record::first_word(block);
        let [begun, acknowledged, durable] =
            [first, first + 1, first + 2].map(|index| self.word(index).load(Ordering::SeqCst));
        Record { begun, acknowledged, durable }
    }

    /// Stores the words of `block` that change from `before` to `after`; returns how many these are.
    pub(crate) fn change(&self, block: u64, before: Record, after: Record) -> u64 {
        let mut stored = 0;
        for (index, (before, after)) in (0..).zip(before.words().into_iter().zip(after.words())) {
            if before != after {
                self.word(Record::first_word(block) + index).store(after, Ordering::SeqCst);
                stored += 1;
            }
        }
        stored
    }

    /// A word past the end, which a prepared ledger does not ask for, is one that nobody reads.
    fn word(&self, index: u64) -> &'static AtomicU64 {
        static NOWHERE: AtomicU64 = AtomicU64::new(0);
        usize::try_from(index).ok().and_then(|index| self.words.get(index)).unwrap_or(&NOWHERE)
    }

    /// A ledger that nobody shares, all zero.
    #[cfg(test)]
    pub(crate) fn in_heap() -> Self {
        let words: Vec<AtomicU64> = (0..LEDGER_LEN / WORD_LEN).map(|_| AtomicU64::new(0)).collect();
        Self { words: words.leak() }
    }
}

fn find() -> Result<PathBuf> {
    let is_ledger = |device: &Path| {
        let says =
            |file: &str, value: &str| fs::read_to_string(device.join(file)).is_ok_and(|text| text.trim() == value);
        says("vendor", IVSHMEM.0) && says("device", IVSHMEM.1)
    };
    let devices = fs::read_dir("/sys/bus/pci/devices").context("cannot list PCI devices")?;
    let mut found = devices.flatten().map(|entry| entry.path()).filter(|device| is_ledger(device));
    found.next().context("this machine has no ledger (ivshmem-plain)")
}
