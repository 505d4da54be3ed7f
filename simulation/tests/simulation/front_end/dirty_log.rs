//! The dirty log, as a VMM that migrates its VM uses it: on and off while the device runs, longer when memory is plugged in.

use std::rc::Rc;

use vvu_back_end::dirty_log::LOG_PAGE;
use vvu_protocol::address::FileOffset;
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, LogArea};

use super::super::file::MappedFile;
use super::super::world::QUEUES;
use super::{Ended, FEATURES, FrontEnd};

/// What 8 bytes of the log stand for: QEMU makes it a multiple of that.
const CHUNK: u64 = 64 * LOG_PAGE;

impl FrontEnd {
    /// Features with LOG_ALL as long as there is a log.
    pub(super) async fn set_features(&mut self) -> Result<(), Ended> {
        let log = if self.log.is_some() { Features::LOG_ALL } else { Features::empty() };
        self.tell(FrontEndRequest::SetFeatures(FEATURES | log)).await?;
        self.acknowledged.features = Some(FEATURES | log);
        Ok(())
    }

    /// Begins or ends, whichever makes sense.
    pub(super) async fn switch_log(&mut self) -> Result<(), Ended> {
        if !self.has(ProtocolFeatures::LOG_SHMFD) {
            return Ok(());
        }
        self.world.session.set("switching the log");
        let switched = if self.log.is_some() { self.end_log().await } else { self.begin_log().await };
        switched?;
        self.world.session.set("running");
        Ok(())
    }

    async fn begin_log(&mut self) -> Result<(), Ended> {
        self.new_log(self.memory_end()).await?;
        self.set_features().await?;
        self.set_all_addresses().await?;
        self.settle().await?;
        // From now on every page has to be found.
        self.world.dirty.watch(self.machine.memory.borrow()[0].file.id);
        Ok(())
    }

    /// What was written until now is in the log when the front-end has heard that nothing is logged any more.
    pub(super) async fn end_log(&mut self) -> Result<(), Ended> {
        self.world.dirty.unwatch();
        let log = self.log.take();
        self.set_features().await?;
        self.settle().await?;
        self.log = log;
        self.read_log();
        self.log = None;
        (0..usize::from(QUEUES)).for_each(|queue| self.world.dirty.check(queue));
        self.set_all_addresses().await
    }

    async fn set_all_addresses(&mut self) -> Result<(), Ended> {
        for queue in 0..QUEUES {
            if self.acknowledged.started[usize::from(queue)] {
                self.set_addresses(queue).await?;
            }
        }
        Ok(())
    }

    fn memory_end(&self) -> u64 {
        let memory = self.machine.memory.borrow();
        memory.iter().map(|memory| memory.guest_address + memory.file.len).max().unwrap_or(0)
    }

    /// Memory is about to reach up to `end`.
    pub(super) async fn extend_log(&mut self, end: u64) -> Result<(), Ended> {
        let end = end.max(self.memory_end());
        match &self.log {
            Some(log) if log.len * 8 * LOG_PAGE < end => self.new_log(end).await,
            _ => Ok(()),
        }
    }

    /// A log, which may end anywhere in a page. After the answer nothing comes into the one before.
    async fn new_log(&mut self, end: u64) -> Result<(), Ended> {
        let exact = end.div_ceil(CHUNK) * 8;
        let size = if self.world.random.percent(40) { exact.next_multiple_of(4096) } else { exact };
        let file = Rc::new(MappedFile::new(size));
        let area = LogArea { size, mmap_offset: FileOffset(0) };
        let reply = self.ask(FrontEndRequest::SetLogBase(area, file.duplicate())).await?;
        assert!(matches!(reply, FrontEndReply::LogBase), "SET_LOG_BASE is answered with {reply:?}");
        self.read_log();
        self.log = Some(file);
        Ok(())
    }

    /// Takes all bits, as a VMM does that sends the pages away.
    pub(super) fn read_log(&self) {
        let Some(log) = &self.log else { return };
        for byte in 0..log.len {
            let bits: u8 = log.load(byte);
            if bits != 0 {
                log.store(byte, 0_u8);
                (0..8).filter(|bit| bits >> bit & 1 == 1).for_each(|bit| self.world.dirty.found(byte * 8 + bit));
            }
        }
    }
}
