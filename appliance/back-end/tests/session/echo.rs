//! The smallest device: each request's readable bytes are copied to its writable ones.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags, poll};
use vvu_back_end::wakeup::Wakeup;
use vvu_back_end::{Chain, ConfigWriter, Device, DeviceError, Memory, Ring, RingError, Segment, Service, total_len};
use vvu_protocol::features::{Features, ProtocolFeatures};

/// See the module's text.
#[derive(Default)]
pub(crate) struct Echo {
    /// Requests are taken and not completed.
    held: AtomicBool,
    /// While it is locked, no queue's thread looks at what has changed.
    pub(crate) gate: Mutex<()>,
    /// Wakes the queues that are served.
    wakeups: Mutex<Vec<Arc<Wakeup>>>,
    /// Heads in the order in which they were taken, with their queue.
    pub(crate) taken: Mutex<Vec<(u16, u16)>>,
    pub(crate) resets: AtomicU32,
    pub(crate) config: Mutex<[u8; 8]>,
    /// What broke rings.
    pub(crate) faults: Mutex<Vec<String>>,
}

impl Echo {
    /// From now on requests are taken and stay in flight until [`Echo::release`].
    pub(crate) fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    pub(crate) fn release(&self) {
        self.held.store(false, Ordering::SeqCst);
        self.wakeups.lock().unwrap().iter().for_each(|wakeup| wakeup.wake());
    }
}

pub(crate) const QUEUES: u16 = 3;
pub(crate) const MAX_QUEUE_SIZE: u16 = 256;

impl Device for Echo {
    fn queue_count(&self) -> u16 {
        QUEUES
    }

    fn max_queue_size(&self) -> u16 {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> Features {
        Features::VERSION_1 | Features::EVENT_IDX | Features::INDIRECT_DESC
    }

    fn protocol_features(&self) -> ProtocolFeatures {
        // Of these, SHMEM is none that a device can bring.
        ProtocolFeatures::CONFIG | ProtocolFeatures::SHMEM
    }

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }

    fn read_config(&self, offset: u32, len: usize) -> Option<Vec<u8>> {
        let config = self.config.lock().unwrap();
        config.get(offset as usize..offset as usize + len).map(<[u8]>::to_vec)
    }

    fn write_config(&self, offset: u32, bytes: &[u8], writer: ConfigWriter) -> Result<(), DeviceError> {
        if writer == ConfigWriter::Driver && offset < 4 {
            return Err(DeviceError::new("read-only"));
        }
        let mut config = self.config.lock().unwrap();
        let place = config.get_mut(offset as usize..offset as usize + bytes.len());
        place.ok_or(DeviceError::new("beyond the end"))?.copy_from_slice(bytes);
        Ok(())
    }

    fn serve(&self, service: Service<'_>) {
        self.wakeups.lock().unwrap().push(Arc::clone(service.wakeup()));
        Queue {
            device: self,
            service,
            ring: None,
            requests: VecDeque::new(),
            finished: VecDeque::new(),
            broken: false,
        }
        .run();
    }
}

/// A request in flight keeps its memory.
struct Request {
    head: u16,
    memory: Arc<Memory>,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

/// One that is done does not: it may have to wait until its ring has a place.
struct Finished {
    head: u16,
    written: Vec<Segment>,
}

struct Queue<'a> {
    device: &'a Echo,
    service: Service<'a>,
    ring: Option<Ring>,
    requests: VecDeque<Request>,
    finished: VecDeque<Finished>,
    broken: bool,
}

impl Queue<'_> {
    fn run(mut self) {
        let mut kick = Arc::clone(self.service.kick());
        loop {
            drop(self.device.gate.lock().unwrap());
            let changes = self.service.update(self.ring.as_mut());
            kick = changes.kick.unwrap_or(kick);
            if changes.signal {
                self.signal();
            }
            let stopping = self.service.should_stop();
            if let Err(error) = self.work(stopping) {
                match error.pause().map_or(Err(error), |pause| self.service.pause(pause)) {
                    Ok(()) => {}
                    Err(error) => self.break_ring(&error),
                }
            }
            if stopping && self.requests.is_empty() {
                if let Some(ring) = &self.ring {
                    self.service.save_position(ring);
                }
                return;
            }
            let wakeup = self.service.wakeup();
            let mut events = [PollFd::new(&kick, PollFlags::IN), PollFd::new(wakeup.as_ref(), PollFlags::IN)];
            poll(&mut events, None).unwrap();
            wakeup.consume();
            if !events[0].revents().is_empty() {
                rustix::io::read(kick.as_fd(), &mut [0; 8]).unwrap();
            }
        }
    }

    fn work(&mut self, stopping: bool) -> Result<(), RingError> {
        if !self.device.held.load(Ordering::SeqCst) {
            self.finished.extend(self.requests.drain(..).map(echo));
        }
        if self.ring.is_none() && !self.broken {
            self.ring = Some(self.service.open_ring()?);
        }
        let Some(ring) = &mut self.ring else { return Ok(()) };
        ring.place()?;
        for finished in self.finished.drain(..) {
            finished.written.iter().for_each(|segment| ring.view().mark_written(*segment));
            ring.put_used(finished.head, u32::try_from(total_len(&finished.written)).unwrap())?;
        }
        if ring.publish()? {
            self.signal();
        }
        if stopping || self.broken {
            return Ok(());
        }
        self.take()?;
        self.service.resume();
        if self.device.held.load(Ordering::SeqCst) || self.requests.is_empty() {
            return Ok(());
        }
        self.work(stopping)
    }

    fn take(&mut self) -> Result<(), RingError> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let mut chain = Chain::new(MAX_QUEUE_SIZE);
        loop {
            for _ in 0..ring.available()? {
                let head = ring.peek()?;
                ring.walk(head, &mut chain)?;
                ring.take(head);
                self.device.taken.lock().unwrap().push((self.service.index(), head));
                self.requests.push_back(Request {
                    head,
                    memory: Arc::clone(ring.view().memory()),
                    readable: std::mem::take(&mut chain.readable),
                    writable: std::mem::take(&mut chain.writable),
                });
            }
            if !ring.listen()? {
                return Ok(());
            }
        }
    }

    fn signal(&self) {
        if let Some(call) = self.service.call() {
            rustix::io::write(call, &1u64.to_ne_bytes()).unwrap();
        }
    }

    fn break_ring(&mut self, error: &RingError) {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        self.device.faults.lock().unwrap().push(text);
        self.broken = true;
        if let Some(event) = self.service.error() {
            rustix::io::write(event, &1u64.to_ne_bytes()).unwrap();
        }
    }
}

fn echo(request: Request) -> Finished {
    let Request { head, memory, readable, writable } = request;
    let mut bytes = Vec::new();
    for segment in &readable {
        let mut part = vec![0; segment.len as usize];
        memory.read_slice(&mut part, segment.address).unwrap();
        bytes.extend(part);
    }
    bytes.resize(usize::try_from(total_len(&writable)).unwrap(), 0);
    let mut rest = &bytes[..];
    for segment in &writable {
        let (now, later) = rest.split_at(segment.len as usize);
        memory.write_slice(now, segment.address).unwrap();
        rest = later;
    }
    Finished { head, written: writable }
}
