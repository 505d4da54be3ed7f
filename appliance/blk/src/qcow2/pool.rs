//! The threads that carry out requests, and how a ring hands them over and gets them back.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vvu_back_end::wakeup::Wakeup;

use super::disk::{Job, Qcow2Disk};
use super::transfer::Moved;

/// Requests of a device that are carried out at a time.
const THREADS: usize = 8;

/// A disk, and the threads that work on it.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    disk: Qcow2Disk,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// No more than the rings have entries.
    tasks: VecDeque<Task>,
    ended: bool,
}

#[derive(Debug)]
struct Task {
    head: u16,
    job: Job,
    returns: Arc<Returns>,
}

/// Where the requests of one ring come back.
#[derive(Debug)]
struct Returns {
    state: Mutex<ReturnState>,
    /// Fires when the last request has come back.
    idle: Condvar,
    wakeup: Arc<Wakeup>,
}

#[derive(Debug, Default)]
struct ReturnState {
    done: Vec<Done>,
    running: usize,
}

/// A request that was carried out.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) head: u16,
    pub(crate) result: io::Result<Moved>,
}

impl Pool {
    /// Starts the threads.
    pub(crate) fn new(disk: Qcow2Disk) -> io::Result<Self> {
        let shared = Arc::new(Shared { disk, queue: Mutex::default(), changed: Condvar::new() });
        let mut pool = Self { shared, threads: Vec::new() };
        for index in 0..THREADS {
            let shared = Arc::clone(&pool.shared);
            let builder = std::thread::Builder::new().name(format!("qcow2-{index}"));
            pool.threads.push(builder.spawn(move || shared.work())?);
        }
        Ok(pool)
    }

    pub(crate) fn disk(&self) -> &Qcow2Disk {
        &self.shared.disk
    }

    /// For the requests of a ring. `wakeup` fires when some have come back.
    pub(crate) fn connect(&self, wakeup: &Arc<Wakeup>) -> RingJobs<'_> {
        let returns = Returns { state: Mutex::default(), idle: Condvar::new(), wakeup: Arc::clone(wakeup) };
        RingJobs { shared: &self.shared, returns: Arc::new(returns) }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the disk has failed");
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut buffer = None;
        while let Some(Task { head, job, returns }) = self.next() {
            let result = self.disk.carry_out(&job, &mut buffer);
            // Memory is let go of before the request comes back.
            drop(job);
            returns.put(Done { head, result });
        }
    }

    fn next(&self) -> Option<Task> {
        let mut queue = self.lock();
        loop {
            if let Some(task) = queue.tasks.pop_front() {
                return Some(task);
            }
            if queue.ended {
                return None;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Returns {
    fn lock(&self) -> MutexGuard<'_, ReturnState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, done: Done) {
        let mut state = self.lock();
        state.done.push(done);
        state.running = state.running.saturating_sub(1);
        if state.running == 0 {
            self.idle.notify_all();
        }
        drop(state);
        self.wakeup.wake();
    }
}

/// The requests of one ring. When it is dropped, none is carried out any more.
#[derive(Debug)]
pub(crate) struct RingJobs<'a> {
    shared: &'a Shared,
    returns: Arc<Returns>,
}

impl RingJobs<'_> {
    /// Has a request carried out. Requests overtake each other.
    pub(crate) fn submit(&self, head: u16, job: Job) {
        self.returns.lock().running += 1;
        self.shared.lock().tasks.push_back(Task { head, job, returns: Arc::clone(&self.returns) });
        self.shared.changed.notify_one();
    }

    /// Takes what has come back.
    pub(crate) fn take_done(&self) -> Vec<Done> {
        std::mem::take(&mut self.returns.lock().done)
    }
}

impl Drop for RingJobs<'_> {
    fn drop(&mut self) {
        let mut state = self.returns.lock();
        while state.running > 0 {
            state = self.returns.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
