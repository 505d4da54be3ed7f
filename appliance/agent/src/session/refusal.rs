//! Why a request is refused, and the log of it.

use tracing::{debug, warn};
use vvu_protocol::address::UserAddress;

use crate::in_one_line;
use crate::regions::RegionError;
use crate::translate::TranslateError;
use crate::uuid::Uuid;
use crate::window::ReadError;

/// Refusals of one session and channel that are logged as warnings: a peer can cause as many as it likes.
const REFUSALS_LOGGED: u32 = 16;

/// Why a request is refused. The bridge hears that it was, the log why.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error(transparent)]
    Translate(#[from] TranslateError),
    #[error(transparent)]
    Memory(#[from] RegionError),
    #[error("a back-end's descriptor for the state of the device")]
    Pipe(#[source] std::io::Error),
    #[error("state of the device is being transferred already")]
    TransferUnderWay,
    #[error("only a vring's position can be resumed")]
    ResumeOther,
    #[error("vring {index} cannot be resumed before its address is set")]
    NoAddress { index: u32 },
    #[error("vring {index} cannot be resumed: {reason}, and the back-end has no inflight buffer")]
    NotFound { index: u32, reason: &'static str },
    #[error("vring {index} cannot be resumed: its used ring at user address {address} is not in driver memory")]
    UsedRing { index: u32, address: UserAddress },
    #[error("vring {index} cannot be resumed")]
    UsedIndex {
        index: u32,
        #[source]
        source: ReadError,
    },
    #[error("{reason}")]
    NotCarried { reason: &'static str },
}

/// Logs refusals, a bounded number of them as warnings.
#[derive(Debug)]
pub(super) struct RefusalLog {
    uuid: Uuid,
    count: u32,
}

impl RefusalLog {
    pub(super) const fn new(uuid: Uuid) -> Self {
        Self { uuid, count: 0 }
    }

    pub(super) fn log(&mut self, code: u32, name: &str, refusal: &Refusal) {
        self.count = self.count.saturating_add(1);
        if self.count <= REFUSALS_LOGGED {
            warn!(set = %self.uuid, code, "{name} is refused: {}", in_one_line(refusal));
        } else {
            debug!(set = %self.uuid, code, "{name} is refused: {}", in_one_line(refusal));
        }
    }
}
