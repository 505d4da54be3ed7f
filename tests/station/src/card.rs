//! A virtio network card without its kernel driver: registers, rings, and nothing that keeps anyone to the rules (virtio
//! 1.3, sections 2.7 and 4.1).

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{Ordering, fence};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::mapping::Mapping;

/// How long the device may take for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// Between two looks at the device, which is to interrupt nobody.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Entries of each ring.
pub(crate) const RING_LEN: u16 = 256;

/// Places in the page: each queue has this much for descriptors, available ring (a page behind) and used ring (two).
const QUEUE_LEN: usize = 0x4000;
const AVAILABLE: usize = 0x1000;
const USED: usize = 0x2000;

/// Where buffers and tables are, behind all rings.
pub(crate) const DATA: usize = 0x10_0000;

/// The queues of a card with one pair.
pub(crate) const RECEIVE: u16 = 0;
pub(crate) const TRANSMIT: u16 = 1;
pub(crate) const CONTROL: u16 = 2;

/// Flags of descriptors.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Features that are taken if they are offered: CSUM, MAC, HOST_TSO4, MRG_RXBUF, CTRL_VQ, CTRL_RX, INDIRECT_DESC, VERSION_1,
/// and ACCESS_PLATFORM, which a driver must take.
const FEATURES: u64 = 1 | 1 << 5 | 1 << 11 | 1 << 15 | 1 << 17 | 1 << 18 | 1 << 28 | 1 << 32 | 1 << 33;

/// States of the device.
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// Fields of the common configuration.
const DEVICE_FEATURE_SELECT: usize = 0;
const DEVICE_FEATURE: usize = 4;
const DRIVER_FEATURE_SELECT: usize = 8;
const DRIVER_FEATURE: usize = 12;
const DEVICE_STATUS: usize = 20;
const QUEUE_SELECT: usize = 22;
const QUEUE_SIZE: usize = 24;
const QUEUE_ENABLE: usize = 28;
const QUEUE_NOTIFY_OFF: usize = 30;
const QUEUE_ADDRESSES: usize = 32;

/// Kinds of capabilities that matter here.
const COMMON_CONFIG: u8 = 1;
const NOTIFY_CONFIG: u8 = 2;
const DEVICE_CONFIG: u8 = 4;

/// PCI command register: memory, bus master, no INTx.
const COMMAND: u64 = 4;
const COMMAND_BITS: u16 = 2 | 4 | 1 << 10;

/// A descriptor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Desc {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// Part of a memory region.
#[derive(Debug, Clone, Copy)]
struct Registers {
    region: Mapping,
    offset: usize,
    /// Only of notifications: bytes from one queue's place to the next.
    multiplier: usize,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Card {
    common: Registers,
    notify: Registers,
    config: Registers,
    memory: Mapping,
    /// Where the memory is for the device.
    base: u64,
    /// Available indices, as this driver counts them.
    available: [u16; 3],
}

impl Card {
    /// Takes a PCI device from its driver, resets it, and starts it with its first pair of queues and the control queue.
    pub(crate) fn take(device: &str) -> Result<Self> {
        let folder = PathBuf::from("/sys/bus/pci/devices").join(device);
        if folder.join("driver").exists() {
            fs::write(folder.join("driver/unbind"), device).context("the driver does not let go")?;
        }
        // It counts how often it was enabled.
        if fs::read_to_string(folder.join("enable"))?.trim() == "0" {
            fs::write(folder.join("enable"), "1").context("cannot enable the device")?;
        }
        let config = File::options().read(true).write(true).open(folder.join("config"))?;
        config.write_all_at(&COMMAND_BITS.to_le_bytes(), COMMAND).context("cannot command the device")?;
        let mut space = [0; 256];
        config.read_exact_at(&mut space, 0).context("cannot read the configuration space")?;
        let find = |kind| find_registers(&space, kind, &folder);
        let (common, notify, config) = (find(COMMON_CONFIG)?, find(NOTIFY_CONFIG)?, find(DEVICE_CONFIG)?);
        // The device of an earlier run may still use the page: it is stopped before anything else.
        common.write(DEVICE_STATUS, 0_u8)?;
        let (memory, base) = Mapping::of_huge_page()?;
        let mut card = Self { common, notify, config, memory, base, available: [0; 3] };
        card.start()?;
        Ok(card)
    }

    fn start(&mut self) -> Result<()> {
        let common = self.common;
        await_it("the reset", || Ok(common.read::<u8>(DEVICE_STATUS)? == 0))?;
        common.write(DEVICE_STATUS, ACKNOWLEDGE | DRIVER)?;
        for (half, shift) in [(0_u32, 0), (1, 32)] {
            common.write(DEVICE_FEATURE_SELECT, half)?;
            let offered = u64::from(common.read::<u32>(DEVICE_FEATURE)?);
            common.write(DRIVER_FEATURE_SELECT, half)?;
            common.write(DRIVER_FEATURE, u32::try_from(offered & (FEATURES >> shift))?)?;
        }
        common.write(DEVICE_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)?;
        ensure!(common.read::<u8>(DEVICE_STATUS)? & FEATURES_OK != 0, "the device refuses the features");
        for queue in [RECEIVE, TRANSMIT, CONTROL] {
            let place = queue_place(queue);
            // The available ring's flag: no interrupts.
            self.memory.write(place + AVAILABLE, 1_u16)?;
            common.write(QUEUE_SELECT, queue)?;
            common.write(QUEUE_SIZE, RING_LEN)?;
            for (field, part) in (QUEUE_ADDRESSES..).step_by(8).zip([0, AVAILABLE, USED]) {
                let address = self.address(place + part);
                common.write(field, u32::try_from(address & 0xffff_ffff)?)?;
                common.write(field + 4, u32::try_from(address >> 32)?)?;
            }
            common.write(QUEUE_ENABLE, 1_u16)?;
        }
        common.write(DEVICE_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    }

    /// The address of the card.
    pub(crate) fn mac(&self) -> Result<[u8; 6]> {
        let mut mac = [0; 6];
        for (offset, byte) in mac.iter_mut().enumerate() {
            *byte = self.config.read(offset)?;
        }
        Ok(mac)
    }

    /// Where a place of the memory is for the device.
    pub(crate) fn address(&self, place: usize) -> u64 {
        self.base + place as u64
    }

    /// The memory.
    pub(crate) fn memory(&self) -> &Mapping {
        &self.memory
    }

    /// Writes descriptor `index` of a queue.
    pub(crate) fn describe(&self, queue: u16, index: u16, desc: Desc) -> Result<()> {
        self.describe_at(queue_place(queue) + 16 * usize::from(index), desc)
    }

    /// Writes a descriptor anywhere.
    pub(crate) fn describe_at(&self, place: usize, desc: Desc) -> Result<()> {
        self.memory.write(place, desc.address)?;
        self.memory.write(place + 8, desc.len)?;
        self.memory.write(place + 12, desc.flags)?;
        self.memory.write(place + 14, desc.next)
    }

    /// Puts a head into a queue's available ring.
    pub(crate) fn offer(&mut self, queue: u16, head: u16) -> Result<()> {
        let index = self.skip(queue, 1)?;
        let slot = usize::from(index % RING_LEN);
        self.memory.write(queue_place(queue) + AVAILABLE + 4 + 2 * slot, head)
    }

    /// Moves a queue's available index on; returns what it was.
    pub(crate) fn skip(&mut self, queue: u16, count: u16) -> Result<u16> {
        let index = self.available.get_mut(usize::from(queue)).context("no such queue")?;
        let before = *index;
        *index = before.wrapping_add(count);
        Ok(before)
    }

    /// Shows the device what was offered, and kicks.
    pub(crate) fn kick(&self, queue: u16) -> Result<()> {
        let index = self.available.get(usize::from(queue)).context("no such queue")?;
        fence(Ordering::SeqCst);
        self.memory.write(queue_place(queue) + AVAILABLE + 2, *index)?;
        fence(Ordering::SeqCst);
        self.common.write(QUEUE_SELECT, queue)?;
        let place = usize::from(self.common.read::<u16>(QUEUE_NOTIFY_OFF)?) * self.notify.multiplier;
        self.notify.write(place, queue)
    }

    /// Waits until the device has returned all that a queue was offered.
    pub(crate) fn await_all_used(&self, queue: u16) -> Result<()> {
        let index = self.available.get(usize::from(queue)).context("no such queue")?;
        await_it("a chain's return", || Ok(self.memory.read::<u16>(queue_place(queue) + USED + 2)? == *index))
    }
}

impl Registers {
    fn read<T: crate::mapping::Word>(self, field: usize) -> Result<T> {
        self.region.read(self.offset + field)
    }

    fn write<T: crate::mapping::Word>(self, field: usize, value: T) -> Result<()> {
        self.region.write(self.offset + field, value)
    }
}

fn queue_place(queue: u16) -> usize {
    usize::from(queue) * QUEUE_LEN
}

/// Walks the list of capabilities (section 4.1.4).
fn find_registers(space: &[u8; 256], kind: u8, folder: &Path) -> Result<Registers> {
    const FIRST: usize = 0x34;
    const VENDOR: u8 = 9;
    let byte = |place: usize| space.get(place).copied().unwrap_or(0);
    let word = |place| usize::try_from(u32::from_le_bytes([0, 1, 2, 3].map(|n| byte(place + n))));
    let mut place = usize::from(byte(FIRST));
    // As many as there is room for: the list might be a circle.
    for _ in 0..64 {
        if place != 0 && byte(place) == VENDOR && byte(place + 3) == kind {
            let region = Mapping::of_file(&folder.join(format!("resource{}", byte(place + 4))))?;
            return Ok(Registers { region, offset: word(place + 8)?, multiplier: word(place + 16)? });
        }
        place = usize::from(byte(place + 1));
    }
    anyhow::bail!("the device has no registers of kind {kind}")
}

fn await_it(what: &str, mut is_there: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is_there()? {
        ensure!(Instant::now() < deadline, "{what} does not come");
        sleep(LOOK_EVERY);
    }
    Ok(())
}
