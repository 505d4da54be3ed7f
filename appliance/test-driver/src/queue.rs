//! A ring with its events, as a back-end gets to know it.

use std::ops::{Deref, DerefMut};

use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::event::wait_event;
use crate::front_end::{FrontEnd, USER_BASE};
use crate::ring::{Memory, Ring};

/// Where the rings of all queues are.
const RING_SPACE: u64 = 0x1_0000;

/// Memory of one queue for its rings.
const QUEUE_SPACE: u64 = 0x1_0000;

/// See the module's text. What concerns the ring alone is [`Ring`]'s.
#[derive(Debug)]
pub struct Queue {
    /// Its number.
    pub index: usize,
    /// The ring.
    pub ring: Ring,
    /// Signals the device.
    pub kick: EventFd,
    /// The device signals by it that there are used heads.
    pub call: EventFd,
    /// The device signals by it that the ring is broken.
    pub error: EventFd,
    /// What the front-end adds to ring addresses: its own addresses, or none where an IOMMU translates.
    pub address_base: u64,
    /// Where writes to the used ring are logged, if they are to be.
    pub log_address: Option<u64>,
}

impl Deref for Queue {
    type Target = Ring;

    fn deref(&self) -> &Ring {
        &self.ring
    }
}

impl DerefMut for Queue {
    fn deref_mut(&mut self) -> &mut Ring {
        &mut self.ring
    }
}

impl Queue {
    /// A queue with empty rings that the device does not know yet.
    #[must_use]
    pub fn new(memory: &Memory, index: usize, size: u16) -> Self {
        let base = RING_SPACE + index as u64 * QUEUE_SPACE;
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let mut queue = Self {
            index,
            ring: Ring::new(size, base, base + 0x5000, base + 0x8000),
            kick: event(),
            call: event(),
            error: event(),
            address_base: USER_BASE,
            log_address: None,
        };
        queue.clear(memory);
        queue
    }

    /// Empties the rings, as a driver does that starts anew.
    pub fn clear(&mut self, memory: &Memory) {
        memory.write_slice(&[0; QUEUE_SPACE as usize], GuestAddress(self.ring.desc)).unwrap();
        self.ring.avail_index = 0;
        self.ring.used_seen = 0;
    }

    /// Announces the ring to the back-end, which goes on at `base`, and enables it.
    pub fn announce(&self, front_end: &mut FrontEnd, base: u16) {
        let frontend = &mut front_end.frontend;
        frontend.set_vring_num(self.index, self.ring.size).unwrap();
        self.announce_addresses(frontend);
        frontend.set_vring_base(self.index, base).unwrap();
        frontend.set_vring_call(self.index, &self.call).unwrap();
        frontend.set_vring_err(self.index, &self.error).unwrap();
        frontend.set_vring_kick(self.index, &self.kick).unwrap();
        frontend.set_vring_enable(self.index, true).unwrap();
    }

    /// Tells where the ring is, and whether writes to its used ring are logged. Also while it runs.
    pub fn announce_addresses(&self, frontend: &Frontend) {
        let Ring { size, desc, avail, used, .. } = self.ring;
        let config = VringConfigData {
            queue_max_size: 1024,
            queue_size: size,
            flags: u32::from(self.log_address.is_some()),
            desc_table_addr: self.address_base + desc,
            used_ring_addr: self.address_base + used,
            avail_ring_addr: self.address_base + avail,
            log_addr: self.log_address,
        };
        frontend.set_vring_addr(self.index, &config).unwrap();
    }

    /// Stops the ring; returns the position that the back-end has reached.
    pub fn stop(&self, front_end: &FrontEnd) -> u16 {
        u16::try_from(front_end.frontend.get_vring_base(self.index).unwrap()).unwrap()
    }

    /// Tells the device that there is something.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// As [`Ring::take_used`]; then asks for an interrupt for the next one.
    pub fn take_used(&mut self, memory: &Memory) -> Option<(u16, u32)> {
        let used = self.ring.take_used(memory)?;
        self.ring.ask_for_call(memory);
        Some(used)
    }

    /// Waits for an entry of the used ring by the call event.
    pub fn wait_used(&mut self, memory: &Memory) -> (u16, u32) {
        loop {
            if let Some(used) = self.take_used(memory) {
                return used;
            }
            wait_event(&self.call, "call");
        }
    }
}
