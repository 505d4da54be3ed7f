//! Feature bits, as types that keep bits without a name.

use bitflags::bitflags;

bitflags! {
    /// Device features (GET_FEATURES, SET_FEATURES): the bits that a vhost-user proxy has to know. Bits of device
    /// classes have no name here and pass through.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Features: u64 {
        /// `VHOST_F_LOG_ALL`: log every write to driver memory.
        const LOG_ALL = 1 << 26;
        /// `VIRTIO_F_INDIRECT_DESC` (virtio 1.3, section 6).
        const INDIRECT_DESC = 1 << 28;
        /// `VIRTIO_F_EVENT_IDX` (virtio 1.3, section 6).
        const EVENT_IDX = 1 << 29;
        /// `VHOST_USER_F_PROTOCOL_FEATURES`: [`ProtocolFeatures`] can be negotiated.
        const PROTOCOL_FEATURES = 1 << 30;
        /// `VIRTIO_F_VERSION_1` (virtio 1.3, section 6).
        const VERSION_1 = 1 << 32;
        /// `VIRTIO_F_ACCESS_PLATFORM`: ring and buffer addresses pass an IOMMU; needs IOTLB messages.
        const ACCESS_PLATFORM = 1 << 33;
        /// `VIRTIO_F_RING_PACKED` (virtio 1.3, section 6).
        const RING_PACKED = 1 << 34;
        // Every other bit is kept as it is.
        const _ = !0;
    }
}

bitflags! {
    /// Protocol features of vhost-user (specification, section "Protocol features"; bits 20 to 22 as of QEMU 11).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct ProtocolFeatures: u64 {
        /// More than one queue pair; GET_QUEUE_NUM.
        const MQ = 1 << 0;
        /// The dirty log comes with a file descriptor.
        const LOG_SHMFD = 1 << 1;
        /// SEND_RARP.
        const RARP = 1 << 2;
        /// A request may ask for an acknowledgement.
        const REPLY_ACK = 1 << 3;
        /// NET_SET_MTU.
        const MTU = 1 << 4;
        /// SET_BACKEND_REQ_FD: requests from back-end to front-end.
        const BACKEND_REQ = 1 << 5;
        /// SET_VRING_ENDIAN.
        const CROSS_ENDIAN = 1 << 6;
        /// CREATE_CRYPTO_SESSION, CLOSE_CRYPTO_SESSION.
        const CRYPTO_SESSION = 1 << 7;
        /// Postcopy migration by userfaultfd.
        const PAGEFAULT = 1 << 8;
        /// GET_CONFIG, SET_CONFIG, CONFIG_CHANGE.
        const CONFIG = 1 << 9;
        /// File descriptors in requests of the back-end.
        const BACKEND_SEND_FD = 1 << 10;
        /// VRING_HOST_NOTIFIER.
        const HOST_NOTIFIER = 1 << 11;
        /// GET_INFLIGHT_FD, SET_INFLIGHT_FD.
        const INFLIGHT_SHMFD = 1 << 12;
        /// RESET_DEVICE.
        const RESET_DEVICE = 1 << 13;
        /// Kicks and calls as messages.
        const INBAND_NOTIFICATIONS = 1 << 14;
        /// GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// GET_STATUS, SET_STATUS.
        const STATUS = 1 << 16;
        /// Memory regions of Xen.
        const XEN_MMAP = 1 << 17;
        /// Shared objects (dma-buf).
        const SHARED_OBJECT = 1 << 18;
        /// SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE.
        const DEVICE_STATE = 1 << 19;
        /// GET_VRING_BASE leaves requests in the inflight buffer.
        const GET_VRING_BASE_INFLIGHT = 1 << 20;
        /// Ring addresses are guest-physical.
        const GPA_ADDRESSES = 1 << 21;
        /// GET_SHMEM_CONFIG, SHMEM_MAP, SHMEM_UNMAP.
        const SHMEM = 1 << 22;
        // Bits of later specifications are kept as they are; a proxy masks them out by name.
        const _ = !0;
    }
}
