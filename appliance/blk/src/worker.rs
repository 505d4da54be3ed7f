//! The thread of one queue while its ring is in service: takes requests from the ring, has them carried out, returns them,
//! and gives the ring back when it is stopped, with nothing in flight.

use std::sync::Arc;
use std::time::Instant;

use crate::DriverMemory;
use crate::chain::{Chain, Segment};
use crate::counters::QueueCounters;
use crate::device::Device;
use crate::engine::{Completion, EngineError, Signal, Watch};
use crate::execution::Executor;
use crate::lost_memory;
use crate::request::Request;
use crate::ring::{MAX_QUEUE_SIZE, Ring, RingError};
use crate::vring::{QueueVring, Service};
use vm_memory::GuestAddressSpace;

/// Serves a ring until it is stopped. Returns at once if it is not to be served.
pub(crate) fn serve(device: &Device, queue_index: usize, vring: &QueueVring) {
    let Some(service) = vring.begin() else { return };
    let Some(counters) = device.counters.queue(queue_index) else { return };
    counters.starts.add(1);
    let parameters = service.parameters;
    tracing::debug!(queue_index, ?parameters, "ring starts");
    let features = device.features();
    let slots = parameters.size.min(MAX_QUEUE_SIZE);
    let executor = match Executor::new(device, counters, slots, features, vring.wakeup()) {
        Ok(executor) => executor,
        Err(error) => {
            tracing::error!(queue_index, error = error_chain(&error), "queue cannot be served");
            return;
        }
    };
    let mut worker = Worker {
        device,
        counters,
        queue_index,
        vring,
        service: &service,
        ring: None,
        executor,
        chain: Chain::default(),
        data: Vec::new(),
    };
    let outcome = worker.run(features);
    let (next_avail, next_used) =
        worker.ring.map_or((parameters.next_avail, parameters.next_used), |ring| (ring.next_avail(), ring.next_used()));
    // Ends what the kernel still has, before the control thread may unmap memory.
    drop(worker.executor);
    if let Err(error) = outcome {
        tracing::error!(queue_index, error = error_chain(&error), "queue failed");
    }
    tracing::debug!(queue_index, next_avail, next_used, "ring stops");
    service.save_position(next_avail, next_used);
}

struct Worker<'a> {
    device: &'a Device,
    counters: &'a QueueCounters,
    queue_index: usize,
    vring: &'a QueueVring,
    service: &'a Service<'a>,
    /// None while parameters are wrong; see `broken`.
    ring: Option<Ring>,
    executor: Executor<'a>,
    chain: Chain,
    data: Vec<Segment>,
}

/// Whether the ring is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Intake {
    /// After the next event.
    Waiting,
    /// There may be heads to take right now.
    Ready,
    /// The driver broke the ring; only a restart helps.
    Broken,
}

impl Worker<'_> {
    fn run(&mut self, features: u64) -> Result<(), EngineError> {
        self.executor.engine.watch(Watch::Kick, self.service.kick.clone())?;
        self.executor.engine.watch(Watch::Wakeup, self.vring.wakeup().clone())?;
        let memory = self.vring.memory().memory();
        // Heads may have been made available before the ring started, and their kick may be gone.
        let mut intake = match Ring::new(&self.service.parameters, features, &memory) {
            Ok(ring) => {
                self.ring = Some(ring);
                Intake::Ready
            }
            Err(error) => self.break_ring(&error)?,
        };
        drop(memory);
        loop {
            let stopping = self.service.should_stop();
            if lost_memory::happened() && intake != Intake::Broken {
                intake = self.break_ring(&RingError::MemoryLost)?;
            }
            intake = self.return_requests(intake)?;
            if intake == Intake::Ready && !stopping {
                intake = self.take_requests()?;
                // Some are finished without any I/O.
                intake = self.return_requests(intake)?;
            }
            if stopping && self.executor.in_flight() == 0 {
                return self.executor.engine.close();
            }
            if intake == Intake::Ready && !stopping {
                self.executor.engine.do_not_block()?;
            }
            self.executor.engine.wait()?;
            intake = self.handle_completions(intake)?;
        }
    }

    fn handle_completions(&mut self, mut intake: Intake) -> Result<Intake, EngineError> {
        while let Some(completion) = self.executor.engine.next_completion()? {
            match completion {
                Completion::Request { head, transferred, result } => {
                    self.executor.complete(head, transferred, result)?;
                }
                Completion::Event(Watch::Kick) => {
                    self.counters.kicks.add(1);
                    if intake == Intake::Waiting {
                        intake = Intake::Ready;
                    }
                }
                Completion::Event(Watch::Wakeup) => self.follow_changes()?,
                Completion::WatchFailed(watch, error) => {
                    tracing::warn!(queue_index = self.queue_index, ?watch, %error, "event cannot be watched");
                }
            }
        }
        self.executor.advance_line()?;
        Ok(intake)
    }

    fn follow_changes(&mut self) -> Result<(), EngineError> {
        let changes = self.service.take_changes();
        if let Some(kick) = changes.kick {
            self.executor.engine.watch(Watch::Kick, kick)?;
        }
        if changes.signal {
            self.signal_driver()?;
        }
        Ok(())
    }

    /// Takes what is available now; at most a ring full, so that completions get their turn.
    fn take_requests(&mut self) -> Result<Intake, EngineError> {
        let memory = self.vring.memory().memory().into_inner();
        let Some(ring) = &mut self.ring else { return Ok(Intake::Broken) };
        let count = match ring.available(&memory) {
            Ok(count) => count,
            Err(error) => return self.break_ring(&error),
        };
        for _ in 0..count {
            if let Err(error) = self.take_request(&memory)? {
                return self.break_ring(&error);
            }
        }
        match self.ring.as_mut().map(|ring| ring.listen(&memory)) {
            Some(Ok(true)) => Ok(Intake::Ready),
            Some(Ok(false)) => Ok(Intake::Waiting),
            Some(Err(error)) => self.break_ring(&error),
            None => Ok(Intake::Broken),
        }
    }

    fn take_request(&mut self, memory: &Arc<DriverMemory>) -> Result<Result<(), RingError>, EngineError> {
        let Some(ring) = &mut self.ring else { return Ok(Ok(())) };
        let head = match ring.take(memory) {
            Ok(head) => head,
            Err(error) => return Ok(Err(error)),
        };
        if self.executor.is_in_flight(head) {
            return Ok(Err(RingError::DuplicateHead { head }));
        }
        let parsed = self
            .chain
            .walk(memory.as_ref(), ring.table(), head)
            .and_then(|()| Request::parse(memory.as_ref(), &mut self.chain, &mut self.data));
        match parsed {
            Ok(request) => self.executor.start(head, request, memory, &mut self.data).map(Ok),
            Err(source) => Ok(Err(RingError::Chain { head, source })),
        }
    }

    /// Puts what is finished into the used ring, and notifies the driver if it wants to be.
    fn return_requests(&mut self, intake: Intake) -> Result<Intake, EngineError> {
        let memory = self.vring.memory().memory();
        let mut returned = false;
        let mut outcome = Ok(());
        while let Some(finished) = self.executor.take_finished() {
            if let (Some(ring), Ok(())) = (&mut self.ring, &outcome) {
                outcome = ring.put_used(&memory, finished.head, finished.written_len);
                returned = true;
            }
        }
        let wants_signal = match (&mut self.ring, outcome) {
            (Some(ring), Ok(())) if returned => ring.wants_signal(&memory),
            (_, outcome) => outcome.map(|()| false),
        };
        match wants_signal {
            Ok(true) => self.signal_driver().map(|()| intake),
            Ok(false) => Ok(intake),
            Err(_) if intake == Intake::Broken => Ok(intake),
            Err(error) => self.break_ring(&error),
        }
    }

    fn signal_driver(&mut self) -> Result<(), EngineError> {
        let Some(call) = self.service.call() else { return Ok(()) };
        self.counters.calls.add(1);
        self.executor.engine.signal(Signal::Call, call)
    }

    /// The driver broke the rules: nothing more is taken until the ring is started anew (virtio 1.3, section 2.1.2). The
    /// front-end learns it by the err event; vhost-user has no message for it.
    fn break_ring(&mut self, error: &RingError) -> Result<Intake, EngineError> {
        self.counters.broken.add(1);
        if let Some(suppressed) = self.device.peer_log.admit(Instant::now()) {
            tracing::error!(queue_index = self.queue_index, error = error_chain(error), suppressed, "ring is broken");
        }
        if let Some(event) = self.service.error() {
            self.executor.engine.signal(Signal::Error, event)?;
        }
        Ok(Intake::Broken)
    }
}

/// An error and its causes in one line.
fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
