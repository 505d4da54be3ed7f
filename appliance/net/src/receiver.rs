//! A receive queue: whoever has a packet for the driver puts it into the ring, one thread at a time.
//!
//! # Theory of operation
//! The queue's own thread opens the ring, follows what the front-end changes, and takes the ring away when it is to stop. In
//! between the ring lies here, behind a lock, and the thread that has a packet fills it: no other thread has to wake up for
//! that, and the packet's bytes go from the sender's memory to the receiver's at once. Nobody holds two of these locks, nor
//! waits for anything with one of them in hand.
//!
//! A packet takes its buffers only when there are enough for all of it. [`Receiver::flush`] lets the driver see what was
//! delivered since the last time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vvu_back_end::wakeup::Wakeup;
use vvu_back_end::{Chain, Ring, RingError, RingSignals, Segment, Service, total_len};

use vvu_protocol::features::Features;

use crate::bell::{Bell, Target};
use crate::driver_data::{Cursor, MemoryWatch};
use crate::fault::{Condition, Fault};
use crate::features;
use crate::net_header::{self, NetHeader};
use crate::offloads::Offloads;
use crate::packet::Content;
use crate::port::{MAX_INDIRECT_CHAIN, Port};
use crate::waiting::Waiting;

/// One receive queue of a port.
#[derive(Debug)]
pub(crate) struct Receiver {
    /// What stands for it among those that are signalled.
    target: Target,
    /// None while the ring is not in service.
    open: Mutex<Option<Open>>,
}

/// A ring in service.
#[derive(Debug)]
struct Open {
    ring: Ring,
    signals: RingSignals,
    /// Entries of the ring.
    size: u16,
    header_len: usize,
    mergeable: bool,
    /// Addresses pass an IOMMU.
    translated: bool,
    /// What the driver has accepted; it may have asked for less since.
    offloads: Offloads,
    condition: Condition,
    watch: MemoryWatch,
    /// Who waits for more buffers.
    waiters: Vec<Arc<Wakeup>>,
    chain: Chain,
    buffers: Vec<Buffer>,
    segments: Vec<Segment>,
}

/// One buffer for the packet in hand.
#[derive(Debug, Clone, Copy)]
struct Buffer {
    head: u16,
    len: u64,
}

/// What has become of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// It is in the ring; [`Receiver::flush`] is to come.
    Done,
    /// There are too few buffers. Who has left a wakeup is told when there are more.
    Full,
    /// No buffer of the driver will ever hold it.
    TooLarge,
    /// There is no ring in service, or it does not work.
    Away,
}

/// What is to be delivered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parcel<'a> {
    pub(crate) header: NetHeader,
    pub(crate) content: Content<'a>,
}

impl Receiver {
    pub(crate) fn new(target: Target) -> Self {
        Self { target, open: Mutex::new(None) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a packet into the ring. If there are too few buffers, `waiter` fires when there may be more.
    pub(crate) fn deliver(
        &self,
        port: &Port,
        parcel: &Parcel<'_>,
        waiter: Option<&Arc<Wakeup>>,
        bell: &mut Bell,
    ) -> Delivery {
        let mut guard = self.lock();
        let Some(open) = guard.as_mut().filter(|open| open.condition == Condition::Working) else {
            return Delivery::Away;
        };
        // A look at the ring takes back what was asked of the driver for them.
        open.wake_waiters();
        // The driver that this was adapted for may be gone, and another have come.
        if !open.offloads.contains(parcel.header.needs()) {
            return Delivery::Away;
        }
        let outcome = open.fill(parcel, waiter);
        outcome.unwrap_or_else(|fault| {
            self.stop_for(open, fault, port, bell);
            Delivery::Away
        })
    }

    /// Lets the driver see what was delivered.
    pub(crate) fn flush(&self, port: &Port, bell: &mut Bell) {
        let mut guard = self.lock();
        if let Some(open) = guard.as_mut() {
            self.publish(open, port, bell);
        }
    }

    fn publish(&self, open: &mut Open, port: &Port, bell: &mut Bell) {
        if open.condition == Condition::Broken || !open.ring.is_placed() {
            return;
        }
        match open.ring.publish() {
            Ok(true) => self.signal(open, port, bell),
            Ok(false) => {}
            Err(error) => self.stop_for(open, error.into(), port, bell),
        }
    }

    fn signal(&self, open: &Open, port: &Port, bell: &mut Bell) {
        if let Some(call) = open.signals.call() {
            port.counters.calls.count();
            bell.signal(self.target, call);
        }
    }

    /// The ring waits if it is for the front-end to give something, which the queue's thread asks for; else it is broken.
    fn stop_for(&self, open: &mut Open, fault: Fault, port: &Port, bell: &mut Bell) {
        if let Fault::Ring(error) = &fault
            && error.pause().is_some()
        {
            open.condition = Condition::Waiting;
            open.signals.wake();
            return;
        }
        open.condition = Condition::Broken;
        open.wake_waiters();
        port.note_broken(self.target, &fault);
        if let Some(event) = open.signals.error() {
            bell.signal(self.target, event);
        }
    }
}

/// What the queue's own thread does.
impl Receiver {
    /// Puts the ring in service.
    pub(crate) fn open(&self, ring: Ring, service: &Service<'_>) {
        let bits = service.features().bits();
        let mergeable = bits & features::MRG_RXBUF != 0;
        let open = Open {
            ring,
            signals: service.signals(),
            size: service.size(),
            header_len: header_len(bits),
            mergeable,
            translated: service.features().contains(Features::ACCESS_PLATFORM),
            offloads: Offloads::of_receiver(bits),
            condition: Condition::Working,
            watch: MemoryWatch::new(),
            waiters: Vec::new(),
            chain: Chain::new(MAX_INDIRECT_CHAIN),
            buffers: Vec::new(),
            segments: Vec::new(),
        };
        *self.lock() = Some(open);
    }

    /// Follows what the front-end has changed, and looks again at what the ring waits for.
    pub(crate) fn follow(&self, port: &Port, service: &Service<'_>, waiting: &mut Waiting, bell: &mut Bell) {
        let mut guard = self.lock();
        let signal = waiting.follow(service, guard.as_mut().map(|open| &mut open.ring));
        if let Some(open) = guard.as_mut() {
            if signal {
                self.signal(open, port, bell);
            }
            self.proceed(open, port, service, bell);
        }
    }

    /// Asks the front-end for what the ring waits for, unless it has come; and with an IOMMU for what it will wait for, so that
    /// no packet has to be dropped for the lack of a mapping.
    fn proceed(&self, open: &mut Open, port: &Port, service: &Service<'_>, bell: &mut Bell) {
        let looks = open.condition == Condition::Waiting || open.condition == Condition::Working && open.translated;
        let mut is_more = looks;
        while is_more {
            is_more = match self.look_ahead(open, port, service, bell) {
                Ok(is_more) => is_more,
                Err(fault) => return self.stop_for(open, fault, port, bell),
            };
        }
    }

    /// Looks at the ring and all buffers that are there. True if there are more by now.
    fn look_ahead(&self, open: &mut Open, port: &Port, service: &Service<'_>, bell: &mut Bell) -> Result<bool, Fault> {
        let available = match open.reach() {
            Ok(available) => available,
            Err(error) => {
                // The same question is asked once, and its answer wakes this thread.
                service.pause(error.pause().ok_or(error)?)?;
                return Ok(false);
            }
        };
        service.resume();
        if open.condition == Condition::Waiting {
            open.condition = Condition::Working;
            open.wake_waiters();
            self.publish(open, port, bell);
        }
        Ok(open.translated && open.condition == Condition::Working && open.ring.listen_beyond(available)?)
    }

    /// The driver has kicked: there are more buffers.
    fn note_kick(&self, port: &Port, service: &Service<'_>, bell: &mut Bell) {
        if let Some(open) = self.lock().as_mut() {
            open.wake_waiters();
            if open.translated {
                self.proceed(open, port, service, bell);
            }
        }
    }

    /// The driver has ever given the ring a buffer. If not, it kicks when it does.
    fn is_supplied(&self) -> bool {
        let mut guard = self.lock();
        let Some(Open { ring, .. }) = guard.as_mut() else { return false };
        // What is wrong with the ring shows when it is used; what it waits for fires the wakeup.
        ring.next_avail() != 0 || ring.place().is_ok() && matches!(ring.listen(), Ok(true))
    }

    /// Who waits is to look again.
    pub(crate) fn wake_waiters(&self) {
        if let Some(open) = self.lock().as_mut() {
            open.wake_waiters();
        }
    }

    /// Takes the ring out of service, with nothing in flight.
    pub(crate) fn close(&self, port: &Port, service: &Service<'_>, bell: &mut Bell) {
        let mut guard = self.lock();
        if let Some(mut open) = guard.take() {
            self.publish(&mut open, port, bell);
            open.wake_waiters();
            service.save_position(&open.ring);
        }
    }
}

impl Open {
    fn wake_waiters(&mut self) {
        for waiter in self.waiters.drain(..) {
            waiter.wake();
        }
    }

    fn fill(&mut self, parcel: &Parcel<'_>, waiter: Option<&Arc<Wakeup>>) -> Result<Delivery, Fault> {
        self.ring.place()?;
        let len = self.header_len + parcel.content.len();
        loop {
            let available = self.ring.available()?;
            let is_enough = self.collect(len as u64, available)?;
            self.watch.check(self.ring.view().memory())?;
            if is_enough {
                break;
            }
            if !self.mergeable && !self.buffers.is_empty() {
                return Ok(Delivery::TooLarge);
            }
            let Some(waiter) = waiter else { return Ok(Delivery::Full) };
            if available >= self.size {
                return Ok(Delivery::TooLarge);
            }
            if !self.ring.listen_beyond(available)? {
                self.waiters.push(Arc::clone(waiter));
                return Ok(Delivery::Full);
            }
        }
        let memory = Arc::clone(self.ring.view().memory());
        let mut cursor = Cursor::new(&memory, &self.segments);
        // At most as many as the ring has entries.
        let count = u16::try_from(self.buffers.len()).unwrap_or(u16::MAX);
        let header = parcel.header.encode(self.offloads.contains(Offloads::CHECKSUM), count);
        cursor.write(header.get(..self.header_len).unwrap_or(&header))?;
        parcel.content.copy_to_driver(&mut cursor)?;
        self.watch.check(&memory)?;
        self.return_buffers(len as u64)?;
        Ok(Delivery::Done)
    }

    /// Looks for buffers that hold `len` bytes, among the first `available` of the ring. None is taken.
    fn collect(&mut self, len: u64, available: u16) -> Result<bool, Fault> {
        self.buffers.clear();
        self.segments.clear();
        let most = if self.mergeable { available } else { available.min(1) };
        let mut room = 0;
        for ahead in 0..most {
            let head = self.ring.peek_ahead(ahead)?;
            if self.buffers.iter().any(|buffer| buffer.head == head) {
                return Err(RingError::DuplicateHead { head }.into());
            }
            self.ring.walk(head, &mut self.chain)?;
            if !self.chain.readable.is_empty() {
                return Err(Fault::Direction { head });
            }
            let buffer = Buffer { head, len: total_len(&self.chain.writable) };
            // Section 5.1.6.3.1: each buffer holds a header at the least.
            if buffer.len < self.header_len as u64 {
                return Err(Fault::Short { head, len: buffer.len });
            }
            room += buffer.len;
            self.buffers.push(buffer);
            self.segments.append(&mut self.chain.writable);
            if room >= len {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns the buffers that were collected, of which the first `len` bytes were written.
    fn return_buffers(&mut self, len: u64) -> Result<(), Fault> {
        let mut left = len;
        for segment in &self.segments {
            let written = left.min(u64::from(segment.len));
            left -= written;
            // Not more than the segment has.
            let len = u32::try_from(written).unwrap_or(segment.len);
            if len > 0 {
                self.ring.view().mark_written(Segment { len, ..*segment });
            }
        }
        let mut left = len;
        for buffer in &self.buffers {
            let written = left.min(buffer.len);
            left -= written;
            self.ring.take(buffer.head);
            // Less than a packet.
            self.ring.put_used(buffer.head, u32::try_from(written).unwrap_or(u32::MAX))?;
        }
        Ok(())
    }

    /// Finds out whether the ring and all buffers that are there can be reached. The number of buffers.
    fn reach(&mut self) -> Result<u16, RingError> {
        self.ring.place()?;
        let available = self.ring.available()?;
        for ahead in 0..available {
            self.ring.walk(self.ring.peek_ahead(ahead)?, &mut self.chain)?;
        }
        Ok(available)
    }
}

/// Length of the header before each packet (section 5.1.6.1).
pub(crate) fn header_len(bits: u64) -> usize {
    if bits & (features::VERSION_1 | features::MRG_RXBUF) != 0 { net_header::LEN } else { net_header::LEGACY_LEN }
}

/// Serves the queue's ring until it is stopped, on the queue's thread.
pub(crate) fn serve(port: &Port, receiver: &Receiver, pair: u16, service: &Service<'_>) {
    let Some(mut bell) = port.new_bell() else { return };
    let mut waiting = Waiting::new(service);
    let mut opening = Condition::Waiting;
    let mut try_to_open = true;
    let mut is_supplied = false;
    while !service.should_stop() {
        if opening == Condition::Waiting && std::mem::take(&mut try_to_open) {
            opening = match service.open_ring() {
                Ok(ring) => {
                    service.resume();
                    receiver.open(ring, service);
                    receiver.note_kick(port, service, &mut bell);
                    port.set_receiving(pair, true);
                    Condition::Working
                }
                Err(error) => port.pause_or_break(error, service, &mut bell),
            };
        }
        if !is_supplied && receiver.is_supplied() {
            port.set_supplied(pair);
            is_supplied = true;
        }
        let events = waiting.wait(&mut bell, None);
        if events.woken {
            receiver.follow(port, service, &mut waiting, &mut bell);
            try_to_open = true;
        }
        if events.kicked {
            port.counters.kicks.count();
            receiver.note_kick(port, service, &mut bell);
        }
    }
    port.set_receiving(pair, false);
    receiver.close(port, service, &mut bell);
    bell.finish();
}
