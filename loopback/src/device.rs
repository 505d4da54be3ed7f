//! One generic vhost-user device of a VMM, as QEMU's `vhost-user-test-device-pci` is one: the front-end of the bridge's
//! control device or window device.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use vvu_agent::ring::{QUEUE_SIZE, RingAddresses};
use vvu_protocol::DecodeError;
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{ConfigSpace, FrontEndReply, FrontEndRequest, VringAddresses, VringFile, VringState};
use vvu_socket::{MessageSocket, SocketError};

use crate::memory::user_address;

type Reply = FrontEndReply<OwnedFd>;
type Request = FrontEndRequest<OwnedFd>;

/// Why a device is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Nobody listens at its socket.
    #[error("cannot connect to {path}: is the bridge running, with this directory as --appliance-dir?")]
    Connect {
        /// The socket.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The bridge has closed its socket.
    #[error("bridge has closed the {device} socket")]
    Closed {
        /// Name of the device.
        device: &'static str,
    },
    /// The stream failed.
    #[error("{device} socket")]
    Socket {
        /// Name of the device.
        device: &'static str,
        /// Why.
        source: SocketError,
    },
    /// What came is no reply to the request.
    #[error("bridge's reply to {request}")]
    Reply {
        /// Name of the request.
        request: &'static str,
        /// What is wrong with it.
        source: DecodeError,
    },
    /// What the bridge does is nothing that QEMU would accept, or survive.
    #[error("{device} device: expected {expected}, found {found}")]
    Rule {
        /// Name of the device.
        device: &'static str,
        /// What is right.
        expected: &'static str,
        /// What came.
        found: String,
    },
    /// A descriptor could not be made.
    #[error("descriptor for the {device} device")]
    Io {
        /// Name of the device.
        device: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl DeviceError {
    fn of_socket(device: &'static str, source: SocketError) -> Self {
        if has_closed(&source) { Self::Closed { device } } else { Self::Socket { device, source } }
    }
}

/// Whether the other end is gone: with what nobody has read, that is an error of the socket.
pub(crate) fn has_closed(error: &SocketError) -> bool {
    let kinds = [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
    matches!(error, SocketError::Io(error) if kinds.contains(&error.kind()))
}

/// A queue as the device gets to know it.
#[derive(Debug)]
pub struct Vring {
    /// Guest-physical addresses.
    pub addresses: RingAddresses,
    /// Tells the device of new buffers.
    pub kick: OwnedFd,
    /// The device tells of used buffers.
    pub call: OwnedFd,
}

/// One device.
#[derive(Debug)]
pub struct Device {
    name: &'static str,
    socket: MessageSocket,
    queue_count: u32,
    /// All vrings are enabled: the bridge may use the back channel.
    running: bool,
}

impl Device {
    /// Connects, and does what QEMU does before the guest runs. Answers the back channel, too.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub async fn realize(
        name: &'static str,
        path: &Path,
        queue_count: u32,
    ) -> Result<(Self, MessageSocket), DeviceError> {
        use FrontEndRequest as R;
        let stream = UnixStream::connect(path)
            .map_err(|source| DeviceError::Connect { path: path.display().to_string(), source })?;
        let io = |source| DeviceError::Io { device: name, source };
        let mut device = Self { name, socket: MessageSocket::new(stream).map_err(io)?, queue_count, running: false };
        let features = Features::from_bits_retain(device.number(R::GetFeatures).await?);
        device.insist(
            features.contains(Features::VERSION_1 | Features::PROTOCOL_FEATURES),
            "VERSION_1 and PROTOCOL_FEATURES",
            &features,
        )?;
        let protocol = ProtocolFeatures::from_bits_retain(device.number(R::GetProtocolFeatures).await?);
        let needed = ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::CONFIG | ProtocolFeatures::REPLY_ACK;
        // With memory slots, a reset of the appliance kills QEMU 11.
        let fits = protocol.contains(needed) && !protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS);
        device.insist(fits, "BACKEND_REQ, CONFIG and REPLY_ACK, no CONFIGURE_MEM_SLOTS", &protocol)?;
        device.done(R::SetProtocolFeatures(protocol)).await?;
        let queues = device.number(R::GetQueueNum).await?;
        device.insist(queues == u64::from(queue_count), "the queues that it is to have", &queues)?;
        let (ours, theirs) = UnixStream::pair().map_err(io)?;
        device.done(R::SetBackendReqFd(theirs.into())).await?;
        device.done(R::SetOwner).await?;
        if protocol.contains(ProtocolFeatures::SHMEM) {
            let reply = device.ask(R::GetShmemConfig).await?;
            // QEMU asserts it.
            let fits = matches!(&reply, FrontEndReply::ShmemConfig(config)
                if config.regions.iter().map(|(_, len)| len).sum::<u64>().is_power_of_two());
            device.insist(fits, "regions whose lengths add up to a power of two", &reply)?;
        }
        Ok((device, MessageSocket::new(ours).map_err(io)?))
    }

    /// The guest has set DRIVER_OK.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub async fn start(&mut self, table: Vec<(MemoryRegion, OwnedFd)>, rings: Vec<Vring>) -> Result<(), DeviceError> {
        use FrontEndRequest as R;
        self.done(R::SetFeatures(Features::VERSION_1 | Features::PROTOCOL_FEATURES)).await?;
        self.done(R::SetMemTable(table)).await?;
        for (index, ring) in (0_u8..).zip(rings) {
            let state = |num| VringState { index: u32::from(index), num };
            self.done(R::SetVringNum(state(u32::from(QUEUE_SIZE)))).await?;
            self.done(R::SetVringBase(state(0))).await?;
            let RingAddresses { descriptors, available, used } = ring.addresses;
            self.done(R::SetVringAddr(VringAddresses {
                index: u32::from(index),
                flags: 0,
                descriptors: user_address(descriptors),
                used: user_address(used),
                available: user_address(available),
                log: 0,
            }))
            .await?;
            self.done(R::SetVringKick(VringFile { index, descriptor: Some(ring.kick) })).await?;
            self.done(R::SetVringCall(VringFile { index, descriptor: Some(ring.call) })).await?;
        }
        self.running = true;
        for index in 0..self.queue_count {
            self.done(R::SetVringEnable(VringState { index, num: 1 })).await?;
        }
        Ok(())
    }

    /// Whether the bridge may use the back channel.
    #[must_use]
    pub const fn is_running(&self) -> bool {
        self.running
    }

    /// Hands out a new memory table, as QEMU does for each change of its machine's memory.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub async fn hand_out(&mut self, table: Vec<(MemoryRegion, OwnedFd)>) -> Result<(), DeviceError> {
        self.done(FrontEndRequest::SetMemTable(table)).await
    }

    /// Reads `len` bytes of the configuration space, from its start.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub async fn read_config(&mut self, len: usize) -> Result<Vec<u8>, DeviceError> {
        let wanted = ConfigSpace { offset: 0, flags: 0, bytes: vec![0; len] };
        match self.ask(FrontEndRequest::GetConfig(wanted)).await? {
            FrontEndReply::Config(Some(config)) => Ok(config.bytes),
            other => Err(self.rule("the configuration space", &other)),
        }
    }

    /// Writes the whole configuration space, as QEMU does whatever the guest has written of it.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub async fn write_config(&mut self, bytes: Vec<u8>) -> Result<(), DeviceError> {
        self.done(FrontEndRequest::SetConfig(ConfigSpace { offset: 0, flags: 0, bytes })).await
    }

    /// Waits until the bridge closes the socket, or says what nobody has asked for. May be cancelled.
    pub async fn broken(&mut self) -> DeviceError {
        match self.socket.recv().await {
            Ok(None) => DeviceError::Closed { device: self.name },
            Ok(Some(message)) => self.rule("silence", &message.header.request),
            Err(source) => DeviceError::of_socket(self.name, source),
        }
    }

    /// What the bridge does is wrong.
    pub fn rule(&self, expected: &'static str, found: &dyn std::fmt::Debug) -> DeviceError {
        DeviceError::Rule { device: self.name, expected, found: format!("{found:?}") }
    }

    fn insist(&self, holds: bool, expected: &'static str, found: &dyn std::fmt::Debug) -> Result<(), DeviceError> {
        if holds { Ok(()) } else { Err(self.rule(expected, found)) }
    }

    async fn done(&mut self, request: Request) -> Result<(), DeviceError> {
        let reply = self.ask(request).await?;
        self.insist(matches!(reply, FrontEndReply::Acknowledgement(0)), "an acknowledgement", &reply)
    }

    async fn number(&mut self, request: Request) -> Result<u64, DeviceError> {
        match self.ask(request).await? {
            FrontEndReply::Number(value) => Ok(value),
            other => Err(self.rule("a number", &other)),
        }
    }

    /// Must not be cancelled.
    async fn ask(&mut self, request: Request) -> Result<Reply, DeviceError> {
        let (code, name, device) = (request.code(), request.name(), self.name);
        let failed = |source| DeviceError::of_socket(device, source);
        self.socket.send(&request.encode(true)).await.map_err(failed)?;
        let message = self.socket.recv().await.map_err(failed)?.ok_or(DeviceError::Closed { device })?;
        FrontEndReply::decode(code, message).map_err(|source| DeviceError::Reply { request: name, source })
    }
}
