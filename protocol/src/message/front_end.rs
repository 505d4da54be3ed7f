//! Requests of the front-end, typed.

use std::convert::Infallible;

use crate::DecodeError;
use crate::features::{Features, ProtocolFeatures};
use crate::memory::{MAX_TABLE_REGIONS, MemoryRegion};
use crate::payload::{Reader, Writer};

use super::payloads::{
    ConfigSpace, DeviceStateTransfer, Inflight, Iotlb, LogArea, VringAddresses, VringFile, VringState,
};
use super::request_table::{FRONT_END_REQUESTS, RequestRow, known_request, row};
use super::{RawMessage, at_most_one, single};

/// A request of the front-end ("Front-end message types"). `F` stands for a file descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrontEndRequest<F> {
    /// GET_FEATURES (1). Asks for the device features.
    GetFeatures,
    /// SET_FEATURES (2). Sets the device features that were negotiated.
    SetFeatures(Features),
    /// SET_OWNER (3). Starts the session.
    SetOwner,
    /// RESET_OWNER (4). Deprecated; disables the device.
    ResetOwner,
    /// SET_MEM_TABLE (5). Replaces the whole memory table.
    SetMemTable(Vec<(MemoryRegion, F)>),
    /// SET_LOG_BASE (6). Hands over the dirty log.
    SetLogBase(LogArea, F),
    /// SET_LOG_FD (7). Hands over an eventfd for log updates.
    SetLogFd(F),
    /// SET_VRING_NUM (8). Sets the size of a vring.
    SetVringNum(VringState),
    /// SET_VRING_ADDR (9). Sets the addresses of a vring.
    SetVringAddr(VringAddresses),
    /// SET_VRING_BASE (10). Sets the next available index of a vring.
    SetVringBase(VringState),
    /// GET_VRING_BASE (11). Stops a vring and asks for its next available index.
    GetVringBase(VringState),
    /// SET_VRING_KICK (12). Hands over the kick eventfd of a vring and starts it.
    SetVringKick(VringFile<F>),
    /// SET_VRING_CALL (13). Hands over the call eventfd of a vring.
    SetVringCall(VringFile<F>),
    /// SET_VRING_ERR (14). Hands over the error eventfd of a vring.
    SetVringErr(VringFile<F>),
    /// GET_PROTOCOL_FEATURES (15). Asks for the protocol features.
    GetProtocolFeatures,
    /// SET_PROTOCOL_FEATURES (16). Sets the protocol features that were negotiated.
    SetProtocolFeatures(ProtocolFeatures),
    /// GET_QUEUE_NUM (17). Asks for the largest number of queues.
    GetQueueNum,
    /// SET_VRING_ENABLE (18). Enables or disables a vring.
    SetVringEnable(VringState),
    /// SEND_RARP (19). Asks a net device to announce this MAC address.
    SendRarp(u64),
    /// NET_SET_MTU (20). Sets the MTU of a net device.
    NetSetMtu(u64),
    /// SET_BACKEND_REQ_FD (21). Hands over the socket for requests of the back-end.
    SetBackendReqFd(F),
    /// IOTLB_MSG (22). Updates or invalidates the device IOTLB.
    Iotlb(Iotlb),
    /// SET_VRING_ENDIAN (23). Sets the byte order of a vring.
    SetVringEndian(VringState),
    /// GET_CONFIG (24). Reads from the configuration space.
    GetConfig(ConfigSpace),
    /// SET_CONFIG (25). Writes to the configuration space.
    SetConfig(ConfigSpace),
    /// CREATE_CRYPTO_SESSION (26). Creates a crypto session; carried as opaque bytes.
    CreateCryptoSession(Vec<u8>),
    /// CLOSE_CRYPTO_SESSION (27). Closes a crypto session.
    CloseCryptoSession(u64),
    /// POSTCOPY_ADVISE (28). Asks for a userfaultfd.
    PostcopyAdvise,
    /// POSTCOPY_LISTEN (29). Postcopy starts.
    PostcopyListen,
    /// POSTCOPY_END (30). Postcopy has ended.
    PostcopyEnd,
    /// GET_INFLIGHT_FD (31). Asks for an inflight buffer.
    GetInflightFd(Inflight),
    /// SET_INFLIGHT_FD (32). Hands over an inflight buffer.
    SetInflightFd(Inflight, F),
    /// GPU_SET_SOCKET (33). Hands over the socket to the display.
    GpuSetSocket(F),
    /// RESET_DEVICE (34). Resets the device.
    ResetDevice,
    /// VRING_KICK (35). A kick as a message.
    VringKick(VringState),
    /// GET_MAX_MEM_SLOTS (36). Asks for the number of memory slots.
    GetMaxMemSlots,
    /// ADD_MEM_REG (37). Adds one memory region.
    AddMemReg(MemoryRegion, F),
    /// REM_MEM_REG (38). Removes one memory region.
    RemMemReg(MemoryRegion),
    /// SET_STATUS (39). Sets the virtio device status.
    SetStatus(u64),
    /// GET_STATUS (40). Asks for the virtio device status.
    GetStatus,
    /// GET_SHARED_OBJECT (41). Asks for a shared object.
    GetSharedObject([u8; 16]),
    /// SET_DEVICE_STATE_FD (42). Hands over a pipe for the state of the device.
    SetDeviceStateFd(DeviceStateTransfer, F),
    /// CHECK_DEVICE_STATE (43). Asks whether the transfer of the state succeeded.
    CheckDeviceState,
    /// GET_SHMEM_CONFIG (44). Asks for the shared memory regions.
    GetShmemConfig,
    /// A request that the specification, as known here, does not have.
    Unknown(RawMessage<F>),
}

impl<F> FrontEndRequest<F> {
    /// Reads a request.
    ///
    /// # Errors
    /// [`DecodeError`] if `message` is a reply, or its payload or number of descriptors does not fit the request code.
    pub fn decode(message: RawMessage<F>) -> Result<Self, DecodeError> {
        match known_request(&FRONT_END_REQUESTS, &message)? {
            Some(row) => Self::decode_known(row, message),
            None => Ok(Self::Unknown(message)),
        }
    }

    fn decode_known(row: &RequestRow, message: RawMessage<F>) -> Result<Self, DecodeError> {
        let (name, payload, descriptors) = (row.name, message.payload.as_slice(), message.descriptors);
        let mut reader = Reader::new(name, payload);
        let request = match row.code {
            1 => Self::GetFeatures,
            2 => Self::SetFeatures(Features::from_bits_retain(reader.u64()?)),
            3 => Self::SetOwner,
            4 => Self::ResetOwner,
            5 => Self::SetMemTable(read_table(name, &mut reader, descriptors)?),
            6 => Self::SetLogBase(LogArea::read(&mut reader)?, single(name, descriptors)?),
            7 => Self::SetLogFd(single(name, descriptors)?),
            8 => Self::SetVringNum(VringState::read(&mut reader)?),
            9 => Self::SetVringAddr(VringAddresses::read(&mut reader)?),
            10 => Self::SetVringBase(VringState::read(&mut reader)?),
            11 => Self::GetVringBase(VringState::read(&mut reader)?),
            12 => Self::SetVringKick(VringFile::read(name, &mut reader, at_most_one(name, descriptors)?)?),
            13 => Self::SetVringCall(VringFile::read(name, &mut reader, at_most_one(name, descriptors)?)?),
            14 => Self::SetVringErr(VringFile::read(name, &mut reader, at_most_one(name, descriptors)?)?),
            15 => Self::GetProtocolFeatures,
            16 => Self::SetProtocolFeatures(ProtocolFeatures::from_bits_retain(reader.u64()?)),
            17 => Self::GetQueueNum,
            18 => Self::SetVringEnable(VringState::read(&mut reader)?),
            19 => Self::SendRarp(reader.u64()?),
            20 => Self::NetSetMtu(reader.u64()?),
            21 => Self::SetBackendReqFd(single(name, descriptors)?),
            22 => Self::Iotlb(Iotlb::read(&mut reader)?),
            23 => Self::SetVringEndian(VringState::read(&mut reader)?),
            24 => Self::GetConfig(ConfigSpace::read(name, &mut reader)?),
            25 => Self::SetConfig(ConfigSpace::read(name, &mut reader)?),
            26 => Self::CreateCryptoSession(reader.bytes(payload.len())?.to_vec()),
            27 => Self::CloseCryptoSession(reader.u64()?),
            28 => Self::PostcopyAdvise,
            29 => Self::PostcopyListen,
            30 => Self::PostcopyEnd,
            31 => Self::GetInflightFd(Inflight::read(reader.bytes(payload.len())?, name)?),
            32 => Self::SetInflightFd(Inflight::read(reader.bytes(payload.len())?, name)?, single(name, descriptors)?),
            33 => Self::GpuSetSocket(single(name, descriptors)?),
            34 => Self::ResetDevice,
            35 => Self::VringKick(VringState::read(&mut reader)?),
            36 => Self::GetMaxMemSlots,
            37 => {
                reader.skip(8)?;
                Self::AddMemReg(MemoryRegion::read(&mut reader)?, single(name, descriptors)?)
            }
            38 => {
                reader.skip(8)?;
                Self::RemMemReg(MemoryRegion::read(&mut reader)?)
            }
            39 => Self::SetStatus(reader.u64()?),
            40 => Self::GetStatus,
            41 => Self::GetSharedObject(reader.array()?),
            42 => Self::SetDeviceStateFd(DeviceStateTransfer::read(name, &mut reader)?, single(name, descriptors)?),
            43 => Self::CheckDeviceState,
            44 => Self::GetShmemConfig,
            found => return Err(DecodeError::Value { what: name, field: "request", value: u64::from(found) }),
        };
        reader.finish()?;
        Ok(request)
    }

    /// Request code of the specification.
    #[must_use]
    pub fn code(&self) -> u32 {
        match self {
            Self::GetFeatures => 1,
            Self::SetFeatures(..) => 2,
            Self::SetOwner => 3,
            Self::ResetOwner => 4,
            Self::SetMemTable(..) => 5,
            Self::SetLogBase(..) => 6,
            Self::SetLogFd(..) => 7,
            Self::SetVringNum(..) => 8,
            Self::SetVringAddr(..) => 9,
            Self::SetVringBase(..) => 10,
            Self::GetVringBase(..) => 11,
            Self::SetVringKick(..) => 12,
            Self::SetVringCall(..) => 13,
            Self::SetVringErr(..) => 14,
            Self::GetProtocolFeatures => 15,
            Self::SetProtocolFeatures(..) => 16,
            Self::GetQueueNum => 17,
            Self::SetVringEnable(..) => 18,
            Self::SendRarp(..) => 19,
            Self::NetSetMtu(..) => 20,
            Self::SetBackendReqFd(..) => 21,
            Self::Iotlb(..) => 22,
            Self::SetVringEndian(..) => 23,
            Self::GetConfig(..) => 24,
            Self::SetConfig(..) => 25,
            Self::CreateCryptoSession(..) => 26,
            Self::CloseCryptoSession(..) => 27,
            Self::PostcopyAdvise => 28,
            Self::PostcopyListen => 29,
            Self::PostcopyEnd => 30,
            Self::GetInflightFd(..) => 31,
            Self::SetInflightFd(..) => 32,
            Self::GpuSetSocket(..) => 33,
            Self::ResetDevice => 34,
            Self::VringKick(..) => 35,
            Self::GetMaxMemSlots => 36,
            Self::AddMemReg(..) => 37,
            Self::RemMemReg(..) => 38,
            Self::SetStatus(..) => 39,
            Self::GetStatus => 40,
            Self::GetSharedObject(..) => 41,
            Self::SetDeviceStateFd(..) => 42,
            Self::CheckDeviceState => 43,
            Self::GetShmemConfig => 44,
            Self::Unknown(message) => message.header.request,
        }
    }

    /// What the specification says of this request, or `None` for [`Self::Unknown`].
    #[must_use]
    pub fn row(&self) -> Option<&'static RequestRow> {
        row(&FRONT_END_REQUESTS, self.code())
    }

    /// Name as in the specification.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.row().map_or("unknown request", |row| row.name)
    }

    /// Writes the request.
    #[must_use]
    pub fn encode(self, needs_reply: bool) -> RawMessage<F> {
        let code = self.code();
        let (writer, descriptors) = self.into_body();
        RawMessage::request(code, needs_reply, writer.done(), descriptors)
    }

    /// The same request with other descriptors, each made of the one before.
    #[must_use]
    pub fn map_descriptors<G>(self, mut change: impl FnMut(F) -> G) -> FrontEndRequest<G> {
        let Ok(request) = self.try_map_descriptors(|file| Ok::<G, Infallible>(change(file)));
        request
    }

    /// The same request for another kind of descriptor, or `None` if it carries descriptors or is not known.
    #[must_use]
    pub fn without_descriptors<G>(self) -> Option<FrontEndRequest<G>> {
        match self {
            Self::Unknown(..) => None,
            known => known.try_map_descriptors(|_| Err(())).ok(),
        }
    }

    /// The same request with other descriptors, each made of the one before.
    ///
    /// # Errors
    /// The first error of `change`.
    pub fn try_map_descriptors<G, E>(self, mut change: impl FnMut(F) -> Result<G, E>) -> Result<FrontEndRequest<G>, E> {
        use FrontEndRequest as To;
        Ok(match self {
            Self::SetMemTable(regions) => {
                let regions = regions.into_iter().map(|(region, file)| Ok((region, change(file)?)));
                To::SetMemTable(regions.collect::<Result<_, E>>()?)
            }
            Self::SetLogBase(area, file) => To::SetLogBase(area, change(file)?),
            Self::SetLogFd(file) => To::SetLogFd(change(file)?),
            Self::SetVringKick(file) => To::SetVringKick(file.try_map(change)?),
            Self::SetVringCall(file) => To::SetVringCall(file.try_map(change)?),
            Self::SetVringErr(file) => To::SetVringErr(file.try_map(change)?),
            Self::SetBackendReqFd(file) => To::SetBackendReqFd(change(file)?),
            Self::SetInflightFd(inflight, file) => To::SetInflightFd(inflight, change(file)?),
            Self::GpuSetSocket(file) => To::GpuSetSocket(change(file)?),
            Self::AddMemReg(region, file) => To::AddMemReg(region, change(file)?),
            Self::SetDeviceStateFd(transfer, file) => To::SetDeviceStateFd(transfer, change(file)?),
            Self::Unknown(RawMessage { header, payload, descriptors }) => {
                let descriptors = descriptors.into_iter().map(change).collect::<Result<_, E>>()?;
                To::Unknown(RawMessage { header, payload, descriptors })
            }
            Self::GetFeatures => To::GetFeatures,
            Self::SetOwner => To::SetOwner,
            Self::ResetOwner => To::ResetOwner,
            Self::GetProtocolFeatures => To::GetProtocolFeatures,
            Self::GetQueueNum => To::GetQueueNum,
            Self::PostcopyAdvise => To::PostcopyAdvise,
            Self::PostcopyListen => To::PostcopyListen,
            Self::PostcopyEnd => To::PostcopyEnd,
            Self::ResetDevice => To::ResetDevice,
            Self::GetMaxMemSlots => To::GetMaxMemSlots,
            Self::GetStatus => To::GetStatus,
            Self::CheckDeviceState => To::CheckDeviceState,
            Self::GetShmemConfig => To::GetShmemConfig,
            Self::SetFeatures(content) => To::SetFeatures(content),
            Self::SetVringNum(content) => To::SetVringNum(content),
            Self::SetVringAddr(content) => To::SetVringAddr(content),
            Self::SetVringBase(content) => To::SetVringBase(content),
            Self::GetVringBase(content) => To::GetVringBase(content),
            Self::SetProtocolFeatures(content) => To::SetProtocolFeatures(content),
            Self::SetVringEnable(content) => To::SetVringEnable(content),
            Self::SendRarp(content) => To::SendRarp(content),
            Self::NetSetMtu(content) => To::NetSetMtu(content),
            Self::Iotlb(content) => To::Iotlb(content),
            Self::SetVringEndian(content) => To::SetVringEndian(content),
            Self::GetConfig(content) => To::GetConfig(content),
            Self::SetConfig(content) => To::SetConfig(content),
            Self::CreateCryptoSession(content) => To::CreateCryptoSession(content),
            Self::CloseCryptoSession(content) => To::CloseCryptoSession(content),
            Self::GetInflightFd(content) => To::GetInflightFd(content),
            Self::VringKick(content) => To::VringKick(content),
            Self::RemMemReg(content) => To::RemMemReg(content),
            Self::SetStatus(content) => To::SetStatus(content),
            Self::GetSharedObject(content) => To::GetSharedObject(content),
        })
    }

    fn into_body(self) -> (Writer, Vec<F>) {
        match self {
            Self::SetMemTable(regions) => write_table(regions),
            Self::GetFeatures
            | Self::SetOwner
            | Self::ResetOwner
            | Self::GetProtocolFeatures
            | Self::GetQueueNum
            | Self::PostcopyAdvise
            | Self::PostcopyListen
            | Self::PostcopyEnd
            | Self::ResetDevice
            | Self::GetMaxMemSlots
            | Self::GetStatus
            | Self::CheckDeviceState
            | Self::GetShmemConfig => (Writer::default(), Vec::new()),
            Self::SetFeatures(value) => (Writer::default().u64(value.bits()), Vec::new()),
            Self::SetProtocolFeatures(value) => (Writer::default().u64(value.bits()), Vec::new()),
            Self::SetLogBase(area, descriptor) => (area.write(Writer::default()), vec![descriptor]),
            Self::SetLogFd(descriptor) | Self::SetBackendReqFd(descriptor) | Self::GpuSetSocket(descriptor) => {
                (Writer::default(), vec![descriptor])
            }
            Self::SetVringNum(state)
            | Self::SetVringBase(state)
            | Self::GetVringBase(state)
            | Self::SetVringEnable(state)
            | Self::SetVringEndian(state)
            | Self::VringKick(state) => (state.write(Writer::default()), Vec::new()),
            Self::SetVringAddr(addresses) => (addresses.write(Writer::default()), Vec::new()),
            Self::SetVringKick(file) | Self::SetVringCall(file) | Self::SetVringErr(file) => {
                (Writer::default().u64(file.value()), file.descriptor.into_iter().collect())
            }
            Self::SendRarp(value)
            | Self::NetSetMtu(value)
            | Self::CloseCryptoSession(value)
            | Self::SetStatus(value) => (Writer::default().u64(value), Vec::new()),
            Self::Iotlb(iotlb) => (iotlb.write(Writer::default()), Vec::new()),
            Self::GetConfig(config) | Self::SetConfig(config) => (config.write(Writer::default()), Vec::new()),
            Self::CreateCryptoSession(bytes) => (Writer::default().bytes(&bytes), Vec::new()),
            Self::GetInflightFd(inflight) => (inflight.write(Writer::default()), Vec::new()),
            Self::SetInflightFd(inflight, descriptor) => (inflight.write(Writer::default()), vec![descriptor]),
            Self::AddMemReg(region, descriptor) => (region.write(Writer::default().zeros(8)), vec![descriptor]),
            Self::RemMemReg(region) => (region.write(Writer::default().zeros(8)), Vec::new()),
            Self::GetSharedObject(uuid) => (Writer::default().bytes(&uuid), Vec::new()),
            Self::SetDeviceStateFd(transfer, descriptor) => (transfer.write(Writer::default()), vec![descriptor]),
            Self::Unknown(message) => (Writer::default().bytes(&message.payload), message.descriptors),
        }
    }
}

fn read_table<F>(
    what: &'static str,
    reader: &mut Reader<'_>,
    descriptors: Vec<F>,
) -> Result<Vec<(MemoryRegion, F)>, DecodeError> {
    let (count, _padding) = (reader.u32()?, reader.u32()?);
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if count > MAX_TABLE_REGIONS {
        return Err(DecodeError::Value { what, field: "region count", value: count as u64 });
    }
    if descriptors.len() != count {
        return Err(DecodeError::Descriptors { what, expected: count..=count, found: descriptors.len() });
    }
    descriptors.into_iter().map(|descriptor| Ok((MemoryRegion::read(reader)?, descriptor))).collect()
}

fn write_table<F>(regions: Vec<(MemoryRegion, F)>) -> (Writer, Vec<F>) {
    let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
    let mut writer = Writer::default().u32(count).u32(0);
    let mut descriptors = Vec::with_capacity(regions.len());
    for (region, descriptor) in regions {
        writer = region.write(writer);
        descriptors.push(descriptor);
    }
    (writer, descriptors)
}
