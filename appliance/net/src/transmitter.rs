//! A transmit queue: its thread takes packets from the ring and carries each of them to where it is to go.
//!
//! When the ring is empty, the thread looks at it for a while before it asks the driver to notify ([`Polling`]). Whoever asks
//! for a notification looks once more after that: what the driver has made available before it saw the wish, it does not
//! notify of. Receive queues need no such thing: those who have packets look at them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vvu_back_end::polling::{Look, PollMode, Polling};
use vvu_back_end::{Chain, Ring, RingError, Service, total_len};

use crate::driver_data::MemoryWatch;
use crate::fault::Fault;
use crate::offloads::Offloads;
use crate::outbox::Outbox;
use crate::packet::{FRONT_LEN, Packet};
use crate::port::{MAX_INDIRECT_CHAIN, Port};
use crate::receiver::header_len;
use crate::switch::{Place, Switch};
use crate::waiting::Waiting;

/// Looks at the ring between two looks at the clock.
const LOOKS: u32 = 32;

/// Most packets until receivers and the sender see what has become of them.
const BATCH: u16 = 32;

/// Whether the ring is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Intake {
    /// There may be heads to take right now.
    Ready,
    /// After the next kick: the driver notifies.
    Waiting,
    /// All that was there is taken, and the driver does not notify.
    Drained,
    /// After a moment: the port is at its limit.
    Limited(Instant),
    /// After the next wakeup: the front-end has to give something first.
    Paused,
    /// The driver broke the ring; only a restart helps.
    Broken,
}

struct Transmitter<'a> {
    switch: &'a Switch,
    port: &'a Port,
    service: &'a Service<'a>,
    outbox: Outbox,
    /// None until it could be opened.
    ring: Option<Ring>,
    chain: Chain,
    header_len: usize,
    offloads: Offloads,
    watch: MemoryWatch,
    /// Something of the ring or of its next packet had to be waited for.
    pauses: bool,
    /// How long the thread looks for packets by itself.
    polling: Polling,
    front: Box<[u8; FRONT_LEN]>,
}

/// Serves the queue's ring until it is stopped, on the queue's thread.
pub(crate) fn serve(switch: &Switch, port: &Port, service: &Service<'_>) {
    let Some(bell) = port.new_bell() else { return };
    let bits = service.features().bits();
    let mut transmitter = Transmitter {
        switch,
        port,
        service,
        outbox: Outbox::new(bell, usize::from(service.index() / 2)),
        ring: None,
        chain: Chain::new(MAX_INDIRECT_CHAIN),
        header_len: header_len(bits),
        offloads: Offloads::of_sender(bits),
        watch: MemoryWatch::new(),
        pauses: false,
        polling: Polling::new(switch.threads.polling()),
        front: Box::new([0; FRONT_LEN]),
    };
    transmitter.run();
    if let Some(ring) = &transmitter.ring {
        service.save_position(ring);
    }
    transmitter.outbox.bell.finish();
}

impl Transmitter<'_> {
    fn run(&mut self) {
        let mut waiting = Waiting::new(self.service);
        // Packets may have been made available before the ring started, and their kick may be gone.
        let mut intake = Intake::Ready;
        while !self.service.should_stop() {
            if intake == Intake::Ready {
                intake = self.work();
            }
            if intake == Intake::Drained {
                intake = self.look_for_work(&waiting);
            }
            if intake == Intake::Ready && !waiting.has_events(&mut self.outbox.bell) {
                self.end_idle_time();
                continue;
            }
            let limit = match intake {
                Intake::Ready => Some(Duration::ZERO),
                Intake::Limited(until) => Some(until.saturating_duration_since(Instant::now())),
                _ => None,
            };
            let events = waiting.wait(&mut self.outbox.bell, limit);
            self.end_idle_time();
            if events.kicked {
                self.port.counters.kicks.count();
            }
            if events.woken && waiting.follow(self.service, self.ring.as_mut()) {
                self.signal();
            }
            intake = match intake {
                Intake::Waiting if events.kicked || events.woken => Intake::Ready,
                Intake::Paused if events.woken => Intake::Ready,
                Intake::Limited(until) if Instant::now() >= until => Intake::Ready,
                other => other,
            };
        }
    }

    /// Looks for packets, as long as that is worth it; then has the driver notify.
    fn look_for_work(&mut self, waiting: &Waiting) -> Intake {
        let look = if self.polling.mode() == PollMode::Off { Look::Not } else { self.polling.begin(Instant::now()) };
        let until = match look {
            Look::Not => return self.listen(),
            Look::Until(until) => Some(until),
            Look::Endlessly => None,
        };
        loop {
            for _ in 0..LOOKS {
                if waiting.has_events(&mut self.outbox.bell) {
                    return Intake::Ready;
                }
                match self.ring.as_ref().map(Ring::has_heads) {
                    Some(Ok(false)) => std::hint::spin_loop(),
                    // What is wrong with the ring shows when it is used.
                    Some(Ok(true) | Err(_)) | None => return Intake::Ready,
                }
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return self.listen();
            }
        }
    }

    /// Has the driver notify of what comes.
    fn listen(&mut self) -> Intake {
        match self.ring.as_mut().map(Ring::listen) {
            Some(Ok(true)) => Intake::Ready,
            Some(Ok(false)) | None => Intake::Waiting,
            Some(Err(error)) => self.pause_or_break(error.into()),
        }
    }

    fn end_idle_time(&mut self) {
        if self.polling.is_idle() {
            self.polling.end(Instant::now());
        }
    }

    /// Takes what is there, at most a batch, and tells all sides of it.
    fn work(&mut self) -> Intake {
        let outcome = self.take_batch();
        self.switch.flush(&mut self.outbox);
        let published = match (&mut self.ring, &outcome) {
            (Some(ring), Ok(_)) => ring.publish(),
            (Some(ring), Err(_)) if ring.is_placed() => ring.publish(),
            _ => Ok(false),
        };
        if matches!(published, Ok(true)) {
            self.signal();
        }
        match (outcome, published) {
            (Ok(intake), Ok(_)) => intake,
            (Err(fault), _) => self.pause_or_break(fault),
            (_, Err(error)) => self.pause_or_break(error.into()),
        }
    }

    fn take_batch(&mut self) -> Result<Intake, Fault> {
        match &mut self.ring {
            Some(ring) => ring.place()?,
            None => self.ring = Some(self.service.open_ring()?),
        }
        let Some(ring) = &mut self.ring else { return Ok(Intake::Paused) };
        let count = ring.available()?;
        let now = Instant::now();
        self.watch.check(ring.view().memory())?;
        for _ in 0..count.min(BATCH) {
            if let Some(until) = self.take_packet(now)? {
                return Ok(Intake::Limited(until));
            }
        }
        if std::mem::take(&mut self.pauses) {
            self.service.resume();
        }
        Ok(if count > BATCH { Intake::Ready } else { Intake::Drained })
    }

    /// Takes one packet and sends it on its way; says how long to wait if the port is at its limit. `now` is when the batch
    /// began.
    fn take_packet(&mut self, now: Instant) -> Result<Option<Instant>, Fault> {
        let Some(ring) = &mut self.ring else { return Ok(None) };
        let head = ring.peek()?;
        ring.walk(head, &mut self.chain)?;
        let len = total_len(&self.chain.readable);
        if !self.chain.writable.is_empty() {
            return Err(Fault::Direction { head });
        }
        if len < self.header_len as u64 {
            return Err(Fault::Short { head, len });
        }
        let bytes = len.saturating_sub(self.header_len as u64);
        if let Err(until) = self.port.limit.take(1, bytes, now) {
            self.port.counters.tx_waits.count();
            return Ok(Some(until));
        }
        let memory = Arc::clone(ring.view().memory());
        ring.take(head);
        let (segments, offloads) = (&self.chain.readable, self.offloads);
        let packet = Packet::from_driver(&memory, segments, self.header_len, offloads, &mut self.front);
        self.watch.check(&memory)?;
        self.port.counters.tx_packets.count();
        self.port.counters.tx_bytes.add(bytes);
        match packet {
            Ok(packet) => self.switch.accept(Place::Port(self.port.index), &packet, &mut self.outbox, now),
            Err(error) => self.port.note_malformed(&error),
        }
        if let Some(ring) = &mut self.ring {
            ring.put_used(head, 0)?;
        }
        Ok(None)
    }

    fn signal(&mut self) {
        self.port.signal_driver(self.service, &mut self.outbox.bell);
    }

    fn pause_or_break(&mut self, fault: Fault) -> Intake {
        let outcome = match fault {
            Fault::Ring(error) => self.pause(error),
            fault => Err(fault),
        };
        match outcome {
            Ok(()) => {
                self.pauses = true;
                Intake::Paused
            }
            Err(fault) => {
                self.port.break_ring(&fault, self.service, &mut self.outbox.bell);
                Intake::Broken
            }
        }
    }

    fn pause(&self, error: RingError) -> Result<(), Fault> {
        match error.pause() {
            Some(pause) => Ok(self.service.pause(pause)?),
            None => Err(error.into()),
        }
    }
}
