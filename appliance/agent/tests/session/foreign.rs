//! A back-end that knows nothing of appliances: the crate `vhost-user-backend` as it is, with a device that fills buffers. A
//! driver of this file's own puts requests into a real ring in the window, and looks at what came of them.

use std::cell::Cell;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use rustix::process::{Pid, Signal, kill_process};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use vvu_agent::doorbell::Doorbell;
use vvu_protocol::address::FileOffset;
use vvu_protocol::control::Handle;
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::message::{ConfigSpace, FrontEndReply, LogArea, VringAddresses};
use vvu_protocol::window::{ALIGNMENT, LOG_OFFSET, MEMORY_OFFSET};
use vvu_socket::event;

use crate::back_end::{this_binary, told};
use crate::stage::{MEMORY_IN_NODE, Request, Stage, file, play_with, region, state};

/// With memory slots, or with a memory table only.
const VARIANTS: [&str; 2] = ["slots", "table"];

/// What the device writes into each buffer.
const FILLING: [u8; 16] = *b"filled by device";

const QUEUE_SIZE: u16 = 8;

type Memory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;

struct Filler {
    memory: Memory,
    slots: bool,
    exit: (EventConsumer, EventNotifier),
}

impl VhostUserBackend for Filler {
    type Bitmap = BitmapMmapRegion;
    type Vring = VringRwLock<Memory>;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        usize::from(QUEUE_SIZE)
    }

    fn features(&self) -> u64 {
        (Features::VERSION_1 | Features::PROTOCOL_FEATURES | Features::LOG_ALL).bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        use VhostUserProtocolFeatures as P;
        let features = P::MQ | P::REPLY_ACK | P::CONFIG | P::LOG_SHMFD;
        if self.slots { features | P::CONFIGURE_MEM_SLOTS } else { features }
    }

    fn set_event_idx(&self, _enabled: bool) {}

    /// So that a test can end the process.
    fn get_config(&self, _offset: u32, _size: u32) -> Vec<u8> {
        std::process::id().to_le_bytes().to_vec()
    }

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        Ok(())
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some((self.exit.0.try_clone().unwrap(), self.exit.1.try_clone().unwrap()))
    }

    fn handle_event(
        &self,
        _device_event: u16,
        _events: EventSet,
        vrings: &[Self::Vring],
        _thread_id: usize,
    ) -> io::Result<()> {
        let mut vring = vrings[0].get_mut();
        while let Some(chain) = vring.get_queue_mut().pop_descriptor_chain(self.memory.memory()) {
            let (head, memory) = (chain.head_index(), self.memory.memory());
            for buffer in chain {
                assert!(buffer.is_write_only());
                memory.write_slice(&FILLING, buffer.addr()).unwrap();
            }
            vring.add_used(head, u32::try_from(FILLING.len()).unwrap()).unwrap();
        }
        vring.signal_used_queue()
    }
}

#[test]
#[ignore = "the back-end of the other tests, which start it as a process"]
fn filler() {
    let (variant, socket) = told();
    let mut listener = Listener::from(UnixListener::bind(socket).unwrap());
    loop {
        let memory = Memory::new(GuestMemoryMmap::new());
        let exit = new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap();
        let slots = variant == "slots";
        let filler = Filler { memory: memory.clone(), slots, exit };
        let mut daemon = VhostUserDaemon::new("filler".to_owned(), Arc::new(filler), memory).unwrap();
        daemon.start(&mut listener).unwrap();
        // It ends when the front-end goes.
        let _ = daemon.wait();
    }
}

fn play(story: impl Fn(&Stage) -> crate::stage::Story<'_>) {
    for variant in VARIANTS {
        play_with(variant, |directory| this_binary("foreign::filler", variant, directory), &story);
    }
}

const USER: u64 = 0x7f00_0000_0000;

/// Driver memory begins here in the driver VM; its first part has the ring.
const GUEST: u64 = 1 << 30;
const FIRST_LEN: u64 = 4 << 20;

/// A region of another file, which comes and goes.
const SECOND_GUEST: u64 = 4 << 30;

/// Places from the start of driver memory in the window, in bytes.
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x10_0000;
const SECOND: u64 = 16 << 20;

/// A driver of vring 0, which counts as the ring does.
struct Driver<'a> {
    stage: &'a Stage,
    count: Cell<u16>,
}

impl<'a> Driver<'a> {
    fn new(stage: &'a Stage) -> Self {
        Self { stage, count: Cell::new(0) }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.stage.window.write_all_at(bytes, MEMORY_IN_NODE + at).unwrap();
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.stage.window.read_exact_at(&mut bytes, MEMORY_IN_NODE + at).unwrap();
        bytes
    }

    fn used(&self) -> u16 {
        u16::from_le_bytes(self.read(USED + 2))
    }

    /// Makes a request available: a buffer at a guest address.
    fn offer(&self, guest: u64) {
        let slot = self.count.get() % QUEUE_SIZE;
        let descriptor = [guest.to_le_bytes(), 16_u64.to_le_bytes()].concat();
        self.write(u64::from(slot) * 16, &descriptor);
        // The device writes it (virtio 1.3, section 2.7.5).
        self.write(u64::from(slot) * 16 + 12, &[2, 0, 0, 0]);
        self.write(AVAILABLE + 4 + u64::from(slot) * 2, &slot.to_le_bytes());
        self.count.set(self.count.get().wrapping_add(1));
        self.write(AVAILABLE + 2, &self.count.get().to_le_bytes());
    }

    fn kick(&self) {
        event::signal(self.stage.eventfds.clone().vector(Vector(1)).unwrap()).unwrap();
    }

    /// Waits until all that was made available is done.
    async fn all_done(&self) {
        let call = self.stage.called();
        while self.used() != self.count.get() {
            call.signalled().await.unwrap();
        }
    }

    /// One request to its end; the buffer is at `at` in the window and at `guest` in the driver VM.
    async fn fill(&self, at: u64, guest: u64) {
        self.write(at, &[0; FILLING.len()]);
        self.offer(guest);
        self.kick();
        self.all_done().await;
        assert_eq!(self.read(at), FILLING, "at {guest:#x}");
    }

    async fn fill_some(&self, count: u64) {
        for index in 0..count {
            self.fill(BUFFERS + index * 0x1000, GUEST + BUFFERS + index * 0x1000).await;
        }
    }

    /// Sets memory and vring as a front-end does; the position comes last.
    async fn start(&self, position: Request, resumes: bool) {
        let stage = self.stage;
        stage.done(add_first()).await;
        stage.done(Request::SetVringNum(state(u32::from(QUEUE_SIZE)))).await;
        let (descriptors, available, used) = (USER, USER + AVAILABLE, USER + USED);
        let addresses = VringAddresses { index: 0, flags: 0, descriptors, used, available, log: GUEST + USED };
        stage.done(Request::SetVringAddr(addresses)).await;
        if resumes {
            stage.bridge.send_resume(position);
            assert_eq!(stage.bridge.frame().await.message.payload, 0_u64.to_le_bytes());
        } else {
            stage.done(position).await;
        }
        stage.done(Request::SetVringCall(file(Handle::Peer(PeerId(2))))).await;
        stage.done(Request::SetVringErr(file(Handle::Peer(PeerId(3))))).await;
        stage.done(Request::SetVringKick(file(Handle::Vector(Vector(1))))).await;
        stage.done(Request::SetVringEnable(state(1))).await;
    }

    /// A vring that was stopped in order goes on.
    async fn start_again(&self, position: u32) {
        let stage = self.stage;
        stage.done(Request::SetVringBase(state(position))).await;
        // The crate drops kick and call with GET_VRING_BASE.
        stage.done(Request::SetVringCall(file(Handle::Peer(PeerId(2))))).await;
        stage.done(Request::SetVringKick(file(Handle::Vector(Vector(1))))).await;
        stage.done(Request::SetVringEnable(state(1))).await;
    }
}

fn add_first() -> Request {
    let (region, handle) = region(GUEST, FIRST_LEN, USER, MEMORY_OFFSET.0);
    Request::AddMemReg(region, handle)
}

fn add_second() -> Request {
    let (region, handle) = region(SECOND_GUEST, ALIGNMENT, USER << 1, MEMORY_OFFSET.0 + SECOND);
    Request::AddMemReg(region, handle)
}

fn remove_second() -> Request {
    Request::RemMemReg(region(SECOND_GUEST, ALIGNMENT, USER << 1, 0).0)
}

#[test]
fn an_unmodified_back_end_serves_and_its_memory_changes_meanwhile() {
    play(|stage| {
        Box::pin(async {
            let offered = stage.connect_and_negotiate().await;
            assert!(offered.contains(ProtocolFeatures::REPLY_ACK));
            let driver = Driver::new(stage);
            driver.start(Request::SetVringBase(state(0)), false).await;
            driver.fill_some(20).await;
            for _ in 0..3 {
                stage.done(add_second()).await;
                driver.fill(SECOND, SECOND_GUEST).await;
                driver.fill(SECOND + ALIGNMENT - 16, SECOND_GUEST + ALIGNMENT - 16).await;
                driver.fill_some(3).await;
                stage.done(remove_second()).await;
                driver.fill_some(3).await;
            }
            // Stopped where it is, and started there.
            let stopped = stage.ask(Request::GetVringBase(state(0))).await;
            assert_eq!(stopped, FrontEndReply::VringState(state(u32::from(driver.count.get()))));
            driver.start_again(u32::from(driver.count.get())).await;
            driver.fill_some(5).await;
        })
    });
}

#[test]
fn an_unmodified_back_end_logs_what_it_writes() {
    play(|stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            let driver = Driver::new(stage);
            driver.start(Request::SetVringBase(state(0)), false).await;
            driver.fill_some(3).await;
            // As large as the front-end needs it: one bit for each page up to the end of memory.
            let size = (GUEST + FIRST_LEN) / 4096 / 8;
            let log = LogArea { size, mmap_offset: FileOffset(LOG_OFFSET.0) };
            assert_eq!(stage.ask(Request::SetLogBase(log, Handle::Window)).await, FrontEndReply::LogBase);
            let features = Features::VERSION_1 | Features::PROTOCOL_FEATURES;
            stage.done(Request::SetFeatures(features | Features::LOG_ALL)).await;
            let buffer = BUFFERS + 0x7000;
            driver.fill(buffer, GUEST + buffer).await;
            let mut bits = vec![0; usize::try_from(size).unwrap()];
            stage.window.read_exact_at(&mut bits, 0).unwrap();
            let dirty = (0..size * 8).filter(|page| bits[usize::try_from(page / 8).unwrap()] & 1 << (page % 8) != 0);
            let expected = [(GUEST + USED) / 4096, (GUEST + buffer) / 4096];
            assert_eq!(dirty.collect::<Vec<_>>(), expected);
        })
    });
}

#[test]
fn an_unmodified_back_end_goes_on_where_the_one_before_was_lost() {
    play(|stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            let driver = Driver::new(stage);
            driver.start(Request::SetVringBase(state(0)), false).await;
            driver.fill_some(11).await;
            let config = ConfigSpace { offset: 0, flags: 0, bytes: vec![0; 4] };
            let FrontEndReply::Config(Some(config)) = stage.ask(Request::GetConfig(config)).await else {
                panic!("no process id")
            };
            let id = i32::from_le_bytes(config.bytes.try_into().unwrap());
            kill_process(Pid::from_raw(id).unwrap(), Signal::KILL).unwrap();
            stage.bridge.orphaned().await;
            // Made available while nobody is there: done once, when somebody is.
            for index in 0..3 {
                driver.write(BUFFERS + index * 0x1000, &[0; FILLING.len()]);
                driver.offer(GUEST + BUFFERS + index * 0x1000);
            }
            assert_eq!(driver.used(), 11);
            stage.connect_and_negotiate().await;
            driver.start(Request::SetVringBase(state(0)), true).await;
            // As the bridge does after a replay.
            driver.kick();
            driver.all_done().await;
            for index in 0..3 {
                assert_eq!(driver.read(BUFFERS + index * 0x1000), FILLING);
            }
            driver.fill_some(9).await;
            let stopped = stage.ask(Request::GetVringBase(state(0))).await;
            assert_eq!(stopped, FrontEndReply::VringState(state(23)));
        })
    });
}
