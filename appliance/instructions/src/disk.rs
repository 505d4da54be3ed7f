//! A driver of a disk, in lock-step with its back-end.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vm_memory::{Bytes, GuestAddress};
use vvu_test_driver::event::{wait_event, wait_until};
use vvu_test_driver::front_end::{FrontEnd, ORDINARY};
use vvu_test_driver::process::Process;
use vvu_test_driver::queue::Queue;
use vvu_test_driver::ring::{Desc, INDIRECT_FLAG, NEXT, WRITE};

use crate::asleep::wait_asleep;
use crate::scenario::{Scenario, Work};

/// Length of the image. It is one hole, and what is written to it begins at its start.
const IMAGE_LEN: u64 = 64 << 20;

/// Length of each of the two memory regions.
const REGION_LEN: u64 = 16 << 20;

/// Where headers, status bytes and indirect tables are, one page per request.
const REQUESTS: u64 = 0x40_0000;

/// Where the data is, one page per request.
const DATA: u64 = 0x80_0000;

/// Bytes of a page and of a request.
const PAGE: u32 = 4096;

/// Entries of the ring: those of QEMU's default.
const QUEUE_SIZE: u16 = 128;

/// Sectors of a request.
const SECTORS: u64 = 8;

/// Offsets in the page of a request.
const STATUS: u64 = 16;
const TABLE: u64 = 64;

/// Types of requests, and the status of one that is done (virtio 1.3, section 5.2.6).
const READ_REQUEST: u32 = 0;
const WRITE_REQUEST: u32 = 1;
const OK: u8 = 0;

/// Whether images in a directory can be read past the page cache. If not, each request takes another way, and who is faster
/// decides how many are done together.
pub(crate) fn has_direct_io(directory: &Path) -> anyhow::Result<bool> {
    let file = tempfile::NamedTempFile::new_in(directory).with_context(|| format!("{}", directory.display()))?;
    Ok(rustix::fs::open(file.path(), OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()).is_ok())
}

/// A back-end with its driver.
pub(crate) struct Disk {
    process: Process,
    front_end: FrontEnd,
    queue: Queue,
    scenario: Scenario,
    sector: u64,
}

impl Disk {
    /// Starts the back-end by `command`, which lacks its arguments, and its ring.
    pub(crate) fn start(mut command: Command, directory: &Path, scenario: Scenario) -> anyhow::Result<Self> {
        let (image, socket) = (directory.join("disk.img"), directory.join("socket"));
        File::create(&image)?.set_len(IMAGE_LEN).context("image")?;
        command.arg("--socket-path").arg(&socket).arg("--image").arg(&image);
        command.args(["--poll", "off"]).env("RUST_LOG", "info");
        let process = Process::spawn_quietly(command);
        process.wait_for_line(|line| line.contains("listening"));
        let protocol = VhostUserProtocolFeatures::empty();
        let mut front_end = FrontEnd::connect(&socket, |offered| offered & ORDINARY, protocol, REGION_LEN);
        let queue = Queue::new(&front_end.memory, 0, QUEUE_SIZE);
        for slot in 0..scenario.depth {
            prepare(&front_end, &queue, slot, scenario.work);
        }
        queue.announce(&mut front_end, 0);
        wait_asleep(process.id())?;
        Ok(Self { process, front_end, queue, scenario, sector: 0 })
    }

    /// Carries out so many requests, and ends the back-end.
    pub(crate) fn run(mut self, requests: u32) -> anyhow::Result<()> {
        for _ in 0..requests / u32::from(self.scenario.depth) {
            self.run_batch()?;
        }
        self.process.signal(Signal::TERM);
        let status = self.process.wait();
        ensure!(status.success(), "vvu-blk ended with {status}");
        Ok(())
    }

    fn run_batch(&mut self) -> anyhow::Result<()> {
        let (memory, queue) = (&self.front_end.memory, &mut self.queue);
        for slot in 0..self.scenario.depth {
            let page = page(REQUESTS, slot);
            memory.write_obj(self.sector, GuestAddress(page + 8))?;
            memory.write_obj(0xffu8, GuestAddress(page + STATUS))?;
            self.sector = (self.sector + SECTORS) % (IMAGE_LEN / 512);
            queue.offer(memory, slot);
        }
        queue.publish(memory);
        queue.kick();
        wait_event(&queue.call, "call");
        wait_until("end of the requests", || queue.used_index(memory) == queue.avail_index);
        wait_asleep(self.process.id())?;
        while let Some((slot, _)) = queue.take_used(memory) {
            let status: u8 = memory.read_obj(GuestAddress(page(REQUESTS, slot) + STATUS))?;
            ensure!(status == OK, "a request failed with status {status}");
        }
        Ok(())
    }
}

fn page(start: u64, slot: u16) -> u64 {
    start + u64::from(slot) * u64::from(PAGE)
}

/// Builds the chain of a request but for its sector: in an indirect table, as Linux does.
fn prepare(front_end: &FrontEnd, queue: &Queue, slot: u16, work: Work) {
    let start = page(REQUESTS, slot);
    let (kind, flags) = if work == Work::DiskRead { (READ_REQUEST, WRITE) } else { (WRITE_REQUEST, 0) };
    front_end.fill(start, &kind.to_le_bytes());
    let desc = |address, len, flags, next| Desc { address, len, flags, next };
    let table =
        [desc(start, 16, NEXT, 1), desc(page(DATA, slot), PAGE, NEXT | flags, 2), desc(start + STATUS, 1, WRITE, 0)];
    front_end.fill(start + TABLE, &table.map(Desc::bytes).concat());
    queue.put_desc(&front_end.memory, slot, desc(start + TABLE, 3 * 16, INDIRECT_FLAG, 0));
}
