//! VMMs that may still take the front-end's kicks.
//!
//! A VMM that was given a kick eventfd reads it, and nothing but the end of its process stops it: an appliance that was
//! replaced or dropped still takes kicks from the one that has its place (QEMU without KVM does so all the time; with KVM only
//! as long as its guest has the vector switched on). So the end of each VMM that knows a kick is awaited, by its end of
//! the doorbell device's socket, and until then kicks are repeated ([`super::Doorbells::signal_all`]).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, spawn_local};
use vvu_socket::HangUp;

/// Most VMMs whose end is awaited: two in use, one that retires, and some that an operator is slow to end. Of more, the
/// one that was told first is forgotten.
const READERS_MAX: usize = 8;

/// Eventfds that a VMM was given, as far as the front-end's session still has them.
pub(super) type Given = Rc<RefCell<Vec<Weak<OwnedFd>>>>;

/// Names a VMM among those of a bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ReaderId(u64);

#[derive(Debug, Default)]
struct Known {
    readers: BTreeMap<ReaderId, AbortHandle>,
    count: u64,
}

/// All VMMs that were given eventfds of a front-end and have not ended. Needs a tokio `LocalSet`.
#[derive(Debug, Default)]
pub struct Readers {
    known: RefCell<Known>,
    ended: Notify,
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.known.get_mut().readers.values().for_each(AbortHandle::abort);
    }
}

impl Readers {
    /// One more, which is given eventfds until it hangs up.
    pub(super) fn add(self: &Rc<Self>, hang_up: HangUp, given: &Given) -> ReaderId {
        let mut known = self.known.borrow_mut();
        known.count += 1;
        let id = ReaderId(known.count);
        let task = spawn_local(await_end(Rc::downgrade(self), id, hang_up, Rc::clone(given)));
        known.readers.insert(id, task.abort_handle());
        if known.readers.len() > READERS_MAX
            && let Some((_, oldest)) = known.readers.pop_first()
        {
            tracing::warn!("VMMs of {READERS_MAX} appliances that were dropped are still there");
            oldest.abort();
        }
        id
    }

    /// Whether there are others than this one.
    pub(super) fn has_others(&self, own: Option<ReaderId>) -> bool {
        self.known.borrow().readers.keys().any(|id| Some(*id) != own)
    }

    /// Waits until one has ended.
    pub(super) async fn one_ended(&self) {
        self.ended.notified().await;
    }
}

async fn await_end(readers: Weak<Readers>, id: ReaderId, hang_up: HangUp, given: Given) {
    if let Err(error) = hang_up.happened().await {
        tracing::warn!(%error, "the end of an appliance's VMM cannot be awaited");
    }
    given.borrow().iter().filter_map(Weak::upgrade).for_each(|descriptor| restore(&descriptor));
    if let Some(readers) = readers.upgrade() {
        readers.known.borrow_mut().readers.remove(&id);
        readers.ended.notify_waiters();
    }
}

/// QEMU lets reads of a descriptor that it receives wait, and sets that right a moment later. One that was killed in between
/// has not.
fn restore(descriptor: &OwnedFd) {
    let flags = fcntl_getfl(descriptor);
    if let Ok(flags) = flags
        && !flags.contains(OFlags::NONBLOCK)
        && let Err(error) = fcntl_setfl(descriptor, flags | OFlags::NONBLOCK)
    {
        tracing::warn!(%error, "O_NONBLOCK of a front-end's eventfd is lost");
    }
}
