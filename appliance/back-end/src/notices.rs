//! What other threads want of the session: requests to the front-end, and the end.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Notices {
    config_changed: AtomicBool,
    /// There may be a request for the front-end: one permit, however often it is told.
    requests: Notify,
    end: Notify,
}

impl Notices {
    /// There is something to ask the front-end for.
    pub(crate) fn notify(&self) {
        self.requests.notify_one();
    }

    pub(crate) async fn notified(&self) {
        self.requests.notified().await;
    }

    pub(crate) fn note_config_change(&self) {
        self.config_changed.store(true, Ordering::Release);
        self.notify();
    }

    pub(crate) fn take_config_change(&self) -> bool {
        self.config_changed.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn end(&self) {
        self.end.notify_one();
    }

    pub(crate) async fn ended(&self) {
        self.end.notified().await;
    }
}
