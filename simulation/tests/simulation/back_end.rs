//! A back-end: a vhost-user server that takes requests out of rings and completes them later, in any order if it tracks what is
//! in flight, else in theirs. It works in the appliance's window: each access goes by way of what the VMM has mapped there at
//! that moment, and dies of a fault where there is nothing.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use rustix::fs::fstat;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until};
use vvu_back_end::inflight::{InflightBuffer, InflightQueue};
use vvu_protocol::address::FileOffset;
use vvu_protocol::dax::NODE_OFFSET;
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{
    FrontEndReply, FrontEndRequest, Inflight, ReplyPayload, VringAddresses, VringFile, VringState,
};
use vvu_protocol::window::FileId;
use vvu_socket::MessageSocket;
use vvu_socket::event::{self, Event};

use super::file::MappedFile;
use super::virtq;
use super::vmm::Vmm;
use super::world::{QUEUES, World};

type Reply = FrontEndReply<OwnedFd>;

const DONE: Reply = FrontEndReply::Acknowledgement(0);

/// Memory slots of a back-end that has some.
const SLOTS: u64 = 32;

/// Length of the device's configuration space in bytes.
pub(crate) const CONFIG_LEN: usize = 16;

/// What a back-end can do; the same for all of a schedule.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    /// Tracks requests in flight.
    pub(crate) inflight: bool,
    pub(crate) acknowledges: bool,
    pub(crate) slots: bool,
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
            | ProtocolFeatures::RESET_DEVICE;
        let when = |condition, feature| if condition { feature } else { ProtocolFeatures::empty() };
        always
            | when(self.inflight, ProtocolFeatures::INFLIGHT_SHMFD)
            | when(self.acknowledges, ProtocolFeatures::REPLY_ACK)
            | when(self.slots, ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }
}

/// A request between ring and ring.
#[derive(Debug)]
struct InFlight {
    head: u16,
    id: u64,
    /// Guest-physical address of its answer.
    answer: u64,
    due: Instant,
}

#[derive(Debug, Default)]
pub(crate) struct Vring {
    pub(crate) size: u16,
    pub(crate) addresses: Option<VringAddresses>,
    pub(crate) next: u16,
    kick: Option<Rc<Event>>,
    pub(crate) started: bool,
    pub(crate) call: Option<Rc<OwnedFd>>,
    pub(crate) enabled: bool,
    in_flight: Vec<InFlight>,
    /// A batch of them is on its way to the used ring.
    completing: bool,
    tracker: Option<InflightQueue>,
}

impl Vring {
    fn works(&self) -> bool {
        self.started && self.enabled
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.len()
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
    pub(crate) status: u64,
    pub(crate) config: [u8; CONFIG_LEN],
    back_channel: Option<Rc<RefCell<MessageSocket>>>,
}

#[derive(Debug)]
pub(crate) struct BackEnd {
    number: u32,
    world: Rc<World>,
    vmm: Rc<Vmm>,
    pub(crate) state: RefCell<State>,
    /// The agent does not look after it any more: what it works on may be taken away.
    orphaned: Cell<bool>,
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
            death: Notify::new(),
        })
    }

    pub(crate) fn die(&self) {
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

    /// An access to memory that is not there kills the process. It may happen to one whose appliance was given up.
    fn fault(&self, what: &str) -> Dead {
        self.world.note(format!("appliance {}: back-end faults: {what}", self.number));
        let given_up = self.orphaned.get() || self.vmm.abandoned.get();
        assert!(given_up, "appliance {}: memory that the back-end may use is not mapped: {what}", self.number);
        Dead
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
                std::array::from_fn(|index| self.state.borrow().vrings[index].kick.clone());
            let due = self.next_due();
            tokio::select! {
                message = socket.recv() => {
                    let Ok(Some(message)) = message else { return Ok(()) };
                    let asks = message.header.needs_reply;
                    let request = FrontEndRequest::decode(message).unwrap();
                    let (code, row) = (request.code(), request.row().unwrap());
                    assert!(row.reply == ReplyPayload::None || !asks, "{} has a reply of its own", row.name);
                    self.world.hesitate().await;
                    let reply = self.handle(request).await?;
                    self.world.hesitate().await;
                    if (row.reply != ReplyPayload::None || asks) && socket.send(&reply.encode(code)).await.is_err() {
                        return Ok(());
                    }
                }
                index = kicked(&kicks) => self.take_requests(index)?,
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => self.complete(None).await?,
            }
        }
    }

    async fn handle(&self, request: FrontEndRequest<OwnedFd>) -> Result<Reply, Dead> {
        use FrontEndRequest as R;
        let mut state = self.state.borrow_mut();
        Ok(match request {
            R::GetFeatures => FrontEndReply::Number(offered().bits()),
            R::SetFeatures(features) => {
                assert!(offered().contains(features), "{features:?} were not offered");
                state.features = Some(features);
                DONE
            }
            R::SetOwner => {
                state.owner = true;
                DONE
            }
            R::GetProtocolFeatures => FrontEndReply::Number(self.world.kind.protocol().bits()),
            R::SetProtocolFeatures(protocol) => {
                assert!(self.world.kind.protocol().contains(protocol), "{protocol:?} were not offered");
                state.protocol = Some(protocol);
                DONE
            }
            R::GetQueueNum => FrontEndReply::Number(u64::from(QUEUES)),
            R::GetMaxMemSlots => FrontEndReply::Number(SLOTS),
            R::GetConfig(mut wanted) => {
                let start = usize::try_from(wanted.offset).unwrap();
                wanted.bytes.clone_from(&state.config[start..start + wanted.bytes.len()].to_vec());
                FrontEndReply::Config(Some(wanted))
            }
            R::SetConfig(written) => {
                let start = usize::try_from(written.offset).unwrap();
                state.config[start..start + written.bytes.len()].copy_from_slice(&written.bytes);
                DONE
            }
            R::SetStatus(status) => {
                state.status = status;
                DONE
            }
            R::GetStatus => FrontEndReply::Number(state.status),
            R::SetBackendReqFd(file) => {
                state.back_channel = Some(Rc::new(RefCell::new(MessageSocket::new(file.into()).unwrap())));
                DONE
            }
            other => {
                drop(state);
                return self.handle_memory(other).await;
            }
        })
    }

    async fn handle_memory(&self, request: FrontEndRequest<OwnedFd>) -> Result<Reply, Dead> {
        use FrontEndRequest as R;
        match request {
            R::SetMemTable(table) => {
                let regions: Vec<MemoryRegion> = table.iter().map(|(region, _)| *region).collect();
                for region in &regions {
                    self.at(region.mmap_offset.0, 1)?;
                }
                self.state.borrow_mut().regions = regions;
            }
            R::AddMemReg(region, _) => {
                self.at(region.mmap_offset.0, 1)?;
                self.state.borrow_mut().regions.push(region);
            }
            R::RemMemReg(region) => {
                let mut state = self.state.borrow_mut();
                let place = state.regions.iter().position(|known| known.guest_address == region.guest_address);
                state.regions.remove(place.expect("a region that was added"));
            }
            R::SetInflightFd(inflight, _) => self.set_inflight(&inflight)?,
            R::SetLogBase(area, _) => {
                self.log_place(area.mmap_offset.0, 1)?;
                return Ok(FrontEndReply::LogBase);
            }
            other => return self.handle_vring(other).await,
        }
        Ok(DONE)
    }

    fn log_place(&self, node_offset: u64, len: u64) -> Result<(), Dead> {
        let window_offset = node_offset + NODE_OFFSET;
        let place = self.vmm.place(window_offset, len);
        place.map(drop).ok_or_else(|| self.fault(&format!("dirty log at window offset {window_offset:#x}")))
    }

    fn set_inflight(&self, inflight: &Inflight) -> Result<(), Dead> {
        let window_offset = inflight.mmap_offset.0 + NODE_OFFSET;
        let place = self.vmm.place(window_offset, 1);
        let place = place.ok_or_else(|| self.fault(&format!("inflight buffer at window offset {window_offset:#x}")))?;
        let file_len = fstat(&place.file).unwrap().st_size.unsigned_abs();
        let description = Inflight {
            mmap_size: inflight.mmap_size.min(file_len - place.offset),
            mmap_offset: FileOffset(place.offset),
            ..*inflight
        };
        let buffer = InflightBuffer::map(&File::from(place.file), &description).unwrap();
        self.state.borrow_mut().inflight = Some((buffer, place.id));
        Ok(())
    }

    async fn handle_vring(&self, request: FrontEndRequest<OwnedFd>) -> Result<Reply, Dead> {
        use FrontEndRequest as R;
        match request {
            R::SetVringNum(state) => self.vring(state.index, |vring| vring.size = u16::try_from(state.num).unwrap()),
            R::SetVringBase(state) => self.vring(state.index, |vring| vring.next = u16::try_from(state.num).unwrap()),
            R::SetVringAddr(addresses) => {
                for address in [addresses.descriptors, addresses.available, addresses.used] {
                    self.at_user(address, 16)?;
                }
                self.vring(addresses.index, |vring| vring.addresses = Some(addresses));
            }
            R::SetVringEnable(state) => {
                self.vring(state.index, |vring| vring.enabled = state.num != 0);
                self.take_requests(usize::try_from(state.index).unwrap())?;
            }
            R::SetVringCall(VringFile { index, descriptor }) => {
                self.vring(u32::from(index), |vring| vring.call = descriptor.map(Rc::new));
            }
            R::SetVringErr(_) => {}
            R::SetVringKick(VringFile { index, descriptor }) => self.start(index, descriptor)?,
            R::GetVringBase(VringState { index, .. }) => {
                let place = usize::try_from(index).unwrap();
                while !self.state.borrow().vrings[place].in_flight.is_empty() {
                    if let Some(due) = self.next_due_of(place) {
                        sleep_until(due).await;
                    }
                    self.complete(Some(place)).await?;
                }
                let num = self.vring(index, |vring| {
                    (vring.started, vring.kick, vring.tracker) = (false, None, None);
                    u32::from(vring.next)
                });
                return Ok(FrontEndReply::VringState(VringState { index, num }));
            }
            R::ResetDevice => {
                let mut state = self.state.borrow_mut();
                state.status = 0;
                for vring in &mut state.vrings {
                    let call = vring.call.take();
                    *vring = Vring { call, ..Vring::default() };
                }
            }
            other => panic!("{} must not come through", other.name()),
        }
        Ok(DONE)
    }

    fn vring<T>(&self, index: u32, change: impl FnOnce(&mut Vring) -> T) -> T {
        change(&mut self.state.borrow_mut().vrings[usize::try_from(index).unwrap()])
    }

    /// SET_VRING_KICK: the vring starts, with what the inflight buffer says.
    fn start(&self, index: u8, kick: Option<OwnedFd>) -> Result<(), Dead> {
        let place = usize::from(index);
        let (addresses, size, started, buffer) = {
            let state = self.state.borrow();
            let vring = &state.vrings[place];
            let buffer = state.inflight.as_ref().map(|(buffer, _)| std::sync::Arc::clone(buffer));
            (vring.addresses, vring.size, vring.started, buffer)
        };
        let kick = kick.map(|kick| Rc::new(Event::new(kick).unwrap()));
        self.vring(u32::from(index), |vring| {
            vring.kick = kick;
            vring.started = true;
        });
        let Some(addresses) = addresses.filter(|_| !started) else { return Ok(()) };
        if let Some(buffer) = buffer {
            let used = self.read_u16(addresses.used + 2)?;
            let mut tracker = buffer.queue(u16::from(index), size).unwrap();
            let recovered = tracker.recover(used);
            if !recovered.heads.is_empty() {
                self.world.note(format!("appliance {}: vring {index} resubmits {:?}", self.number, recovered.heads));
            }
            let again = recovered.heads.iter().map(|head| self.request(&addresses, size, *head));
            let again = again.collect::<Result<Vec<_>, _>>()?;
            self.vring(u32::from(index), |vring| {
                vring.next = recovered.next_avail;
                vring.in_flight = again;
                vring.tracker = Some(tracker);
            });
        }
        Ok(())
    }

    fn read_u16(&self, user_address: u64) -> Result<u16, Dead> {
        let (file, offset) = self.at_user(user_address, 2)?;
        Ok(u16::from_le(file.load(offset)))
    }

    /// What the descriptors of `head` say.
    fn request(&self, addresses: &VringAddresses, size: u16, head: u16) -> Result<InFlight, Dead> {
        assert!(head + 1 < size, "head {head} is none of the driver's");
        let (file, offset) = self.at_user(addresses.descriptors + u64::from(head) * 16, 32)?;
        let (read, answer) = (u64::from_le(file.load(offset)), u64::from_le(file.load(offset + 16)));
        let (file, offset) = self.at_guest(read, u64::from(virtq::READ_LEN))?;
        let (id, check) = (u64::from_le(file.load(offset)), u64::from_le(file.load(offset + 8)));
        assert_eq!(id, !check, "what the back-end reads is no request of the driver");
        self.world.executed(id);
        let due = Instant::now() + self.world.random.time(self.world.kind.service_time);
        Ok(InFlight { head, id, answer, due })
    }

    /// Takes all requests that are in the available ring.
    fn take_requests(&self, index: usize) -> Result<(), Dead> {
        loop {
            let (addresses, size, next) = {
                let state = self.state.borrow();
                let vring = &state.vrings[index];
                let Some(addresses) = vring.addresses.filter(|_| vring.works()) else { return Ok(()) };
                (addresses, vring.size, vring.next)
            };
            let available = self.read_u16(addresses.available + 2)?;
            let ahead = available.wrapping_sub(next);
            assert!(ahead <= size, "vring {index} of {size} stands at {next}, the driver's index is {available}");
            if ahead == 0 {
                return Ok(());
            }
            let head = self.read_u16(addresses.available + 4 + u64::from(next % size) * 2)?;
            let request = self.request(&addresses, size, head)?;
            let mut state = self.state.borrow_mut();
            let vring = &mut state.vrings[index];
            vring.next = next.wrapping_add(1);
            if let Some(tracker) = &mut vring.tracker {
                tracker.start(head);
            }
            vring.in_flight.push(request);
        }
    }

    fn next_due(&self) -> Option<Instant> {
        (0..usize::from(QUEUES)).filter_map(|index| self.next_due_of(index)).min()
    }

    /// Without tracking, requests are completed in their order.
    fn next_due_of(&self, index: usize) -> Option<Instant> {
        let state = self.state.borrow();
        let vring = &state.vrings[index];
        if vring.tracker.is_some() {
            return vring.in_flight.iter().map(|request| request.due).min();
        }
        vring.in_flight.first().map(|request| request.due)
    }

    /// Completes requests that are due, of this vring or of any: a batch of them.
    async fn complete(&self, only: Option<usize>) -> Result<(), Dead> {
        let now = Instant::now();
        for index in 0..usize::from(QUEUES) {
            let due = self.next_due_of(index).is_some_and(|due| due <= now);
            if !due || only.is_some_and(|only| only != index) {
                continue;
            }
            let batch = self.take_batch(index, now);
            self.complete_batch(index, batch).await?;
        }
        Ok(())
    }

    fn take_batch(&self, index: usize, now: Instant) -> Vec<InFlight> {
        let mut state = self.state.borrow_mut();
        let vring = &mut state.vrings[index];
        let most = 1 + self.world.random.below(3);
        let mut batch = Vec::new();
        while batch.len() < most {
            let place = match vring.tracker {
                Some(_) => vring.in_flight.iter().position(|request| request.due <= now),
                None => (!vring.in_flight.is_empty()).then_some(0),
            };
            let Some(place) = place else { break };
            batch.push(vring.in_flight.remove(place));
        }
        vring.completing = true;
        batch
    }

    /// The stores of a batch, in the order that the specification prescribes. The process may be killed between any two.
    async fn complete_batch(&self, index: usize, batch: Vec<InFlight>) -> Result<(), Dead> {
        let Some(addresses) = self.state.borrow().vrings[index].addresses else { return Ok(()) };
        let size = self.state.borrow().vrings[index].size;
        let used = self.read_u16(addresses.used + 2)?;
        for (request, position) in batch.iter().zip(0_u16..) {
            let (file, offset) = self.at_guest(request.answer, u64::from(virtq::WRITE_LEN))?;
            file.store(offset, virtq::response(request.id).to_le());
            self.track(index, |tracker| tracker.begin_batch(request.head));
            self.world.hesitate().await;
            let element = addresses.used + 4 + u64::from(used.wrapping_add(position) % size) * 8;
            let (file, offset) = self.at_user(element, 8)?;
            file.store(offset, u32::from(request.head).to_le());
            file.store(offset + 4, virtq::WRITE_LEN.to_le());
        }
        self.world.hesitate().await;
        let used = used.wrapping_add(u16::try_from(batch.len()).unwrap());
        let (file, offset) = self.at_user(addresses.used + 2, 2)?;
        file.store(offset, used.to_le());
        self.world.hesitate().await;
        self.track(index, |tracker| tracker.end_batch(used));
        self.state.borrow_mut().vrings[index].completing = false;
        self.world.hesitate().await;
        let call = self.state.borrow().vrings[index].call.clone();
        if let Some(call) = call {
            event::signal(&*call).unwrap();
        }
        Ok(())
    }

    fn track(&self, index: usize, note: impl FnOnce(&mut InflightQueue)) {
        if let Some(tracker) = &mut self.state.borrow_mut().vrings[index].tracker {
            note(tracker);
        }
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

async fn kicked(kicks: &[Option<Rc<Event>>; QUEUES as usize]) -> usize {
    let one = async |index: usize| match &kicks[index] {
        Some(kick) => {
            kick.signalled().await.unwrap();
            index
        }
        None => std::future::pending().await,
    };
    tokio::select! {
        index = one(0) => index,
        index = one(1) => index,
    }
}
