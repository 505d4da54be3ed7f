//! What a port is to its vhost-user session.

use std::sync::Arc;

use vvu_back_end::{ConfigWriter, Device, DeviceError, Service};
use vvu_protocol::features::{Features, ProtocolFeatures};

use crate::config_space;
use crate::control_queue;
use crate::ethernet::MacAddress;
use crate::features;
use crate::port::Port;
use crate::receiver;
use crate::switch::Switch;
use crate::transmitter;

/// Largest ring that is served; as large as the largest of the VMMs.
const MAX_QUEUE_SIZE: u16 = 1024;

/// A port of a switch. Lives as long as the process; connections come and go.
#[derive(Debug)]
pub(crate) struct PortDevice {
    switch: Arc<Switch>,
    index: usize,
}

impl PortDevice {
    /// None if the switch has no such port.
    pub(crate) fn new(switch: &Arc<Switch>, index: usize) -> Option<Self> {
        switch.port(index).is_some().then(|| Self { switch: Arc::clone(switch), index })
    }

    fn port(&self) -> Option<&Port> {
        self.switch.port(self.index)
    }
}

impl Device for PortDevice {
    /// Two for each pair, and the control queue: front-ends that keep the latter to themselves leave it alone.
    fn queue_count(&self) -> u16 {
        self.port().map_or(0, |port| 2 * port.max_pairs + 1)
    }

    fn max_queue_size(&self) -> u16 {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> Features {
        Features::from_bits_retain(features::OFFERED)
    }

    fn protocol_features(&self) -> ProtocolFeatures {
        ProtocolFeatures::CONFIG | ProtocolFeatures::RARP | ProtocolFeatures::MTU
    }

    fn reset(&self) {
        if let Some(port) = self.port() {
            port.reset();
            self.switch.forget(self.index);
        }
    }

    fn negotiated(&self, features: Features) {
        if let Some(port) = self.port() {
            port.negotiate(features.bits());
        }
    }

    fn read_config(&self, offset: u32, len: usize) -> Option<Vec<u8>> {
        let config = self.port()?.config().encode();
        // Front-ends ask for fields that are newer than ours; those of features not offered read as zero.
        Some(config.into_iter().chain(std::iter::repeat(0)).skip(offset as usize).take(len).collect())
    }

    /// Only a legacy driver without a command for it writes its address here (section 5.1.4.2); and migration has nothing to
    /// restore, as the address comes with this device's port.
    fn write_config(&self, offset: u32, bytes: &[u8], writer: ConfigWriter) -> Result<(), DeviceError> {
        let Some(port) = self.port() else { return Ok(()) };
        let negotiated = port.negotiated().features;
        let may_write = negotiated & (features::VERSION_1 | features::CTRL_MAC_ADDR) == 0;
        if writer == ConfigWriter::Driver && may_write && (offset as usize) < config_space::LEN {
            port.change_driver(|driver| {
                for (to, from) in driver.mac.0.iter_mut().skip(offset as usize).zip(bytes) {
                    *to = *from;
                }
            });
        }
        Ok(())
    }

    fn set_mtu(&self, mtu: u64) -> Result<(), DeviceError> {
        let most = self.port().map_or(0, |port| port.mtu);
        if mtu < 68 || mtu > u64::from(most) {
            return Err(DeviceError::new(format!("MTU {mtu} of the front-end, the switch has {most}")));
        }
        Ok(())
    }

    fn send_rarp(&self, mac: u64) -> Result<(), DeviceError> {
        // The first six bytes of the message, which is little-endian.
        let [a, b, c, d, e, g, _, _] = mac.to_le_bytes();
        let mac = MacAddress([a, b, c, d, e, g]);
        if mac.is_group() || mac.bits() == 0 {
            return Err(DeviceError::new(format!("{mac} is not the address of a network card")));
        }
        self.switch.announce(self.index, mac);
        Ok(())
    }

    fn cpu_of_queue(&self, index: u16) -> Option<usize> {
        self.switch.cpu_of_pair(self.index, index / 2)
    }

    fn serve(&self, service: Service<'_>) {
        let Some(port) = self.port() else { return };
        let (queue, bits) = (service.index(), service.features().bits());
        port.counters.starts.count();
        tracing::debug!(port = self.index, queue, size = service.size(), features = ?service.features(), "ring starts");
        if port.control_queue(bits) == Some(queue) {
            control_queue::serve(port, &service);
        } else if queue % 2 == 1 {
            transmitter::serve(&self.switch, port, &service);
        } else if let Some(receiver) = port.receiver(queue / 2) {
            receiver::serve(port, receiver, queue / 2, &service);
        }
        tracing::debug!(port = self.index, queue, "ring stops");
    }
}
