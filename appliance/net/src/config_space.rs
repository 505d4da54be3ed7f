//! The configuration space (virtio 1.3, section 5.1.4, `struct virtio_net_config`), little-endian. Pure.

use crate::ethernet::MacAddress;

/// Length in bytes.
pub(crate) const LEN: usize = 24;

/// Bits of `status`.
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;

/// What it tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ConfigSpace {
    pub(crate) mac: MacAddress,
    pub(crate) link_up: bool,
    pub(crate) announce: bool,
    pub(crate) max_pairs: u16,
    pub(crate) mtu: u16,
}

impl ConfigSpace {
    pub(crate) fn encode(&self) -> [u8; LEN] {
        let [m0, m1, m2, m3, m4, m5] = self.mac.0;
        let status = if self.link_up { LINK_UP } else { 0 } | if self.announce { ANNOUNCE } else { 0 };
        let ([s0, s1], [p0, p1], [t0, t1]) =
            (status.to_le_bytes(), self.max_pairs.to_le_bytes(), self.mtu.to_le_bytes());
        // `speed` and `duplex` are unknown; RSS and hash reports are not offered.
        let [u, d] = [0xff, 0xff];
        [m0, m1, m2, m3, m4, m5, s0, s1, p0, p1, t0, t1, u, u, u, u, d, 0, 0, 0, 0, 0, 0, 0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_that_of_the_specification() {
        let mac = MacAddress([2, 1, 0, 3, 4, 5]);
        let config = ConfigSpace { mac, link_up: true, announce: true, max_pairs: 0x102, mtu: 9000 };
        let bytes = config.encode();
        assert_eq!(bytes[..6], mac.0);
        assert_eq!(bytes[6..8], [3, 0], "status");
        assert_eq!(bytes[8..10], [2, 1], "max_virtqueue_pairs");
        assert_eq!(bytes[10..12], 9000u16.to_le_bytes(), "mtu");
        assert_eq!(bytes[12..17], [0xff; 5], "speed and duplex");
        assert_eq!(bytes[17..], [0; 7]);
        let down = ConfigSpace { link_up: false, announce: false, ..config }.encode();
        assert_eq!(down[6..8], [0, 0]);
    }
}
