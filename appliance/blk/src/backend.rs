//! The device as `vhost-user-backend` sees it, for one connection.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use crate::config_space::{self, WRITEBACK_OFFSET};
use crate::descriptors::ExitEvent;
use crate::device::Device;
use crate::lost_memory;
use crate::ring::MAX_QUEUE_SIZE;
use crate::vring::{MemoryTable, QueueVring};
use crate::worker::serve;

/// One connection's view of the device.
pub(crate) struct Backend {
    device: Arc<Device>,
    /// One per queue, as each has a thread of its own.
    exit_events: Vec<ExitEvent>,
    rings: Mutex<Rings>,
}

#[derive(Default)]
struct Rings {
    /// Rings that have been in service.
    known: Vec<QueueVring>,
    closed: bool,
}

impl Backend {
    pub(crate) fn new(device: &Arc<Device>) -> io::Result<Self> {
        device.reset();
        lost_memory::forget();
        let exit_events = (0..device.queues).map(|_| ExitEvent::new()).collect::<io::Result<_>>()?;
        Ok(Self { device: Arc::clone(device), exit_events, rings: Mutex::default() })
    }

    /// Takes all rings out of service for good, and waits until nothing is in flight. No request works on the
    /// connection's memory afterwards.
    pub(crate) fn close(&self) {
        let known = {
            let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
            rings.closed = true;
            std::mem::take(&mut rings.known)
        };
        for ring in known {
            ring.close();
        }
    }

    /// Notes a ring that goes into service; false if the connection is over.
    fn enter(&self, queue_index: usize, ring: &QueueVring) -> bool {
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        // One per queue: the rings of a connection are made once.
        if !rings.closed && !rings.known.iter().any(|known| known.is_same(ring)) {
            tracing::debug!(queue_index, "first start of the ring");
            rings.known.push(ring.clone());
        }
        !rings.closed
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = QueueVring;

    fn num_queues(&self) -> usize {
        usize::from(self.device.queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(MAX_QUEUE_SIZE)
    }

    fn features(&self) -> u64 {
        self.device.offered_features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        self.device.negotiate(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn reset_device(&self) {
        self.device.reset();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // Part of the features that a ring latches when it starts.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = config_space::encode(self.device.image.shape(), self.device.queues, self.device.writeback());
        // Front-ends ask for fields that are newer than ours; those of features not offered read as zero.
        config.into_iter().chain(std::iter::repeat(0)).skip(offset as usize).take(size as usize).collect()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        // All other fields are read-only for the driver; writing them has no effect.
        let position = WRITEBACK_OFFSET.checked_sub(offset).and_then(|position| bytes.get(position as usize));
        match position {
            Some(0) => self.device.set_writeback(false),
            Some(1) => self.device.set_writeback(true),
            Some(_) | None => tracing::debug!(offset, len = bytes.len(), "write to read-only configuration"),
        }
        Ok(())
    }

    fn update_memory(&self, _memory: MemoryTable) -> io::Result<()> {
        // Rings share the table and look at it anew for each batch; requests in flight keep the one they began with.
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.device.queues).map(|queue_index| 1 << queue_index).collect()
    }

    fn exit_event(&self, thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        let event = self.exit_events.get(thread_index)?;
        event.lend().inspect_err(|error| tracing::error!(%error, "no descriptor left for an exit event")).ok()
    }

    fn handle_event(
        &self,
        _device_event: u16,
        _events: EventSet,
        vrings: &[QueueVring],
        thread_id: usize,
    ) -> io::Result<()> {
        // The thread has one ring, and its one event says that the ring was started and enabled.
        for vring in vrings {
            if self.enter(thread_id, vring) {
                serve(&self.device, thread_id, vring);
            }
        }
        Ok(())
    }
}
