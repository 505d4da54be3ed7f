//! The front-end: what the VMM of a driver VM says to the bridge, in the order of its kind, and what it may expect.

mod dirty_log;
mod memory;
mod side_channels;
mod vrings;

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, Inflight, ReplyPayload};
use vvu_protocol::window::FileId;
use vvu_socket::MessageSocket;

use self::side_channels::BackChannel;
use self::vrings::Interrupt;
use super::back_end::CONFIG_LEN;
use super::checks;
use super::file::MappedFile;
use super::machine::Machine;
use super::virtq::{self, ring_offset};
use super::world::{QUEUES, World};

type Request = FrontEndRequest<OwnedFd>;
type Reply = FrontEndReply<OwnedFd>;

/// What every front-end negotiates.
const FEATURES: Features = Features::VERSION_1.union(Features::PROTOCOL_FEATURES);

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
    /// Uses of the device beside requests: the dirty log, the device's state, IOTLB messages.
    migrates: bool,
    /// The driver waits for what it has submitted before it goes on.
    waits: bool,
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
            back_channel: random.percent(50),
            status: random.percent(50),
            migrates: random.percent(50),
            waits: random.percent(30),
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
            | when(self.migrates, ProtocolFeatures::DEVICE_STATE)
    }
}

/// The bridge has ended the session.
#[derive(Debug)]
pub(crate) struct Ended;

/// What the front-end has set, and was told is so.
#[derive(Debug, Default)]
pub(crate) struct Acknowledged {
    pub(crate) memory: Vec<(MemoryRegion, Rc<MappedFile>)>,
    pub(crate) started: [bool; QUEUES as usize],
    pub(crate) enabled: [bool; QUEUES as usize],
    pub(crate) sizes: [u16; QUEUES as usize],
    pub(crate) features: Option<Features>,
    pub(crate) config: [u8; CONFIG_LEN],
    pub(crate) status: Option<u64>,
    pub(crate) inflight: Option<FileId>,
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
    back_channel: Option<BackChannel>,
    /// Number of changes that the configuration said when it was read.
    config_read: u64,
    /// The dirty log, while there is one.
    log: Option<Rc<MappedFile>>,
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
                config_read: 0,
                log: None,
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
            self.set_back_channel().await?;
        }
        self.read_config().await
    }

    fn has(&self, features: ProtocolFeatures) -> bool {
        self.protocol.contains(features)
    }

    /// Starts the device, as drivers and firmware do it again and again.
    pub(crate) async fn start(&mut self) -> Result<(), Ended> {
        use FrontEndRequest as R;
        self.world.session.set("starting");
        self.set_features().await?;
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

    /// One thing that happens while the device runs.
    pub(crate) async fn step(&mut self) -> Result<(), Ended> {
        let queue = u16::try_from(self.world.random.below(usize::from(QUEUES))).unwrap();
        self.heed_config().await?;
        match self.world.random.below(20) {
            0..8 => self.submit(queue).await?,
            8 => self.write_config().await?,
            9 if self.profile.migrates => self.tell_iotlb().await?,
            10 if self.profile.migrates => self.switch_log().await?,
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

    async fn submit(&mut self, queue: u16) -> Result<(), Ended> {
        for _ in 0..=self.world.random.below(6) {
            self.machine.submit(usize::from(queue));
        }
        self.kick(queue);
        if self.profile.waits { self.drain().await } else { Ok(()) }
    }

    /// Stops the device.
    pub(crate) async fn stop(&mut self) -> Result<(), Ended> {
        use FrontEndRequest as R;
        self.world.session.set("stopping");
        if self.log.is_some() && self.world.random.percent(50) {
            self.end_log().await?;
        }
        for queue in 0..QUEUES {
            self.stop_vring(queue).await?;
        }
        if self.has(ProtocolFeatures::STATUS) && self.world.random.percent(50) {
            self.tell(R::SetStatus(0)).await?;
            self.acknowledged.status = Some(0);
        }
        self.settle().await?;
        self.world.session.set("stopped");
        if self.world.random.percent(40) {
            self.move_state().await?;
        }
        Ok(())
    }

    /// The driver resets the device, running or not. What is outstanding is forgotten, on both sides.
    pub(crate) async fn reset(&mut self) -> Result<(), Ended> {
        if !self.has(ProtocolFeatures::RESET_DEVICE) {
            return self.stop().await;
        }
        self.world.session.set("resetting");
        self.tell(FrontEndRequest::ResetDevice).await?;
        let acknowledged = &mut self.acknowledged;
        (acknowledged.started, acknowledged.enabled) = Default::default();
        (acknowledged.status, acknowledged.config) = (Some(0), Default::default());
        (acknowledged.inflight, self.inflight) = (None, None);
        self.settle().await?;
        (0..usize::from(QUEUES)).for_each(|queue| checks::is_stopped(&self.world, queue));
        self.reset_rings();
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
