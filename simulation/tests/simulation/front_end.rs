//! The front-end: what the VMM of a driver VM says to the bridge, in the order of its kind, and what it may expect.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{Instant, sleep};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{
    ConfigSpace, FrontEndReply, FrontEndRequest, Inflight, ReplyPayload, VringAddresses, VringFile, VringState,
};
use vvu_socket::MessageSocket;
use vvu_socket::event::{self, Event};

use super::checks;
use super::file::MappedFile;
use super::machine::{Machine, Memory, USER};
use super::virtq::{self, AVAILABLE, USED, ring_offset};
use super::world::{QUEUES, World};

type Request = FrontEndRequest<OwnedFd>;
type Reply = FrontEndReply<OwnedFd>;

/// How long anything may take from the last disturbance on, with an appliance that is of use: an agent that hangs (90 s) is
/// given time to clear (30 s), and its successor's back-end may be slow.
const PATIENCE: Duration = Duration::from_secs(240);

/// How often a wait is looked at.
const LOOK: Duration = Duration::from_secs(5);

/// A front-end that was turned away comes again after this time at the most.
const RECONNECT: Duration = Duration::from_millis(500);

/// What a front-end makes use of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Profile {
    pub(crate) acknowledges: bool,
    pub(crate) inflight: bool,
    pub(crate) slots: bool,
    back_channel: bool,
    status: bool,
    /// Of a hundred requests without a reply, so many ask for an acknowledgement.
    asks: u64,
}

impl Profile {
    pub(crate) fn new(world: &World) -> Self {
        let random = &world.random;
        Self {
            acknowledges: random.percent(75),
            inflight: random.percent(60),
            slots: random.percent(40),
            back_channel: random.percent(30),
            status: random.percent(50),
            asks: *random.one_of(&[0, 50, 100]).unwrap(),
        }
    }

    fn protocol(self) -> ProtocolFeatures {
        let when = |condition, feature| if condition { feature } else { ProtocolFeatures::empty() };
        ProtocolFeatures::MQ
            | ProtocolFeatures::CONFIG
            | ProtocolFeatures::LOG_SHMFD
            | ProtocolFeatures::RESET_DEVICE
            | when(self.acknowledges, ProtocolFeatures::REPLY_ACK)
            | when(self.inflight, ProtocolFeatures::INFLIGHT_SHMFD)
            | when(self.slots, ProtocolFeatures::CONFIGURE_MEM_SLOTS)
            | when(self.back_channel, ProtocolFeatures::BACKEND_REQ)
            | when(self.status, ProtocolFeatures::STATUS)
    }
}

/// The bridge has ended the session.
#[derive(Debug)]
pub(crate) struct Ended;

/// The interrupt of a queue.
#[derive(Debug)]
struct Interrupt {
    event: Rc<Event>,
    /// The moment when the vring was stopped. As long as it is the same, no call may come; a replay signals all.
    quiet: Rc<Cell<Option<checks::Moment>>>,
    task: AbortHandle,
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Interrupt {
    fn new(world: &Rc<World>, machine: &Rc<Machine>, queue: usize) -> Self {
        let world = Rc::clone(world);
        let event = Rc::new(Event::new(event::create().unwrap()).unwrap());
        let quiet = Rc::new(Cell::new(None));
        let (machine, waited, silent) = (Rc::clone(machine), Rc::clone(&event), Rc::clone(&quiet));
        let task = spawn_local(async move {
            loop {
                waited.signalled().await.unwrap();
                assert_ne!(silent.get(), Some(checks::moment(&world)), "queue {queue} is stopped, and a call comes");
                machine.harvest(queue);
            }
        });
        Self { event, quiet, task: task.abort_handle() }
    }

    fn descriptor(&self) -> OwnedFd {
        use std::os::fd::AsFd;
        self.event.as_fd().try_clone_to_owned().unwrap()
    }
}

/// What the front-end has set, and was told is so.
#[derive(Debug, Default)]
pub(crate) struct Acknowledged {
    pub(crate) memory: Vec<(MemoryRegion, Rc<MappedFile>)>,
    pub(crate) started: [bool; QUEUES as usize],
    pub(crate) enabled: [bool; QUEUES as usize],
    pub(crate) sizes: [u16; QUEUES as usize],
    pub(crate) status: Option<u64>,
    pub(crate) inflight: Option<vvu_protocol::window::FileId>,
}

#[derive(Debug)]
pub(crate) struct FrontEnd {
    world: Rc<World>,
    pub(crate) machine: Rc<Machine>,
    profile: Profile,
    socket: MessageSocket,
    protocol: ProtocolFeatures,
    pub(crate) acknowledged: Acknowledged,
    bases: [u16; QUEUES as usize],
    kicks: [Option<OwnedFd>; QUEUES as usize],
    interrupts: [Interrupt; QUEUES as usize],
    /// Instead of the interrupt, while it is masked.
    masks: [Option<OwnedFd>; QUEUES as usize],
    inflight: Option<(Inflight, OwnedFd)>,
    back_channel: Option<MessageSocket>,
}

impl FrontEnd {
    /// Connects as often as it takes, and negotiates.
    pub(crate) async fn connect(
        world: &Rc<World>,
        machine: &Rc<Machine>,
        profile: Profile,
        inflight: Option<(Inflight, OwnedFd)>,
    ) -> Self {
        let since = Instant::now();
        loop {
            world.session.set("connecting");
            let stream = std::os::unix::net::UnixStream::connect(world.directory.join("front-end.sock")).unwrap();
            let mut front_end = Self {
                world: Rc::clone(world),
                machine: Rc::clone(machine),
                profile,
                socket: MessageSocket::new(stream).unwrap(),
                protocol: ProtocolFeatures::empty(),
                acknowledged: Acknowledged::default(),
                bases: [0; QUEUES as usize],
                kicks: Default::default(),
                interrupts: std::array::from_fn(|queue| Interrupt::new(world, machine, queue)),
                masks: Default::default(),
                inflight: None,
                back_channel: None,
            };
            // Until the first answer, it may be that another one has the device: this one's predecessor.
            if let Ok(offered) = front_end.first().await {
                front_end.inflight = inflight;
                front_end.negotiate(offered).await.expect("the bridge has ended the session while it was negotiated");
                return front_end;
            }
            assert!(since.max(world.disturbed()).elapsed() < PATIENCE, "the bridge turns front-ends away for too long");
            sleep(world.random.time(RECONNECT)).await;
        }
    }

    async fn first(&mut self) -> Result<Features, Ended> {
        match self.ask(FrontEndRequest::GetFeatures).await? {
            FrontEndReply::Number(features) => Ok(Features::from_bits_retain(features)),
            other => panic!("expected features, {other:?} came"),
        }
    }

    async fn negotiate(&mut self, offered: Features) -> Result<(), Ended> {
        use FrontEndRequest as R;
        self.world.session.set("negotiating");
        assert!(offered.contains(Features::VERSION_1 | Features::PROTOCOL_FEATURES), "{offered:?}");
        let FrontEndReply::Number(protocol) = self.ask(R::GetProtocolFeatures).await? else { panic!("no number") };
        let protocol = ProtocolFeatures::from_bits_retain(protocol);
        assert!(protocol.contains(ProtocolFeatures::REPLY_ACK), "{protocol:?}");
        assert_eq!(protocol.contains(ProtocolFeatures::INFLIGHT_SHMFD), self.world.kind.inflight, "{protocol:?}");
        let wanted = self.profile.protocol().intersection(protocol);
        self.tell(R::SetProtocolFeatures(wanted)).await?;
        self.protocol = wanted;
        let FrontEndReply::Number(count) = self.ask(R::GetQueueNum).await? else { panic!("no number") };
        assert_eq!(count, u64::from(QUEUES));
        self.tell(R::SetOwner).await?;
        if wanted.contains(ProtocolFeatures::BACKEND_REQ) {
            let (ours, theirs) =
                socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
            self.back_channel = Some(MessageSocket::new(ours.into()).unwrap());
            self.tell(R::SetBackendReqFd(theirs)).await?;
        }
        self.read_config().await
    }

    async fn read_config(&mut self) -> Result<(), Ended> {
        let wanted = ConfigSpace { offset: 4, flags: 0, bytes: vec![0; 8] };
        match self.ask(FrontEndRequest::GetConfig(wanted)).await? {
            FrontEndReply::Config(Some(config)) => assert_eq!((config.offset, config.bytes.len()), (4, 8)),
            other => panic!("expected the configuration space, {other:?} came"),
        }
        Ok(())
    }

    fn has(&self, features: ProtocolFeatures) -> bool {
        self.protocol.contains(features)
    }

    /// Starts the device, as drivers and firmware do it again and again.
    pub(crate) async fn start(&mut self) -> Result<(), Ended> {
        use FrontEndRequest as R;
        self.world.session.set("starting");
        self.tell(R::SetFeatures(Features::VERSION_1 | Features::PROTOCOL_FEATURES)).await?;
        self.set_memory().await?;
        if self.has(ProtocolFeatures::INFLIGHT_SHMFD) {
            self.set_inflight().await?;
        }
        for queue in 0..QUEUES {
            self.start_vring(queue).await?;
        }
        if self.has(ProtocolFeatures::STATUS) {
            self.tell(R::SetStatus(0xf)).await?;
            self.acknowledged.status = Some(0xf);
        }
        self.settle().await?;
        self.world.session.set("running");
        Ok(())
    }

    async fn start_vring(&mut self, queue: u16) -> Result<(), Ended> {
        use FrontEndRequest as R;
        let (index, place) = (u32::from(queue), usize::from(queue));
        let size = self.machine.queues.borrow()[place].size;
        self.tell(R::SetVringNum(VringState { index, num: u32::from(size) })).await?;
        self.acknowledged.sizes[place] = size;
        self.tell(R::SetVringBase(VringState { index, num: u32::from(self.bases[place]) })).await?;
        let base = USER + ring_offset(queue);
        let (used, available) = (base + USED, base + AVAILABLE);
        self.tell(R::SetVringAddr(VringAddresses { index, flags: 0, descriptors: base, used, available, log: 0 }))
            .await?;
        if self.world.random.percent(80) || self.kicks[place].is_none() {
            self.kicks[place] = Some(event::create().unwrap());
        }
        self.interrupts[place].quiet.set(None);
        self.masks[place] = None;
        let call = self.interrupts[place].descriptor();
        self.set_call(queue, call).await?;
        let kick = self.kicks[place].as_ref().map(|kick| kick.try_clone().unwrap());
        let index = u8::try_from(queue).unwrap();
        self.tell(R::SetVringKick(VringFile { index, descriptor: kick })).await?;
        self.acknowledged.started[place] = true;
        self.tell(R::SetVringEnable(VringState { index: u32::from(queue), num: 1 })).await?;
        self.acknowledged.enabled[place] = true;
        // What was submitted before the start.
        self.kick(queue);
        Ok(())
    }

    fn kick(&self, queue: u16) {
        if let Some(kick) = &self.kicks[usize::from(queue)] {
            event::signal(kick).unwrap();
        }
    }

    async fn set_call(&mut self, queue: u16, call: OwnedFd) -> Result<(), Ended> {
        let file = VringFile { index: u8::try_from(queue).unwrap(), descriptor: Some(call) };
        self.tell(FrontEndRequest::SetVringCall(file)).await
    }

    /// GET_INFLIGHT_FD once in the life of the front-end, SET_INFLIGHT_FD before each start.
    async fn set_inflight(&mut self) -> Result<(), Ended> {
        use FrontEndRequest as R;
        if self.inflight.is_none() {
            let zero = vvu_protocol::address::FileOffset(0);
            let wanted = Inflight { mmap_size: 0, mmap_offset: zero, queue_count: QUEUES, queue_size: 64 };
            let FrontEndReply::Inflight(inflight, file) = self.ask(R::GetInflightFd(wanted)).await? else {
                panic!("no inflight buffer")
            };
            self.inflight = Some((inflight, file));
        }
        let (inflight, file) = self.inflight.as_ref().expect("it is there");
        let (inflight, file) = (*inflight, file.try_clone().unwrap());
        let id = super::file::identity(&file);
        self.tell(R::SetInflightFd(inflight, file)).await?;
        self.acknowledged.inflight = Some(id);
        Ok(())
    }

    /// Tells the bridge what memory the driver VM has now.
    async fn set_memory(&mut self) -> Result<(), Ended> {
        use FrontEndRequest as R;
        let memory = self.machine.memory.borrow().clone();
        let with_file = |memory: &Memory| {
            let file = Rc::clone(&memory.file);
            memory.regions().into_iter().map(move |region| (region, Rc::clone(&file))).collect::<Vec<_>>()
        };
        let wanted: Vec<_> = memory.iter().flat_map(with_file).collect();
        if !self.has(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            let table = wanted.iter().map(|(region, file)| (*region, file.duplicate())).collect();
            self.acknowledged.memory = wanted;
            return self.tell(R::SetMemTable(table)).await;
        }
        let same = |one: &(MemoryRegion, Rc<MappedFile>), other: &(MemoryRegion, Rc<MappedFile>)| {
            one.0 == other.0 && Rc::ptr_eq(&one.1, &other.1)
        };
        let before = std::mem::take(&mut self.acknowledged.memory);
        let (kept, gone): (Vec<_>, Vec<_>) =
            before.into_iter().partition(|one| wanted.iter().any(|other| same(one, other)));
        self.acknowledged.memory = kept;
        for (region, _) in gone {
            self.tell(R::RemMemReg(region)).await?;
        }
        for entry in wanted {
            if !self.acknowledged.memory.iter().any(|known| same(known, &entry)) {
                let (region, file) = (entry.0, entry.1.duplicate());
                self.acknowledged.memory.push(entry);
                self.tell(R::AddMemReg(region, file)).await?;
            }
        }
        Ok(())
    }

    /// One thing that happens while the device runs.
    pub(crate) async fn step(&mut self) -> Result<(), Ended> {
        let queue = u16::try_from(self.world.random.below(usize::from(QUEUES))).unwrap();
        match self.world.random.below(20) {
            0..10 => self.submit(queue),
            10 => self.read_config().await?,
            11 | 12 => self.mask(queue).await?,
            13 => self.plug().await?,
            14 => self.unplug().await?,
            15 => self.restart_vring(queue).await?,
            16 => self.disable(queue).await?,
            _ => sleep(self.world.random.time(Duration::from_millis(20))).await,
        }
        self.world.hesitate().await;
        Ok(())
    }

    fn submit(&self, queue: u16) {
        for _ in 0..=self.world.random.below(6) {
            self.machine.submit(usize::from(queue));
        }
        self.kick(queue);
    }

    /// QEMU masks a vector by another eventfd, and looks into that when it takes the mask away.
    async fn mask(&mut self, queue: u16) -> Result<(), Ended> {
        let place = usize::from(queue);
        if self.masks[place].is_none() {
            let mask = event::create().unwrap();
            self.set_call(queue, mask.try_clone().unwrap()).await?;
            self.masks[place] = Some(mask);
            return Ok(());
        }
        self.unmask(queue).await
    }

    async fn unmask(&mut self, queue: u16) -> Result<(), Ended> {
        let place = usize::from(queue);
        let Some(mask) = self.masks[place].take() else { return Ok(()) };
        let call = self.interrupts[place].descriptor();
        self.set_call(queue, call).await?;
        self.settle().await?;
        if event::take(&mask).unwrap().is_some() {
            self.machine.harvest(place);
        }
        Ok(())
    }

    async fn plug(&mut self) -> Result<(), Ended> {
        if self.machine.memory.borrow().len() > 3 {
            return Ok(());
        }
        self.world.session.set("changing memory");
        self.machine.plug();
        // The driver VM uses it only when the front-end has been told.
        let plugged = self.machine.memory.borrow_mut().pop().expect("it was just plugged");
        let before = self.machine.memory.borrow().clone();
        self.machine.memory.borrow_mut().push(plugged.clone());
        let told = self.set_memory();
        // Nothing runs in the driver VM meanwhile: its driver is this task.
        told.await?;
        drop(before);
        self.settle().await?;
        self.world.session.set("running");
        Ok(())
    }

    async fn unplug(&mut self) -> Result<(), Ended> {
        let removed = {
            let memory = self.machine.memory.borrow();
            let mut unused = memory.iter().skip(1).filter(|memory| self.machine.is_unused(memory));
            unused.next().map(|memory| Rc::clone(&memory.file))
        };
        let Some(removed) = removed else { return Ok(()) };
        self.world.session.set("changing memory");
        self.machine.memory.borrow_mut().retain(|memory| !Rc::ptr_eq(&memory.file, &removed));
        self.set_memory().await?;
        self.settle().await?;
        checks::is_unmapped(&self.world, removed.id);
        self.world.session.set("running");
        Ok(())
    }

    async fn disable(&mut self, queue: u16) -> Result<(), Ended> {
        use FrontEndRequest as R;
        let index = u32::from(queue);
        self.tell(R::SetVringEnable(VringState { index, num: 0 })).await?;
        self.acknowledged.enabled[usize::from(queue)] = false;
        self.settle().await?;
        self.world.hesitate().await;
        self.tell(R::SetVringEnable(VringState { index, num: 1 })).await?;
        self.acknowledged.enabled[usize::from(queue)] = true;
        self.kick(queue);
        Ok(())
    }

    async fn restart_vring(&mut self, queue: u16) -> Result<(), Ended> {
        self.world.session.set("restarting a vring");
        self.stop_vring(queue).await?;
        self.start_vring(queue).await?;
        self.settle().await?;
        self.world.session.set("running");
        Ok(())
    }

    /// After the answer nothing of the vring is under way.
    async fn stop_vring(&mut self, queue: u16) -> Result<(), Ended> {
        let (index, place) = (u32::from(queue), usize::from(queue));
        let state = VringState { index, num: 0 };
        let FrontEndReply::VringState(stopped) = self.ask(FrontEndRequest::GetVringBase(state)).await? else {
            panic!("expected the state of a vring");
        };
        assert_eq!(stopped.index, index);
        let base = u16::try_from(stopped.num).unwrap();
        let events = [self.masks[place].as_ref().map(event::take), Some(event::take(&*self.interrupts[place].event))];
        assert!(events.iter().flatten().all(Result::is_ok));
        self.masks[place] = None;
        self.interrupts[place].quiet.set(Some(checks::moment(&self.world)));
        let used = self.machine.queues.borrow()[place].used_index();
        assert_eq!(base, used, "queue {queue} is stopped: the answer, and what was completed");
        self.machine.harvest(place);
        self.acknowledged.started[place] = false;
        self.bases[place] = base;
        checks::is_stopped(&self.world, place);
        Ok(())
    }

    /// Stops the device.
    pub(crate) async fn stop(&mut self) -> Result<(), Ended> {
        use FrontEndRequest as R;
        self.world.session.set("stopping");
        for queue in 0..QUEUES {
            self.stop_vring(queue).await?;
        }
        if self.has(ProtocolFeatures::STATUS) && self.world.random.percent(50) {
            self.tell(R::SetStatus(0)).await?;
            self.acknowledged.status = Some(0);
        }
        self.settle().await?;
        self.world.session.set("stopped");
        Ok(())
    }

    /// The driver has reset the device, and begins with empty rings.
    pub(crate) fn reset_rings(&mut self) {
        self.machine.reset_rings();
        self.bases = [0; QUEUES as usize];
    }

    /// Waits until everything that was submitted is completed.
    pub(crate) async fn drain(&mut self) -> Result<(), Ended> {
        for queue in 0..QUEUES {
            self.unmask(queue).await?;
        }
        let since = Instant::now();
        while !self.machine.is_idle() {
            tokio::select! {
                biased;
                () = self.machine.progress.notified() => {}
                message = self.socket.recv() => match message {
                    Ok(Some(message)) => panic!("{message:?} came, which nobody has asked for"),
                    Ok(None) | Err(_) => return Err(Ended),
                },
                () = sleep(LOOK) => {
                    let outstanding = self.machine.outstanding();
                    checks::patience(&self.world, since, PATIENCE, || format!("requests {outstanding:?}"));
                }
            }
        }
        Ok(())
    }

    /// A place in the rings where a new connection of this machine goes on.
    pub(crate) fn resume_at_used(&mut self) {
        for queue in 0..usize::from(QUEUES) {
            self.machine.harvest(queue);
            self.bases[queue] = self.machine.queues.borrow()[queue].used_index();
        }
    }

    /// The inflight buffer, for the next connection of this front-end.
    pub(crate) fn inflight_copy(&self) -> Option<(Inflight, OwnedFd)> {
        self.inflight.as_ref().map(|(inflight, file)| (*inflight, file.try_clone().unwrap()))
    }

    /// Asks something whose answer comes after all that was said before has been done.
    async fn settle(&mut self) -> Result<(), Ended> {
        self.ask(FrontEndRequest::GetFeatures).await.map(drop)
    }

    /// Says something that has no reply of its own.
    async fn tell(&mut self, request: Request) -> Result<(), Ended> {
        let asks = self.has(ProtocolFeatures::REPLY_ACK) && self.world.random.percent(self.profile.asks);
        let (code, name) = (request.code(), request.name());
        let own = request.row().is_some_and(|row| row.reply != ReplyPayload::None);
        assert!(!own, "{name} has a reply of its own");
        self.world.hesitate().await;
        self.world.note(format!("front-end: {name}{}", if asks { ", asks" } else { "" }));
        self.socket.send(&request.encode(asks)).await.map_err(|_| Ended)?;
        if asks {
            let reply = self.reply(code, name).await?;
            assert!(matches!(reply, FrontEndReply::Acknowledgement(0)), "{name} is answered with {reply:?}");
        }
        Ok(())
    }

    async fn ask(&mut self, request: Request) -> Result<Reply, Ended> {
        let (code, name) = (request.code(), request.name());
        self.world.hesitate().await;
        self.world.note(format!("front-end: {name}?"));
        let before = checks::moment(&self.world);
        self.socket.send(&request.encode(false)).await.map_err(|_| Ended)?;
        let reply = self.reply(code, name).await?;
        self.world.note(format!("front-end: {name} is answered: {reply:?}"));
        if checks::moment(&self.world) == before {
            let vring_stops = matches!(reply, FrontEndReply::VringState(_));
            if !vring_stops {
                checks::back_end_is_as_acknowledged(&self.world, &self.acknowledged);
            }
        }
        Ok(reply)
    }

    async fn reply(&mut self, code: u32, name: &'static str) -> Result<Reply, Ended> {
        let since = Instant::now();
        loop {
            tokio::select! {
                biased;
                message = self.socket.recv() => {
                    let Ok(Some(message)) = message else { return Err(Ended) };
                    return Ok(FrontEndReply::decode(code, message).unwrap_or_else(|error| panic!("reply to {name}: {error}")));
                }
                () = sleep(LOOK) => checks::patience(&self.world, since, PATIENCE, || format!("the answer to {name}")),
            }
        }
    }
}

const _: () = assert!(virtq::RINGS_END >= ring_offset(QUEUES));
