//! What all queues of a device share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use vvu_back_end::log_limit::LogLimit;
use vvu_back_end::rate_limit::RateLimit;
use vvu_back_end::threads::Threads;
use vvu_back_end::{ConfigWriter, DeviceError, Service, lost_memory};
use vvu_protocol::features::{Features, ProtocolFeatures};

use crate::config_space::{self, DiskShape, WRITEBACK_OFFSET, feature, offered_features};
use crate::counters::DeviceCounters;
use crate::daemon::Options;
use crate::engine::Setup;
use crate::image::Image;
use crate::qcow2::pool::Pool;
use crate::request::DiskRules;
use crate::worker;

/// Length of the serial number in a GET_ID answer, padded with NUL (virtio 1.3, section 5.2.6).
pub(crate) const SERIAL_LEN: usize = 20;

/// Largest ring that is served; as large as the largest of the VMMs.
pub(crate) const MAX_QUEUE_SIZE: u16 = 1024;

/// A disk, its options and its counters. Lives as long as the process; connections come and go.
#[derive(Debug)]
pub(crate) struct Device {
    /// The image; of a disk in a format, the file on top.
    pub(crate) image: Arc<Image>,
    /// None if the image is the disk, byte for byte.
    pub(crate) formatted: Option<Pool>,
    pub(crate) serial: [u8; SERIAL_LEN],
    pub(crate) queues: u16,
    /// How the queues' threads work.
    pub(crate) threads: Threads,
    /// How they ask for their io_uring.
    pub(crate) ring_setup: Setup,
    /// For all queues together.
    pub(crate) rate_limit: RateLimit,
    pub(crate) counters: DeviceCounters,
    /// For what the driver or the front-end can cause.
    pub(crate) peer_log: LogLimit,
    /// For errors of the storage.
    pub(crate) storage_log: LogLimit,
    /// `writeback` of the configuration space.
    writeback: AtomicBool,
    /// Losses of memory before this connection, whose memory is its own.
    former_losses: AtomicU64,
}

impl Device {
    pub(crate) fn new(image: Arc<Image>, formatted: Option<Pool>, ring_setup: Setup, options: &Options) -> Self {
        let queues = options.queues;
        Self {
            image,
            formatted,
            serial: serial_bytes(&options.serial),
            queues,
            threads: options.threads.clone(),
            ring_setup,
            rate_limit: RateLimit::new(options.limits, Instant::now()),
            counters: DeviceCounters::new(queues),
            peer_log: LogLimit::default(),
            storage_log: LogLimit::default(),
            writeback: AtomicBool::new(true),
            former_losses: AtomicU64::new(0),
        }
    }

    /// A new connection begins.
    pub(crate) fn forget_lost_memory(&self) {
        self.former_losses.store(lost_memory::losses(), Ordering::Relaxed);
    }

    /// Losses of memory before this connection.
    pub(crate) fn former_losses(&self) -> u64 {
        self.former_losses.load(Ordering::Relaxed)
    }

    /// Driver memory was lost in this connection: what was read of it since is not to be trusted.
    pub(crate) fn lost_memory(&self) -> bool {
        lost_memory::losses() != self.former_losses()
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

    /// With the capacity of this moment.
    pub(crate) fn shape(&self) -> DiskShape {
        self.formatted.as_ref().map_or_else(|| self.image.shape(), |pool| pool.disk().shape())
    }

    pub(crate) fn rules(&self, features: u64) -> DiskRules {
        let shape = self.shape();
        DiskRules { capacity_sectors: shape.capacity_sectors, read_only: shape.read_only, features }
    }
}

fn serial_bytes(serial: &str) -> [u8; SERIAL_LEN] {
    let mut bytes = [0; SERIAL_LEN];
    for (to, from) in bytes.iter_mut().zip(serial.bytes()) {
        *to = from;
    }
    bytes
}

impl vvu_back_end::Device for Device {
    fn queue_count(&self) -> u16 {
        self.queues
    }

    fn max_queue_size(&self) -> u16 {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> Features {
        Features::from_bits_retain(offered_features(self.shape().read_only))
    }

    fn protocol_features(&self) -> ProtocolFeatures {
        ProtocolFeatures::CONFIG
    }

    fn reset(&self) {
        self.writeback.store(true, Ordering::Relaxed);
    }

    fn read_config(&self, offset: u32, len: usize) -> Option<Vec<u8>> {
        let config = config_space::encode(self.shape(), self.queues, self.writeback());
        // Front-ends ask for fields that are newer than ours; those of features not offered read as zero.
        Some(config.into_iter().chain(std::iter::repeat(0)).skip(offset as usize).take(len).collect())
    }

    fn write_config(&self, offset: u32, bytes: &[u8], _writer: ConfigWriter) -> Result<(), DeviceError> {
        // All other fields are read-only for the driver, writing them has no effect; and migration has none to restore,
        // for they describe the image of this side.
        let position = WRITEBACK_OFFSET.checked_sub(offset).and_then(|position| bytes.get(position as usize));
        match position {
            Some(0) => self.writeback.store(false, Ordering::Relaxed),
            Some(1) => self.writeback.store(true, Ordering::Relaxed),
            Some(_) | None => tracing::debug!(offset, len = bytes.len(), "write to read-only configuration"),
        }
        Ok(())
    }

    fn cpu_of_queue(&self, index: u16) -> Option<usize> {
        self.threads.cpu_of_queue(index)
    }

    fn serve(&self, service: Service<'_>) {
        worker::serve(self, &service);
    }
}
