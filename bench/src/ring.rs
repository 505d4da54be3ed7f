//! A split ring, the driver's side (virtio 1.3, section 2.7).

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use crate::error::Error;
use crate::memory::{Layout, Memory};

/// Flag of a descriptor: another one follows.
pub const NEXT: u16 = 1;
/// Flag of a descriptor: the device writes.
pub const WRITE: u16 = 2;
/// Flag of a descriptor: it is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Length of a descriptor in bytes.
pub const DESCRIPTOR_LEN: usize = 16;

/// Without EVENT_IDX: flag of the available ring that the driver wants no calls, and of the used ring that the device wants
/// no kicks.
const SILENT: u16 = 1;

/// One descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    /// Guest-physical.
    pub address: usize,
    /// In bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The one that follows.
    pub next: u16,
}

impl Descriptor {
    /// Writes it to a place, in a ring's table or in one of its own.
    ///
    /// # Errors
    /// If the place is outside of the memory.
    pub fn write(self, memory: &Memory, place: usize) -> Result<(), Error> {
        memory.at::<AtomicU64>(place)?.store(self.address as u64, Ordering::Relaxed);
        memory.at::<AtomicU32>(place + 8)?.store(self.len, Ordering::Relaxed);
        memory.at::<AtomicU16>(place + 12)?.store(self.flags, Ordering::Relaxed);
        memory.at::<AtomicU16>(place + 14)?.store(self.next, Ordering::Relaxed);
        Ok(())
    }
}

/// Where the parts of a ring are, as guest-physical addresses.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Entries, a power of two.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: usize,
    /// The available ring.
    pub available: usize,
    /// The used ring.
    pub used: usize,
}

impl Place {
    /// Takes room for a ring of `size` entries. Driver and device write to cache lines of their own.
    pub fn take(layout: &mut Layout, size: u16) -> Self {
        let entries = usize::from(size);
        Self {
            size,
            descriptors: layout.take(DESCRIPTOR_LEN * entries, 4096),
            available: layout.take(6 + 2 * entries, 64),
            used: layout.take(6 + 8 * entries, 64),
        }
    }

    /// Where a descriptor of the table is.
    #[must_use]
    pub fn descriptor(&self, index: u16) -> usize {
        self.descriptors + DESCRIPTOR_LEN * usize::from(index)
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Ring<'m> {
    memory: &'m Memory,
    place: Place,
    /// Whether EVENT_IDX was negotiated.
    event_idx: bool,
    /// Position up to which heads were offered, and up to which the device was told.
    offered: u16,
    published: u16,
    /// Position up to which used heads were taken.
    taken: u16,
}

impl<'m> Ring<'m> {
    /// An empty ring, in memory that is zero.
    #[must_use]
    pub fn new(memory: &'m Memory, place: Place, event_idx: bool) -> Self {
        Self { memory, place, event_idx, offered: 0, published: 0, taken: 0 }
    }

    /// Puts a chain into the available ring; the device does not see it yet.
    ///
    /// # Errors
    /// If the ring is outside of the memory.
    #[inline]
    pub fn offer(&mut self, head: u16) -> Result<(), Error> {
        let entry = self.place.available + 4 + 2 * usize::from(self.offered & (self.place.size - 1));
        self.memory.at::<AtomicU16>(entry)?.store(head, Ordering::Relaxed);
        self.offered = self.offered.wrapping_add(1);
        Ok(())
    }

    /// Shows the device what was offered; whether it wants to be kicked for it.
    ///
    /// # Errors
    /// If the ring is outside of the memory.
    #[inline]
    pub fn publish(&mut self) -> Result<bool, Error> {
        if self.offered == self.published {
            return Ok(false);
        }
        self.memory.at::<AtomicU16>(self.place.available + 2)?.store(self.offered, Ordering::Release);
        // The device writes its wish, then looks at the index; we write the index, then look at the wish.
        fence(Ordering::SeqCst);
        let before = std::mem::replace(&mut self.published, self.offered);
        if !self.event_idx {
            return Ok(self.memory.at::<AtomicU16>(self.place.used)?.load(Ordering::Relaxed) & SILENT == 0);
        }
        let wish = self.place.used + 4 + 8 * usize::from(self.place.size);
        let wish = self.memory.at::<AtomicU16>(wish)?.load(Ordering::Relaxed);
        Ok(passes(wish, before, self.offered))
    }

    /// Whether there is a chain to take.
    ///
    /// # Errors
    /// If the ring is outside of the memory.
    #[inline]
    pub fn has_used(&self) -> Result<bool, Error> {
        Ok(self.memory.at::<AtomicU16>(self.place.used + 2)?.load(Ordering::Acquire) != self.taken)
    }

    /// Takes one chain that the device is done with: its head, and how much was written.
    ///
    /// # Errors
    /// If the ring is outside of the memory, or the head is none.
    #[inline]
    pub fn take(&mut self) -> Result<Option<(u16, u32)>, Error> {
        if !self.has_used()? {
            return Ok(None);
        }
        let entry = self.place.used + 4 + 8 * usize::from(self.taken & (self.place.size - 1));
        let head = self.memory.at::<AtomicU32>(entry)?.load(Ordering::Relaxed);
        let len = self.memory.at::<AtomicU32>(entry + 4)?.load(Ordering::Relaxed);
        self.taken = self.taken.wrapping_add(1);
        let head = u16::try_from(head).map_err(|_| Error::NotUnderWay(head))?;
        Ok(Some((head, len)))
    }

    /// Asks for a call for the next chain, or for none. After asking for one the used ring has to be looked at again before
    /// waiting.
    ///
    /// # Errors
    /// If the ring is outside of the memory.
    #[inline]
    pub fn ask_for_calls(&self, wanted: bool) -> Result<(), Error> {
        if self.event_idx {
            let wish = self.place.available + 4 + 2 * usize::from(self.place.size);
            // One position back is the one that takes longest to come round.
            let position = if wanted { self.taken } else { self.taken.wrapping_sub(1) };
            self.memory.at::<AtomicU16>(wish)?.store(position, Ordering::Relaxed);
        } else {
            let flags = if wanted { 0 } else { SILENT };
            self.memory.at::<AtomicU16>(self.place.available)?.store(flags, Ordering::Relaxed);
        }
        if wanted {
            fence(Ordering::SeqCst);
        }
        Ok(())
    }
}

/// Whether an index that went from `before` to `after` has passed `wish` (virtio 1.3, section 2.7.7.1).
fn passes(wish: u16, before: u16, after: u16) -> bool {
    after.wrapping_sub(wish).wrapping_sub(1) < after.wrapping_sub(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_passed_once_and_across_the_wrap_of_the_index() {
        assert!(passes(5, 5, 6) && passes(5, 3, 9));
        assert!(!passes(6, 5, 6) && !passes(4, 5, 6));
        assert!(passes(0xffff, 0xfffe, 1) && !passes(1, 0xfffe, 1));
    }

    #[test]
    fn the_device_is_kicked_when_it_wants_and_its_chains_are_taken_in_order() {
        for event_idx in [false, true] {
            let memory = Memory::new(1).unwrap();
            let place = Place::take(&mut Layout::default(), 4);
            let mut ring = Ring::new(&memory, place, event_idx);
            assert!(!ring.publish().unwrap());
            ring.offer(3).unwrap();
            assert!(ring.publish().unwrap(), "a device that has wished nothing wants every kick");
            assert_eq!(memory.at::<AtomicU16>(place.available + 4).unwrap().load(Ordering::Relaxed), 3);
            assert_eq!(memory.at::<AtomicU16>(place.available + 2).unwrap().load(Ordering::Relaxed), 1);

            assert!(ring.take().unwrap().is_none());
            memory.at::<AtomicU32>(place.used + 4).unwrap().store(3, Ordering::Relaxed);
            memory.at::<AtomicU32>(place.used + 8).unwrap().store(513, Ordering::Relaxed);
            memory.at::<AtomicU16>(place.used + 2).unwrap().store(1, Ordering::Relaxed);
            assert_eq!(ring.take().unwrap(), Some((3, 513)));
            assert!(ring.take().unwrap().is_none());

            memory.at::<AtomicU16>(place.used).unwrap().store(SILENT, Ordering::Relaxed);
            memory.at::<AtomicU16>(place.used + 4 + 8 * 4).unwrap().store(0x8000, Ordering::Relaxed);
            ring.offer(0).unwrap();
            assert!(!ring.publish().unwrap(), "a device that wants none is left alone");
        }
    }

    #[test]
    fn calls_are_asked_for_by_the_index_or_by_the_flag() {
        let memory = Memory::new(1).unwrap();
        let place = Place::take(&mut Layout::default(), 4);
        let wish = memory.at::<AtomicU16>(place.available + 4 + 2 * 4).unwrap();
        let flags = memory.at::<AtomicU16>(place.available).unwrap();
        let by_index = Ring::new(&memory, place, true);
        wish.store(7, Ordering::Relaxed);
        by_index.ask_for_calls(true).unwrap();
        assert_eq!(wish.load(Ordering::Relaxed), 0);
        by_index.ask_for_calls(false).unwrap();
        assert_eq!((wish.load(Ordering::Relaxed), flags.load(Ordering::Relaxed)), (0xffff, 0));
        let by_flag = Ring::new(&memory, place, false);
        by_flag.ask_for_calls(false).unwrap();
        assert_eq!(flags.load(Ordering::Relaxed), SILENT);
        by_flag.ask_for_calls(true).unwrap();
        assert_eq!(flags.load(Ordering::Relaxed), 0);
    }
}
