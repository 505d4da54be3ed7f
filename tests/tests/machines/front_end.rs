//! A front-end of another make, the `vhost` crate's, on a whole machine: it starts a device step by step, and leaves
//! without a word after each one.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;
use vvu_tests::backend::{Backend, Served, ServedImage};
use vvu_tests::driver_vm::{Disk, DriverVmPlan};
use vvu_tests::image_file::create;
use vvu_tests::testbed::machine_test;

const MIB: u64 = 1 << 20;

/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a front-end that was turned away waits; QEMU's `reconnect-ms` is of this kind.
const TURNED_AWAY_WAIT: Duration = Duration::from_millis(50);

/// VIRTIO_F_VERSION_1 and VHOST_USER_F_PROTOCOL_FEATURES.
const FEATURES: u64 = (1 << 32) | (1 << 30);

/// Where the memory is for the driver and for the front-end: far apart, as they are with a VMM.
const GUEST_ADDRESS: u64 = 0x1000_0000;
const USER_ADDRESS: u64 = 0x7f00_0000_0000;

/// Places in the memory.
const DESCRIPTORS: u64 = 0x0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x3000;
const DATA: u64 = 0x4000;
const STATUS: u64 = 0x5000;

const QUEUE_LEN: u16 = 16;

/// A front-end, its memory and its ring.
struct Starter {
    front_end: Frontend,
    memory: File,
    kick: EventFd,
    call: EventFd,
}

/// One step of a start.
type Step = fn(&mut Starter) -> Result<()>;

/// All steps; the last ones use the device and stop it.
const STEPS: [(&str, Step); 15] = [
    ("SET_OWNER", |s| Ok(s.front_end.set_owner()?)),
    ("GET_PROTOCOL_FEATURES", |s| Ok(s.front_end.get_protocol_features().map(drop)?)),
    ("SET_PROTOCOL_FEATURES", |s| Ok(s.front_end.set_protocol_features(VhostUserProtocolFeatures::CONFIG)?)),
    ("SET_FEATURES", |s| Ok(s.front_end.set_features(FEATURES)?)),
    ("GET_CONFIG", Starter::read_capacity),
    ("SET_MEM_TABLE", Starter::set_mem_table),
    ("SET_VRING_NUM", |s| Ok(s.front_end.set_vring_num(0, QUEUE_LEN)?)),
    ("SET_VRING_ADDR", Starter::set_vring_addr),
    ("SET_VRING_BASE", |s| Ok(s.front_end.set_vring_base(0, 0)?)),
    ("SET_VRING_CALL", |s| Ok(s.front_end.set_vring_call(0, &s.call)?)),
    ("SET_VRING_KICK", |s| Ok(s.front_end.set_vring_kick(0, &s.kick)?)),
    ("SET_VRING_ENABLE", |s| Ok(s.front_end.set_vring_enable(0, true)?)),
    ("a request", Starter::submit),
    ("its end", Starter::await_end),
    ("GET_VRING_BASE", |s| {
        ensure!(s.front_end.get_vring_base(0)? == 1, "the ring did not stop behind its only request");
        Ok(())
    }),
];

impl Starter {
    /// Connects until it is served: while the device of the one before is being stopped, a front-end is turned away.
    fn connect(socket: &Path) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let front_end = Frontend::connect(socket, 1).context("cannot connect")?;
            match front_end.get_features() {
                Ok(features) => {
                    ensure!(features & FEATURES == FEATURES, "the device offers only {features:#x}");
                    let memory = File::from(memfd_create("driver-memory", MemfdFlags::CLOEXEC)?);
                    memory.set_len(2 * MIB)?;
                    return Ok(Self { front_end, memory, kick: EventFd::new(0)?, call: EventFd::new(0)? });
                }
                Err(error) if Instant::now() > deadline => return Err(error).context("no front-end is served"),
                Err(_) => thread::sleep(TURNED_AWAY_WAIT),
            }
        }
    }

    fn read_capacity(&mut self) -> Result<()> {
        let (_, config) = self.front_end.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8])?;
        let sectors = u64::from_le_bytes(config.as_slice().try_into().context("a capacity has 8 bytes")?);
        ensure!(sectors == 16 * MIB / 512, "the disk has {sectors} sectors");
        Ok(())
    }

    fn set_mem_table(&mut self) -> Result<()> {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_ADDRESS,
            memory_size: 2 * MIB,
            userspace_addr: USER_ADDRESS,
            mmap_offset: 0,
            mmap_handle: self.memory.as_raw_fd(),
        };
        Ok(self.front_end.set_mem_table(&[region]).map(drop)?)
    }

    fn set_vring_addr(&mut self) -> Result<()> {
        let addresses = VringConfigData {
            queue_max_size: QUEUE_LEN,
            queue_size: QUEUE_LEN,
            flags: 0,
            desc_table_addr: USER_ADDRESS + DESCRIPTORS,
            used_ring_addr: USER_ADDRESS + USED,
            avail_ring_addr: USER_ADDRESS + AVAILABLE,
            log_addr: None,
        };
        Ok(self.front_end.set_vring_addr(0, &addresses)?)
    }

    /// Reads the first sector: a header of 16 zero bytes (VIRTIO_BLK_T_IN, sector 0), the data, the status.
    fn submit(&mut self) -> Result<()> {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        let chain = [(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)];
        for (descriptor, (place, len, flags, next)) in (0_u64..).zip(chain) {
            let at = DESCRIPTORS + 16 * descriptor;
            self.memory.write_all_at(&(GUEST_ADDRESS + place).to_le_bytes(), at)?;
            self.memory.write_all_at(&u32::to_le_bytes(len), at + 8)?;
            self.memory.write_all_at(&u16::to_le_bytes(flags), at + 12)?;
            self.memory.write_all_at(&u16::to_le_bytes(next), at + 14)?;
        }
        self.memory.write_all_at(&[0xff], STATUS)?;
        // Entry 0 of the available ring is descriptor 0, as memory is; its index goes up by one.
        self.memory.write_all_at(&1_u16.to_le_bytes(), AVAILABLE + 2)?;
        Ok(self.kick.write(1)?)
    }

    fn await_end(&mut self) -> Result<()> {
        // A call may be spurious.
        let used = || -> Result<u16> {
            let mut index = [0; 2];
            self.memory.read_exact_at(&mut index, USED + 2)?;
            Ok(u16::from_le_bytes(index))
        };
        while used()? == 0 {
            let (call, (sender, called)) = (self.call.try_clone()?, channel());
            // It ends with the call; if none comes, with the process.
            thread::spawn(move || sender.send(call.read()));
            called.recv_timeout(PATIENCE).context("no call")??;
        }
        let mut status = [0; 1];
        self.memory.read_exact_at(&mut status, STATUS)?;
        ensure!(status == [0], "the request ended with status {status:?}");
        Ok(())
    }
}

/// Path: a front-end that goes after each of its messages in turn, the last times with a request in flight and with one
/// done; each next one is served from the start, and in the end a driver VM is.
#[test]
fn a_front_end_may_leave_after_every_step() -> Result<()> {
    machine_test("a_front_end_may_leave_after_every_step", |testbed| {
        let image = create(&testbed.folder().join("disk.img"), 16 * MIB)?;
        let served = Backend::chosen()?.serve(testbed, "disk", &ServedImage::writable(&image))?;
        drop(UnixStream::connect(served.socket())?);
        for count in 0..=STEPS.len() {
            let mut starter = Starter::connect(served.socket())?;
            for (name, step) in STEPS.iter().take(count) {
                step(&mut starter).with_context(|| format!("{name}, after {count} front-ends that left early"))?;
            }
        }
        if let Served::Vvu(run) = &served {
            ensure!(run.status()?.restarts == 0, "a front-end that left has cost an appliance VM");
        }
        let mut vm = DriverVmPlan::new(testbed, "driver").disk(Disk::at(served.socket())).boot()?;
        vm.run("dd if=/dev/urandom of=/dev/vda bs=64k count=16 oflag=direct conv=fsync")?;
        vm.power_off()?;
        served.stop()
    })
}
