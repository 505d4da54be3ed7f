//! What all queues of a device share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use crate::config_space::{feature, offered_features};
use crate::counters::DeviceCounters;
use crate::image::Image;
use crate::log_limit::LogLimit;
use crate::request::DiskRules;

/// Length of the serial number in a GET_ID answer, padded with NUL (virtio 1.3, section 5.2.6).
pub(crate) const SERIAL_LEN: usize = 20;

/// A disk, its options and its counters. Lives as long as the process; connections come and go.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) image: Arc<Image>,
    pub(crate) serial: [u8; SERIAL_LEN],
    pub(crate) queues: u16,
    pub(crate) counters: DeviceCounters,
    /// For what the driver or the front-end can cause.
    pub(crate) peer_log: LogLimit,
    /// For errors of the storage.
    pub(crate) storage_log: LogLimit,
    features: AtomicU64,
    /// `writeback` of the configuration space.
    writeback: AtomicBool,
}

impl Device {
    pub(crate) fn new(image: Image, serial: [u8; SERIAL_LEN], queues: u16) -> Self {
        Self {
            image: Arc::new(image),
            serial,
            queues,
            counters: DeviceCounters::new(queues),
            peer_log: LogLimit::default(),
            storage_log: LogLimit::default(),
            features: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
        }
    }

    /// Back to the state before feature negotiation.
    pub(crate) fn reset(&self) {
        self.features.store(0, Ordering::Relaxed);
        self.writeback.store(true, Ordering::Relaxed);
    }

    pub(crate) fn offered_features(&self) -> u64 {
        offered_features(self.image.shape().read_only)
    }

    pub(crate) fn negotiate(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
    }

    pub(crate) fn features(&self) -> u64 {
        self.features.load(Ordering::Relaxed)
    }

    pub(crate) fn set_writeback(&self, writeback: bool) {
        self.writeback.store(writeback, Ordering::Relaxed);
    }

    pub(crate) fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// Whether a write has to be durable before it is completed (virtio 1.3, section 5.2.5.2): the driver chose so, or
    /// it cannot flush.
    pub(crate) fn writes_through(&self, features: u64) -> bool {
        if features & feature(VIRTIO_BLK_F_CONFIG_WCE) != 0 {
            !self.writeback()
        } else {
            features & feature(VIRTIO_BLK_F_FLUSH) == 0
        }
    }

    pub(crate) fn rules(&self, features: u64) -> DiskRules {
        let shape = self.image.shape();
        DiskRules { capacity_sectors: shape.capacity_sectors, read_only: shape.read_only, features }
    }
}
