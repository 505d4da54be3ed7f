//! QEMU's generic vhost-user device (`vhost-user-test-device-pci`), from the side of its back-end.
//!
//! Pure bookkeeping: a request goes in, an answer and at most one [`Effect`] come out. Rules of QEMU 11 that stand behind it:
//! nothing may be asked on the back channel before all vrings are enabled or after one was stopped (QEMU would crash), so
//! [`Effect::Started`] and [`Effect::Stopped`] mark that time; CONFIGURE_MEM_SLOTS is never offered (a reset with mappings
//! in place would crash QEMU).

use std::os::fd::OwnedFd;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{
    ConfigSpace, FrontEndReply, FrontEndRequest, RawMessage, ShmemConfig, VringAddresses, VringFile, VringState,
};
use vvu_socket::MessageSocket;
use vvu_socket::event::{Event, check_kind};

use super::{ApplianceError, sent};

/// Largest queue that is offered; QEMU's `vq_size` decides.
const QUEUE_SIZE_MAX: u16 = 1024;

/// What one of the two devices is made of.
#[derive(Debug, Clone)]
pub struct Model {
    /// Name for errors and logs.
    pub name: &'static str,
    /// Device features that are offered beside VIRTIO_F_VERSION_1.
    pub features: Features,
    /// Number of queues.
    pub queue_count: usize,
    /// Shared memory regions: id and length in bytes.
    pub shared_memory: Vec<(u8, u64)>,
}

/// One vring.
#[derive(Debug)]
pub struct Vring {
    /// Rings and indices.
    pub queue: Queue,
    /// Signals from the appliance.
    pub kick: Option<Event>,
    /// Interrupt of the appliance.
    pub call: Option<OwnedFd>,
    enabled: bool,
}

/// What a request means beyond its answer.
#[derive(Debug)]
pub enum Effect {
    /// Nothing.
    None,
    /// The socket for requests of the back-end.
    BackChannel(OwnedFd),
    /// A new memory table.
    Memory(Vec<(MemoryRegion, OwnedFd)>),
    /// The appliance has written into the configuration space.
    ConfigWritten(ConfigSpace),
    /// All vrings run: the back channel may be used from now on.
    Started,
    /// A vring was stopped: the back channel must not be used until [`Effect::Started`], and all mappings are gone.
    Stopped,
}

/// State of one generic device.
#[derive(Debug)]
pub struct GenericDevice {
    model: Model,
    regions: Vec<MemoryRegion>,
    vrings: Vec<Vring>,
    running: bool,
}

type Answer = (Option<FrontEndReply<OwnedFd>>, Effect);

impl GenericDevice {
    /// A device before the first request.
    ///
    /// # Errors
    /// [`ApplianceError::Queue`] if a queue cannot be made.
    pub fn new(model: Model) -> Result<Self, ApplianceError> {
        let vrings = (0..model.queue_count)
            .map(|_| {
                let queue = Queue::new(QUEUE_SIZE_MAX)
                    .map_err(|error| ApplianceError::Queue { queue: 0, problem: error.to_string() })?;
                Ok(Vring { queue, kick: None, call: None, enabled: false })
            })
            .collect::<Result<_, ApplianceError>>()?;
        Ok(Self { model, regions: Vec::new(), vrings, running: false })
    }

    /// Name for errors and logs.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.model.name
    }

    /// Whether the back channel may be used.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// A vring by its index.
    pub fn vring(&mut self, index: u16) -> Option<&mut Vring> {
        self.vrings.get_mut(usize::from(index))
    }

    /// The kick events of the first two vrings, as far as they are set.
    #[must_use]
    pub fn kicks(&self) -> (Option<&Event>, Option<&Event>) {
        let mut kicks = self.vrings.iter().map(|vring| vring.kick.as_ref());
        (kicks.next().flatten(), kicks.next().flatten())
    }

    /// Takes one message, answers it on `socket`, and says what it means. `config` is the configuration space.
    ///
    /// # Errors
    /// [`ApplianceError`]; the device is of no use any more then.
    pub async fn serve(
        &mut self,
        socket: &MessageSocket,
        message: RawMessage<OwnedFd>,
        config: &[u8],
    ) -> Result<Effect, ApplianceError> {
        let device = self.model.name;
        let (code, needs_reply) = (message.header.request, message.header.needs_reply);
        let request = FrontEndRequest::decode(message).map_err(|source| ApplianceError::Decode { device, source })?;
        tracing::trace!(device, request = request.name(), "request of the appliance's VMM");
        let (reply, effect) = self.handle(request, config)?;
        let reply = reply.or(needs_reply.then_some(FrontEndReply::Acknowledgement(0)));
        if let Some(reply) = reply {
            sent(device, socket.send(&reply.encode(code))).await?;
        }
        Ok(effect)
    }

    fn handle(&mut self, request: FrontEndRequest<OwnedFd>, config: &[u8]) -> Result<Answer, ApplianceError> {
        use FrontEndRequest as R;
        match request {
            R::GetFeatures => Ok(number(self.offered().bits())),
            R::GetProtocolFeatures => Ok(number(self.protocol_features().bits())),
            R::GetQueueNum => Ok(number(self.vrings.len() as u64)),
            R::SetOwner | R::SetFeatures(_) | R::SetProtocolFeatures(_) => Ok((None, Effect::None)),
            R::SetBackendReqFd(descriptor) => Ok((None, Effect::BackChannel(descriptor))),
            R::SetMemTable(table) => self.set_memory(table),
            R::SetVringNum(state) => self.set_size(state),
            R::SetVringAddr(addresses) => self.set_addresses(addresses),
            R::SetVringBase(state) => self.set_base(state),
            R::SetVringKick(file) => self.set_kick(file),
            R::SetVringCall(file) => self.set_call(file),
            R::SetVringErr(_) => Ok((None, Effect::None)),
            R::SetVringEnable(state) => self.set_enabled(state),
            R::GetVringBase(state) => self.stop(state),
            R::GetConfig(wanted) => Ok((Some(FrontEndReply::Config(read_config(&wanted, config))), Effect::None)),
            R::SetConfig(written) => Ok((None, Effect::ConfigWritten(written))),
            R::GetShmemConfig => {
                let regions = self.model.shared_memory.clone();
                Ok((Some(FrontEndReply::ShmemConfig(ShmemConfig { regions })), Effect::None))
            }
            other => Err(ApplianceError::Request { device: self.model.name, request: other.name() }),
        }
    }

    fn offered(&self) -> Features {
        self.model.features | Features::VERSION_1 | Features::PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> ProtocolFeatures {
        let mut features = ProtocolFeatures::MQ
            | ProtocolFeatures::REPLY_ACK
            | ProtocolFeatures::BACKEND_REQ
            | ProtocolFeatures::BACKEND_SEND_FD
            | ProtocolFeatures::CONFIG;
        if !self.model.shared_memory.is_empty() {
            features |= ProtocolFeatures::SHMEM;
        }
        features
    }

    fn set_memory(&mut self, table: Vec<(MemoryRegion, OwnedFd)>) -> Result<Answer, ApplianceError> {
        self.regions = table.iter().map(|(region, _)| *region).collect();
        vvu_protocol::memory::check_table(&self.regions, vvu_protocol::memory::MAX_TABLE_REGIONS)?;
        Ok((None, Effect::Memory(table)))
    }

    fn indexed(&mut self, index: u32) -> Result<&mut Vring, ApplianceError> {
        let device = self.model.name;
        let position = usize::try_from(index).unwrap_or(usize::MAX);
        let missing = ApplianceError::Vring { device, index, problem: "the device has no such vring" };
        self.vrings.get_mut(position).ok_or(missing)
    }

    fn set_size(&mut self, state: VringState) -> Result<Answer, ApplianceError> {
        let (device, index) = (self.model.name, state.index);
        let error = ApplianceError::Vring { device, index, problem: "size is no power of two up to 1024" };
        let vring = self.indexed(index)?;
        match u16::try_from(state.num) {
            Ok(size) if vring.queue.try_set_size(size).is_ok() => Ok((None, Effect::None)),
            _ => Err(error),
        }
    }

    fn set_base(&mut self, state: VringState) -> Result<Answer, ApplianceError> {
        let (device, index) = (self.model.name, state.index);
        let error = ApplianceError::Vring { device, index, problem: "base has more than 16 bits" };
        let base = u16::try_from(state.num).map_err(|_| error)?;
        let vring = self.indexed(index)?;
        vring.queue.set_next_avail(base);
        vring.queue.set_next_used(base);
        Ok((None, Effect::None))
    }

    fn set_addresses(&mut self, addresses: VringAddresses) -> Result<Answer, ApplianceError> {
        let (device, index) = (self.model.name, addresses.index);
        let translate = |address: u64| {
            guest_address(&self.regions, address).ok_or(ApplianceError::Vring {
                device,
                index,
                problem: "an address is in no memory region",
            })
        };
        let descriptors = translate(addresses.descriptors)?;
        let (available, used) = (translate(addresses.available)?, translate(addresses.used)?);
        let queue = &mut self.indexed(index)?.queue;
        let set = queue
            .try_set_desc_table_address(descriptors)
            .and_then(|()| queue.try_set_avail_ring_address(available))
            .and_then(|()| queue.try_set_used_ring_address(used));
        let unaligned = ApplianceError::Vring { device, index, problem: "an address is not aligned" };
        set.map_err(|_| unaligned)?;
        Ok((None, Effect::None))
    }

    fn set_kick(&mut self, file: VringFile<OwnedFd>) -> Result<Answer, ApplianceError> {
        let device = self.model.name;
        let vring = self.indexed(u32::from(file.index))?;
        let event = file.descriptor.map(Event::new).transpose();
        vring.kick = event.map_err(|source| ApplianceError::Event { device, source })?;
        vring.queue.set_ready(true);
        Ok((None, Effect::None))
    }

    fn set_call(&mut self, file: VringFile<OwnedFd>) -> Result<Answer, ApplianceError> {
        let device = self.model.name;
        if let Some(descriptor) = &file.descriptor {
            use std::os::fd::AsFd;
            check_kind(descriptor.as_fd()).map_err(|source| ApplianceError::Event { device, source })?;
        }
        self.indexed(u32::from(file.index))?.call = file.descriptor;
        Ok((None, Effect::None))
    }

    fn set_enabled(&mut self, state: VringState) -> Result<Answer, ApplianceError> {
        self.indexed(state.index)?.enabled = state.num != 0;
        let running = self.vrings.iter().all(|vring| vring.enabled);
        let effect = match (self.running, running) {
            (false, true) => Effect::Started,
            (true, false) => Effect::Stopped,
            _ => Effect::None,
        };
        self.running = running;
        Ok((None, effect))
    }

    fn stop(&mut self, state: VringState) -> Result<Answer, ApplianceError> {
        let vring = self.indexed(state.index)?;
        let num = u32::from(vring.queue.next_avail());
        vring.queue.reset();
        vring.kick = None;
        vring.call = None;
        vring.enabled = false;
        let effect = if self.running { Effect::Stopped } else { Effect::None };
        self.running = false;
        Ok((Some(FrontEndReply::VringState(VringState { index: state.index, num })), effect))
    }
}

fn number(value: u64) -> Answer {
    (Some(FrontEndReply::Number(value)), Effect::None)
}

fn read_config(wanted: &ConfigSpace, config: &[u8]) -> Option<ConfigSpace> {
    let start = usize::try_from(wanted.offset).ok()?;
    let bytes = config.get(start..start.checked_add(wanted.bytes.len())?)?.to_vec();
    Some(ConfigSpace { offset: wanted.offset, flags: wanted.flags, bytes })
}

fn guest_address(regions: &[MemoryRegion], user_address: u64) -> Option<GuestAddress> {
    regions.iter().find_map(|region| {
        let offset = user_address.checked_sub(region.user_address.0)?;
        (offset < region.size).then(|| GuestAddress(region.guest_address.0 + offset))
    })
}
