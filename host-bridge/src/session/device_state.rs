//! What a front-end has set, so that the next back-end can be brought to the same state. Nothing here waits or speaks to
//! anybody.
//!
//! [`DeviceState::apply`] is the only door: it takes a request of the front-end that was answered as done. What came before
//! under the same name is replaced, and the descriptors that belong to it are closed. [`DeviceState::crosses`] is told of
//! a request before the back-end may hear of it, for one thing: a vring that may have been started may have moved.
//! [`DeviceState::steps`] is what a back-end has to be told, in order.
//!
//! A vring is *stopped* or *started*, by SET_VRING_KICK and GET_VRING_BASE (vhost-user specification, "Ring states"), and its
//! [`Position`] is known or not:
//!
//! ```text
//!            SET_VRING_BASE            SET_VRING_KICK crosses
//! stopped, At(0) ──► stopped, At(n) ────────────────────────────► started, Unknown ◄──┐ SET_VRING_KICK
//!                          ▲           GET_VRING_BASE is answered       │      │      │ of a replay crosses
//!                          └────────────────────────────────────────────┘      ▼      │
//!                                                                drained: started, At(n)
//! ```
//!
//! Bounds: 509 regions, as many vrings as the device has, 256 bytes of configuration, one log, one inflight buffer, one back
//! channel. Every descriptor is held once.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use vvu_protocol::carriage;
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{
    ConfigSpace, FrontEndReply, FrontEndRequest, Inflight, LogArea, VringAddresses, VringFile, VringState,
};

/// A descriptor of the front-end. Every copy is of the same one.
pub(super) type Descriptor = Rc<OwnedFd>;

/// A request of the front-end.
pub(super) type Request = FrontEndRequest<Descriptor>;

/// How far a vring has come, as its next available index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Position {
    /// Exactly here: it was set, or answered by the back-end that stopped.
    At(u32),
    /// Somewhere behind the position that was known last: a back-end works on it, or did when it was lost.
    Unknown { since: u32 },
}

/// What was set of one vring.
#[derive(Debug, Clone)]
struct Vring {
    size: Option<u32>,
    addresses: Option<VringAddresses>,
    position: Position,
    /// With or without an eventfd the vring is started.
    kick: Option<VringFile<Descriptor>>,
    call: Option<VringFile<Descriptor>>,
    error: Option<VringFile<Descriptor>>,
    enabled: Option<u32>,
}

impl Default for Vring {
    fn default() -> Self {
        let (kick, call, error) = (None, None, None);
        Self { size: None, addresses: None, position: Position::At(0), kick, call, error, enabled: None }
    }
}

impl Vring {
    fn set_position(&mut self, index: u32) {
        self.position = match self.kick {
            None => Position::At(index),
            Some(_) => Position::Unknown { since: index },
        };
    }

    /// Stopped in order at this index. The front-end sets the addresses anew before the next start; those of now may lie
    /// in memory that is gone by then.
    fn stop(&mut self, index: u32) {
        self.kick = None;
        self.addresses = None;
        self.position = Position::At(index);
    }

    /// As it was in the beginning, but for the eventfds that the front-end has set once and for all.
    fn reset(&mut self) {
        let Self { call, error, .. } = std::mem::take(self);
        *self = Self { call, error, ..Self::default() };
    }

    fn steps(&self, index: u32) -> impl Iterator<Item = Step> {
        let state = |num| VringState { index, num };
        let base = match self.position {
            Position::At(0) if self.kick.is_none() => None,
            Position::At(base) => Some(Step::Ask(Request::SetVringBase(state(base)))),
            Position::Unknown { since } => Some(Step::Resume(state(since))),
        };
        let before =
            [self.size.map(|size| Request::SetVringNum(state(size))), self.addresses.map(Request::SetVringAddr)];
        let after = [
            self.call.clone().map(Request::SetVringCall),
            self.error.clone().map(Request::SetVringErr),
            self.kick.clone().map(Request::SetVringKick),
            self.enabled.map(|enabled| Request::SetVringEnable(state(enabled))),
        ];
        let ask = |requests: Vec<Option<Request>>| requests.into_iter().flatten().map(Step::Ask);
        ask(before.into()).chain(base).chain(ask(after.into()))
    }
}

/// One thing to tell a back-end.
#[derive(Debug, Clone)]
pub(super) enum Step {
    /// A request as the front-end has sent it, or might have.
    Ask(Request),
    /// SET_VRING_BASE of a vring whose position nobody knows.
    Resume(VringState),
    /// All of [`DeviceState::regions`].
    Memory,
    /// That the front-end has a back channel. Its descriptor is not kept here: the channel is in use all the time.
    BackChannel,
}

/// The inflight buffer, and whose it is.
#[derive(Debug, Clone)]
enum InflightBuffer {
    FrontEnds(Inflight, Descriptor),
    /// Made by the bridge, for a front-end that has none.
    Own(Inflight, Descriptor),
}

/// What a front-end has set.
#[derive(Debug, Default)]
pub(super) struct DeviceState {
    offered: Option<Features>,
    features: Option<Features>,
    offered_protocol: Option<ProtocolFeatures>,
    protocol: Option<ProtocolFeatures>,
    has_owner: bool,
    regions: Vec<(MemoryRegion, Descriptor)>,
    has_back_channel: bool,
    log: Option<(LogArea, Descriptor)>,
    log_signal: Option<Descriptor>,
    inflight: Option<InflightBuffer>,
    /// Bytes of the configuration space that were written, each with the flags of its write.
    config: BTreeMap<u32, (u8, u32)>,
    mtu: Option<u64>,
    status: Option<u64>,
    vrings: BTreeMap<u32, Vring>,
    largest_vring: u32,
}

impl DeviceState {
    /// The request is about to cross: from now on the back-end may have heard of it.
    pub(super) fn crosses(&mut self, request: &Request) {
        if let Request::SetVringKick(file) = request {
            let vring = self.vrings.entry(u32::from(file.index)).or_default();
            if let Position::At(since) = vring.position {
                vring.position = Position::Unknown { since };
            }
        }
    }

    /// The request was answered as done, with `answer` if it has a reply of its own.
    pub(super) fn apply(&mut self, request: &Request, answer: &FrontEndReply<Descriptor>) {
        use FrontEndRequest as R;
        match request {
            R::GetFeatures => self.offered = number(answer).map(Features::from_bits_retain),
            R::SetFeatures(features) => self.features = Some(*features),
            R::GetProtocolFeatures => {
                self.offered_protocol = number(answer).map(ProtocolFeatures::from_bits_retain);
            }
            R::SetProtocolFeatures(protocol) => self.protocol = Some(*protocol),
            R::SetOwner => self.has_owner = true,
            R::ResetOwner => self.vrings.values_mut().for_each(|vring| vring.enabled = vring.enabled.map(|_| 0)),
            R::SetMemTable(table) => self.regions.clone_from(table),
            R::AddMemReg(region, file) => self.regions.push((*region, Rc::clone(file))),
            R::RemMemReg(region) => self.regions.retain(|(known, _)| !is_same_region(known, region)),
            R::SetBackendReqFd(_) => self.has_back_channel = true,
            R::SetLogBase(area, file) => self.log = Some((*area, Rc::clone(file))),
            R::SetLogFd(descriptor) => self.log_signal = Some(Rc::clone(descriptor)),
            R::SetInflightFd(inflight, file) => {
                self.inflight = Some(InflightBuffer::FrontEnds(*inflight, Rc::clone(file)));
            }
            R::SetConfig(written) => self.write_config(written),
            R::NetSetMtu(mtu) => self.mtu = Some(*mtu),
            R::SetStatus(status) => self.status = Some(*status),
            R::ResetDevice => self.reset_device(),
            _ => self.apply_to_vring(request, answer),
        }
    }

    fn apply_to_vring(&mut self, request: &Request, answer: &FrontEndReply<Descriptor>) {
        use FrontEndRequest as R;
        match request {
            R::SetVringNum(state) => {
                self.largest_vring = self.largest_vring.max(state.num);
                self.vring(state.index).size = Some(state.num);
            }
            R::SetVringAddr(addresses) => self.vring(addresses.index).addresses = Some(*addresses),
            R::SetVringBase(state) => self.vring(state.index).set_position(state.num),
            R::GetVringBase(state) => {
                if let FrontEndReply::VringState(VringState { num, .. }) = answer {
                    self.vring(state.index).stop(*num);
                }
            }
            R::SetVringKick(file) => self.vring(u32::from(file.index)).kick = Some(file.clone()),
            R::SetVringCall(file) => self.vring(u32::from(file.index)).call = Some(file.clone()),
            R::SetVringErr(file) => self.vring(u32::from(file.index)).error = Some(file.clone()),
            R::SetVringEnable(state) => self.vring(state.index).enabled = Some(state.num),
            // Nothing of them lasts.
            _ => {}
        }
    }

    fn vring(&mut self, index: u32) -> &mut Vring {
        self.vrings.entry(index).or_default()
    }

    fn write_config(&mut self, written: &ConfigSpace) {
        let bytes = (written.offset..).zip(&written.bytes);
        self.config.extend(bytes.map(|(offset, byte)| (offset, (*byte, written.flags))));
    }

    /// RESET_DEVICE: "disable all rings and reset all internal device state"; owner, memory, features, back channel and
    /// eventfds stay, and so does the connection.
    fn reset_device(&mut self) {
        self.vrings.values_mut().for_each(Vring::reset);
        self.config.clear();
        self.status = None;
        if let Some(InflightBuffer::Own(..)) = self.inflight {
            self.inflight = None;
        }
    }

    /// The bridge has stopped a vring to take it elsewhere; for the front-end it runs on.
    pub(super) fn drained(&mut self, index: u32, base: u32) {
        self.vring(index).position = Position::At(base);
    }

    /// Vrings that the front-end has started, and not stopped.
    pub(super) fn started(&self) -> Vec<u32> {
        self.vrings.iter().filter(|(_, vring)| vring.kick.is_some()).map(|(index, _)| *index).collect()
    }

    /// All that a back-end has to be told after feature negotiation.
    pub(super) fn steps(&self) -> Vec<Step> {
        let ask = |request: Option<Request>| request.map(Step::Ask);
        let memory = (!self.regions.is_empty()).then_some(Step::Memory);
        let status = self.status.filter(|status| *status != 0);
        let mut steps: Vec<Step> = [
            ask(self.has_owner.then_some(Request::SetOwner)),
            ask(self.features.map(Request::SetFeatures)),
            memory,
            self.has_back_channel.then_some(Step::BackChannel),
            ask(self.log.clone().map(|(area, file)| Request::SetLogBase(area, file))),
            ask(self.log_signal.clone().map(Request::SetLogFd)),
            ask(self.inflight().map(|(inflight, file)| Request::SetInflightFd(inflight, file))),
        ]
        .into_iter()
        .flatten()
        .collect();
        steps.extend(self.config_writes().map(|written| Step::Ask(Request::SetConfig(written))));
        steps.extend(ask(self.mtu.map(Request::NetSetMtu)));
        steps.extend(self.vrings.iter().flat_map(|(index, vring)| vring.steps(*index)));
        steps.extend(ask(status.map(Request::SetStatus)));
        steps
    }

    /// Neighbouring bytes that were written with the same flags are written at once.
    fn config_writes(&self) -> impl Iterator<Item = ConfigSpace> {
        let mut writes: Vec<ConfigSpace> = Vec::new();
        for (offset, (byte, flags)) in &self.config {
            match writes.last_mut() {
                Some(last) if is_next(last, *offset) && last.flags == *flags => last.bytes.push(*byte),
                _ => writes.push(ConfigSpace { offset: *offset, flags: *flags, bytes: vec![*byte] }),
            }
        }
        writes.into_iter()
    }

    /// Device features that the front-end was offered.
    pub(super) const fn offered(&self) -> Option<Features> {
        self.offered
    }

    /// Device features that were negotiated.
    pub(super) const fn features(&self) -> Option<Features> {
        self.features
    }

    /// Protocol features that the front-end was offered.
    pub(super) const fn offered_protocol(&self) -> Option<ProtocolFeatures> {
        self.offered_protocol
    }

    /// Protocol features that were negotiated.
    pub(super) const fn protocol(&self) -> Option<ProtocolFeatures> {
        self.protocol
    }

    /// Whether these protocol features were negotiated.
    pub(super) fn has_negotiated(&self, features: ProtocolFeatures) -> bool {
        self.protocol.is_some_and(|protocol| protocol.contains(features))
    }

    /// What the front-end was offered is offered no longer, as far as this is not in it.
    pub(super) fn narrow_offer(&mut self, features: Features, protocol: ProtocolFeatures) {
        self.offered = self.offered.map(|offered| offered.intersection(features));
        let offered = carriage::offer_protocol(protocol);
        self.offered_protocol = self.offered_protocol.map(|before| before.intersection(offered));
    }

    /// Memory regions, in the order in which they came.
    pub(super) fn regions(&self) -> &[(MemoryRegion, Descriptor)] {
        &self.regions
    }

    /// The inflight buffer.
    pub(super) fn inflight(&self) -> Option<(Inflight, Descriptor)> {
        match self.inflight.as_ref()? {
            InflightBuffer::FrontEnds(inflight, file) | InflightBuffer::Own(inflight, file) => {
                Some((*inflight, Rc::clone(file)))
            }
        }
    }

    /// The inflight buffer, if the bridge has made it.
    pub(super) const fn own_inflight(&self) -> Option<&Inflight> {
        match &self.inflight {
            Some(InflightBuffer::Own(inflight, _)) => Some(inflight),
            _ => None,
        }
    }

    /// The bridge has given the back-end an inflight buffer of its own, or takes it away.
    pub(super) fn set_own_inflight(&mut self, buffer: Option<(Inflight, Descriptor)>) {
        self.inflight = buffer.map(|(inflight, file)| InflightBuffer::Own(inflight, file));
    }

    /// Size of the largest vring so far, in entries.
    pub(super) const fn largest_vring(&self) -> u32 {
        self.largest_vring
    }
}

/// Whether REM_MEM_REG means this region: "identified by guest address, user address and size; the mmap offset is ignored".
pub(super) fn is_same_region(known: &MemoryRegion, wanted: &MemoryRegion) -> bool {
    let identity = |region: &MemoryRegion| (region.guest_address, region.user_address, region.size);
    identity(known) == identity(wanted)
}

fn is_next(written: &ConfigSpace, offset: u32) -> bool {
    u32::try_from(written.bytes.len()).is_ok_and(|len| written.offset.checked_add(len) == Some(offset))
}

const fn number(answer: &FrontEndReply<Descriptor>) -> Option<u64> {
    match answer {
        FrontEndReply::Number(value) => Some(*value),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
