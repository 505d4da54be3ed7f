//! The thread of one queue while its ring is in service: takes requests from the ring, has them carried out, returns them,
//! and gives the ring back when it is stopped, with nothing in flight.
//!
//! All that is there is taken and goes to the kernel in one system call; all that is done by then is returned at once, with
//! one signal at the most. When the ring is empty, the thread looks at it and at its completions for a while before it asks the
//! driver to notify ([`Polling`]). Whoever asks for a notification looks once more after that: what the driver
//! has made available before it saw the wish, it does not notify of.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vvu_back_end::polling::{Look, PollMode, Polling};
use vvu_back_end::{Chain, Ring, RingError, Segment, Service, total_len};

use crate::config_space::SEG_MAX;
use crate::counters::QueueCounters;
use crate::device::{Device, MAX_QUEUE_SIZE};
use crate::engine::{Completion, EngineError, Signal, Watch};
use crate::execution::Executor;
use crate::request::{Request, RequestError};

/// Longest indirect chain when the queue itself is smaller: header, segments and status.
const MAX_INDIRECT_CHAIN: u16 = SEG_MAX + 2;

/// Serves a ring until it is stopped.
pub(crate) fn serve(device: &Device, service: &Service<'_>) {
    let queue_index = service.index();
    let Some(counters) = device.counters.queue(usize::from(queue_index)) else { return };
    counters.starts.add(1);
    tracing::debug!(queue_index, size = service.size(), features = ?service.features(), "ring starts");
    // Until the last of its requests is done.
    let _in_use = device.formatted.as_ref().map(|pool| pool.disk().enter());
    let slots = service.size().min(MAX_QUEUE_SIZE);
    let executor = match Executor::new(device, counters, slots, service.features().bits(), service.wakeup()) {
        Ok(executor) => executor,
        Err(error) => {
            tracing::error!(queue_index, error = vvu_back_end::in_one_line(&error), "queue cannot be served");
            return;
        }
    };
    let mut worker = Worker {
        device,
        counters,
        service,
        ring: None,
        executor,
        chain: Chain::new(MAX_INDIRECT_CHAIN),
        data: Vec::new(),
        pauses: false,
        // What a back-end before has returned.
        unpublished: true,
        polling: [(); 2].map(|()| Polling::new(device.threads.polling())),
    };
    let outcome = worker.run();
    if let Some(ring) = &worker.ring {
        tracing::debug!(queue_index, next_avail = ring.next_avail(), "ring stops");
        service.save_position(ring);
    }
    // Ends what the kernel still has, before the control thread may unmap memory.
    drop(worker);
    if let Err(error) = outcome {
        tracing::error!(queue_index, error = vvu_back_end::in_one_line(&error), "queue failed");
    }
}

/// Why a ring breaks.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("chain of head {head}")]
    Request { head: u16, source: RequestError },
    #[error("driver memory was taken away under the device")]
    MemoryLost,
}

struct Worker<'a> {
    device: &'a Device,
    counters: &'a QueueCounters,
    service: &'a Service<'a>,
    /// None until it could be opened.
    ring: Option<Ring>,
    executor: Executor<'a>,
    chain: Chain,
    data: Vec<Segment>,
    /// Something of the ring or of its next request has to be waited for.
    pauses: bool,
    /// The driver may not have seen all that was returned, or not have been told of it.
    unpublished: bool,
    /// How long the thread looks for something to do: while nothing is in flight, and while something is. The driver's pace
    /// says nothing of the storage's.
    polling: [Polling; 2],
}

/// Looks between two looks at the clock. The CPU is not yielded in between: who gets it may keep it for much longer than the
/// window.
const LOOKS: u32 = 32;

/// Whether the ring is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Intake {
    /// After the next event: the driver notifies.
    Waiting,
    /// All that was there is taken, and the driver does not notify.
    Drained,
    /// There may be heads to take right now.
    Ready,
    /// At this time: the rate limit has to give something first.
    Throttled(Instant),
    /// After the next wakeup: the front-end has to give something first.
    Paused,
    /// The driver broke the ring; only a restart helps.
    Broken,
}

impl Intake {
    /// How long an event is waited for at the most.
    fn time_left(self) -> Option<Duration> {
        match self {
            Self::Throttled(time) => Some(time.saturating_duration_since(Instant::now())),
            _ => None,
        }
    }

    /// What it is when its time has come.
    fn at_its_time(self) -> Self {
        if self.time_left() == Some(Duration::ZERO) { Self::Ready } else { self }
    }
}

/// Whether a request was taken from the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taken {
    Yes,
    /// It is worth trying again at this time.
    Later(Instant),
}

impl Worker<'_> {
    fn run(&mut self) -> Result<(), EngineError> {
        self.executor.engine.watch(Watch::Kick, self.service.kick().clone())?;
        self.executor.engine.watch(Watch::Wakeup, self.service.wakeup().clone())?;
        // Heads may have been made available before the ring started, and their kick may be gone.
        let mut intake = Intake::Ready;
        loop {
            let stopping = self.service.should_stop();
            if self.device.lost_memory() && intake != Intake::Broken {
                intake = self.break_ring(&Fault::MemoryLost)?;
            }
            intake = self.place_ring(intake)?;
            intake = self.return_requests(intake, stopping)?;
            if intake == Intake::Ready && !stopping {
                intake = self.take_requests()?;
                // Some are finished without any I/O.
                intake = self.return_requests(intake, stopping)?;
            }
            if stopping && self.executor.in_flight() == 0 {
                return self.executor.engine.close();
            }
            if intake == Intake::Drained && !stopping {
                intake = self.look_for_work()?;
            }
            if intake == Intake::Ready && !stopping {
                self.executor.engine.submit()?;
            } else {
                self.executor.engine.wait(intake.time_left())?;
            }
            self.end_idle_time();
            intake = self.handle_completions(intake.at_its_time())?;
        }
    }

    /// Opens the ring if that is to be done, and lets it follow what has changed around it.
    fn place_ring(&mut self, intake: Intake) -> Result<Intake, EngineError> {
        let outcome = match (&mut self.ring, intake) {
            // What is in flight is returned if it can be.
            (Some(ring), Intake::Broken) => ring.place().or(Ok(())),
            (Some(ring), _) => ring.place(),
            (None, Intake::Ready) => self.service.open_ring().map(|ring| self.ring = Some(ring)),
            (None, _) => Ok(()),
        };
        outcome.map_or_else(|error| self.pause_or_break(error), |()| Ok(intake))
    }

    /// Looks for something to do, as long as that is worth it; then has the driver notify.
    fn look_for_work(&mut self) -> Result<Intake, EngineError> {
        let until = match self.polling().map(|polling| polling.begin(Instant::now())) {
            None | Some(Look::Not) => return self.listen(),
            Some(Look::Until(until)) => Some(until),
            Some(Look::Endlessly) => None,
        };
        self.executor.engine.submit()?;
        loop {
            for _ in 0..LOOKS {
                if self.executor.engine.has_events() {
                    return Ok(Intake::Ready);
                }
                match self.ring.as_ref().map(Ring::has_heads) {
                    Some(Ok(false)) => std::hint::spin_loop(),
                    // What is wrong with the ring shows when it is used.
                    Some(Ok(true) | Err(_)) | None => return Ok(Intake::Ready),
                }
            }
            if self.device.lost_memory() {
                return Ok(Intake::Ready);
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return self.listen();
            }
        }
    }

    /// That of the moment, unless the thread is never to look by itself.
    fn polling(&mut self) -> Option<&mut Polling> {
        let is_in_flight = usize::from(self.executor.in_flight() > 0);
        self.polling.get_mut(is_in_flight).filter(|polling| polling.mode() != PollMode::Off)
    }

    fn end_idle_time(&mut self) {
        for polling in self.polling.iter_mut().filter(|polling| polling.is_idle()) {
            polling.end(Instant::now());
        }
    }

    /// Has the driver notify of what comes.
    fn listen(&mut self) -> Result<Intake, EngineError> {
        match self.ring.as_mut().map(Ring::listen) {
            Some(Ok(true)) => Ok(Intake::Ready),
            Some(Ok(false)) | None => Ok(Intake::Waiting),
            Some(Err(error)) => self.pause_or_break(error),
        }
    }

    fn handle_completions(&mut self, mut intake: Intake) -> Result<Intake, EngineError> {
        while let Some(completion) = self.executor.engine.next_completion()? {
            match completion {
                Completion::Request { head, transferred, result } => {
                    self.executor.complete(head, transferred, result)?;
                    if intake == Intake::Waiting && self.device.threads.poll != PollMode::Off {
                        // The next request may be near.
                        intake = Intake::Ready;
                    }
                }
                Completion::Event(Watch::Kick) => {
                    self.counters.kicks.add(1);
                    if intake == Intake::Waiting {
                        intake = Intake::Ready;
                    }
                }
                Completion::Event(Watch::Wakeup) => {
                    self.follow_changes()?;
                    if intake == Intake::Paused {
                        intake = Intake::Ready;
                    }
                }
                Completion::WatchFailed(watch, error) => {
                    tracing::warn!(queue_index = self.service.index(), ?watch, %error, "event cannot be watched");
                }
            }
        }
        self.executor.complete_jobs()?;
        self.executor.advance_line()?;
        Ok(intake)
    }

    fn follow_changes(&mut self) -> Result<(), EngineError> {
        let changes = self.service.update(self.ring.as_mut());
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
        let Some(ring) = &mut self.ring else { return Ok(Intake::Paused) };
        let count = match ring.available() {
            Ok(count) => count,
            Err(error) => return self.pause_or_break(error),
        };
        self.executor.engine.expect(count);
        let (mut throttled, mut intake) = (None, Intake::Drained);
        for _ in 0..count {
            if self.executor.engine.has_enough() {
                intake = Intake::Ready;
                break;
            }
            match self.take_request()? {
                Ok(Taken::Yes) => {}
                Ok(Taken::Later(time)) => {
                    throttled = Some(time);
                    break;
                }
                Err(Fault::Ring(error)) => return self.pause_or_break(error),
                Err(fault) => return self.break_ring(&fault),
            }
        }
        if std::mem::take(&mut self.pauses) {
            self.service.resume();
        }
        if let Some(time) = throttled {
            self.counters.throttled.add(1);
            return Ok(Intake::Throttled(time));
        }
        Ok(intake)
    }

    /// Takes the next request, if the rate limit admits it; if not, it stays in the ring.
    fn take_request(&mut self) -> Result<Result<Taken, Fault>, EngineError> {
        let Some(ring) = &mut self.ring else { return Ok(Ok(Taken::Yes)) };
        let head = match ring.peek() {
            Ok(head) => head,
            Err(error) => return Ok(Err(error.into())),
        };
        if let Err(error) = ring.walk(head, &mut self.chain) {
            return Ok(Err(error.into()));
        }
        let memory = ring.view().memory();
        match Request::parse(memory.as_ref(), &mut self.chain, &mut self.data) {
            Ok(request) => {
                if self.device.rate_limit.is_limited()
                    && let Err(time) = self.device.rate_limit.take(1, total_len(&self.data), Instant::now())
                {
                    return Ok(Ok(Taken::Later(time)));
                }
                let memory = Arc::clone(memory);
                ring.take(head);
                self.executor.start(head, request, &memory, &mut self.data).map(|()| Ok(Taken::Yes))
            }
            Err(source) => Ok(Err(Fault::Request { head, source })),
        }
    }

    /// Puts what is finished into the used ring, and notifies the driver if it wants to be.
    fn return_requests(&mut self, intake: Intake, stopping: bool) -> Result<Intake, EngineError> {
        if !self.unpublished && !self.executor.has_finished() {
            return Ok(intake);
        }
        let Some(ring) = &mut self.ring else { return Ok(intake) };
        if !ring.is_placed() && !stopping && intake != Intake::Broken {
            // Until the ring has a place again.
            return Ok(intake);
        }
        let mut outcome = Ok(());
        self.unpublished = true;
        while let Some(finished) = self.executor.take_finished() {
            if outcome.is_ok() && ring.is_placed() {
                let data = if finished.writes_data { self.executor.data(finished.head) } else { &[] };
                data.iter().for_each(|segment| ring.view().mark_written(*segment));
                ring.view().mark_written(finished.status);
                outcome = ring.put_used(finished.head, finished.written_len);
            }
        }
        if !ring.is_placed() {
            return Ok(intake);
        }
        let published = outcome.and_then(|()| ring.publish());
        self.unpublished = published.is_err();
        match published {
            Ok(true) => self.signal_driver().map(|()| intake),
            Ok(false) => Ok(intake),
            Err(_) if intake == Intake::Broken => Ok(intake),
            Err(error) => self.pause_or_break(error),
        }
    }

    fn signal_driver(&mut self) -> Result<(), EngineError> {
        let Some(call) = self.service.call() else { return Ok(()) };
        self.counters.calls.add(1);
        self.executor.engine.signal(Signal::Call, call)
    }

    /// The ring waits, if it is for the front-end to give something; else it is broken.
    fn pause_or_break(&mut self, error: RingError) -> Result<Intake, EngineError> {
        let outcome = match error.pause() {
            Some(pause) => self.service.pause(pause),
            None => Err(error),
        };
        match outcome {
            Ok(()) => {
                self.pauses = true;
                Ok(Intake::Paused)
            }
            Err(error) => self.break_ring(&error.into()),
        }
    }

    /// The driver broke the rules: nothing more is taken until the ring is started anew (virtio 1.3, section 2.1.2). The
    /// front-end learns it by the err event; vhost-user has no message for it.
    fn break_ring(&mut self, fault: &Fault) -> Result<Intake, EngineError> {
        self.counters.broken.add(1);
        if let Some(suppressed) = self.device.peer_log.admit(Instant::now()) {
            let queue_index = self.service.index();
            tracing::error!(queue_index, error = vvu_back_end::in_one_line(fault), suppressed, "ring is broken");
        }
        if let Some(event) = self.service.error() {
            self.executor.engine.signal(Signal::Error, event)?;
        }
        Ok(Intake::Broken)
    }
}
