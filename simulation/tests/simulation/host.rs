//! Where a back-end's process runs: it is started, connected to, and may die. In the place of the agent's supervisor, which
//! does the same to processes of the kernel.

use std::cell::{Cell, RefCell};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{Instant, sleep, timeout};
use vvu_agent::back_end::BackEndLink;
use vvu_agent::restarts::RestartLimit;
use vvu_agent::supervisor::{GaveUp, Supervise};
use vvu_protocol::message::FrontEndRequest;
use vvu_socket::MessageSocket;

use super::back_end::{self, BackEnd};
use super::vmm::Vmm;
use super::world::World;

/// As the agent's supervisor has them.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
const EXIT_GRACE: Duration = Duration::from_millis(250);

/// A process may take up to this long to listen.
const START: Duration = Duration::from_millis(50);

/// A process, as long as it lives.
#[derive(Debug)]
struct Process {
    connections: mpsc::UnboundedSender<UnixStream>,
    back_end: Rc<BackEnd>,
    lives: watch::Receiver<bool>,
    task: AbortHandle,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Process {
    fn is_alive(&self) -> bool {
        *self.lives.borrow()
    }
}

/// The back-end of one appliance.
#[derive(Debug)]
pub(crate) struct BackEndHost {
    number: u32,
    world: Rc<World>,
    process: RefCell<Option<Process>>,
    frozen: Cell<bool>,
    given_up: Cell<bool>,
}

impl BackEndHost {
    pub(crate) fn new(number: u32, world: &Rc<World>) -> Rc<Self> {
        Rc::new(Self {
            number,
            world: Rc::clone(world),
            process: RefCell::default(),
            frozen: Cell::new(false),
            given_up: Cell::new(false),
        })
    }

    /// What the agent's `main` makes after each boot.
    pub(crate) fn supervisor(self: &Rc<Self>, vmm: &Rc<Vmm>) -> SimulatedSupervisor {
        self.frozen.set(false);
        self.given_up.set(false);
        SimulatedSupervisor { host: Rc::clone(self), vmm: Rc::clone(vmm), restarts: RestartLimit::default() }
    }

    /// The process dies.
    pub(crate) fn kill(&self) {
        if let Some(process) = self.process.take() {
            process.back_end.die();
        }
    }

    /// Nobody looks after the process any more.
    pub(crate) fn freeze_supervisor(&self) {
        self.frozen.set(true);
        if let Some(process) = &*self.process.borrow() {
            process.back_end.orphan();
        }
    }

    pub(crate) fn is_given_up(&self) -> bool {
        self.given_up.get()
    }

    /// The back-end, if its process lives.
    pub(crate) fn back_end(&self) -> Option<Rc<BackEnd>> {
        let process = self.process.borrow();
        process.as_ref().filter(|process| process.is_alive()).map(|process| Rc::clone(&process.back_end))
    }

    fn start(&self, vmm: &Rc<Vmm>) {
        let back_end = BackEnd::new(self.number, &self.world, vmm);
        let (connections, accepted) = mpsc::unbounded_channel();
        let (life, lives) = watch::channel(true);
        let (served, died) = (Rc::clone(&back_end), Rc::clone(&back_end));
        let task = spawn_local(async move {
            tokio::select! {
                // Who is killed does nothing more.
                biased;
                () = died.death() => {}
                () = back_end::serve(served, accepted) => {}
            }
            life.send_replace(false);
        });
        self.world.note(format!("appliance {}: back-end starts", self.number));
        self.process.replace(Some(Process { connections, back_end, lives, task: task.abort_handle() }));
    }
}

/// In the place of [`vvu_agent::supervisor::Supervisor`].
#[derive(Debug)]
pub(crate) struct SimulatedSupervisor {
    host: Rc<BackEndHost>,
    vmm: Rc<Vmm>,
    restarts: RestartLimit,
}

/// Why a back-end is not ready.
enum NotReady {
    Ended,
    NoAnswer,
}

impl SimulatedSupervisor {
    async fn try_ready(&mut self) -> Result<BackEndLink, NotReady> {
        let world = &self.host.world;
        if self.host.back_end().is_none() {
            sleep(world.random.time(START)).await;
            self.host.start(&self.vmm);
        }
        let mut dead = self.death();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connected =
            self.host.process.borrow().as_ref().is_some_and(|process| process.connections.send(theirs).is_ok());
        if !connected {
            return Err(NotReady::Ended);
        }
        let mut link = BackEndLink::new(MessageSocket::new(ours).unwrap());
        tokio::select! {
            answer = timeout(READY_TIMEOUT, link.request(FrontEndRequest::GetFeatures)) => match answer {
                Ok(Ok(_)) => Ok(link),
                Ok(Err(_)) => Err(NotReady::Ended),
                Err(_) => Err(NotReady::NoAnswer),
            },
            _ = dead.wait_for(|lives| !lives) => Err(NotReady::Ended),
        }
    }

    /// Shows the end of the process.
    fn death(&self) -> watch::Receiver<bool> {
        let process = self.host.process.borrow();
        process.as_ref().map_or_else(|| watch::channel(false).1, |process| process.lives.clone())
    }

    fn failed(&mut self) {
        if !self.restarts.may_restart(Instant::now().into_std()) {
            self.host.given_up.set(true);
            self.host.world.disturb(&format!("appliance {}: its back-end has failed too often", self.host.number));
        }
    }
}

impl Supervise for SimulatedSupervisor {
    async fn ready(&mut self) -> Result<BackEndLink, GaveUp> {
        while !self.host.given_up.get() {
            match self.try_ready().await {
                Ok(link) => return Ok(link),
                Err(NotReady::Ended | NotReady::NoAnswer) => self.end().await,
            }
        }
        Err(GaveUp { last: "failed".to_owned() })
    }

    async fn lost(&mut self) {
        let mut dead = self.death();
        if timeout(EXIT_GRACE, dead.wait_for(|lives| !lives)).await.is_ok() {
            self.host.process.take();
        }
        self.failed();
    }

    async fn end(&mut self) {
        self.host.kill();
        self.failed();
    }
}
