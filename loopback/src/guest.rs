//! What the agent does in an appliance, on the devices of this process.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use tracing::info;
use vvu_agent::control::{ControlDevice, ControlError, ControlQueues};
use vvu_agent::session::{DeviceSet, DeviceSetError};
use vvu_agent::uuid::Uuid;
use vvu_socket::event::{self, Event, EventError};

use crate::back_end::OutsideBackEnd;
use crate::doorbell::Doorbells;
use crate::memory::{self, MemoryError};
use crate::registers::{Access, Bus, BusRegisters};
use crate::window::{MappedFiles, Mappings};

/// Why the guest has ended.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The control device cannot be brought up.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The machine has no memory.
    #[error("the machine's memory")]
    Memory(#[from] MemoryError),
    /// An eventfd cannot be made.
    #[error("eventfd for the control device")]
    Event(#[from] EventError),
    /// A descriptor cannot be made.
    #[error("descriptor for the control device")]
    Io(#[from] io::Error),
    /// The device set has failed.
    #[error(transparent)]
    DeviceSet(#[from] DeviceSetError),
}

/// What the machine has.
#[derive(Debug)]
pub struct Machine {
    /// Identity of the device set.
    pub uuid: Uuid,
    /// The way to the VMM.
    pub bus: Bus,
    /// The machine's memory.
    pub memory: OwnedFd,
    /// What the doorbell device knows.
    pub doorbells: Doorbells,
    /// What is mapped into the window.
    pub mappings: Mappings,
}

/// Brings the devices up, and serves one front-end after the other with the back-end that listens at `back_end`. Needs a tokio
/// runtime of one thread with I/O and time.
///
/// # Errors
/// [`GuestError`].
pub async fn run(machine: Machine, back_end: PathBuf) -> Result<Infallible, GuestError> {
    let Machine { uuid, bus, memory, doorbells, mappings } = machine;
    let queues = ControlQueues::new(memory::control_pages(&memory)?)?;
    let kicks = [event::create()?, event::create()?];
    let interrupt = event::create()?;
    let [receive, transmit] = &kicks;
    bus.access(Access::StartControl {
        queues: queues.addresses(),
        kicks: [receive.try_clone()?, transmit.try_clone()?],
        interrupt: interrupt.try_clone()?,
    })?;
    let registers = BusRegisters { bus: bus.clone(), kicks };
    let mut control = ControlDevice::new(registers, queues, Event::new(interrupt)?)?;
    bus.access(Access::StartWindow)?;
    let window = MappedFiles { mappings, len: control.window_len().await? };
    info!(set = %uuid, window_len_bytes = window.len, "devices are up");
    let mut set = DeviceSet::new(uuid, control, doorbells, window, OutsideBackEnd::new(back_end));
    Ok(set.serve().await?)
}
