//! The network outside: a TAP interface, and the threads that carry its packets into the switch.
//!
//! A switch with one port is a wire: when the driver has no buffers, its packets stay in the interface, whose queue is what
//! the kernel's senders are held back by. With several ports one driver must not hold up the packets of others, so they are
//! dropped.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vvu_back_end::in_one_line;
use vvu_back_end::log_limit::LogLimit;
use vvu_back_end::wakeup::Wakeup;

use crate::bell::Bell;
use crate::counters::Counters;
use crate::net_header::{self, LEGACY_LEN, NetHeader};
use crate::offloads::Offloads;
use crate::outbox::Outbox;
use crate::packet::{MAX_FRAME_LEN, Packet};
use crate::receiver::Delivery;
use crate::switch::{Place, Switch};
use crate::tap::Tap;

/// Most packets until receivers see what they have got.
const BATCH: usize = 32;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Uplink {
    pub(crate) counters: Counters,
    lanes: Vec<OwnedFd>,
    offloads: Offloads,
    log: LogLimit,
}

impl Uplink {
    pub(crate) fn new(tap: Tap) -> Self {
        let Tap { lanes, cuts_udp } = tap;
        let udp = Offloads::UDP4 | Offloads::UDP6;
        let offloads = if cuts_udp { Offloads::all() } else { Offloads::all() - udp };
        Self { counters: Counters::default(), lanes, offloads, log: LogLimit::new() }
    }

    /// What may be left to the kernel.
    pub(crate) fn offloads(&self) -> Offloads {
        self.offloads
    }

    pub(crate) fn lanes(&self) -> usize {
        self.lanes.len()
    }

    fn lane(&self, number: usize) -> Option<&OwnedFd> {
        self.lanes.get(number.checked_rem(self.lanes.len())?)
    }

    /// Gives a packet to the kernel.
    pub(crate) fn deliver(&self, header: &NetHeader, frame: &[u8], lane: usize) -> Delivery {
        let Some(lane) = self.lane(lane) else { return Delivery::Away };
        let header = header.encode(true, 1);
        match rustix::io::writev(lane, &[IoSlice::new(&header), IoSlice::new(frame)]) {
            Ok(_) => Delivery::Done,
            Err(Errno::AGAIN | Errno::NOBUFS) => Delivery::Full,
            // The interface is down, or the kernel finds fault with the packet.
            Err(error) => {
                if let Some(suppressed) = self.log.admit(Instant::now()) {
                    tracing::info!(%error, suppressed, "the uplink takes no packet");
                }
                Delivery::Away
            }
        }
    }
}

/// The thread of one of the uplink's queues.
struct Lane<'a> {
    switch: &'a Switch,
    uplink: &'a Uplink,
    queue: &'a OwnedFd,
    end: &'a Wakeup,
    outbox: Outbox,
    waiter: Arc<Wakeup>,
}

/// Carries packets of one of the uplink's queues into the switch, until `end` fires.
///
/// # Errors
/// If the system refuses what the thread needs.
pub(crate) fn serve(switch: &Switch, number: usize, end: &Wakeup) -> io::Result<()> {
    let Some(uplink) = switch.uplink() else { return Ok(()) };
    let Some(queue) = uplink.lane(number) else { return Ok(()) };
    let waiter = Arc::new(Wakeup::new()?);
    let mut outbox = Outbox::new(Bell::new()?, number);
    outbox.waiter = (switch.ports().len() == 1).then(|| Arc::clone(&waiter));
    Lane { switch, uplink, queue, end, outbox, waiter }.run()
}

impl Lane<'_> {
    fn run(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; net_header::LEN + MAX_FRAME_LEN];
        loop {
            let mut is_idle = false;
            for _ in 0..BATCH {
                match rustix::io::read(self.queue, &mut buffer) {
                    Ok(len) => {
                        if !self.take(buffer.get(..len).unwrap_or_default())? {
                            return Ok(());
                        }
                    }
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => {
                        is_idle = true;
                        break;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            self.switch.flush(&mut self.outbox);
            let goes_on = if is_idle { self.wait(self.queue)? } else { !has_fired(self.end)? };
            if !goes_on {
                return Ok(());
            }
        }
    }

    /// Carries one packet; false if the thread is to end.
    fn take(&mut self, bytes: &[u8]) -> io::Result<bool> {
        let Some((header, frame)) = bytes.split_at_checked(net_header::LEN) else { return Ok(true) };
        let Some(header) = header.first_chunk::<LEGACY_LEN>() else { return Ok(true) };
        let counters = &self.uplink.counters;
        counters.tx_packets.count();
        counters.tx_bytes.add(frame.len() as u64);
        let packet = match Packet::from_buffer(header, frame) {
            Ok(packet) => packet,
            Err(error) => {
                counters.tx_malformed.count();
                if let Some(suppressed) = self.uplink.log.admit(Instant::now()) {
                    tracing::info!(error = in_one_line(&error), suppressed, "packet of the uplink dropped");
                }
                return Ok(true);
            }
        };
        self.switch.accept(Place::Uplink, &packet, &mut self.outbox, Instant::now());
        while std::mem::take(&mut self.outbox.must_wait) {
            // What was delivered before is seen by the driver, who may need it to give more buffers.
            self.switch.flush(&mut self.outbox);
            counters.tx_waits.count();
            let waiter = Arc::clone(&self.waiter);
            if !self.wait(&waiter)? {
                return Ok(false);
            }
            waiter.consume();
            self.outbox.is_repeated = true;
            self.switch.accept(Place::Uplink, &packet, &mut self.outbox, Instant::now());
            self.outbox.is_repeated = false;
        }
        Ok(true)
    }

    /// Waits until `event` is readable; false if the thread is to end.
    fn wait(&mut self, event: &impl AsFd) -> io::Result<bool> {
        loop {
            let progress = self.outbox.bell.progress();
            // What there is not is replaced by the end.
            let watched = [self.end.as_fd(), event.as_fd(), progress.unwrap_or(self.end.as_fd())];
            let mut polled = watched.map(|descriptor| PollFd::from_borrowed_fd(descriptor, PollFlags::IN));
            match poll(&mut polled, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let [end, ready, _progress] = polled.map(|polled| !polled.revents().is_empty());
            self.outbox.bell.proceed();
            if end || ready {
                return Ok(!end);
            }
        }
    }
}

fn has_fired(event: &Wakeup) -> io::Result<bool> {
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    match poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&now)) {
        Ok(count) => Ok(count > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
