//! What all parts of a schedule share: chance, the memory files that there are, and how often something was done to anybody.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::{Rc, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, timeout};
use vvu_protocol::window::FileId;
use vvu_simulation::random::Random;
use vvu_socket::event::{self, Identity};

use super::appliance::Appliance;
use super::back_end::Kind;
use super::dirty_pages::DirtyPages;
use super::file::MappedFile;
use super::log;
use super::questions::Questions;

/// Queues of the device.
pub(crate) const QUEUES: u16 = 2;

/// Driver memory that the window is made for, in bytes.
pub(crate) const WINDOW_MEMORY: u64 = 32 << 20;

/// Identity of the device set.
pub(crate) const UUID: [u8; 16] = [7; 16];

/// Hesitations take up to this long, if they take time at all.
const MOMENT: Duration = Duration::from_micros(300);

/// How long a request may take.
const SERVICE_TIMES: [Duration; 4] =
    [Duration::ZERO, Duration::from_micros(100), Duration::from_millis(5), Duration::from_secs(2)];

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) random: Random,
    pub(crate) directory: PathBuf,
    pub(crate) kind: Kind,
    pub(crate) appliances: RefCell<Vec<Rc<Appliance>>>,
    /// What the front-end is doing.
    pub(crate) session: Cell<&'static str>,
    /// Nobody is disturbed any more: the front-end brings what it does to an end.
    pub(crate) rests: Cell<bool>,
    requests: Cell<u64>,
    /// Of a hundred steps of a simulated part, so many wait for others before they go on.
    pub(crate) hesitancy: u64,
    files: RefCell<BTreeMap<FileId, Weak<MappedFile>>>,
    disturbances: Cell<u64>,
    disturbed: Cell<Instant>,
    /// Number of vectors of the doorbell device.
    pub(crate) vectors: u16,
    /// Eventfds that an appliance was given, and which appliance that is.
    eventfds: RefCell<BTreeSet<(Identity, u32)>>,
    /// Eventfds that a front-end has made.
    front_end_eventfds: RefCell<BTreeSet<Identity>>,
    /// How often each request was executed by a back-end.
    executions: RefCell<BTreeMap<u64, u32>>,
    /// How often requests that had been taken from a ring were left to somebody else.
    losses: Cell<u64>,
    /// Number of changes of the device's configuration.
    pub(crate) config: Cell<u64>,
    pub(crate) dirty: DirtyPages,
    pub(crate) questions: Questions,
    /// Steps of simulated parts until the schedule steps in; 0 if it does not.
    steps: Cell<u64>,
    stepped: Notify,
}

impl World {
    pub(crate) fn new(seed: u64, directory: PathBuf) -> Rc<Self> {
        let random = Random::new(seed);
        let hesitancy = *random.one_of(&[0, 5, 20, 50]).unwrap();
        Rc::new(Self {
            kind: Kind {
                inflight: random.percent(70),
                acknowledges: random.percent(80),
                slots: random.percent(50),
                asks: random.percent(50),
                service_time: *random.one_of(&SERVICE_TIMES).unwrap(),
            },
            vectors: QUEUES + random.one_of(&[0, 1, 3, 10, 100]).unwrap(),
            random,
            directory,
            appliances: RefCell::default(),
            session: Cell::new("none"),
            rests: Cell::new(false),
            requests: Cell::new(0),
            hesitancy,
            files: RefCell::default(),
            disturbances: Cell::new(0),
            disturbed: Cell::new(Instant::now()),
            eventfds: RefCell::default(),
            front_end_eventfds: RefCell::default(),
            executions: RefCell::default(),
            losses: Cell::new(0),
            config: Cell::new(0),
            dirty: DirtyPages::default(),
            questions: Questions::default(),
            steps: Cell::new(0),
            stepped: Notify::new(),
        })
    }

    pub(crate) fn note(&self, text: impl AsRef<str>) {
        log::note(text.as_ref());
    }

    /// Something is done to a part that it has not asked for: what anybody waits for may take its full time again.
    pub(crate) fn disturb(&self, what: &str) {
        self.note(format!("# {what}"));
        self.disturbances.set(self.disturbances.get() + 1);
        self.disturbed.set(Instant::now());
    }

    pub(crate) fn disturbances(&self) -> u64 {
        self.disturbances.get()
    }

    /// When somebody was disturbed last.
    pub(crate) fn disturbed(&self) -> Instant {
        self.disturbed.get()
    }

    /// Waits until simulated parts have done so many steps. The one that does the last of them stays there until the
    /// schedule has done its next action.
    pub(crate) async fn steps(&self, count: u64, limit: Duration) {
        self.steps.set(count);
        let _ = timeout(limit, self.stepped.notified()).await;
        self.steps.set(0);
    }

    /// A step of a simulated part: lets others go on in between, now and then.
    pub(crate) async fn hesitate(&self) {
        let steps = self.steps.get();
        if steps > 0 {
            self.steps.set(steps - 1);
            if steps == 1 {
                self.stepped.notify_one();
                yield_now().await;
                return yield_now().await;
            }
        }
        if !self.random.percent(self.hesitancy) {
            return;
        }
        if self.random.percent(20) {
            sleep(self.random.time(MOMENT)).await;
        } else {
            for _ in 0..self.random.within(1..4) {
                yield_now().await;
            }
        }
    }

    /// A memory file that is known by its identity as long as it lives.
    pub(crate) fn file(&self, len: u64) -> Rc<MappedFile> {
        let file = Rc::new(MappedFile::new(len));
        self.files.borrow_mut().insert(file.id, Rc::downgrade(&file));
        file
    }

    pub(crate) fn known_file(&self, id: FileId) -> Option<Rc<MappedFile>> {
        self.files.borrow().get(&id)?.upgrade()
    }

    /// A front-end makes an eventfd. Any appliance may be given it.
    pub(crate) fn front_end_eventfd(&self) -> OwnedFd {
        let eventfd = event::create().unwrap();
        self.front_end_eventfds.borrow_mut().insert(event::identity(&eventfd).unwrap());
        eventfd
    }

    /// An appliance is given an eventfd.
    pub(crate) fn own_eventfd(&self, id: Identity, appliance: u32) {
        let mut given = self.eventfds.borrow_mut();
        let is_taken = given.iter().any(|(known, _)| *known == id) && !self.front_end_eventfds.borrow().contains(&id);
        assert!(!is_taken, "appliance {appliance} was given an eventfd that another one has");
        assert!(given.insert((id, appliance)), "appliance {appliance} was given an eventfd that it has");
    }

    /// Whether several appliances have an eventfd.
    pub(crate) fn is_shared(&self, id: Identity) -> bool {
        self.eventfds.borrow().iter().filter(|(known, _)| *known == id).count() > 1
    }

    /// An eventfd was taken from an appliance.
    pub(crate) fn disown_eventfd(&self, id: Identity, appliance: u32) {
        self.eventfds.borrow_mut().remove(&(id, appliance));
    }

    /// An appliance is gone, with all its eventfds.
    pub(crate) fn forget_eventfds(&self, appliance: u32) {
        self.eventfds.borrow_mut().retain(|(_, owner)| *owner != appliance);
    }

    /// A number for the next request of a driver.
    pub(crate) fn next_request(&self) -> u64 {
        self.requests.set(self.requests.get() + 1);
        self.requests.get()
    }

    /// Requests so far.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.get()
    }

    /// Appliances whose VMM lives.
    pub(crate) fn living(&self) -> Vec<Rc<Appliance>> {
        self.appliances.borrow().iter().filter(|appliance| appliance.is_alive()).cloned().collect()
    }

    /// The appliance that serves the front-end, as far as guests know.
    pub(crate) fn serving(&self) -> Option<Rc<Appliance>> {
        self.living()
            .into_iter()
            .filter(|appliance| appliance.session().is_some())
            .max_by_key(|appliance| appliance.session())
    }

    /// Whether this appliance is the one that serves the front-end, and will notice what becomes of its back-end.
    pub(crate) fn is_served_by(&self, number: u32) -> bool {
        self.serving().is_some_and(|appliance| appliance.number == number && !appliance.hung.get())
    }

    pub(crate) fn executed(&self, id: u64) {
        *self.executions.borrow_mut().entry(id).or_default() += 1;
    }

    pub(crate) fn executions(&self, id: u64) -> u32 {
        self.executions.borrow().get(&id).copied().unwrap_or(0)
    }

    pub(crate) fn executions_lost(&self) {
        self.losses.set(self.losses.get() + 1);
    }

    pub(crate) fn losses(&self) -> u64 {
        self.losses.get()
    }
}
