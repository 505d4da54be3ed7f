//! A modern virtio device on PCI, brought up by way of VFIO.
//!
//! Source: virtio 1.3, section 3.1.1 "Driver Requirements: Device Initialization" and section 4.1 "Virtio Over PCI Bus".
//! 64-bit registers are written as two of 32 bits, as section 4.1.3.1 allows for all of them.

use std::time::{Duration, Instant};

use crate::ring::{QUEUE_SIZE, Queue};
use crate::vfio::{Region, VfioDevice, VfioError};

/// Offsets in the common configuration (section 4.1.4.3).
mod common {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0;
    pub(super) const DEVICE_FEATURE: u64 = 4;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 8;
    pub(super) const DRIVER_FEATURE: u64 = 12;
    pub(super) const CONFIG_VECTOR: u64 = 16;
    pub(super) const QUEUE_COUNT: u64 = 18;
    pub(super) const STATUS: u64 = 20;
    pub(super) const CONFIG_GENERATION: u64 = 21;
    pub(super) const QUEUE_SELECT: u64 = 22;
    pub(super) const QUEUE_SIZE: u64 = 24;
    pub(super) const QUEUE_VECTOR: u64 = 26;
    pub(super) const QUEUE_ENABLE: u64 = 28;
    pub(super) const QUEUE_NOTIFY_OFFSET: u64 = 30;
    pub(super) const QUEUE_DESCRIPTORS: u64 = 32;
    pub(super) const QUEUE_AVAILABLE: u64 = 40;
    pub(super) const QUEUE_USED: u64 = 48;
    pub(super) const LEN: u32 = 56;
}

/// Bits of the device status (section 2.1).
mod status {
    pub(super) const ACKNOWLEDGE: u8 = 1;
    pub(super) const DRIVER: u8 = 2;
    pub(super) const DRIVER_OK: u8 = 4;
    pub(super) const FEATURES_OK: u8 = 8;
}

/// `VIRTIO_F_VERSION_1`, bit 32: bit 0 of the upper half of the features (section 6).
const VERSION_1_UPPER: u32 = 1;

/// The only MSI-X vector that is used: for configuration changes and all queues.
const VECTOR: u16 = 0;

/// The device refuses a vector by this value (section 4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;

/// How long a device may take for a reset.
const RESET_TIMEOUT: Duration = Duration::from_secs(2);

/// Why the device cannot be brought up.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// A register cannot be accessed.
    #[error("virtio device's registers")]
    Vfio(#[from] VfioError),
    /// No capability of this kind, or one that lies outside of its base address register.
    #[error("virtio device has no {what} that could be used")]
    Capability {
        /// Kind of the capability.
        what: &'static str,
    },
    /// The device does not come out of its reset.
    #[error("virtio device did not finish its reset")]
    Reset,
    /// The device does not do what the driver needs.
    #[error("virtio device does not accept {what}")]
    Refused {
        /// What the driver wants.
        what: &'static str,
    },
}

/// Kinds of capabilities (section 4.1.4) that are looked for.
const COMMON_CONFIG: u8 = 1;
const NOTIFICATION: u8 = 2;
const DEVICE_CONFIG: u8 = 4;

/// A structure's place, as a virtio capability tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    kind: u8,
    bar: u8,
    offset: u32,
    len: u32,
    /// For notifications: bytes from one queue's register to the next.
    multiplier: u32,
}

/// Longest PCI capability list: as many as fit between the header and the end of the configuration space.
const CAPABILITIES_MAX: usize = (256 - 64) / 4;

/// Goes through the PCI capability list (PCI 3.0, section 6.7) for the virtio structures (virtio 1.3, section 4.1.4).
fn virtio_places(config: &[u8; 256]) -> Vec<Place> {
    const STATUS_HAS_LIST: u8 = 1 << 4;
    const VENDOR_SPECIFIC: u8 = 9;
    let byte = |at: u8| config.get(usize::from(at)).copied().unwrap_or(0);
    let word = |at: u8| {
        let bytes = config.get(usize::from(at)..).and_then(<[u8]>::first_chunk::<4>);
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    };
    let mut places = Vec::new();
    let mut next = if byte(6) & STATUS_HAS_LIST == 0 { 0 } else { byte(0x34) };
    for _ in 0..CAPABILITIES_MAX {
        let at = next & !3;
        // 24 bytes of the longest structure have to fit behind it, and nothing lies in the header.
        if !(64..=232).contains(&at) {
            break;
        }
        if byte(at) == VENDOR_SPECIFIC {
            let (kind, bar) = (byte(at + 3), byte(at + 4));
            let multiplier = if kind == NOTIFICATION { word(at + 16) } else { 0 };
            places.push(Place { kind, bar, offset: word(at + 8), len: word(at + 12), multiplier });
        }
        next = byte(at + 1);
    }
    places
}

/// A structure within a base address register.
#[derive(Debug)]
struct Structure {
    region: Region,
    start: u64,
}

impl Structure {
    fn find(
        device: &VfioDevice,
        places: &[Place],
        kind: u8,
        min_len: u32,
        what: &'static str,
    ) -> Result<(Self, Place), VirtioError> {
        // The first of several of a kind is the one that the device prefers (section 4.1.4.1).
        let usable = |place: &&Place| place.kind == kind && place.bar <= 5 && place.len >= min_len;
        let place = places.iter().find(usable).ok_or(VirtioError::Capability { what })?;
        let region = device.bar(place.bar)?;
        if u64::from(place.offset) + u64::from(place.len) > region.size() {
            return Err(VirtioError::Capability { what });
        }
        Ok((Self { region, start: u64::from(place.offset) }, *place))
    }

    fn read_u8(&self, offset: u64) -> Result<u8, VfioError> {
        self.region.read_u8(self.start + offset)
    }

    fn read_u16(&self, offset: u64) -> Result<u16, VfioError> {
        self.region.read_u16(self.start + offset)
    }

    fn read_u32(&self, offset: u64) -> Result<u32, VfioError> {
        self.region.read_u32(self.start + offset)
    }

    fn write_u8(&self, offset: u64, value: u8) -> Result<(), VfioError> {
        self.region.write_u8(self.start + offset, value)
    }

    fn write_u16(&self, offset: u64, value: u16) -> Result<(), VfioError> {
        self.region.write_u16(self.start + offset, value)
    }

    fn write_u32(&self, offset: u64, value: u32) -> Result<(), VfioError> {
        self.region.write_u32(self.start + offset, value)
    }

    fn write_u64(&self, offset: u64, value: u64) -> Result<(), VfioError> {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        self.write_u32(offset, u32::from_le_bytes([a, b, c, d]))?;
        self.write_u32(offset + 4, u32::from_le_bytes([e, f, g, h]))
    }
}

/// Where a queue is notified: an offset within the notification structure, and the value to write.
#[derive(Debug, Clone, Copy)]
pub struct NotifyRegister {
    offset: u64,
    queue: u16,
}

/// The registers of a virtio device.
#[derive(Debug)]
pub struct VirtioDevice {
    common: Structure,
    device_config: Structure,
    notify: Structure,
    notify_place: Place,
}

impl VirtioDevice {
    /// Finds the structures of a device whose configuration space has `config_len` bytes or more. Changes nothing.
    ///
    /// # Errors
    /// [`VirtioError::Capability`] or [`VirtioError::Vfio`].
    pub fn new(device: &VfioDevice, config_len: u32) -> Result<Self, VirtioError> {
        let pci_config = device.config()?;
        let mut bytes = [0; 256];
        for (offset, byte) in (0..).zip(bytes.iter_mut()) {
            *byte = pci_config.read_u8(offset)?;
        }
        let places = virtio_places(&bytes);
        let find = |kind, min_len, what| Structure::find(device, &places, kind, min_len, what);
        let (common, _) = find(COMMON_CONFIG, common::LEN, "common configuration")?;
        let (device_config, _) = find(DEVICE_CONFIG, config_len, "configuration space")?;
        let (notify, notify_place) = find(NOTIFICATION, 2, "notification register")?;
        Ok(Self { common, device_config, notify, notify_place })
    }

    /// Resets the device, so that it forgets its queues.
    ///
    /// # Errors
    /// [`VirtioError::Reset`] or [`VirtioError::Vfio`].
    pub fn reset(&self) -> Result<(), VirtioError> {
        self.common.write_u8(common::STATUS, 0)?;
        let deadline = Instant::now() + RESET_TIMEOUT;
        // "After writing 0 to device_status, the driver MUST wait for a read of device_status to return 0" (section
        // 4.1.4.3.2). Each read is an exit to the VMM, which is wait enough.
        while self.common.read_u8(common::STATUS)? != 0 {
            if Instant::now() > deadline {
                return Err(VirtioError::Reset);
            }
        }
        Ok(())
    }

    /// Brings the device up with VIRTIO_F_VERSION_1 and these queues, all on the first MSI-X vector, and returns where
    /// each queue is notified.
    ///
    /// # Errors
    /// [`VirtioError`].
    pub fn start(&self, queues: &[&Queue]) -> Result<Vec<NotifyRegister>, VirtioError> {
        self.reset()?;
        let mut status = status::ACKNOWLEDGE;
        self.common.write_u8(common::STATUS, status)?;
        status |= status::DRIVER;
        self.common.write_u8(common::STATUS, status)?;
        self.negotiate()?;
        status |= status::FEATURES_OK;
        self.common.write_u8(common::STATUS, status)?;
        if self.common.read_u8(common::STATUS)? & status::FEATURES_OK == 0 {
            return Err(VirtioError::Refused { what: "its features" });
        }
        self.set_vector(common::CONFIG_VECTOR)?;
        if usize::from(self.common.read_u16(common::QUEUE_COUNT)?) < queues.len() {
            return Err(VirtioError::Refused { what: "so many queues" });
        }
        let queues = (0..).zip(queues);
        let notify = queues.map(|(index, queue)| self.set_queue(index, queue)).collect::<Result<_, _>>()?;
        self.common.write_u8(common::STATUS, status | status::DRIVER_OK)?;
        Ok(notify)
    }

    fn negotiate(&self) -> Result<(), VirtioError> {
        self.common.write_u32(common::DEVICE_FEATURE_SELECT, 1)?;
        if self.common.read_u32(common::DEVICE_FEATURE)? & VERSION_1_UPPER == 0 {
            return Err(VirtioError::Refused { what: "version 1 of virtio" });
        }
        for (half, features) in [(0, 0), (1, VERSION_1_UPPER)] {
            self.common.write_u32(common::DRIVER_FEATURE_SELECT, half)?;
            self.common.write_u32(common::DRIVER_FEATURE, features)?;
        }
        Ok(())
    }

    fn set_vector(&self, register: u64) -> Result<(), VirtioError> {
        self.common.write_u16(register, VECTOR)?;
        if self.common.read_u16(register)? == NO_VECTOR {
            return Err(VirtioError::Refused { what: "an interrupt" });
        }
        Ok(())
    }

    fn set_queue(&self, index: u16, queue: &Queue) -> Result<NotifyRegister, VirtioError> {
        self.common.write_u16(common::QUEUE_SELECT, index)?;
        if self.common.read_u16(common::QUEUE_SIZE)? < QUEUE_SIZE {
            return Err(VirtioError::Refused { what: "queues of 16 entries" });
        }
        self.common.write_u16(common::QUEUE_SIZE, QUEUE_SIZE)?;
        self.set_vector(common::QUEUE_VECTOR)?;
        let addresses = queue.addresses();
        self.common.write_u64(common::QUEUE_DESCRIPTORS, addresses.descriptors)?;
        self.common.write_u64(common::QUEUE_AVAILABLE, addresses.available)?;
        self.common.write_u64(common::QUEUE_USED, addresses.used)?;
        let position = u64::from(self.common.read_u16(common::QUEUE_NOTIFY_OFFSET)?);
        let offset = position * u64::from(self.notify_place.multiplier);
        if offset + 2 > u64::from(self.notify_place.len) {
            return Err(VirtioError::Capability { what: "notification register" });
        }
        self.common.write_u16(common::QUEUE_ENABLE, 1)?;
        Ok(NotifyRegister { offset, queue: index })
    }

    /// Tells the device that buffers were offered.
    ///
    /// # Errors
    /// [`VirtioError::Vfio`].
    pub fn notify(&self, register: NotifyRegister) -> Result<(), VirtioError> {
        Ok(self.notify.write_u16(register.offset, register.queue)?)
    }

    /// Changes whenever the configuration space has changed (section 2.5.1).
    ///
    /// # Errors
    /// [`VirtioError::Vfio`].
    pub fn config_generation(&self) -> Result<u8, VirtioError> {
        Ok(self.common.read_u8(common::CONFIG_GENERATION)?)
    }

    /// Reads 32 bits of the configuration space.
    ///
    /// # Errors
    /// [`VirtioError::Vfio`].
    pub fn read_config(&self, offset: u64) -> Result<u32, VirtioError> {
        Ok(self.device_config.read_u32(offset)?)
    }

    /// Writes 32 bits of the configuration space.
    ///
    /// # Errors
    /// [`VirtioError::Vfio`].
    pub fn write_config(&self, offset: u64, value: u32) -> Result<(), VirtioError> {
        Ok(self.device_config.write_u32(offset, value)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration space with virtio capabilities as QEMU lists them.
    fn config() -> [u8; 256] {
        let mut config = [0; 256];
        config[6] = 0x10;
        config[0x34] = 0x84;
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x84, &[9, 0x70, 20, 5, 0, 0, 0, 0]);
        put(0x70, &[9, 0x60, 20, 2, 4, 0, 0, 0, 0, 0x30, 0, 0, 0, 0x10, 0, 0, 4, 0, 0, 0]);
        put(0x60, &[9, 0x50, 16, 4, 4, 0, 0, 0, 0, 0x20, 0, 0, 0, 0x10, 0, 0]);
        put(0x50, &[9, 0x40, 16, 1, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0]);
        put(0x40, &[0x11, 0, 1, 0]);
        config
    }

    #[test]
    fn the_structures_of_a_device_are_found() {
        let place = |kind, offset, multiplier| Place { kind, bar: 4, offset, len: 0x1000, multiplier };
        let places = virtio_places(&config());
        assert_eq!(
            places[1..],
            [place(NOTIFICATION, 0x3000, 4), place(DEVICE_CONFIG, 0x2000, 0), place(COMMON_CONFIG, 0, 0)]
        );
    }

    #[test]
    fn a_list_without_end_or_outside_of_the_space_ends() {
        let mut ring = config();
        ring[0x51] = 0x84;
        assert!(virtio_places(&ring).len() <= CAPABILITIES_MAX);
        for start in [0, 4, 0x3c, 0xec, 0xff] {
            let mut outside = config();
            outside[0x34] = start;
            assert!(virtio_places(&outside).is_empty());
        }
        let mut none = config();
        none[6] = 0;
        assert!(virtio_places(&none).is_empty());
    }
}
