//! What a device has to say and do; everything else is the session's.

use vvu_protocol::features::{Features, ProtocolFeatures};

use crate::vring::Service;

/// Who writes to the configuration space (SET_CONFIG).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigWriter {
    /// The driver. What is read-only for it stays as it is.
    Driver,
    /// Migration, which restores what the device had on the other side.
    Migration,
}

/// Why a device does not do what the front-end asks for.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct DeviceError {
    /// For the log.
    pub reason: String,
}

impl DeviceError {
    /// With the reason for the log.
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into() }
    }
}

/// A virtio device. It outlives connections; one [`crate::Connection`] is served at a time.
///
/// All methods but [`Device::serve`] are called by the control thread, one after the other.
pub trait Device: Send + Sync + 'static {
    /// Number of queues; at most 256, as SET_VRING_KICK has 8 bits for the index.
    fn queue_count(&self) -> u16;

    /// Most entries of a ring: a power of two.
    fn max_queue_size(&self) -> u16;

    /// Features of the device class and of its rings. What the session does by itself is offered without being named:
    /// PROTOCOL_FEATURES, LOG_ALL and ACCESS_PLATFORM.
    fn features(&self) -> Features;

    /// Protocol features that need the device: of CONFIG, RARP and MTU those that it has. The others are the session's.
    fn protocol_features(&self) -> ProtocolFeatures {
        ProtocolFeatures::empty()
    }

    /// Back to the state before feature negotiation: a connection begins, or the front-end resets the device.
    fn reset(&self);

    /// The features that the driver has accepted. Rings latch theirs when they start ([`Service::features`]).
    fn negotiated(&self, features: Features) {
        let _ = features;
    }

    /// Bytes of the configuration space; None if there is no such place. The result has `len` bytes. Needs CONFIG.
    fn read_config(&self, offset: u32, len: usize) -> Option<Vec<u8>> {
        let _ = (offset, len);
        None
    }

    /// Writes to the configuration space. Needs CONFIG.
    ///
    /// # Errors
    /// [`DeviceError`] to refuse.
    fn write_config(&self, offset: u32, bytes: &[u8], writer: ConfigWriter) -> Result<(), DeviceError> {
        let _ = (offset, bytes, writer);
        Err(DeviceError::new("the device has no configuration space"))
    }

    /// NET_SET_MTU. Needs MTU.
    ///
    /// # Errors
    /// [`DeviceError`] to refuse.
    fn set_mtu(&self, mtu: u64) -> Result<(), DeviceError> {
        let _ = mtu;
        Err(DeviceError::new("the device has no MTU"))
    }

    /// SEND_RARP: announce this MAC address (its first 6 bytes). Needs RARP.
    ///
    /// # Errors
    /// [`DeviceError`] to refuse.
    fn send_rarp(&self, mac: u64) -> Result<(), DeviceError> {
        let _ = mac;
        Err(DeviceError::new("the device announces no addresses"))
    }

    /// The CPU for the thread of a queue; None to leave that to the kernel.
    fn cpu_of_queue(&self, index: u16) -> Option<usize> {
        let _ = index;
        None
    }

    /// Serves one ring until it is to stop, on the thread of its queue. To return before that is a failure, after which the
    /// ring waits for the front-end to start it anew.
    ///
    /// A request keeps the [`crate::Memory`] that it works on, and lets go of it as soon as its data is moved, before it is
    /// returned: the front-end may be waiting for that to take memory away, and the ring for memory to return the request.
    fn serve(&self, service: Service<'_>);
}
