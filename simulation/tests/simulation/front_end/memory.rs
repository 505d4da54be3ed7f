//! Driver memory: the memory table or its slots, and what is plugged in and out.

use std::rc::Rc;

use vvu_protocol::features::ProtocolFeatures;
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::FrontEndRequest;

use super::super::checks;
use super::super::file::MappedFile;
use super::super::machine::Memory;
use super::{Ended, FrontEnd};

impl FrontEnd {
    /// Tells the bridge what memory the driver VM has now.
    pub(super) async fn set_memory(&mut self) -> Result<(), Ended> {
        use FrontEndRequest as R;
        let memory = self.machine.memory.borrow().clone();
        let with_file = |memory: &Memory| {
            let file = Rc::clone(&memory.file);
            memory.regions().into_iter().map(move |region| (region, Rc::clone(&file))).collect::<Vec<_>>()
        };
        let wanted: Vec<_> = memory.iter().flat_map(with_file).collect();
        if !self.has(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            let table = wanted.iter().map(|(region, file)| (*region, file.duplicate())).collect();
            self.acknowledged.memory = wanted;
            return self.tell(R::SetMemTable(table)).await;
        }
        let same = |one: &(MemoryRegion, Rc<MappedFile>), other: &(MemoryRegion, Rc<MappedFile>)| {
            one.0 == other.0 && Rc::ptr_eq(&one.1, &other.1)
        };
        let before = std::mem::take(&mut self.acknowledged.memory);
        let (kept, gone): (Vec<_>, Vec<_>) =
            before.into_iter().partition(|one| wanted.iter().any(|other| same(one, other)));
        self.acknowledged.memory = kept;
        for (region, _) in gone {
            self.tell(R::RemMemReg(region)).await?;
        }
        for entry in wanted {
            if !self.acknowledged.memory.iter().any(|known| same(known, &entry)) {
                let (region, file) = (entry.0, entry.1.duplicate());
                self.acknowledged.memory.push(entry);
                self.tell(R::AddMemReg(region, file)).await?;
            }
        }
        Ok(())
    }

    pub(super) async fn plug(&mut self) -> Result<(), Ended> {
        if self.machine.memory.borrow().len() > 3 {
            return Ok(());
        }
        self.world.session.set("changing memory");
        self.machine.plug();
        // The driver VM uses it only when the front-end has been told.
        let plugged = self.machine.memory.borrow_mut().pop().expect("it was just plugged");
        if self.log.is_some() {
            self.extend_log(plugged.guest_address + plugged.file.len).await?;
        }
        // Nothing runs in the driver VM meanwhile: its driver is this task.
        self.machine.memory.borrow_mut().push(plugged);
        self.set_memory().await?;
        self.settle().await?;
        self.world.session.set("running");
        Ok(())
    }

    pub(super) async fn unplug(&mut self) -> Result<(), Ended> {
        let removed = {
            let memory = self.machine.memory.borrow();
            let mut unused = memory.iter().skip(1).filter(|memory| self.machine.is_unused(memory));
            unused.next().map(|memory| Rc::clone(&memory.file))
        };
        let Some(removed) = removed else { return Ok(()) };
        self.world.session.set("changing memory");
        self.machine.memory.borrow_mut().retain(|memory| !Rc::ptr_eq(&memory.file, &removed));
        self.set_memory().await?;
        self.settle().await?;
        checks::is_unmapped(&self.world, removed.id);
        self.world.session.set("running");
        Ok(())
    }
}
