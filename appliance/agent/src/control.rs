//! The control device, driven from here: frames to and from the bridge, and the configuration space.
//!
//! [`ControlPort`] is what a session needs of it, [`ControlDevice`] the device itself, whose registers are in PCI or wherever
//! [`Registers`] are. The rules of the profile are not kept
//! here but by the session; this file moves frames and says when something has changed.

use std::future::Future;
use std::rc::Rc;

use tracing::trace;
use vvu_protocol::DecodeError;
use vvu_protocol::control::{
    CONFIG_LEN, CONFIG_STATUS_OFFSET, ConfigSpace, Frame, MAX_FRAME_LEN, RECEIVE_QUEUE, Status, TRANSMIT_QUEUE,
};
use vvu_socket::event::{self, Event, EventError};

use crate::dma::{DmaError, DmaPages};
use crate::ring::{BUFFER_LEN, Direction, QUEUE_SIZE, Queue, RingAddresses, RingError};
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

/// Registers of the control device, after its start.
pub trait Registers {
    /// Tells the device that buffers were offered to it in this queue.
    ///
    /// # Errors
    /// [`ControlError`].
    fn notify(&self, queue: u16) -> Result<(), ControlError>;

    /// Changes whenever the configuration space has changed (virtio 1.3, section 2.5.1).
    ///
    /// # Errors
    /// [`ControlError`].
    fn config_generation(&self) -> Result<u8, ControlError>;

    /// Reads 32 bits of the configuration space.
    ///
    /// # Errors
    /// [`ControlError`].
    fn read_config(&self, offset: u64) -> Result<u32, ControlError>;

    /// Writes 32 bits of the configuration space.
    ///
    /// # Errors
    /// [`ControlError`].
    fn write_config(&self, offset: u64, value: u32) -> Result<(), ControlError>;
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
        let queues = ControlQueues::new(DmaPages::pinned(&vfio, CONTROL_PAGES)?)?;
        let interrupt = event::create()?;
        vfio.set_vector(0, Some(std::os::fd::AsFd::as_fd(&interrupt)))?;
        let notify = virtio.start(&[&queues.receive, &queues.transmit])?;
        ControlDevice::new(PciRegisters { virtio, notify, _vfio: vfio }, queues, Event::new(interrupt)?)
    }
}

/// Pages that the queues need.
pub const CONTROL_PAGES: usize = 2 * (1 + QUEUE_SIZE as usize);

/// Both queues of the control device; buffers are offered for all that it may send.
#[derive(Debug)]
pub struct ControlQueues {
    receive: Queue,
    transmit: Queue,
}

impl ControlQueues {
    /// Queues in [`CONTROL_PAGES`] pages, which are zero.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn new(pages: Rc<DmaPages>) -> Result<Self, ControlError> {
        let mut pages = pages.split();
        let mut queue = |direction| {
            let ring = pages.next().ok_or(DmaError::NotPresent { page: 0 })?;
            Queue::new(ring, &mut pages, direction)
        };
        let mut receive = queue(Direction::FromDevice)?;
        let transmit = queue(Direction::ToDevice)?;
        while let Some(buffer) = receive.free_buffer() {
            receive.offer(buffer)?;
        }
        Ok(Self { receive, transmit })
    }

    /// Where the device finds them, in the order of their numbers.
    #[must_use]
    pub const fn addresses(&self) -> [RingAddresses; 2] {
        [self.receive.addresses(), self.transmit.addresses()]
    }
}

#[expect(clippy::cast_possible_truncation, reason = "64, and `try_from` is not const")]
const CONFIG_LEN_U32: u32 = CONFIG_LEN as u32;

/// Registers of a virtio device on PCI.
#[derive(Debug)]
pub struct PciRegisters {
    virtio: VirtioDevice,
    /// One for each queue.
    notify: Vec<NotifyRegister>,
    _vfio: VfioDevice,
}

impl Registers for PciRegisters {
    fn notify(&self, queue: u16) -> Result<(), ControlError> {
        let register = self.notify.get(usize::from(queue)).ok_or(ControlError::Gone)?;
        Ok(self.virtio.notify(*register)?)
    }

    fn config_generation(&self) -> Result<u8, ControlError> {
        Ok(self.virtio.config_generation()?)
    }

    fn read_config(&self, offset: u64) -> Result<u32, ControlError> {
        Ok(self.virtio.read_config(offset)?)
    }

    fn write_config(&self, offset: u64, value: u32) -> Result<(), ControlError> {
        Ok(self.virtio.write_config(offset, value)?)
    }
}

impl Drop for PciRegisters {
    /// The device forgets the rings before it is closed.
    fn drop(&mut self) {
        if let Err(error) = self.virtio.reset() {
            tracing::error!("control device could not be reset: {error}");
        }
    }
}

/// The control device.
#[derive(Debug)]
pub struct ControlDevice<R = PciRegisters> {
    // Order of the fields is order of dropping: the device is reset, then the memory of its queues goes.
    registers: R,
    queues: ControlQueues,
    interrupt: Event,
    /// Generation of the configuration space that was last looked at.
    generation: u8,
}

impl<R: Registers> ControlDevice<R> {
    /// A device that was started with these queues. `interrupt` is signalled for buffers that are used and for changes of the
    /// configuration space.
    ///
    /// # Errors
    /// [`ControlError`] if it is no control device of this profile.
    pub fn new(registers: R, queues: ControlQueues, interrupt: Event) -> Result<Self, ControlError> {
        registers.notify(RECEIVE_QUEUE)?;
        let generation = registers.config_generation()?;
        let mut device = Self { registers, queues, interrupt, generation };
        device.config()?;
        Ok(device)
    }

    /// Has the bridge wait with the window's header, or not any longer. Only as long as no back-end is up.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn hold_window(&mut self, hold: bool) -> Result<(), ControlError> {
        let status = if hold { Status::HOLD_WINDOW } else { Status::empty() };
        self.registers.write_config(CONFIG_STATUS_OFFSET as u64, status.bits())
    }

    /// Waits until the device tells how long its window is, in bytes.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn window_len(&mut self) -> Result<u64, ControlError> {
        loop {
            let len = self.config()?.window_len;
            if len != 0 {
                return Ok(len);
            }
            self.config_change().await?;
        }
    }

    /// The next frame that has come, if any; its buffer goes back to the device.
    fn receive(&mut self) -> Result<Option<Vec<u8>>, ControlError> {
        let Some(used) = self.queues.receive.take_used()? else {
            return Ok(None);
        };
        let frame = self.queues.receive.contents(used)?;
        self.queues.receive.offer(used.buffer)?;
        if self.queues.receive.wants_notification()? {
            self.registers.notify(RECEIVE_QUEUE)?;
        }
        trace!(len = frame.len(), "frame from the bridge");
        Ok(Some(frame))
    }

    fn take_config_change(&mut self) -> Result<bool, ControlError> {
        let generation = self.registers.config_generation()?;
        let changed = generation != self.generation;
        self.generation = generation;
        Ok(changed)
    }
}

impl<R: Registers> ControlPort for ControlDevice<R> {
    fn config(&mut self) -> Result<ConfigSpace, ControlError> {
        // Read in ascending order and word by word. The device may change it in between; it raises an interrupt for each
        // change, so a mixture of old and new is looked at again.
        let mut bytes = [0; CONFIG_LEN];
        for (offset, word) in (0..).step_by(4).zip(bytes.chunks_exact_mut(4)) {
            word.copy_from_slice(&self.registers.read_config(offset)?.to_le_bytes());
        }
        ConfigSpace::decode(&bytes).map_err(ControlError::Profile)
    }

    fn set_back_end_up(&mut self, up: bool) -> Result<(), ControlError> {
        let status = if up { Status::BACK_END_UP } else { Status::empty() };
        self.registers.write_config(CONFIG_STATUS_OFFSET as u64, status.bits())
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
        while self.queues.transmit.take_used()?.is_some() {}
        let buffer = self.queues.transmit.free_buffer().ok_or(ControlError::TransmitFull)?;
        self.queues.transmit.fill(buffer, &bytes)?;
        self.queues.transmit.offer(buffer)?;
        if self.queues.transmit.wants_notification()? {
            self.registers.notify(TRANSMIT_QUEUE)?;
        }
        trace!(len = bytes.len(), "frame to the bridge");
        Ok(())
    }
}
