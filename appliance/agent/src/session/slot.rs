//! A place where one task of a session leaves something for another.

use std::cell::RefCell;

use tokio::sync::Notify;

/// Holds one thing at most; a newer one takes the place of one that was not fetched.
#[derive(Debug)]
pub(super) struct Slot<T> {
    content: RefCell<Option<T>>,
    filled: Notify,
}

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self { content: RefCell::new(None), filled: Notify::new() }
    }
}

impl<T> Slot<T> {
    pub(super) fn put(&self, thing: T) {
        self.content.replace(Some(thing));
        self.filled.notify_one();
    }

    /// Waits for something, and takes it. Nothing is lost if the future is dropped.
    pub(super) async fn take(&self) -> T {
        loop {
            if let Some(thing) = self.content.take() {
                return thing;
            }
            self.filled.notified().await;
        }
    }
}
