//! Vrings and their eventfds: started, masked, disabled, stopped.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use vvu_protocol::address::FileOffset;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, Inflight, VringAddresses, VringFile, VringState};
use vvu_socket::event::{self, Event};

use super::super::back_end::LOG_USED_RING;
use super::super::checks;
use super::super::file::identity;
use super::super::machine::{Machine, USER};
use super::super::task::OwnedTask;
use super::super::virtq::{AVAILABLE, USED, ring_offset};
use super::super::world::{QUEUES, World};
use super::{Ended, FrontEnd};

/// The interrupt of a queue.
#[derive(Debug)]
pub(super) struct Interrupt {
    pub(super) event: Rc<Event>,
    /// The moment when the vring was stopped, unless a replay was to come. As long as it is the same, no call may come; a
    /// replay signals all, and what it hands over even before it is done.
    pub(super) quiet: Rc<Cell<Option<checks::Moment>>>,
    _task: OwnedTask,
}

impl Interrupt {
    pub(super) fn new(world: &Rc<World>, machine: &Rc<Machine>, queue: usize) -> Self {
        let world = Rc::clone(world);
        let event = Rc::new(Event::new(world.front_end_eventfd()).unwrap());
        let quiet = Rc::new(Cell::new(None));
        let (machine, waited, silent) = (Rc::clone(machine), Rc::clone(&event), Rc::clone(&quiet));
        let task = OwnedTask::spawn(async move {
            loop {
                waited.signalled().await.unwrap();
                assert_ne!(silent.get(), Some(checks::moment(&world)), "queue {queue} is stopped, and a call comes");
                machine.harvest(queue);
            }
        });
        Self { event, quiet, _task: task }
    }

    fn descriptor(&self) -> OwnedFd {
        use std::os::fd::AsFd;
        self.event.as_fd().try_clone_to_owned().unwrap()
    }
}

impl FrontEnd {
    pub(super) async fn start_vring(&mut self, queue: u16) -> Result<(), Ended> {
        use FrontEndRequest as R;
        let (index, place) = (u32::from(queue), usize::from(queue));
        let size = self.machine.queues.borrow()[place].size;
        self.tell(R::SetVringNum(VringState { index, num: u32::from(size) })).await?;
        self.acknowledged.sizes[place] = size;
        self.tell(R::SetVringBase(VringState { index, num: u32::from(self.bases[place]) })).await?;
        self.set_addresses(queue).await?;
        if self.world.random.percent(80) || self.kicks[place].is_none() {
            self.kicks[place] = Some(self.world.front_end_eventfd());
        }
        self.interrupts[place].quiet.set(None);
        self.masks[place] = None;
        let call = self.interrupts[place].descriptor();
        self.set_call(queue, call).await?;
        if self.world.random.percent(20) {
            let error =
                VringFile { index: u8::try_from(queue).unwrap(), descriptor: Some(self.world.front_end_eventfd()) };
            self.tell(R::SetVringErr(error)).await?;
        }
        let kick = self.kicks[place].as_ref().map(|kick| kick.try_clone().unwrap());
        let index = u8::try_from(queue).unwrap();
        self.tell(R::SetVringKick(VringFile { index, descriptor: kick })).await?;
        self.acknowledged.started[place] = true;
        self.tell(R::SetVringEnable(VringState { index: u32::from(queue), num: 1 })).await?;
        self.acknowledged.enabled[place] = true;
        // What was submitted before the start.
        self.kick(queue);
        Ok(())
    }

    /// While there is a log, writes to the used ring go there, too.
    pub(super) async fn set_addresses(&mut self, queue: u16) -> Result<(), Ended> {
        let (index, base) = (u32::from(queue), USER + ring_offset(queue));
        let (used, available) = (base + USED, base + AVAILABLE);
        let (flags, log) = if self.log.is_some() { (LOG_USED_RING, ring_offset(queue) + USED) } else { (0, 0) };
        let addresses = VringAddresses { index, flags, descriptors: base, used, available, log };
        self.tell(FrontEndRequest::SetVringAddr(addresses)).await
    }

    pub(super) fn kick(&self, queue: u16) {
        if let Some(kick) = &self.kicks[usize::from(queue)] {
            event::signal(kick).unwrap();
        }
    }

    async fn set_call(&mut self, queue: u16, call: OwnedFd) -> Result<(), Ended> {
        let file = VringFile { index: u8::try_from(queue).unwrap(), descriptor: Some(call) };
        self.tell(FrontEndRequest::SetVringCall(file)).await
    }

    /// GET_INFLIGHT_FD once in the life of the front-end, SET_INFLIGHT_FD before each start.
    pub(super) async fn set_inflight(&mut self) -> Result<(), Ended> {
        use FrontEndRequest as R;
        if self.inflight.is_none() {
            let zero = FileOffset(0);
            let wanted = Inflight { mmap_size: 0, mmap_offset: zero, queue_count: QUEUES, queue_size: 64 };
            let FrontEndReply::Inflight(inflight, file) = self.ask(R::GetInflightFd(wanted)).await? else {
                panic!("no inflight buffer")
            };
            self.inflight = Some((inflight, file));
        }
        let (inflight, file) = self.inflight.as_ref().expect("it is there");
        let (inflight, file) = (*inflight, file.try_clone().unwrap());
        let id = identity(&file);
        self.tell(R::SetInflightFd(inflight, file)).await?;
        self.acknowledged.inflight = Some(id);
        Ok(())
    }

    /// QEMU masks a vector by another eventfd, and looks into that when it takes the mask away.
    pub(super) async fn mask(&mut self, queue: u16) -> Result<(), Ended> {
        let place = usize::from(queue);
        if self.masks[place].is_none() {
            let mask = self.world.front_end_eventfd();
            self.set_call(queue, mask.try_clone().unwrap()).await?;
            self.masks[place] = Some(mask);
            return Ok(());
        }
        self.unmask(queue).await
    }

    pub(super) async fn unmask(&mut self, queue: u16) -> Result<(), Ended> {
        let place = usize::from(queue);
        let Some(mask) = self.masks[place].take() else { return Ok(()) };
        let call = self.interrupts[place].descriptor();
        self.set_call(queue, call).await?;
        self.settle().await?;
        if event::take(&mask).unwrap().is_some() {
            self.machine.harvest(place);
        }
        Ok(())
    }

    pub(super) async fn disable(&mut self, queue: u16) -> Result<(), Ended> {
        use FrontEndRequest as R;
        let index = u32::from(queue);
        self.tell(R::SetVringEnable(VringState { index, num: 0 })).await?;
        self.acknowledged.enabled[usize::from(queue)] = false;
        self.settle().await?;
        self.world.hesitate().await;
        self.tell(R::SetVringEnable(VringState { index, num: 1 })).await?;
        self.acknowledged.enabled[usize::from(queue)] = true;
        self.kick(queue);
        Ok(())
    }

    pub(super) async fn restart_vring(&mut self, queue: u16) -> Result<(), Ended> {
        self.world.session.set("restarting a vring");
        self.stop_vring(queue).await?;
        self.start_vring(queue).await?;
        self.settle().await?;
        self.world.session.set("running");
        Ok(())
    }

    /// After the answer nothing of the vring is under way.
    pub(super) async fn stop_vring(&mut self, queue: u16) -> Result<(), Ended> {
        let (index, place) = (u32::from(queue), usize::from(queue));
        let state = VringState { index, num: 0 };
        let FrontEndReply::VringState(stopped) = self.ask(FrontEndRequest::GetVringBase(state)).await? else {
            panic!("expected the state of a vring");
        };
        assert_eq!(stopped.index, index);
        let base = u16::try_from(stopped.num).unwrap();
        let events = [self.masks[place].as_ref().map(event::take), Some(event::take(&*self.interrupts[place].event))];
        assert!(events.iter().flatten().all(Result::is_ok));
        self.masks[place] = None;
        self.interrupts[place].quiet.set(checks::is_served().then(|| checks::moment(&self.world)));
        let used = self.machine.queues.borrow()[place].used_index();
        assert_eq!(base, used, "queue {queue} is stopped: the answer, and what was completed");
        self.machine.harvest(place);
        self.acknowledged.started[place] = false;
        self.bases[place] = base;
        checks::is_stopped(&self.world, place);
        self.read_log();
        self.world.dirty.check(place);
        Ok(())
    }
}
