//! The appliance's VMM: one loop that serves the guest and the bridge's three sockets, one thing after the other.
//!
//! As QEMU it hands out a new memory table to its running devices before it answers a mapping, for each mapping counts as
//! memory of the machine. What QEMU would die of ends it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use tokio::sync::mpsc::UnboundedReceiver;
use tracing::{debug, warn};
use vvu_agent::ring::RingAddresses;
use vvu_agent::uuid::Uuid;
use vvu_protocol::DecodeError;
use vvu_protocol::address::{GuestAddress, UserAddress};
use vvu_protocol::control::CONFIG_LEN;
use vvu_protocol::memory::{MAX_TABLE_REGIONS, MemoryRegion};
use vvu_protocol::message::{BackEndReply, BackEndRequest, RawMessage};
use vvu_socket::{MessageSocket, SocketError, event};

use crate::device::{Device, DeviceError, Vring, has_closed};
use crate::doorbell::{Doorbells, Server, ServerError};
use crate::memory::{self, MemoryError};
use crate::registers::{Access, ControlState, Exit};
use crate::window::Mappings;

/// Guest-physical address of the window, and the VMM's.
const WINDOW_BAR: u64 = 0x38_0000_0000;
const WINDOW_USER: u64 = 0x7ec0_0000_0000;

/// Why there is no VMM any more.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// A device is of no use any more.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The doorbell device is.
    #[error(transparent)]
    Doorbell(#[from] ServerError),
    /// The machine has no memory.
    #[error("the machine's memory")]
    Memory(#[from] MemoryError),
    /// A back channel is closed.
    #[error("bridge has closed the back channel of the {device} device")]
    BackChannelClosed {
        /// Name of the device.
        device: &'static str,
    },
    /// A back channel failed.
    #[error("back channel")]
    BackChannel(#[from] SocketError),
    /// What comes on a back channel is no request.
    #[error("back channel")]
    Request(#[from] DecodeError),
    /// A descriptor could not be made or used.
    #[error("descriptor")]
    Io(#[from] io::Error),
}

impl VmmError {
    /// Whether the bridge wants it to end: it has closed a socket.
    #[must_use]
    pub fn is_dismissal(&self) -> bool {
        match self {
            Self::Device(DeviceError::Closed { .. })
            | Self::Doorbell(ServerError::Closed)
            | Self::BackChannelClosed { .. } => true,
            Self::BackChannel(error) => has_closed(error),
            _ => false,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Vmm {
    control: Device,
    control_back: MessageSocket,
    window: Device,
    window_back: MessageSocket,
    doorbell: Server,
    exits: UnboundedReceiver<Exit>,
    memory: OwnedFd,
    mappings: Mappings,
    state: ControlState,
    /// Interrupt of the control device, after its start.
    interrupt: Option<OwnedFd>,
}

impl Vmm {
    /// Starts, and connects to the three sockets in `directory`. Answers the identity of the device set, too.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn connect(
        directory: &Path,
        exits: UnboundedReceiver<Exit>,
        doorbells: Doorbells,
        mappings: Mappings,
    ) -> Result<(Self, Uuid), VmmError> {
        let (control, control_back) = Device::realize("control", &directory.join("control.sock"), 2).await?;
        let (window, window_back) = Device::realize("window", &directory.join("window.sock"), 1).await?;
        let (doorbell, uuid) = Server::connect(&directory.join("doorbell.sock"), doorbells).await?;
        let state = ControlState { config: [0; CONFIG_LEN], generation: 0 };
        let (memory, interrupt) = (memory::create()?, None);
        let mut vmm =
            Self { control, control_back, window, window_back, doorbell, exits, memory, mappings, state, interrupt };
        vmm.refresh().await?;
        Ok((vmm, uuid))
    }

    /// The machine's memory, for the guest.
    ///
    /// # Errors
    /// If the process has too many open files.
    pub fn memory(&self) -> io::Result<OwnedFd> {
        self.memory.try_clone()
    }

    /// Serves until something fails, or the bridge wants no more. `None`: the guest has ended.
    pub async fn run(mut self) -> Option<VmmError> {
        loop {
            let step = tokio::select! {
                exit = self.exits.recv() => self.handle_exit(exit?).await,
                message = self.window_back.recv() => match message {
                    Ok(Some(message)) => self.handle_mapping(message).await,
                    Ok(None) => Err(VmmError::BackChannelClosed { device: "window" }),
                    Err(error) => Err(error.into()),
                },
                message = self.control_back.recv() => match message {
                    Ok(Some(message)) => self.handle_config_change(message).await,
                    Ok(None) => Err(VmmError::BackChannelClosed { device: "control" }),
                    Err(error) => Err(error.into()),
                },
                taken = self.doorbell.take() => taken.map_err(VmmError::from),
                error = self.control.broken() => Err(error.into()),
                error = self.window.broken() => Err(error.into()),
            };
            if let Err(error) = step {
                return Some(error);
            }
        }
    }

    async fn handle_exit(&mut self, Exit { access, resume }: Exit) -> Result<(), VmmError> {
        match access {
            Access::ReadGeneration => {}
            Access::ReadConfig => self.refresh().await?,
            Access::WriteConfig { offset, value } => {
                if let Some(place) = self.state.config.get_mut(offset..).and_then(<[u8]>::first_chunk_mut) {
                    *place = value.to_le_bytes();
                }
                self.control.write_config(self.state.config.to_vec()).await?;
            }
            Access::StartControl { queues, kicks, interrupt } => {
                let rings = queues
                    .into_iter()
                    .zip(kicks)
                    .map(|(addresses, kick)| Ok(Vring { addresses, kick, call: interrupt.try_clone()? }));
                let rings = rings.collect::<io::Result<_>>()?;
                self.interrupt = Some(interrupt);
                self.control.start(self.table()?, rings).await?;
            }
            Access::StartWindow => {
                let [descriptors, available, used] = memory::window_queue();
                let addresses = RingAddresses { descriptors, available, used };
                let ring = Vring { addresses, kick: event::create()?, call: event::create()? };
                self.window.start(self.table()?, vec![ring]).await?;
            }
        }
        // A guest that has ended does not wait.
        let _ = resume.send(self.state);
        Ok(())
    }

    /// The back channel of the window device: it has nothing but mappings.
    async fn handle_mapping(&mut self, message: RawMessage<OwnedFd>) -> Result<(), VmmError> {
        let request = BackEndRequest::decode(message)?;
        let (code, name) = (request.code(), request.name());
        if !self.window.is_running() {
            return Err(self.window.rule("silence of a device that is stopped", &name).into());
        }
        debug!(?request, "{name}");
        let done = match request {
            BackEndRequest::ShmemMap(map, file) => self.mappings.map(map, file),
            BackEndRequest::ShmemUnmap(map) => self.mappings.unmap(&map),
            other => return Err(self.window.rule("SHMEM_MAP or SHMEM_UNMAP", &other).into()),
        };
        let answer = match done {
            Ok(()) => {
                self.hand_out().await?;
                0
            }
            Err(error) => {
                warn!("{name} is refused: {error}");
                1
            }
        };
        Ok(self.window_back.send(&BackEndReply::<OwnedFd>::Acknowledgement(answer).encode(code)).await?)
    }

    /// Of more regions than a table has, QEMU only complains.
    async fn hand_out(&mut self) -> Result<(), VmmError> {
        if self.table()?.len() > MAX_TABLE_REGIONS {
            return Ok(());
        }
        for device in [true, false] {
            let table = self.table()?;
            let device = if device { &mut self.control } else { &mut self.window };
            if device.is_running() {
                device.hand_out(table).await?;
            }
        }
        Ok(())
    }

    /// The back channel of the control device: it has nothing but configuration interrupts.
    async fn handle_config_change(&mut self, message: RawMessage<OwnedFd>) -> Result<(), VmmError> {
        let request = BackEndRequest::decode(message)?;
        match (&request, &self.interrupt) {
            (BackEndRequest::ConfigChange, Some(interrupt)) if self.control.is_running() => {
                self.state.generation = self.state.generation.wrapping_add(1);
                Ok(event::signal(interrupt)?)
            }
            _ => Err(self.control.rule("CONFIG_CHANGE_MSG of a device that runs", &request).into()),
        }
    }

    async fn refresh(&mut self) -> Result<(), VmmError> {
        let bytes = self.control.read_config(CONFIG_LEN).await?;
        self.state.config = bytes
            .try_into()
            .map_err(|bytes: Vec<u8>| self.control.rule("a configuration space of 64 bytes", &bytes.len()))?;
        Ok(())
    }

    /// The memory table of every device of this machine.
    fn table(&self) -> io::Result<Vec<(MemoryRegion, OwnedFd)>> {
        let mut table = vec![(memory::region(), self.memory.try_clone()?)];
        for mapping in self.mappings.all() {
            let map = mapping.map;
            let region = MemoryRegion {
                guest_address: GuestAddress(WINDOW_BAR.saturating_add(map.region_offset)),
                size: map.len,
                user_address: UserAddress(WINDOW_USER.saturating_add(map.region_offset)),
                mmap_offset: map.file_offset,
            };
            table.push((region, mapping.file.try_clone()?));
        }
        Ok(table)
    }
}
