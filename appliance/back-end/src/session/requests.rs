//! What each request of the front-end does.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{
    ConfigSpace, FrontEndReply, FrontEndRequest, Inflight, Iotlb, LogArea, VringAddresses, VringFile, VringState,
};
use vvu_socket::MessageSocket;

use super::back_channel::BackChannel;
use super::{DEVICE_PROTOCOL_FEATURES, LOG, OWN_FEATURES, OWN_PROTOCOL_FEATURES, Session};
use crate::device::{ConfigWriter, Device, DeviceError};
use crate::dirty_log::{DirtyLog, MapError};
use crate::inflight::{InflightBuffer, InflightError};
use crate::iommu::Change;
use crate::iotlb::IotlbError;
use crate::memory::{MAX_MEMORY_SLOTS, Removed, TableError};
use crate::ring::{RingAddresses, used_len};
use crate::vring::{Vring, is_event};

/// `VHOST_VRING_F_LOG` in the flags of SET_VRING_ADDR: writes to the used ring are logged.
const VRING_LOG: u32 = 1;

/// Why a request is not done.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Its feature is not offered, or the request is not known at all.
    #[error("it is not offered")]
    NotOffered,
    /// Its feature was not negotiated.
    #[error("its feature was not negotiated")]
    NotNegotiated,
    /// Features that were not offered.
    #[error("features {surplus:#x} were not offered")]
    Features {
        /// Those.
        surplus: u64,
    },
    /// A queue that the device does not have.
    #[error("there is no vring {index}")]
    NoVring {
        /// What came.
        index: u32,
    },
    /// A number that cannot be.
    #[error("{field} {value:#x} is not valid")]
    Value {
        /// Name of the field.
        field: &'static str,
        /// What came.
        value: u64,
    },
    /// Only possible while all rings are stopped.
    #[error("rings are in service")]
    InService,
    /// A ring has to be polled.
    #[error("rings without a kick are not polled")]
    Polling,
    /// The log ends before memory does.
    #[error("the dirty log does not cover memory up to {end:#x}")]
    LogTooShort {
        /// First guest address behind all memory.
        end: u64,
    },
    /// Memory.
    #[error(transparent)]
    Memory(#[from] TableError),
    /// Dirty log.
    #[error("dirty log")]
    Log(#[source] MapError),
    /// Inflight buffer.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// IOMMU.
    #[error(transparent)]
    Iotlb(#[from] IotlbError),
    /// The device does not want to.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The back channel.
    #[error("back channel")]
    BackChannel(#[source] io::Error),
}

/// What was done, with the reply if the request has one of its own.
type Outcome = Result<Option<FrontEndReply<OwnedFd>>, Refusal>;

type Request = FrontEndRequest<OwnedFd>;

impl<D: Device> Session<D> {
    /// One line for each request.
    pub(super) fn handle(&mut self, request: Request) -> Outcome {
        self.check_negotiated(&request)?;
        match request {
            Request::GetFeatures => number(self.offered_features().bits()),
            Request::SetFeatures(features) => self.set_features(features),
            Request::GetProtocolFeatures => number(self.offered_protocol_features().bits()),
            Request::SetProtocolFeatures(features) => self.set_protocol_features(features),
            Request::GetQueueNum => number(u64::from(self.device.queue_count())),
            Request::SetOwner => Ok(None),
            Request::ResetOwner => self.disable_rings(),
            Request::ResetDevice => self.reset_device(),
            Request::SetMemTable(table) => self.set_mem_table(table),
            Request::GetMaxMemSlots => number(MAX_MEMORY_SLOTS as u64),
            Request::AddMemReg(region, file) => self.add_mem_reg(region, file),
            Request::RemMemReg(region) => self.rem_mem_reg(&region),
            Request::SetLogBase(area, file) => self.set_log_base(area, file),
            Request::SetLogFd(event) => self.set_log_fd(event),
            Request::SetVringNum(state) => self.set_vring_num(state),
            Request::SetVringAddr(addresses) => self.set_vring_addr(&addresses),
            Request::SetVringBase(state) => self.set_vring_base(state),
            Request::GetVringBase(state) => self.get_vring_base(state),
            Request::SetVringKick(file) => self.set_vring_kick(file),
            Request::SetVringCall(file) => self.set_vring_call(file),
            Request::SetVringErr(file) => self.set_vring_err(file),
            Request::SetVringEnable(state) => self.set_vring_enable(state),
            Request::GetConfig(config) => self.get_config(config),
            Request::SetConfig(config) => self.set_config(&config),
            Request::SetBackendReqFd(socket) => self.set_backend_req_fd(socket),
            Request::Iotlb(message) => self.iotlb(&message),
            Request::GetInflightFd(wanted) => self.get_inflight_fd(wanted),
            Request::SetInflightFd(description, file) => self.set_inflight_fd(&description, file),
            Request::SendRarp(mac) => done(self.device.send_rarp(mac)),
            Request::NetSetMtu(mtu) => done(self.device.set_mtu(mtu)),
            Request::SetVringEndian(_)
            | Request::CreateCryptoSession(_)
            | Request::CloseCryptoSession(_)
            | Request::PostcopyAdvise
            | Request::PostcopyListen
            | Request::PostcopyEnd
            | Request::GpuSetSocket(_)
            | Request::VringKick(_)
            | Request::SetStatus(_)
            | Request::GetStatus
            | Request::GetSharedObject(_)
            | Request::SetDeviceStateFd(..)
            | Request::CheckDeviceState
            | Request::GetShmemConfig
            | Request::Unknown(_) => Err(Refusal::NotOffered),
        }
    }

    /// Requests that belong to a feature need it.
    fn check_negotiated(&self, request: &Request) -> Result<(), Refusal> {
        let needed = match request {
            Request::ResetDevice => ProtocolFeatures::RESET_DEVICE,
            Request::GetMaxMemSlots | Request::AddMemReg(..) | Request::RemMemReg(_) => {
                ProtocolFeatures::CONFIGURE_MEM_SLOTS
            }
            Request::SetLogBase(..) => ProtocolFeatures::LOG_SHMFD,
            Request::GetConfig(_) | Request::SetConfig(_) => ProtocolFeatures::CONFIG,
            Request::SetBackendReqFd(_) => ProtocolFeatures::BACKEND_REQ,
            Request::GetInflightFd(_) | Request::SetInflightFd(..) => ProtocolFeatures::INFLIGHT_SHMFD,
            Request::SendRarp(_) => ProtocolFeatures::RARP,
            Request::NetSetMtu(_) => ProtocolFeatures::MTU,
            _ => ProtocolFeatures::empty(),
        };
        let iotlb = matches!(request, Request::Iotlb(_)) && !self.features.contains(Features::ACCESS_PLATFORM);
        if iotlb || !self.protocol_features.contains(needed) { Err(Refusal::NotNegotiated) } else { Ok(()) }
    }

    fn offered_features(&self) -> Features {
        self.device.features() | OWN_FEATURES
    }

    fn offered_protocol_features(&self) -> ProtocolFeatures {
        (self.device.protocol_features() & DEVICE_PROTOCOL_FEATURES) | OWN_PROTOCOL_FEATURES
    }

    fn set_features(&mut self, features: Features) -> Outcome {
        let surplus = features.difference(self.offered_features());
        if !surplus.is_empty() {
            return Err(Refusal::Features { surplus: surplus.bits() });
        }
        let changed = features.symmetric_difference(self.features);
        if !changed.difference(Features::LOG_ALL).is_empty() && !self.is_idle() {
            return Err(Refusal::InService);
        }
        let logs = features.contains(Features::LOG_ALL);
        check_log(self.log.as_deref().filter(|_| logs), self.memory.snapshot().guest_end())?;
        self.features = features;
        for vring in &self.vrings {
            vring.set_features(features);
        }
        self.device.negotiated(features.difference(OWN_FEATURES));
        self.renew_views();
        Ok(None)
    }

    fn set_protocol_features(&mut self, features: ProtocolFeatures) -> Outcome {
        let surplus = features.difference(self.offered_protocol_features());
        if !surplus.is_empty() {
            return Err(Refusal::Features { surplus: surplus.bits() });
        }
        self.protocol_features = features;
        Ok(None)
    }

    fn disable_rings(&mut self) -> Outcome {
        for vring in &self.vrings {
            vring.set_enabled(false);
        }
        Ok(None)
    }

    fn reset_device(&mut self) -> Outcome {
        self.disable_rings()?;
        self.iommu.clear();
        self.device.reset();
        Ok(None)
    }

    fn set_mem_table(&mut self, table: Vec<(MemoryRegion, OwnedFd)>) -> Outcome {
        self.check_log_of(table.iter().map(|(region, _)| region))?;
        let removed = self.memory.replace(table)?;
        self.follow_memory(removed)
    }

    fn add_mem_reg(&mut self, region: MemoryRegion, file: OwnedFd) -> Outcome {
        self.check_log_of([&region])?;
        let removed = self.memory.add(region, file)?;
        self.follow_memory(removed)
    }

    fn rem_mem_reg(&mut self, region: &MemoryRegion) -> Outcome {
        let removed = self.memory.remove(region)?;
        self.follow_memory(removed)
    }

    /// When this is answered, nothing works on a region that is gone.
    fn follow_memory(&self, removed: Removed) -> Outcome {
        self.renew_views();
        removed.wait();
        Ok(None)
    }

    fn check_log_of<'a>(&self, regions: impl IntoIterator<Item = &'a MemoryRegion>) -> Result<(), Refusal> {
        let logs = self.features.contains(Features::LOG_ALL);
        let end = regions.into_iter().map(MemoryRegion::guest_end).max().unwrap_or(0);
        check_log(self.log.as_deref().filter(|_| logs), end)
    }

    fn set_log_base(&mut self, area: LogArea, file: OwnedFd) -> Outcome {
        let log = DirtyLog::map(&File::from(file), area.mmap_offset.0, area.size).map_err(Refusal::Log)?;
        check_log(Some(&log), self.memory.snapshot().guest_end())?;
        self.log = Some(Arc::new(log));
        self.renew_views();
        Ok(Some(FrontEndReply::LogBase))
    }

    fn set_log_fd(&mut self, event: OwnedFd) -> Outcome {
        self.log_event = Some(event);
        Ok(None)
    }

    fn vring(&self, index: u32) -> Result<&Vring, Refusal> {
        // All 32 bits count.
        usize::try_from(index).ok().and_then(|index| self.vrings.get(index)).ok_or(Refusal::NoVring { index })
    }

    fn set_vring_num(&self, state: VringState) -> Outcome {
        let vring = self.vring(state.index)?;
        match u16::try_from(state.num) {
            Ok(size) if size > 0 && size <= vring.max_size() => vring.set_size(size),
            _ => return Err(Refusal::Value { field: "ring size", value: u64::from(state.num) }),
        }
        Ok(None)
    }

    fn set_vring_addr(&self, addresses: &VringAddresses) -> Outcome {
        let vring = self.vring(addresses.index)?;
        if addresses.flags & !VRING_LOG != 0 {
            return Err(Refusal::Value { field: "flags", value: u64::from(addresses.flags) });
        }
        let log = (addresses.flags & VRING_LOG != 0).then_some(addresses.log);
        let VringAddresses { descriptors, available, used, .. } = *addresses;
        vring.set_addresses(RingAddresses { descriptors, available, used }, log);
        vring.wait_for_view();
        Ok(None)
    }

    fn set_vring_base(&self, state: VringState) -> Outcome {
        let vring = self.vring(state.index)?;
        let base = u16::try_from(state.num);
        vring.set_base(base.map_err(|_| Refusal::Value { field: "base", value: u64::from(state.num) })?);
        Ok(None)
    }

    fn get_vring_base(&self, state: VringState) -> Outcome {
        let num = u32::from(self.vring(state.index)?.take_base());
        Ok(Some(FrontEndReply::VringState(VringState { index: state.index, num })))
    }

    fn set_vring_kick(&self, file: VringFile<OwnedFd>) -> Outcome {
        let vring = self.vring(u32::from(file.index))?;
        let kick = file.descriptor.ok_or(Refusal::Polling)?;
        vring.set_kick(accept_event("kick", Some(kick)));
        Ok(None)
    }

    fn set_vring_call(&self, file: VringFile<OwnedFd>) -> Outcome {
        self.vring(u32::from(file.index))?.set_call(accept_event("call", file.descriptor));
        Ok(None)
    }

    fn set_vring_err(&self, file: VringFile<OwnedFd>) -> Outcome {
        self.vring(u32::from(file.index))?.set_error(accept_event("err", file.descriptor));
        Ok(None)
    }

    fn set_vring_enable(&self, state: VringState) -> Outcome {
        let vring = self.vring(state.index)?;
        match state.num {
            0 => vring.set_enabled(false),
            1 => vring.set_enabled(true),
            other => return Err(Refusal::Value { field: "enable", value: u64::from(other) }),
        }
        Ok(None)
    }

    fn get_config(&self, wanted: ConfigSpace) -> Outcome {
        let bytes = self.device.read_config(wanted.offset, wanted.bytes.len());
        Ok(Some(FrontEndReply::Config(bytes.map(|bytes| ConfigSpace { bytes, ..wanted }))))
    }

    fn set_config(&self, config: &ConfigSpace) -> Outcome {
        let writer = match config.flags {
            0 => ConfigWriter::Driver,
            1 => ConfigWriter::Migration,
            other => return Err(Refusal::Value { field: "flags", value: u64::from(other) }),
        };
        done(self.device.write_config(config.offset, &config.bytes, writer))
    }

    fn set_backend_req_fd(&mut self, socket: OwnedFd) -> Outcome {
        if let Some(former) = self.back_channel.take() {
            former.abort();
        }
        let socket = MessageSocket::new(UnixStream::from(socket)).map_err(Refusal::BackChannel)?;
        let channel = BackChannel {
            socket,
            notices: Arc::clone(&self.notices),
            vrings: self.vrings.clone(),
            acknowledged: self.protocol_features.contains(ProtocolFeatures::REPLY_ACK),
            config: self.protocol_features.contains(ProtocolFeatures::CONFIG),
        };
        self.back_channel = Some(tokio::spawn(channel.run()).abort_handle());
        Ok(None)
    }

    fn iotlb(&self, message: &Iotlb) -> Outcome {
        match self.iommu.apply(message)? {
            Change::Updated => self.vrings.iter().for_each(Vring::look_again),
            Change::Invalidated => self.leave_mappings(message),
        }
        number(0)
    }

    /// Rings whose own structures lay in what is gone let go of it.
    fn leave_mappings(&self, gone: &Iotlb) {
        let hit = self.vrings.iter().filter(|vring| may_lie_in(vring, gone)).collect::<Vec<_>>();
        for vring in &hit {
            vring.set_view(self.view());
        }
        for vring in hit {
            vring.wait_for_view();
        }
    }

    fn get_inflight_fd(&self, wanted: Inflight) -> Outcome {
        let Inflight { queue_count, queue_size, .. } = wanted;
        if queue_count > self.device.queue_count() {
            return Err(Refusal::Value { field: "queue count", value: u64::from(queue_count) });
        }
        if queue_size > self.device.max_queue_size() {
            return Err(Refusal::Value { field: "queue size", value: u64::from(queue_size) });
        }
        let (_buffer, file, description) = InflightBuffer::create(queue_count, queue_size)?;
        Ok(Some(FrontEndReply::Inflight(description, file)))
    }

    fn set_inflight_fd(&mut self, description: &Inflight, file: OwnedFd) -> Outcome {
        if !self.is_idle() {
            return Err(Refusal::InService);
        }
        // More queues than the device has are no harm, and what a front-end does not use may be missing.
        self.inflight = Some(InflightBuffer::map(&File::from(file), description)?);
        for vring in &self.vrings {
            vring.set_inflight(self.inflight.clone());
        }
        Ok(None)
    }
}

fn number(value: u64) -> Outcome {
    Ok(Some(FrontEndReply::Number(value)))
}

fn done(outcome: Result<(), DeviceError>) -> Outcome {
    Ok(outcome.map(|()| None)?)
}

fn check_log(log: Option<&DirtyLog>, end: u64) -> Result<(), Refusal> {
    if log.is_none_or(|log| log.covers(0, end)) { Ok(()) } else { Err(Refusal::LogTooShort { end }) }
}

/// Whether a part of the ring may lie in a range of I/O addresses. What is no range stands for all of them.
fn may_lie_in(vring: &Vring, gone: &Iotlb) -> bool {
    let Some((addresses, size)) = vring.addresses() else { return false };
    let Some(end) = gone.iova.checked_add(gone.size).filter(|end| *end > gone.iova) else { return true };
    // The descriptor table is the longest part: 16 bytes for each entry.
    let part_len = u64::from(used_len(u32::from(size))).max(16 * u64::from(size));
    [addresses.descriptors, addresses.available, addresses.used]
        .iter()
        .any(|part| *part < end && gone.iova < part.saturating_add(part_len))
}

/// A descriptor that is no event is dropped: the ring stays without it.
fn accept_event(what: &str, descriptor: Option<OwnedFd>) -> Option<OwnedFd> {
    let descriptor = descriptor?;
    if is_event(&descriptor) {
        return Some(descriptor);
    }
    if let Some(suppressed) = LOG.admit(Instant::now()) {
        tracing::warn!(suppressed, "front-end gave a {what} that is no eventfd; ignored");
    }
    None
}
