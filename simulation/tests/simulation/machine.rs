//! A driver VM: its memory and its rings, and the driver that uses them. It outlives the connection of its VMM's front-end.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use tokio::sync::Notify;
use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress};
use vvu_protocol::memory::MemoryRegion;

use super::file::MappedFile;
use super::virtq::DriverQueue;
use super::world::{QUEUES, World};

/// Bytes of the first file, which has the rings.
const MAIN_LEN: u64 = 4 << 20;

/// The hole of a PC's VGA card.
const HOLE: std::ops::Range<u64> = 0xa_0000..0xc_0000;

/// Where memory is plugged in.
const PLUGGED: u64 = 1 << 32;
const PLUGGED_DISTANCE: u64 = 64 << 20;

/// Where the VMM's process sees driver memory.
pub(crate) const USER: u64 = 0x7fa4_0000_0000;

/// Memory of the driver VM, and where the driver VM sees it.
#[derive(Debug, Clone)]
pub(crate) struct Memory {
    pub(crate) file: Rc<MappedFile>,
    pub(crate) guest_address: u64,
}

impl Memory {
    pub(crate) fn regions(&self) -> Vec<MemoryRegion> {
        let region = |range: std::ops::Range<u64>| MemoryRegion {
            guest_address: GuestAddress(self.guest_address + range.start),
            size: range.end - range.start,
            user_address: UserAddress(USER + self.guest_address + range.start),
            mmap_offset: FileOffset(range.start),
        };
        match self.guest_address {
            0 => vec![region(0..HOLE.start), region(HOLE.end..self.file.len)],
            _ => vec![region(0..self.file.len)],
        }
    }
}

#[derive(Debug)]
pub(crate) struct Machine {
    world: Rc<World>,
    /// The first one is always there.
    pub(crate) memory: RefCell<Vec<Memory>>,
    pub(crate) queues: RefCell<[DriverQueue; QUEUES as usize]>,
    plugged: Cell<u64>,
    /// Requests were completed.
    pub(crate) progress: Notify,
}

impl Machine {
    pub(crate) fn new(world: &Rc<World>) -> Rc<Self> {
        let main = Memory { file: world.file(MAIN_LEN), guest_address: 0 };
        let queues = RefCell::new(Self::empty(world, &main.file));
        let memory = RefCell::new(vec![main]);
        Rc::new(Self { world: Rc::clone(world), memory, queues, plugged: Cell::new(0), progress: Notify::new() })
    }

    fn empty(world: &World, file: &Rc<MappedFile>) -> [DriverQueue; QUEUES as usize] {
        std::array::from_fn(|index| {
            let size = *world.random.one_of(&[8, 16, 64]).unwrap();
            DriverQueue::new(u16::try_from(index).unwrap(), size, file)
        })
    }

    /// The driver starts anew: nothing is outstanding.
    pub(crate) fn reset_rings(&self) {
        let file = Rc::clone(&self.memory.borrow()[0].file);
        self.queues.replace(Self::empty(&self.world, &file));
    }

    /// A DIMM is plugged in.
    pub(crate) fn plug(&self) {
        let plugged = self.plugged.get() + 1;
        self.plugged.set(plugged);
        let len = *self.world.random.one_of(&[2 << 20, 3 << 20, (2 << 20) + 4096]).unwrap();
        let memory = Memory { file: self.world.file(len), guest_address: PLUGGED + plugged % 8 * PLUGGED_DISTANCE };
        self.memory.borrow_mut().push(memory);
    }

    /// The driver submits a request, if the ring has room.
    pub(crate) fn submit(&self, queue: usize) {
        let memory = self.memory.borrow();
        let Memory { file, guest_address } = &memory[self.world.random.below(memory.len())];
        let id = self.world.next_request();
        self.queues.borrow_mut()[queue].submit(id, file, *guest_address);
    }

    /// The driver looks what was completed.
    pub(crate) fn harvest(&self, queue: usize) {
        let completed = self.queues.borrow_mut()[queue].harvest();
        for id in &completed {
            let executions = self.world.executions(*id);
            let lost = self.world.losses() > 0;
            assert!(executions == 1 || executions > 1 && lost, "request {id} was executed {executions} times");
        }
        if !completed.is_empty() {
            self.progress.notify_one();
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.queues.borrow().iter().all(DriverQueue::is_idle)
    }

    /// What is not completed yet.
    pub(crate) fn outstanding(&self) -> Vec<u64> {
        self.queues.borrow().iter().flat_map(DriverQueue::outstanding).collect()
    }

    /// Whether no request lies in this memory.
    pub(crate) fn is_unused(&self, memory: &Memory) -> bool {
        !self.queues.borrow().iter().any(|queue| queue.uses(&memory.file))
    }
}
