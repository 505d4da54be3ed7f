//! Feature bits of the network device (virtio 1.3, section 5.1.3), as masks.

/// The driver may leave checksums to the device.
pub(crate) const CSUM: u64 = 1 << 0;
/// The device may leave checksums to the driver.
pub(crate) const GUEST_CSUM: u64 = 1 << 1;
/// The driver can change what the device leaves to it.
pub(crate) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
/// The device tells the largest MTU.
pub(crate) const MTU: u64 = 1 << 3;
/// The device has an address.
pub(crate) const MAC: u64 = 1 << 5;
/// The driver receives TCP over IPv4 that was not cut.
pub(crate) const GUEST_TSO4: u64 = 1 << 7;
/// The driver receives TCP over IPv6 that was not cut.
pub(crate) const GUEST_TSO6: u64 = 1 << 8;
/// The device cuts TCP over IPv4.
pub(crate) const HOST_TSO4: u64 = 1 << 11;
/// The device cuts TCP over IPv6.
pub(crate) const HOST_TSO6: u64 = 1 << 12;
/// A packet may be received in several buffers.
pub(crate) const MRG_RXBUF: u64 = 1 << 15;
/// The configuration space has a status.
pub(crate) const STATUS: u64 = 1 << 16;
/// There is a control queue.
pub(crate) const CTRL_VQ: u64 = 1 << 17;
/// The control queue sets what is received.
pub(crate) const CTRL_RX: u64 = 1 << 18;
/// The control queue filters VLANs.
pub(crate) const CTRL_VLAN: u64 = 1 << 19;
/// More of what is received.
pub(crate) const CTRL_RX_EXTRA: u64 = 1 << 20;
/// The driver can announce itself when it is asked to.
pub(crate) const GUEST_ANNOUNCE: u64 = 1 << 21;
/// Several queue pairs.
pub(crate) const MQ: u64 = 1 << 22;
/// The control queue sets the address.
pub(crate) const CTRL_MAC_ADDR: u64 = 1 << 23;
/// Indirect descriptors (section 6).
pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
/// Events by index (section 6).
pub(crate) const EVENT_IDX: u64 = 1 << 29;
/// Not a legacy device (section 6).
pub(crate) const VERSION_1: u64 = 1 << 32;
/// The driver receives UDP over IPv4 that was not cut.
pub(crate) const GUEST_USO4: u64 = 1 << 54;
/// The driver receives UDP over IPv6 that was not cut.
pub(crate) const GUEST_USO6: u64 = 1 << 55;
/// The device cuts UDP.
pub(crate) const HOST_USO: u64 = 1 << 56;

/// What every port offers.
///
/// Not among them: HOST_ECN and GUEST_ECN, as segments with ECN bits would have to be told from others on each way; HASH
/// and RSS, as the receiving driver's queues are chosen by a hash of our own; NOTF_COAL, as batches of packets are
/// signalled together already.
pub(crate) const OFFERED: u64 = CSUM
    | GUEST_CSUM
    | CTRL_GUEST_OFFLOADS
    | MTU
    | MAC
    | GUEST_TSO4
    | GUEST_TSO6
    | HOST_TSO4
    | HOST_TSO6
    | MRG_RXBUF
    | STATUS
    | CTRL_VQ
    | CTRL_RX
    | CTRL_VLAN
    | CTRL_RX_EXTRA
    | GUEST_ANNOUNCE
    | MQ
    | CTRL_MAC_ADDR
    | INDIRECT_DESC
    | EVENT_IDX
    | VERSION_1
    | GUEST_USO4
    | GUEST_USO6
    | HOST_USO;
