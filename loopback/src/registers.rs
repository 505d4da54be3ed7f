//! Registers of the control device: each access is a call to the VMM, which the guest waits for, as a virtual CPU does.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{SyncSender, sync_channel};

use tokio::sync::mpsc::UnboundedSender;
use vvu_agent::control::{ControlError, Registers};
use vvu_agent::ring::RingAddresses;
use vvu_protocol::control::CONFIG_LEN;
use vvu_socket::event;

/// What the guest does to its devices.
#[derive(Debug)]
pub enum Access {
    /// DRIVER_OK to the control device, with its queues, where it is notified of new buffers, and its interrupt.
    StartControl {
        /// Of both queues.
        queues: [RingAddresses; 2],
        /// Signalled for new buffers.
        kicks: [OwnedFd; 2],
        /// Signalled for used ones, and for changes of the configuration space.
        interrupt: OwnedFd,
    },
    /// DRIVER_OK to the window device.
    StartWindow,
    /// A write of 32 bits into the control device's configuration space.
    WriteConfig {
        /// Where.
        offset: usize,
        /// What.
        value: u32,
    },
    /// A look at it. QEMU asks the bridge each time: what the bridge has changed is seen even before its interrupt.
    ReadConfig,
    /// A look at its generation.
    ReadGeneration,
}

/// The control device as the guest finds it after an access.
#[derive(Debug, Clone, Copy)]
pub struct ControlState {
    /// Its configuration space.
    pub config: [u8; CONFIG_LEN],
    /// Changes when that has changed.
    pub generation: u8,
}

/// An access, and where the guest waits for it.
#[derive(Debug)]
pub struct Exit {
    /// The access.
    pub access: Access,
    /// The guest goes on.
    pub resume: SyncSender<ControlState>,
}

/// The guest's way to its VMM.
#[derive(Debug, Clone)]
pub struct Bus(pub UnboundedSender<Exit>);

impl Bus {
    /// Does one access, and waits until the VMM has.
    ///
    /// # Errors
    /// [`ControlError::Gone`] if the VMM has ended.
    pub fn access(&self, access: Access) -> Result<ControlState, ControlError> {
        let (resume, resumed) = sync_channel(1);
        self.0.send(Exit { access, resume }).map_err(|_| ControlError::Gone)?;
        resumed.recv().map_err(|_| ControlError::Gone)
    }
}

/// The control device's registers.
#[derive(Debug)]
pub struct BusRegisters {
    /// The way to the VMM.
    pub bus: Bus,
    /// Notification registers: no access, but an eventfd, as KVM makes one of them.
    pub kicks: [OwnedFd; 2],
}

impl Registers for BusRegisters {
    fn notify(&self, queue: u16) -> Result<(), ControlError> {
        let kick = self.kicks.get(usize::from(queue)).ok_or(ControlError::Gone)?;
        Ok(event::signal(kick)?)
    }

    fn config_generation(&self) -> Result<u8, ControlError> {
        Ok(self.bus.access(Access::ReadGeneration)?.generation)
    }

    fn read_config(&self, offset: u64) -> Result<u32, ControlError> {
        let config = self.bus.access(Access::ReadConfig)?.config;
        let word = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)?.first_chunk().copied());
        Ok(u32::from_le_bytes(word.unwrap_or_default()))
    }

    fn write_config(&self, offset: u64, value: u32) -> Result<(), ControlError> {
        let offset = usize::try_from(offset).map_err(|_| ControlError::Gone)?;
        self.bus.access(Access::WriteConfig { offset, value }).map(drop)
    }
}
