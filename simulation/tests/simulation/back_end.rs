//! A back-end: a vhost-user server that takes requests out of rings and completes them later, in any order if it tracks what is
//! in flight, else in theirs. It works in the appliance's window: each access goes by way of what the VMM has mapped there at
//! that moment, and dies of a fault where there is nothing.

mod requests;
mod rings;
mod side_channels;

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until, timeout_at};
use vvu_back_end::inflight::InflightBuffer;
use vvu_protocol::dax::NODE_OFFSET;
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, LogArea, RawMessage, ReplyPayload};
use vvu_protocol::window::FileId;
use vvu_socket::event::Event;
use vvu_socket::{MessageSocket, SocketError};

pub(crate) use self::rings::LOG_USED_RING;
use self::rings::{Vring, kicked};
use self::side_channels::Transfer;
use super::file::MappedFile;
use super::task::OwnedTask;
use super::vmm::Vmm;
use super::world::{QUEUES, World};

type Reply = FrontEndReply<OwnedFd>;
type Received = Result<Option<RawMessage<OwnedFd>>, SocketError>;

/// The agent gives a back-end up that takes so long for an answer, and a moment.
const GIVEN_UP: Duration = Duration::from_secs(31);

/// Length of the device's configuration space in bytes.
pub(crate) const CONFIG_LEN: usize = 16;

/// Where the number of changes stands in it; the rest is what the front-end has written.
pub(crate) const CONFIG_VERSION: std::ops::Range<usize> = 4..12;

/// Code of IOTLB_MSG. The specification has it answered always; who asks for an answer gets one, too.
const IOTLB_MSG: u32 = 22;

/// What a back-end can do; the same for all of a schedule.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    /// Tracks requests in flight.
    pub(crate) inflight: bool,
    pub(crate) acknowledges: bool,
    pub(crate) slots: bool,
    /// Asks the front-end things, and changes its configuration.
    pub(crate) asks: bool,
    /// A request takes up to this long.
    pub(crate) service_time: Duration,
}

impl Kind {
    fn protocol(self) -> ProtocolFeatures {
        let always = ProtocolFeatures::MQ
            | ProtocolFeatures::CONFIG
            | ProtocolFeatures::LOG_SHMFD
            | ProtocolFeatures::BACKEND_REQ
            | ProtocolFeatures::STATUS
            | ProtocolFeatures::RESET_DEVICE
            | ProtocolFeatures::DEVICE_STATE;
        let when = |condition, feature| if condition { feature } else { ProtocolFeatures::empty() };
        always
            | when(self.inflight, ProtocolFeatures::INFLIGHT_SHMFD)
            | when(self.acknowledges, ProtocolFeatures::REPLY_ACK)
            | when(self.slots, ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }
}

/// What a connection has set.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) owner: bool,
    pub(crate) features: Option<Features>,
    pub(crate) protocol: Option<ProtocolFeatures>,
    /// With offsets into the node.
    pub(crate) regions: Vec<MemoryRegion>,
    pub(crate) vrings: [Vring; QUEUES as usize],
    inflight: Option<(std::sync::Arc<InflightBuffer>, FileId)>,
    /// With its offset into the node.
    log: Option<LogArea>,
    pub(crate) status: u64,
    pub(crate) config: [u8; CONFIG_LEN],
    back_channel: Option<OwnedTask>,
    transfer: Option<Transfer>,
    /// Check of the last state that came whole.
    pub(crate) loaded: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct BackEnd {
    number: u32,
    world: Rc<World>,
    vmm: Rc<Vmm>,
    pub(crate) state: RefCell<State>,
    /// The agent does not look after it any more: what it works on may be taken away.
    orphaned: Cell<bool>,
    /// It does nothing until then.
    stuck: Cell<Option<Instant>>,
    death: Notify,
}

/// The process is dead.
#[derive(Debug)]
struct Dead;

/// Serves one connection after the other.
pub(crate) async fn serve(back_end: Rc<BackEnd>, mut connections: mpsc::UnboundedReceiver<UnixStream>) {
    while let Some(stream) = connections.recv().await {
        let served = back_end.connection(MessageSocket::new(stream).unwrap()).await;
        if served.is_err() {
            return;
        }
        back_end.world.hesitate().await;
        back_end.let_go();
    }
}

impl BackEnd {
    pub(crate) fn new(number: u32, world: &Rc<World>, vmm: &Rc<Vmm>) -> Rc<Self> {
        Rc::new(Self {
            number,
            world: Rc::clone(world),
            vmm: Rc::clone(vmm),
            state: RefCell::default(),
            orphaned: Cell::new(false),
            stuck: Cell::new(None),
            death: Notify::new(),
        })
    }

    /// The process dies, now and then with a change of the configuration that it has not told of.
    pub(crate) fn die(&self) {
        let asks = self.world.kind.asks && self.state.borrow().back_channel.is_some();
        if asks && self.world.is_served_by(self.number) && self.world.random.percent(50) {
            self.world.config.set(self.world.config.get() + 1);
        }
        self.let_go();
        self.death.notify_one();
    }

    /// Forgets the connection. Requests in flight are left to whoever comes after.
    fn let_go(&self) {
        let state = self.state.replace(State::default());
        if state.vrings.iter().any(|vring| vring.in_flight() > 0 || vring.completing) {
            self.world.executions_lost();
        }
    }

    pub(crate) async fn death(&self) {
        self.death.notified().await;
    }

    pub(crate) fn orphan(&self) {
        self.orphaned.set(true);
    }

    /// Stops for so long in whatever it does next.
    pub(crate) fn stick(&self, time: Duration) {
        self.stuck.set(Some(Instant::now() + time));
    }

    /// An access to memory that is not there kills the process. It may happen to one whose appliance was given up.
    fn fault(&self, what: &str) -> Dead {
        self.world.note(format!("appliance {}: back-end faults: {what}", self.number));
        assert!(
            self.is_given_up(),
            "appliance {}: memory that the back-end may use is not mapped: {what}",
            self.number
        );
        Dead
    }

    /// Nobody looks after it, or after its appliance, any more.
    fn is_given_up(&self) -> bool {
        self.orphaned.get() || self.vmm.abandoned.get()
    }

    /// Where something of driver memory lies, by its place in the window.
    fn at(&self, node_offset: u64, len: u64) -> Result<(Rc<MappedFile>, u64), Dead> {
        let window_offset = node_offset + NODE_OFFSET;
        let place = self.vmm.place(window_offset, len);
        let place = place.ok_or_else(|| self.fault(&format!("window offset {window_offset:#x}")))?;
        Ok((place.memory, place.offset))
    }

    fn at_guest(&self, address: u64, len: u64) -> Result<(Rc<MappedFile>, u64), Dead> {
        let found = self.state.borrow().regions.iter().find_map(|region| {
            let offset = address.checked_sub(region.guest_address.0)?;
            (offset + len <= region.size).then_some(region.mmap_offset.0 + offset)
        });
        let node_offset = found.ok_or_else(|| self.fault(&format!("guest address {address:#x} is in no region")))?;
        self.at(node_offset, len)
    }

    fn at_user(&self, address: u64, len: u64) -> Result<(Rc<MappedFile>, u64), Dead> {
        let found = self.state.borrow().regions.iter().find_map(|region| {
            let offset = address.checked_sub(region.user_address.0)?;
            (offset + len <= region.size).then_some(region.mmap_offset.0 + offset)
        });
        let node_offset = found.ok_or_else(|| self.fault(&format!("user address {address:#x} is in no region")))?;
        self.at(node_offset, len)
    }

    async fn connection(&self, mut socket: MessageSocket) -> Result<(), Dead> {
        loop {
            let kicks: [Option<Rc<Event>>; QUEUES as usize] =
                std::array::from_fn(|index| self.state.borrow().vrings[index].working_kick());
            let due = self.next_due();
            let stuck = self.stuck.take();
            let message = tokio::select! {
                message = self.recv(&mut socket, stuck) => message,
                index = kicked(&kicks), if stuck.is_none() => {
                    self.take_requests(index)?;
                    continue;
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() && stuck.is_none() => {
                    self.complete(None).await?;
                    continue;
                }
            };
            match message {
                Some(Ok(Some(message))) => match self.answer(message).await? {
                    Some(reply) if socket.send(&reply).await.is_err() => return Ok(()),
                    _ => {}
                },
                Some(Ok(None) | Err(_)) => return Ok(()),
                None => {}
            }
        }
    }

    /// The next message; if the back-end is stuck, after that. `None` if none has come until then.
    async fn recv(&self, socket: &mut MessageSocket, stuck: Option<Instant>) -> Option<Received> {
        let Some(end) = stuck else { return Some(socket.recv().await) };
        let message = timeout_at(end, socket.recv()).await.ok()?;
        let since = Instant::now();
        sleep_until(end).await;
        let patient = matches!(message, Ok(Some(_))) && since.elapsed() > GIVEN_UP;
        assert!(!patient || self.is_given_up(), "the agent waits for an answer since {:?}", since.elapsed());
        Some(message)
    }

    /// Does what a message asks for.
    async fn answer(&self, message: RawMessage<OwnedFd>) -> Result<Option<RawMessage<OwnedFd>>, Dead> {
        let asks = message.header.needs_reply;
        let request = FrontEndRequest::decode(message).unwrap();
        let (code, row) = (request.code(), request.row().unwrap());
        let own = row.reply != ReplyPayload::None;
        assert!(!own || !asks || code == IOTLB_MSG, "{} has a reply of its own", row.name);
        self.world.hesitate().await;
        let reply = self.handle(request).await?;
        self.world.hesitate().await;
        Ok((own || asks).then(|| reply.encode(code)))
    }

    /// Which file the driver VM's memory at this guest address is, and where in it; `None` if there is nothing.
    pub(crate) fn sees(&self, guest_address: u64) -> Option<(FileId, u64)> {
        let node_offset = self.state.borrow().regions.iter().find_map(|region| {
            let offset = guest_address.checked_sub(region.guest_address.0)?;
            (offset < region.size).then_some(region.mmap_offset.0 + offset)
        })?;
        let place = self.vmm.place(node_offset + NODE_OFFSET, 1)?;
        Some((place.id, place.offset))
    }

    /// Identity of the inflight buffer's file.
    pub(crate) fn inflight_file(&self) -> Option<FileId> {
        self.state.borrow().inflight.as_ref().map(|(_, id)| *id)
    }
}

fn offered() -> Features {
    Features::VERSION_1 | Features::PROTOCOL_FEATURES | Features::LOG_ALL | Features::INDIRECT_DESC
}
