//! The appliance's VMM, as QEMU 11 behaves: two generic vhost-user devices, the doorbell device, and the window, whose
//! mappings it keeps account of.
//!
//! Like QEMU it hands out new memory tables to its running devices before it answers a mapping, for each one counts as memory
//! of the appliance; drops all mappings without a word when the window device is reset; and dies of what QEMU dies of, which
//! is a failure of the schedule. When the bridge has closed its sockets it lives on, with all that is mapped.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{Mutex, Notify};
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::sleep;
use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress};
use vvu_protocol::control::{CONFIG_LEN, CONFIG_STATUS_OFFSET, Status};
use vvu_protocol::memory::{MAX_TABLE_REGIONS, MemoryRegion};
use vvu_protocol::message::{BackEndReply, BackEndRequest, ConfigSpace, FrontEndRequest, ShmemMap};
use vvu_protocol::window::{FileId, MEMORY_OFFSET};
use vvu_socket::MessageSocket;
use vvu_socket::ivshmem::ServerStream;

use super::device::{Device, Gone, Vring};
use super::doorbell::Doorbell;
use super::file::{MappedFile, identity};
use super::ring::{self, DriverRing};
use super::world::World;

/// Bytes of the appliance's memory below 4 GiB, and of that above; one behind the other in one file.
const HALF: u64 = ring::LEN.next_multiple_of(4096);

/// Guest-physical address of the upper half, and of the window.
const HIGH_MEMORY: u64 = 0x1_0000_0000;
const WINDOW_BAR: u64 = 0x38_0000_0000;

/// How far user addresses of the VMM's process are from guest-physical ones.
const USER: u64 = 0x7e00_0000_0000;

/// A turn of QEMU's main loop.
const TURN: Duration = Duration::from_micros(100);

/// A mapping in the window.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) map: ShmemMap,
    pub(crate) file: OwnedFd,
    pub(crate) id: FileId,
    /// What is mapped lives on, whoever has made it.
    known: Rc<MappedFile>,
}

/// Where something of the window lies: in which file, and where there.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) file: OwnedFd,
    pub(crate) id: FileId,
    /// The same file, mapped.
    pub(crate) memory: Rc<MappedFile>,
    pub(crate) offset: u64,
}

#[derive(Debug)]
pub(crate) struct Vmm {
    pub(crate) number: u32,
    world: Rc<World>,
    pub(crate) control: Rc<Device>,
    window: Rc<Device>,
    pub(crate) doorbell: Rc<Doorbell>,
    pub(crate) ram: Rc<MappedFile>,
    mappings: RefCell<Vec<Mapping>>,
    /// QEMU's: whoever changes devices or memory holds it.
    big_lock: Mutex<()>,
    /// Writes to the configuration space that the bridge has not answered yet.
    writes: Cell<u32>,
    changed: Cell<bool>,
    pub(crate) interrupt: Notify,
    /// A reset is under way: what the bridge has sent before it knew is still to come.
    resetting: Cell<bool>,
    /// A message for the control device is being dealt with.
    busy: Cell<bool>,
    /// The bridge has closed a socket.
    pub(crate) abandoned: Cell<bool>,
    pub(crate) abandonment: Notify,
    tasks: RefCell<Vec<AbortHandle>>,
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Vmm {
    /// Starts, and connects to the bridge's three sockets. Fails if the bridge does not want it.
    pub(crate) async fn start(number: u32, world: &Rc<World>) -> Result<Rc<Self>, Gone> {
        let connect = |name: &'static str, queue_count, config_len| async move {
            let path = world.directory.join(format!("{name}.sock"));
            let (device, serve) = Device::connect(name, &path, queue_count, config_len, world).await?;
            let task = spawn_local(serve);
            let realized = device.realize().await;
            realized.map(|back_channel| (device, back_channel, task))
        };
        let (control, control_back, control_task) = connect("control", 2, CONFIG_LEN).await?;
        let (window, window_back, window_task) = connect("window", 1, 16).await?;
        let stream = ServerStream::connect(&world.directory.join("doorbell.sock")).map_err(|_| Gone)?;
        let doorbell = Doorbell::new(number, world);
        doorbell.set_up(&stream).await.map_err(|_| Gone)?;
        let vmm = Rc::new(Self {
            number,
            world: Rc::clone(world),
            control,
            window,
            doorbell,
            ram: Rc::new(MappedFile::new(2 * HALF)),
            mappings: RefCell::default(),
            big_lock: Mutex::default(),
            writes: Cell::new(0),
            changed: Cell::new(false),
            interrupt: Notify::new(),
            resetting: Cell::new(false),
            busy: Cell::new(false),
            abandoned: Cell::new(false),
            abandonment: Notify::new(),
            tasks: RefCell::default(),
        });
        let config = vmm.control.read_config().await?;
        vmm.control.config.replace(config);
        let weak = Rc::downgrade(&vmm);
        let abandon = move |what: &str| {
            if let Some(vmm) = weak.upgrade() {
                vmm.abandon(what);
            }
        };
        let ends = [("control", control_task), ("window", window_task)].map(|(name, task)| {
            let (abandon, handle) = (abandon.clone(), task.abort_handle());
            vmm.keep(handle);
            spawn_local(async move {
                if task.await.is_ok() {
                    abandon(name);
                }
            })
        });
        ends.into_iter().for_each(|end| vmm.keep(end.abort_handle()));
        let served = Rc::clone(&vmm.doorbell).serve(stream);
        vmm.spawn(async move {
            served.await;
            abandon("doorbell");
        });
        vmm.spawn(serve_control(Rc::downgrade(&vmm), control_back));
        vmm.spawn(serve_window(Rc::downgrade(&vmm), window_back));
        Ok(vmm)
    }

    fn keep(&self, handle: AbortHandle) {
        self.tasks.borrow_mut().push(handle);
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.keep(spawn_local(task).abort_handle());
    }

    fn abandon(&self, what: &str) {
        if !self.abandoned.replace(true) {
            self.world.note(format!("appliance {}: the bridge has closed the {what} socket", self.number));
        }
        self.abandonment.notify_one();
    }

    /// The process is gone, and all of its sockets.
    pub(crate) fn kill(&self) {
        self.tasks.borrow_mut().drain(..).for_each(|task| task.abort());
        self.doorbell.kill();
        self.mappings.borrow_mut().clear();
    }

    /// The memory table of every device of this VM.
    fn table(&self) -> Vec<(MemoryRegion, OwnedFd)> {
        let region = |guest: u64, size, offset| MemoryRegion {
            guest_address: GuestAddress(guest),
            size,
            user_address: UserAddress(USER + guest),
            mmap_offset: FileOffset(offset),
        };
        let ram = [region(0, HALF, 0), region(HIGH_MEMORY, HALF, HALF)];
        let mappings = self.mappings.borrow();
        let mapped = mappings.iter().map(|Mapping { map, file, .. }| {
            (region(WINDOW_BAR + map.region_offset, map.len, map.file_offset.0), file.try_clone().unwrap())
        });
        ram.map(|region| (region, self.ram.duplicate())).into_iter().chain(mapped).collect()
    }

    /// New queues for the control device, in both halves of the memory.
    pub(crate) fn rings(&self) -> (DriverRing, DriverRing) {
        let receive = DriverRing::new(&self.ram, 0, 0);
        (receive, DriverRing::new(&self.ram, HALF, HIGH_MEMORY))
    }

    /// The drivers of the control device have set DRIVER_OK.
    pub(crate) async fn start_control(&self, rings: [&DriverRing; 2]) -> Result<(), Gone> {
        let _held = self.big_lock.lock().await;
        let vrings = rings.map(|ring| Vring::new(ring.addresses().map(|address| USER + address), Some(ring)));
        self.control.start(self.table(), &vrings).await
    }

    /// The driver of the window device has set DRIVER_OK. Its queue is never used.
    pub(crate) async fn start_window(&self) -> Result<(), Gone> {
        let _held = self.big_lock.lock().await;
        let vring = Vring::new([0x0, 0x1000, 0x2000].map(|address| USER + address), None);
        self.window.start(self.table(), &[vring]).await
    }

    /// The machine is reset: so are both devices, and the mappings are gone. What the bridge had sent before it knew arrives at
    /// a device that is stopped; QEMU might die of that, and nobody could help it.
    pub(crate) async fn reset(&self) -> Result<(), Gone> {
        let _held = self.big_lock.lock().await;
        self.resetting.set(true);
        self.doorbell.reset();
        for device in [&self.window, &self.control] {
            if device.running.replace(false) {
                device.stop().await?;
            }
            self.mappings.borrow_mut().clear();
        }
        // The back channels' tasks read what is there.
        let mut idle = 0;
        while idle < 8 && !self.abandoned.get() {
            sleep(TURN).await;
            idle = if self.busy.get() { 0 } else { idle + 1 };
        }
        self.resetting.set(false);
        Ok(())
    }

    /// A mapping that QEMU would refuse is a fault of the bridge.
    fn map(&self, map: ShmemMap, file: OwnedFd) {
        let mut mappings = self.mappings.borrow_mut();
        let file_len = rustix::fs::fstat(&file).unwrap().st_size.unsigned_abs();
        let aligned = [map.len, map.region_offset, map.file_offset.0].iter().all(|value| value.is_multiple_of(4096));
        assert!(aligned && map.file_offset.0 + map.len <= file_len, "{map:?} of a file of {file_len:#x} bytes");
        let ours = |other: &&Mapping| {
            let theirs = &other.map;
            map.region_offset < theirs.region_offset + theirs.len && theirs.region_offset < map.region_offset + map.len
        };
        let overlap = mappings.iter().find(ours);
        assert!(overlap.is_none(), "{map:?} overlaps {:?}", overlap.map(|other| other.map));
        let id = identity(&file);
        let known = self.world.known_file(id).unwrap_or_else(|| Rc::new(MappedFile::adopt(file.try_clone().unwrap())));
        mappings.push(Mapping { map, file, id, known });
    }

    fn unmap(&self, map: &ShmemMap) {
        let mut mappings = self.mappings.borrow_mut();
        let place = |mapping: &Mapping| mapping.map.region_offset == map.region_offset && mapping.map.len == map.len;
        let index = mappings.iter().position(place);
        mappings.remove(index.unwrap_or_else(|| panic!("{map:?} is unmapped, and was not mapped")));
    }

    /// What lies at these bytes of the window, if all of them are mapped.
    pub(crate) fn place(&self, window_offset: u64, len: u64) -> Option<Place> {
        let mappings = self.mappings.borrow();
        let Mapping { map, file, id, known } = mappings.iter().find(|Mapping { map, .. }| {
            map.region_offset <= window_offset && window_offset + len <= map.region_offset + map.len
        })?;
        let offset = map.file_offset.0 + (window_offset - map.region_offset);
        Some(Place { file: file.try_clone().unwrap(), id: *id, memory: Rc::clone(known), offset })
    }

    /// Files in the window's area for driver memory, with the bytes of the window that each mapping takes.
    pub(crate) fn driver_files(&self) -> Vec<(FileId, std::ops::Range<u64>)> {
        let mappings = self.mappings.borrow();
        let in_area = mappings.iter().filter(|mapping| mapping.map.region_offset >= MEMORY_OFFSET.0);
        in_area.map(|Mapping { map, id, .. }| (*id, map.region_offset..map.region_offset + map.len)).collect()
    }

    /// Everything that is mapped but the header.
    pub(crate) fn mapped_files(&self) -> Vec<FileId> {
        let mappings = self.mappings.borrow();
        mappings.iter().filter(|mapping| mapping.map.region_offset != 0).map(|mapping| mapping.id).collect()
    }

    /// Whether the configuration space may have changed since the last call.
    pub(crate) fn take_config_change(&self) -> bool {
        self.changed.replace(false)
    }

    /// The guest writes the status field. QEMU changes what it has read last, and sends all of it.
    pub(crate) fn write_status(self: &Rc<Self>, status: Status) {
        let mut bytes = self.control.config.borrow_mut();
        bytes[CONFIG_STATUS_OFFSET..CONFIG_STATUS_OFFSET + 4].copy_from_slice(&status.bits().to_le_bytes());
        let written = ConfigSpace { offset: 0, flags: 0, bytes: bytes.clone() };
        drop(bytes);
        self.writes.set(self.writes.get() + 1);
        let (answered, vmm) = (self.control.ask(FrontEndRequest::SetConfig(written)), Rc::downgrade(self));
        self.spawn(async move {
            let answered = answered.await;
            if let (Ok(_), Some(vmm)) = (answered, vmm.upgrade()) {
                vmm.writes.set(vmm.writes.get() - 1);
            }
        });
    }

    /// The same, as far as it matters: a session that the guest knows of does not become another one by itself.
    pub(crate) async fn look_at_status(&self) {
        let known = self.control.config.borrow()[CONFIG_STATUS_OFFSET];
        if known != (Status::BACK_END_UP | Status::FRONT_END_UP).bits().to_le_bytes()[0] {
            self.refresh_config().await;
        }
    }

    /// The guest's next look at the configuration space shows what it is now. A write that is on its way counts as done.
    pub(crate) async fn refresh_config(&self) {
        let Ok(mut fresh) = self.control.read_config().await else { return };
        let mut config = self.control.config.borrow_mut();
        if self.writes.get() > 0 {
            let back_end_up = config[CONFIG_STATUS_OFFSET] & 1;
            fresh[CONFIG_STATUS_OFFSET] = fresh[CONFIG_STATUS_OFFSET] & !1 | back_end_up;
        }
        *config = fresh;
    }
}

/// The back channel of the control device: it has nothing but configuration interrupts.
async fn serve_control(vmm: std::rc::Weak<Vmm>, mut back_channel: MessageSocket) {
    while let Ok(Some(message)) = back_channel.recv().await {
        let Some(vmm) = vmm.upgrade() else { return };
        let request = BackEndRequest::decode(message).unwrap();
        assert!(matches!(request, BackEndRequest::ConfigChange), "{} on the control device", request.name());
        if !vmm.control.running.get() {
            assert!(vmm.resetting.get(), "{} at a device that is stopped", request.name());
            continue;
        }
        vmm.busy.set(true);
        vmm.world.hesitate().await;
        vmm.refresh_config().await;
        vmm.busy.set(false);
        vmm.changed.set(true);
        vmm.interrupt.notify_one();
    }
}

/// The back channel of the window device: it has nothing but mappings.
async fn serve_window(vmm: std::rc::Weak<Vmm>, mut back_channel: MessageSocket) {
    while let Ok(Some(message)) = back_channel.recv().await {
        let Some(vmm) = vmm.upgrade() else { return };
        let request = BackEndRequest::decode(message).unwrap();
        let (code, name) = (request.code(), request.name());
        let mut held = None;
        // While the device is reset nobody reads the back channel: what was sent before is answered after it.
        if vmm.window.running.get() || vmm.resetting.get() {
            vmm.world.hesitate().await;
            held = Some(vmm.big_lock.lock().await);
        }
        let running = vmm.window.running.get();
        assert!(running || held.is_some(), "{name} at a device that is stopped");
        let answer = if running {
            vmm.world.note(format!("appliance {}: {request:?}", vmm.number));
            match request {
                BackEndRequest::ShmemMap(map, file) => vmm.map(map, file),
                BackEndRequest::ShmemUnmap(map) => vmm.unmap(&map),
                other => panic!("{} on the window device", other.name()),
            }
            // Of more regions than a table has, QEMU only complains.
            let tells = vmm.table().len() <= MAX_TABLE_REGIONS;
            for device in [&vmm.control, &vmm.window].into_iter().filter(|_| tells) {
                if device.running.get() && device.done(FrontEndRequest::SetMemTable(vmm.table())).await.is_err() {
                    return;
                }
            }
            0
        } else {
            1
        };
        drop(held);
        let _ = back_channel.send(&BackEndReply::<OwnedFd>::Acknowledgement(answer).encode(code)).await;
    }
}
