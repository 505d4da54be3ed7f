//! Keeps a read-modify-write apart from all other writes.
//!
//! Where the storage writes no less than a block and the driver writes less, the block's other sectors are read and
//! written back. A write to those sectors in between, by another request of any queue, would be undone. So such a write
//! has the image for itself. It is rare: a driver that heeds blk_size never causes one, and images without blocks larger
//! than a sector have no gate at all.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vvu_back_end::wakeup::Wakeup;

/// How a write enters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Passage {
    /// Beside other whole-block writes.
    Shared,
    /// Alone.
    Exclusive,
}

/// The gate of one image.
#[derive(Debug, Default)]
pub(crate) struct WriteGate {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    shared: usize,
    exclusive: bool,
    /// Queues to wake when the gate opens further. While one waits, nobody else enters as [`Passage::Shared`] after
    /// him, so that the exclusive ones get their turn. Bounded by the number of queues.
    waiting: VecDeque<Arc<Wakeup>>,
}

impl WriteGate {
    /// Enters if the gate is open for this passage. Otherwise `wakeup` fires when it is worth trying again.
    pub(crate) fn try_enter(&self, passage: Passage, wakeup: &Arc<Wakeup>) -> bool {
        let mut state = self.lock();
        let first_in_line = state.waiting.front().is_none_or(|front| Arc::ptr_eq(front, wakeup));
        let open = match passage {
            Passage::Shared => !state.exclusive,
            Passage::Exclusive => !state.exclusive && state.shared == 0,
        };
        if !(open && first_in_line) {
            if !state.waiting.iter().any(|waiting| Arc::ptr_eq(waiting, wakeup)) {
                state.waiting.push_back(Arc::clone(wakeup));
            }
            return false;
        }
        state.waiting.retain(|waiting| !Arc::ptr_eq(waiting, wakeup));
        match passage {
            Passage::Shared => state.shared += 1,
            Passage::Exclusive => state.exclusive = true,
        }
        wake_first(&state);
        true
    }

    /// Leaves again after a successful [`WriteGate::try_enter`].
    pub(crate) fn leave(&self, passage: Passage) {
        let mut state = self.lock();
        match passage {
            Passage::Shared => state.shared = state.shared.saturating_sub(1),
            Passage::Exclusive => state.exclusive = false,
        }
        wake_first(&state);
    }

    /// Takes a queue that stops out of the line.
    pub(crate) fn forget(&self, wakeup: &Arc<Wakeup>) {
        let mut state = self.lock();
        state.waiting.retain(|waiting| !Arc::ptr_eq(waiting, wakeup));
        wake_first(&state);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wake_first(state: &State) {
    if let Some(first) = state.waiting.front() {
        first.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wakeup() -> Arc<Wakeup> {
        Arc::new(Wakeup::new().unwrap())
    }

    #[test]
    fn an_exclusive_write_is_alone_and_gets_its_turn() {
        let gate = WriteGate::default();
        let (a, b, c) = (wakeup(), wakeup(), wakeup());
        assert!(gate.try_enter(Passage::Shared, &a));
        assert!(gate.try_enter(Passage::Shared, &b));
        assert!(!gate.try_enter(Passage::Exclusive, &c));
        assert!(!gate.try_enter(Passage::Shared, &a), "a newcomer overtakes the one who waits");
        gate.leave(Passage::Shared);
        assert!(!gate.try_enter(Passage::Exclusive, &c));
        gate.leave(Passage::Shared);
        assert!(c.consume(), "the first in line is woken");
        assert!(gate.try_enter(Passage::Exclusive, &c));
        assert!(!gate.try_enter(Passage::Shared, &a));
        assert!(a.consume(), "the next in line may try");
        gate.leave(Passage::Exclusive);
        assert!(a.consume());
        assert!(gate.try_enter(Passage::Shared, &a));
    }

    #[test]
    fn a_queue_that_stops_does_not_hold_up_the_line() {
        let gate = WriteGate::default();
        let (a, b) = (wakeup(), wakeup());
        assert!(gate.try_enter(Passage::Exclusive, &a));
        assert!(!gate.try_enter(Passage::Shared, &a));
        assert!(!gate.try_enter(Passage::Shared, &b));
        gate.leave(Passage::Exclusive);
        gate.forget(&a);
        assert!(b.consume());
        assert!(gate.try_enter(Passage::Shared, &b));
    }
}
