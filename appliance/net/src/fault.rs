//! Why a ring breaks: its driver has not kept the rules, and only a restart of the ring helps (virtio 1.3, section 2.1.2).

use vm_memory::GuestMemoryError;
use vvu_back_end::RingError;

/// See the module's text.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("chain of head {head} has {len} bytes, which is less than a header")]
    Short { head: u16, len: u64 },
    #[error("chain of head {head} has buffers of the wrong direction")]
    Direction { head: u16 },
    #[error("driver memory was taken away under the device")]
    MemoryLost,
    #[error("driver memory")]
    Memory(#[from] GuestMemoryError),
}

/// Whether a ring is worked on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    /// It is.
    Working,
    /// The front-end has to give something first.
    Waiting,
    /// The driver broke it; only a restart helps.
    Broken,
}
