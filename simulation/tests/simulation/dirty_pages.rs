//! Which pages of driver memory back-ends have written since the front-end has been told that they are logged: what the dirty
//! log must say, whatever bridge, agent and back-end do about it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use vvu_back_end::dirty_log::LOG_PAGE;
use vvu_protocol::window::FileId;

use super::world::QUEUES;

#[derive(Debug, Default)]
pub(crate) struct DirtyPages {
    /// The file with the rings of the driver VM that is logged.
    watched: Cell<Option<FileId>>,
    /// Pages for each queue that were not found in the log yet.
    written: RefCell<[BTreeSet<u64>; QUEUES as usize]>,
}

impl DirtyPages {
    /// From now on pages count.
    pub(crate) fn watch(&self, rings: FileId) {
        self.watched.set(Some(rings));
    }

    /// From now on pages do not count; those until now do.
    pub(crate) fn unwatch(&self) {
        self.watched.set(None);
    }

    /// There is no log any more, and nobody to read it.
    pub(crate) fn forget(&self) {
        self.unwatch();
        self.written.take();
    }

    /// A back-end has written for a queue of the machine that has its rings in this file.
    pub(crate) fn wrote(&self, rings: FileId, queue: usize, guest_address: u64, len: u64) {
        if self.watched.get() == Some(rings) {
            let pages = guest_address / LOG_PAGE..=(guest_address + len - 1) / LOG_PAGE;
            self.written.borrow_mut()[queue].extend(pages);
        }
    }

    /// The front-end has found this page in the log.
    pub(crate) fn found(&self, page: u64) {
        for pages in self.written.borrow_mut().iter_mut() {
            pages.remove(&page);
        }
    }

    /// The front-end has read the log at a moment when all of this queue must be in it.
    pub(crate) fn check(&self, queue: usize) {
        let written = &self.written.borrow()[queue];
        assert!(written.is_empty(), "queue {queue}: pages {written:x?} were written, and are not in the dirty log");
    }
}
