//! A packet generator (virtio 1.3, section 5.1): frames from one port of a switch to another one, as many as it takes.
//!
//! Sender and receiver are two front-ends with memory of their own, and a thread each. The receiver says hello first, so that the
//! switch knows its address. A frame carries the moment when it was offered, so latency is measured on one clock.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::connection::{Connection, EVENT_IDX, Signals};
use crate::disk::PATIENCE;
use crate::error::Error;
use crate::latency::{Latencies, Summary};
use crate::memory::{Layout, Memory};
use crate::outcome::Whole;
use crate::processes;
use crate::ring::{Descriptor, Place, Ring, WRITE};

/// Entries of each ring.
const RING: u16 = 256;

/// Length of the header before each frame, with VERSION_1 (virtio 1.3, section 5.1.6).
const HEADER_LEN: u16 = 12;

/// Room for a header and the largest frame.
const BUFFER_LEN: u16 = 2048;

/// Where the moment of sending is in a buffer: behind both headers.
const MOMENT: usize = 32;

/// Least and most bytes of a frame, without its checksum.
pub const FRAME_LENGTHS: std::ops::RangeInclusive<u16> = 60..=1514;

/// Numbers of the two queues.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// Addresses of both ends, locally administered.
const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 1];
const RECEIVER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const EVERYBODY: [u8; 6] = [0xff; 6];

/// An EtherType for experiments (IEEE 802, section 9.2.4).
const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];

/// How long a wait is when nothing comes: the generator ends soon after its time, and a receiver that lost frames with it.
const LULL: Duration = Duration::from_millis(100);

/// A load of frames.
#[derive(Debug, Clone)]
pub struct Packets {
    /// The sender's port.
    pub from: PathBuf,
    /// The receiver's port.
    pub to: PathBuf,
    /// Bytes of a frame, in [`FRAME_LENGTHS`].
    pub frame: u16,
    /// Frames under way on the sender's side, 1 to 256.
    pub depth: u16,
    /// How long.
    pub time: Duration,
    /// Both sides look at their rings all the time.
    pub polled: bool,
    /// Processes whose switches and processor time are reported.
    pub watched: Vec<u32>,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Frames that the switch took.
    pub sent: u64,
    /// Frames that the receiver got; `whole` has them as requests.
    pub received_per_second: f64,
    /// From the moment when a frame is offered to the moment when it is seen at the other end, in microseconds.
    pub latency_us: Summary,
    /// Sums of both sides.
    pub whole: Whole,
}

/// A front-end with one ring that frames go through.
struct Port {
    connection: Connection,
    memory: Memory,
    place: Place,
    buffers: usize,
    signals: Signals,
    _silent: Signals,
}

impl Packets {
    /// Runs it.
    ///
    /// # Errors
    /// If the back-end refuses something, nothing arrives, or the load makes no sense.
    pub fn run(&self) -> Result<Outcome, Error> {
        if !FRAME_LENGTHS.contains(&self.frame) || self.depth == 0 || self.depth > RING {
            let (least, most) = (FRAME_LENGTHS.start(), FRAME_LENGTHS.end());
            return Err(Error::Usage(format!("give frames of {least} to {most} bytes, and 1 to {RING} of them")));
        }
        greet(&self.to)?;
        let receiver = Port::open(&self.to, RECEIVE)?;
        let sender = Port::open(&self.from, TRANSMIT)?;
        let before = processes::look_at(&self.watched);
        let begin = Instant::now();
        let (sent, received) = thread::scope(|scope| {
            let received = scope.spawn(|| self.receive(&receiver, begin));
            let sent = scope.spawn(|| self.send(&sender, begin));
            let sent = sent.join().map_err(|_| Error::Panicked)?;
            Ok::<_, Error>((sent?, received.join().map_err(|_| Error::Panicked)??))
        })?;
        let (mut whole, latencies, last) = received;
        let count = whole.requests;
        let seconds = last.saturating_duration_since(begin).as_secs_f64();
        whole.add(&sent);
        whole.requests = count;
        whole.processes = processes::between(&before, processes::look_at(&self.watched));
        sender.connection.stop_queue(TRANSMIT)?;
        receiver.connection.stop_queue(RECEIVE)?;
        if count == 0 {
            return Err(Error::Silent(self.time));
        }
        let received_per_second = count as f64 / seconds;
        Ok(Outcome { sent: sent.requests, received_per_second, latency_us: latencies.summary(), whole })
    }

    fn send(&self, port: &Port, begin: Instant) -> Result<Whole, Error> {
        let len = u32::from(self.frame) + u32::from(HEADER_LEN);
        for index in 0..self.depth {
            port.write_frame(index, RECEIVER, SENDER)?;
            Descriptor { address: port.buffer(index), len, flags: 0, next: 0 }
                .write(&port.memory, port.place.descriptor(index))?;
        }
        let mut ring = port.ring();
        let mut whole = Whole::default();
        let mut free: Vec<u16> = (0..self.depth).collect();
        let end = begin + self.time;
        loop {
            let now = Instant::now();
            if now >= end {
                break;
            }
            let moment = moment(begin, now);
            for index in free.drain(..) {
                port.memory.at::<AtomicU64>(port.buffer(index) + MOMENT)?.store(moment, Ordering::Relaxed);
                ring.offer(index)?;
            }
            publish(&mut ring, port, &mut whole)?;
            if !self.await_used(&ring, port, end + PATIENCE, PATIENCE, &mut whole)? {
                return Err(Error::Silent(PATIENCE));
            }
            while let Some((index, _)) = ring.take()? {
                free.push(index);
                whole.requests += 1;
            }
        }
        whole.calls = port.signals.calls();
        whole.load = processes::own_thread();
        Ok(whole)
    }

    fn receive(&self, port: &Port, begin: Instant) -> Result<(Whole, Latencies, Instant), Error> {
        let mut ring = port.ring();
        for index in 0..RING {
            Descriptor { address: port.buffer(index), len: u32::from(BUFFER_LEN), flags: WRITE, next: 0 }
                .write(&port.memory, port.place.descriptor(index))?;
            ring.offer(index)?;
        }
        let mut whole = Whole::default();
        let mut latencies = Latencies::new()?;
        let end = begin + self.time;
        let mut last = begin;
        loop {
            publish(&mut ring, port, &mut whole)?;
            if !self.await_used(&ring, port, end, LULL, &mut whole)? && Instant::now() >= end {
                break;
            }
            let now = Instant::now();
            while let Some((index, len)) = ring.take()? {
                // Frames of others, as hosts send them unasked, have another length.
                if len as usize == usize::from(self.frame + HEADER_LEN) {
                    let sent = port.memory.at::<AtomicU64>(port.buffer(index) + MOMENT)?.load(Ordering::Relaxed);
                    latencies.record(Duration::from_nanos(moment(begin, now).saturating_sub(sent)));
                    whole.requests += 1;
                    last = now;
                }
                ring.offer(index)?;
            }
        }
        whole.calls = port.signals.calls();
        whole.load = processes::own_thread();
        Ok((whole, latencies, last))
    }

    /// Waits for used chains; false if nothing has come: no call within `patience`, or, polled, nothing until a while after
    /// `end`.
    fn await_used(
        &self,
        ring: &Ring<'_>,
        port: &Port,
        end: Instant,
        patience: Duration,
        whole: &mut Whole,
    ) -> Result<bool, Error> {
        if self.polled {
            return poll(ring, end + LULL);
        }
        loop {
            ring.ask_for_calls(true)?;
            if ring.has_used()? {
                return Ok(true);
            }
            whole.waits += 1;
            if !port.signals.wait(patience)? {
                return ring.has_used();
            }
        }
    }
}

/// Looks at a ring until it has used chains, or it is too late.
fn poll(ring: &Ring<'_>, too_late: Instant) -> Result<bool, Error> {
    loop {
        for _ in 0..1024 {
            if ring.has_used()? {
                ring.ask_for_calls(false)?;
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        if Instant::now() > too_late {
            return Ok(false);
        }
    }
}

fn publish(ring: &mut Ring<'_>, port: &Port, whole: &mut Whole) -> Result<(), Error> {
    if ring.publish()? {
        whole.kicks += 1;
        port.signals.kick();
    }
    Ok(())
}

fn moment(begin: Instant, now: Instant) -> u64 {
    u64::try_from(now.saturating_duration_since(begin).as_nanos()).unwrap_or(u64::MAX)
}

/// Has the receiver's port send one frame to everybody.
fn greet(socket: &Path) -> Result<(), Error> {
    let port = Port::open(socket, TRANSMIT)?;
    port.write_frame(0, EVERYBODY, RECEIVER)?;
    let len = u32::from(*FRAME_LENGTHS.start()) + u32::from(HEADER_LEN);
    Descriptor { address: port.buffer(0), len, flags: 0, next: 0 }.write(&port.memory, port.place.descriptor(0))?;
    let mut ring = port.ring();
    ring.offer(0)?;
    ring.ask_for_calls(true)?;
    publish(&mut ring, &port, &mut Whole::default())?;
    while !ring.has_used()? {
        if !port.signals.wait(PATIENCE)? {
            return Err(Error::Silent(PATIENCE));
        }
    }
    port.connection.stop_queue(TRANSMIT).map(drop)
}

impl Port {
    /// Connects, and starts both queues: one for frames, and one that stays empty.
    fn open(socket: &Path, queue: usize) -> Result<Self, Error> {
        let mut connection = Connection::open(socket, EVENT_IDX)?;
        let mut layout = Layout::default();
        let (place, silent_place) = (Place::take(&mut layout, RING), Place::take(&mut layout, RING));
        let buffers = layout.take(usize::from(BUFFER_LEN) * usize::from(RING), 4096);
        let memory = Memory::new(layout.len())?;
        connection.announce_memory(&memory)?;
        let (signals, silent) = (Signals::new()?, Signals::new()?);
        connection.start_queue(1 - queue, silent_place, &silent)?;
        connection.start_queue(queue, place, &signals)?;
        Ok(Self { connection, memory, place, buffers, signals, _silent: silent })
    }

    fn ring(&self) -> Ring<'_> {
        Ring::new(&self.memory, self.place, self.connection.features() & EVENT_IDX != 0)
    }

    fn buffer(&self, index: u16) -> usize {
        self.buffers + usize::from(BUFFER_LEN) * usize::from(index)
    }

    /// The frame's header; the one before it stays zero, as nothing is offloaded.
    fn write_frame(&self, index: u16, to: [u8; 6], from: [u8; 6]) -> Result<(), Error> {
        let header = [&to[..], &from, &ETHER_TYPE].concat();
        for (place, byte) in (self.buffer(index) + usize::from(HEADER_LEN)..).zip(header) {
            self.memory.at::<AtomicU8>(place)?.store(byte, Ordering::Relaxed);
        }
        Ok(())
    }
}
