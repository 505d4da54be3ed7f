//! The rings: requests are taken from them, wait until they are due, and are completed in batches. What is written is marked in
//! the dirty log, and noted for the check of it.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use tokio::time::Instant;
use vvu_back_end::dirty_log::LOG_PAGE;
use vvu_back_end::inflight::InflightQueue;
use vvu_protocol::dax::NODE_OFFSET;
use vvu_protocol::features::Features;
use vvu_protocol::message::VringAddresses;
use vvu_socket::event::{self, Event};

use super::super::virtq;
use super::super::world::QUEUES;
use super::{BackEnd, Dead};

/// `VHOST_VRING_F_LOG`.
pub(crate) const LOG_USED_RING: u32 = 1;

/// A request between ring and ring.
#[derive(Debug)]
pub(super) struct InFlight {
    head: u16,
    id: u64,
    /// Guest-physical address of its answer.
    answer: u64,
    due: Instant,
}

#[derive(Debug, Default)]
pub(crate) struct Vring {
    pub(crate) size: u16,
    pub(crate) addresses: Option<VringAddresses>,
    pub(crate) next: u16,
    pub(super) kick: Option<Rc<Event>>,
    pub(crate) started: bool,
    pub(crate) call: Option<Rc<OwnedFd>>,
    pub(crate) enabled: bool,
    pub(super) in_flight: Vec<InFlight>,
    /// A batch of them is on its way to the used ring.
    pub(super) completing: bool,
    pub(super) tracker: Option<InflightQueue>,
}

impl Vring {
    fn works(&self) -> bool {
        self.started && self.enabled
    }

    /// What says that there are requests. Nobody looks at it while the vring does not work, and nobody looks for requests unless
    /// it says so.
    pub(super) fn working_kick(&self) -> Option<Rc<Event>> {
        self.kick.clone().filter(|_| self.works())
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }
}

impl BackEnd {
    pub(super) fn vring<T>(&self, index: u32, change: impl FnOnce(&mut Vring) -> T) -> T {
        change(&mut self.state.borrow_mut().vrings[usize::try_from(index).unwrap()])
    }

    /// SET_VRING_KICK: the vring starts, with what the inflight buffer says.
    pub(super) fn start(&self, index: u8, kick: Option<OwnedFd>) -> Result<(), Dead> {
        let place = usize::from(index);
        let (addresses, size, started, buffer) = {
            let state = self.state.borrow();
            let vring = &state.vrings[place];
            let buffer = state.inflight.as_ref().map(|(buffer, _)| std::sync::Arc::clone(buffer));
            (vring.addresses, vring.size, vring.started, buffer)
        };
        let kick = kick.map(|kick| Rc::new(Event::new(kick).unwrap()));
        self.vring(u32::from(index), |vring| {
            vring.kick = kick;
            vring.started = true;
        });
        let Some(addresses) = addresses.filter(|_| !started) else { return Ok(()) };
        if let Some(buffer) = buffer {
            let used = self.read_u16(addresses.used + 2)?;
            let mut tracker = buffer.queue(u16::from(index), size).unwrap();
            let recovered = tracker.recover(used);
            if !recovered.heads.is_empty() {
                self.world.note(format!("appliance {}: vring {index} resubmits {:?}", self.number, recovered.heads));
            }
            let again = recovered.heads.iter().map(|head| self.request(&addresses, size, *head));
            let again = again.collect::<Result<Vec<_>, _>>()?;
            self.vring(u32::from(index), |vring| {
                vring.next = recovered.next_avail;
                vring.in_flight = again;
                vring.tracker = Some(tracker);
            });
        }
        Ok(())
    }

    fn read_u16(&self, user_address: u64) -> Result<u16, Dead> {
        let (file, offset) = self.at_user(user_address, 2)?;
        Ok(u16::from_le(file.load(offset)))
    }

    /// What the descriptors of `head` say.
    fn request(&self, addresses: &VringAddresses, size: u16, head: u16) -> Result<InFlight, Dead> {
        assert!(head + 1 < size, "head {head} is none of the driver's");
        let (file, offset) = self.at_user(addresses.descriptors + u64::from(head) * 16, 32)?;
        let (read, answer) = (u64::from_le(file.load(offset)), u64::from_le(file.load(offset + 16)));
        let (file, offset) = self.at_guest(read, u64::from(virtq::READ_LEN))?;
        let (id, check) = (u64::from_le(file.load(offset)), u64::from_le(file.load(offset + 8)));
        assert_eq!(id, !check, "what the back-end reads is no request of the driver");
        self.world.executed(id);
        let due = Instant::now() + self.world.random.time(self.world.kind.service_time);
        Ok(InFlight { head, id, answer, due })
    }

    /// Takes all requests that are in the available ring.
    pub(super) fn take_requests(&self, index: usize) -> Result<(), Dead> {
        loop {
            let (addresses, size, next) = {
                let state = self.state.borrow();
                let vring = &state.vrings[index];
                let Some(addresses) = vring.addresses.filter(|_| vring.works()) else { return Ok(()) };
                (addresses, vring.size, vring.next)
            };
            let available = self.read_u16(addresses.available + 2)?;
            let ahead = available.wrapping_sub(next);
            assert!(ahead <= size, "vring {index} of {size} stands at {next}, the driver's index is {available}");
            if ahead == 0 {
                return Ok(());
            }
            let head = self.read_u16(addresses.available + 4 + u64::from(next % size) * 2)?;
            let request = self.request(&addresses, size, head)?;
            let mut state = self.state.borrow_mut();
            let vring = &mut state.vrings[index];
            vring.next = next.wrapping_add(1);
            if let Some(tracker) = &mut vring.tracker {
                tracker.start(head);
            }
            vring.in_flight.push(request);
        }
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        (0..usize::from(QUEUES)).filter_map(|index| self.next_due_of(index)).min()
    }

    /// Without tracking, requests are completed in their order.
    pub(super) fn next_due_of(&self, index: usize) -> Option<Instant> {
        let state = self.state.borrow();
        let vring = &state.vrings[index];
        if vring.tracker.is_some() {
            return vring.in_flight.iter().map(|request| request.due).min();
        }
        vring.in_flight.first().map(|request| request.due)
    }

    /// Completes requests that are due, of this vring or of any: a batch of them.
    pub(super) async fn complete(&self, only: Option<usize>) -> Result<(), Dead> {
        let now = Instant::now();
        for index in 0..usize::from(QUEUES) {
            let due = self.next_due_of(index).is_some_and(|due| due <= now);
            if !due || only.is_some_and(|only| only != index) {
                continue;
            }
            let batch = self.take_batch(index, now);
            self.complete_batch(index, batch).await?;
        }
        Ok(())
    }

    fn take_batch(&self, index: usize, now: Instant) -> Vec<InFlight> {
        let mut state = self.state.borrow_mut();
        let vring = &mut state.vrings[index];
        let most = 1 + self.world.random.below(3);
        let mut batch = Vec::new();
        while batch.len() < most {
            let place = match vring.tracker {
                Some(_) => vring.in_flight.iter().position(|request| request.due <= now),
                None => (!vring.in_flight.is_empty()).then_some(0),
            };
            let Some(place) = place else { break };
            batch.push(vring.in_flight.remove(place));
        }
        vring.completing = true;
        batch
    }

    /// The stores of a batch, in the order that the specification prescribes. The process may be killed between any two.
    async fn complete_batch(&self, index: usize, batch: Vec<InFlight>) -> Result<(), Dead> {
        let Some(addresses) = self.state.borrow().vrings[index].addresses else { return Ok(()) };
        let size = self.state.borrow().vrings[index].size;
        let used = self.read_u16(addresses.used + 2)?;
        for (request, position) in batch.iter().zip(0_u16..) {
            let (file, offset) = self.at_guest(request.answer, u64::from(virtq::WRITE_LEN))?;
            file.store(offset, virtq::response(request.id).to_le());
            self.mark(index, request.answer, u64::from(virtq::WRITE_LEN))?;
            self.track(index, |tracker| tracker.begin_batch(request.head));
            self.world.hesitate().await;
            let element = addresses.used + 4 + u64::from(used.wrapping_add(position) % size) * 8;
            let (file, offset) = self.at_user(element, 8)?;
            file.store(offset, u32::from(request.head).to_le());
            file.store(offset + 4, virtq::WRITE_LEN.to_le());
            self.mark_used(index, element, 8)?;
        }
        self.world.hesitate().await;
        let used = used.wrapping_add(u16::try_from(batch.len()).unwrap());
        let (file, offset) = self.at_user(addresses.used + 2, 2)?;
        file.store(offset, used.to_le());
        self.mark_used(index, addresses.used + 2, 2)?;
        self.world.hesitate().await;
        self.track(index, |tracker| tracker.end_batch(used));
        self.state.borrow_mut().vrings[index].completing = false;
        self.world.hesitate().await;
        let call = self.state.borrow().vrings[index].call.clone();
        if let Some(call) = call {
            event::signal(&*call).unwrap();
        }
        Ok(())
    }

    /// Bytes for a request were written. That they were and that they are marked is one moment here: what a back-end does
    /// that is killed in between is its own matter.
    fn mark(&self, index: usize, guest_address: u64, len: u64) -> Result<(), Dead> {
        if self.state.borrow().features.is_some_and(|features| features.contains(Features::LOG_ALL)) {
            self.set_bits(guest_address, len)?;
        }
        self.note_written(index, guest_address, len)
    }

    /// Bytes of the used ring were written. It has a switch of its own.
    fn mark_used(&self, index: usize, user_address: u64, len: u64) -> Result<(), Dead> {
        let addresses = self.state.borrow().vrings[index].addresses;
        let Some(addresses) = addresses else { return Ok(()) };
        let guest_address = addresses.log + (user_address - addresses.used);
        if addresses.flags & LOG_USED_RING != 0 {
            self.set_bits(guest_address, len)?;
        }
        let region = self.state.borrow().regions.iter().find_map(|region| {
            let offset = user_address.checked_sub(region.user_address.0)?;
            (offset < region.size).then_some(region.guest_address.0 + offset)
        });
        region.map_or(Ok(()), |guest_address| self.note_written(index, guest_address, len))
    }

    fn note_written(&self, index: usize, guest_address: u64, len: u64) -> Result<(), Dead> {
        let used = self.state.borrow().vrings[index].addresses.map(|addresses| addresses.used);
        if let Some(used) = used.filter(|_| !self.is_given_up()) {
            let (rings, _) = self.at_user(used, 2)?;
            self.world.dirty.wrote(rings.id, index, guest_address, len);
        }
        Ok(())
    }

    fn set_bits(&self, guest_address: u64, len: u64) -> Result<(), Dead> {
        let log = self.state.borrow().log;
        let Some(log) = log else { return Ok(()) };
        for page in guest_address / LOG_PAGE..=(guest_address + len - 1) / LOG_PAGE {
            let byte = page / 8;
            assert!(byte < log.size, "page {page:#x} has no bit in a log of {:#x} bytes", log.size);
            let window_offset = log.mmap_offset.0 + byte + NODE_OFFSET;
            let place = self.vmm.place(window_offset, 1);
            let place = place.ok_or_else(|| self.fault(&format!("dirty log at {window_offset:#x}")))?;
            place.memory.store(place.offset, place.memory.load::<u8>(place.offset) | 1 << (page % 8));
        }
        Ok(())
    }

    fn track(&self, index: usize, note: impl FnOnce(&mut InflightQueue)) {
        if let Some(tracker) = &mut self.state.borrow_mut().vrings[index].tracker {
            note(tracker);
        }
    }
}

pub(super) async fn kicked(kicks: &[Option<Rc<Event>>; QUEUES as usize]) -> usize {
    let one = async |index: usize| match &kicks[index] {
        Some(kick) => {
            kick.signalled().await.unwrap();
            index
        }
        None => std::future::pending().await,
    };
    tokio::select! {
        index = one(0) => index,
        index = one(1) => index,
    }
}
