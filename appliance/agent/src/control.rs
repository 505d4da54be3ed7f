//! The control device, driven from here: frames to and from the bridge, and the configuration space.
//!
//! [`ControlPort`] is what a session needs of it, [`ControlDevice`] the device itself. The rules of the profile are not kept
//! here but by the session; this file moves frames and says when something has changed.

use std::future::Future;

use tracing::trace;
use vvu_protocol::DecodeError;
use vvu_protocol::control::{
    CONFIG_LEN, CONFIG_STATUS_OFFSET, ConfigSpace, Frame, MAX_FRAME_LEN, RECEIVE_QUEUE, Status, TRANSMIT_QUEUE,
};
use vvu_socket::event::{self, Event, EventError};

use crate::dma::{DmaError, DmaPages};
use crate::ring::{BUFFER_LEN, Direction, QUEUE_SIZE, Queue, RingError};
use crate::uuid::Uuid;
use crate::vfio::{VfioDevice, VfioError};
use crate::virtio_pci::{NotifyRegister, VirtioDevice, VirtioError};

const _: () = assert!(BUFFER_LEN as usize >= MAX_FRAME_LEN);
const _: () = assert!(RECEIVE_QUEUE == 0 && TRANSMIT_QUEUE == 1);

/// Offset of the uuid in the configuration space, in bytes.
const CONFIG_UUID_OFFSET: u64 = 8;

/// Why the control device is of no use any more. None of these can be the driver VM's doing.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A register access failed.
    #[error("control device")]
    Virtio(#[from] VirtioError),
    /// A step of VFIO failed.
    #[error("control device")]
    Vfio(#[from] VfioError),
    /// The device broke a rule of its queues.
    #[error("control device breaks a rule of its queues")]
    Ring(#[from] RingError),
    /// No memory for it.
    #[error("control device's memory")]
    Memory(#[from] DmaError),
    /// Its interrupt cannot be waited for.
    #[error("control device's interrupt")]
    Interrupt(#[from] EventError),
    /// A system call failed.
    #[error("control device's interrupt")]
    Io(#[from] std::io::Error),
    /// The configuration space is not one of this profile.
    #[error("control device speaks another profile")]
    Profile(#[source] DecodeError),
    /// A frame of ours cannot be written.
    #[error("frame for the bridge")]
    Frame(#[source] DecodeError),
    /// The bridge takes no frames.
    #[error("bridge leaves {QUEUE_SIZE} frames lying, no room for another")]
    TransmitFull,
    /// The other end is gone.
    #[error("control device is gone")]
    Gone,
}

/// Something has come from the bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ControlEvent {
    /// A frame, not decoded yet.
    Frame(Vec<u8>),
    /// The configuration space may have changed.
    ConfigChange,
}

/// What a session needs of the control device. Futures may be dropped at any time without losing anything.
pub trait ControlPort {
    /// The configuration space as it is now.
    ///
    /// # Errors
    /// [`ControlError`].
    fn config(&mut self) -> Result<ConfigSpace, ControlError>;

    /// Sets or clears BACK_END_UP.
    ///
    /// # Errors
    /// [`ControlError`].
    fn set_back_end_up(&mut self, up: bool) -> Result<(), ControlError>;

    /// Waits for what comes next.
    ///
    /// # Errors
    /// [`ControlError`].
    fn event(&mut self) -> impl Future<Output = Result<ControlEvent, ControlError>>;

    /// Waits for the next change of the configuration space; frames stay where they are.
    ///
    /// # Errors
    /// [`ControlError`].
    fn config_change(&mut self) -> impl Future<Output = Result<(), ControlError>>;

    /// Sends a frame.
    ///
    /// # Errors
    /// [`ControlError`].
    fn send(&mut self, frame: &Frame) -> Result<(), ControlError>;
}

/// A control device that has been found, but not been started: it answers who it is.
#[derive(Debug)]
pub struct FoundControlDevice {
    vfio: VfioDevice,
    virtio: VirtioDevice,
    uuid: Uuid,
}

impl FoundControlDevice {
    /// Looks at a device.
    ///
    /// # Errors
    /// [`ControlError`] if it is no control device of this profile.
    pub fn new(vfio: VfioDevice) -> Result<Self, ControlError> {
        let virtio = VirtioDevice::new(&vfio, CONFIG_LEN_U32)?;
        let mut uuid = [0; 16];
        for (offset, bytes) in (CONFIG_UUID_OFFSET..).step_by(4).zip(uuid.chunks_exact_mut(4)) {
            bytes.copy_from_slice(&virtio.read_config(offset)?.to_le_bytes());
        }
        Ok(Self { vfio, virtio, uuid: Uuid(uuid) })
    }

    /// Identity of the device set that it belongs to.
    #[must_use]
    pub const fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Starts the device. Needs a tokio runtime with I/O.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn start(self) -> Result<ControlDevice, ControlError> {
        let Self { vfio, virtio, .. } = self;
        let mut pages = DmaPages::pinned(&vfio, 2 * (1 + usize::from(QUEUE_SIZE)))?.split();
        let mut queue = |direction| {
            let ring = pages.next().ok_or(DmaError::NotPresent { page: 0 })?;
            Queue::new(ring, &mut pages, direction)
        };
        let mut receive = queue(Direction::FromDevice)?;
        let transmit = queue(Direction::ToDevice)?;
        let interrupt = event::create()?;
        vfio.enable_vectors(&[std::os::fd::AsFd::as_fd(&interrupt)])?;
        let interrupt = Event::new(interrupt)?;
        while let Some(buffer) = receive.free_buffer() {
            receive.offer(buffer)?;
        }
        let [receive_notify, transmit_notify] = *virtio.start(&[&receive, &transmit])?.as_slice() else {
            return Err(ControlError::Gone);
        };
        virtio.notify(receive_notify)?;
        let generation = virtio.config_generation()?;
        let registers = Registers { virtio, receive_notify, transmit_notify };
        let mut device = ControlDevice { registers, receive, transmit, interrupt, generation, _vfio: vfio };
        device.config()?;
        Ok(device)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "64, and `try_from` is not const")]
const CONFIG_LEN_U32: u32 = CONFIG_LEN as u32;

#[derive(Debug)]
struct Registers {
    virtio: VirtioDevice,
    receive_notify: NotifyRegister,
    transmit_notify: NotifyRegister,
}

impl Drop for Registers {
    /// The device forgets the rings before their memory goes back to the kernel: fields that are dropped later.
    fn drop(&mut self) {
        if let Err(error) = self.virtio.reset() {
            tracing::error!("control device could not be reset: {error}");
        }
    }
}

/// The control device.
#[derive(Debug)]
pub struct ControlDevice {
    // Order of the fields is order of dropping: the device is reset, then the memory goes, then the device is closed.
    registers: Registers,
    receive: Queue,
    transmit: Queue,
    interrupt: Event,
    /// Generation of the configuration space that was last looked at.
    generation: u8,
    _vfio: VfioDevice,
}

impl ControlDevice {
    /// Has the bridge wait with the window's header, or not any longer. Only as long as no back-end is up.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn hold_window(&mut self, hold: bool) -> Result<(), ControlError> {
        let status = if hold { Status::HOLD_WINDOW } else { Status::empty() };
        Ok(self.registers.virtio.write_config(CONFIG_STATUS_OFFSET as u64, status.bits())?)
    }

    /// The next frame that has come, if any; its buffer goes back to the device.
    fn receive(&mut self) -> Result<Option<Vec<u8>>, ControlError> {
        let Some(used) = self.receive.take_used()? else {
            return Ok(None);
        };
        let frame = self.receive.contents(used)?;
        self.receive.offer(used.buffer)?;
        if self.receive.wants_notification()? {
            self.registers.virtio.notify(self.registers.receive_notify)?;
        }
        trace!(len = frame.len(), "frame from the bridge");
        Ok(Some(frame))
    }

    fn take_config_change(&mut self) -> Result<bool, ControlError> {
        let generation = self.registers.virtio.config_generation()?;
        let changed = generation != self.generation;
        self.generation = generation;
        Ok(changed)
    }
}

impl ControlPort for ControlDevice {
    fn config(&mut self) -> Result<ConfigSpace, ControlError> {
        // Read in ascending order and word by word. The device may change it in between; it raises an interrupt for each
        // change, so a mixture of old and new is looked at again.
        let mut bytes = [0; CONFIG_LEN];
        for (offset, word) in (0..).step_by(4).zip(bytes.chunks_exact_mut(4)) {
            word.copy_from_slice(&self.registers.virtio.read_config(offset)?.to_le_bytes());
        }
        ConfigSpace::decode(&bytes).map_err(ControlError::Profile)
    }

    fn set_back_end_up(&mut self, up: bool) -> Result<(), ControlError> {
        let status = if up { Status::BACK_END_UP } else { Status::empty() };
        Ok(self.registers.virtio.write_config(CONFIG_STATUS_OFFSET as u64, status.bits())?)
    }

    async fn event(&mut self) -> Result<ControlEvent, ControlError> {
        loop {
            if let Some(frame) = self.receive()? {
                return Ok(ControlEvent::Frame(frame));
            }
            if self.take_config_change()? {
                return Ok(ControlEvent::ConfigChange);
            }
            self.interrupt.signalled().await?;
        }
    }

    async fn config_change(&mut self) -> Result<(), ControlError> {
        while !self.take_config_change()? {
            self.interrupt.signalled().await?;
        }
        Ok(())
    }

    fn send(&mut self, frame: &Frame) -> Result<(), ControlError> {
        let bytes = frame.encode().map_err(ControlError::Frame)?;
        while self.transmit.take_used()?.is_some() {}
        let buffer = self.transmit.free_buffer().ok_or(ControlError::TransmitFull)?;
        self.transmit.fill(buffer, &bytes)?;
        self.transmit.offer(buffer)?;
        if self.transmit.wants_notification()? {
            self.registers.virtio.notify(self.registers.transmit_notify)?;
        }
        trace!(len = bytes.len(), "frame to the bridge");
        Ok(())
    }
}
