//! A schedule: who is disturbed when, and how far the others get in between. All of it follows from a seed.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use clap::Parser;
use tokio::task::{JoinHandle, LocalSet, spawn_local, yield_now};
use tokio::time::{Instant, sleep, timeout};
use vvu_protocol::message::Inflight;
use vvu_simulation::coverage::Coverage;

use super::appliance::Appliance;
use super::front_end::{Ended, FrontEnd, Profile};
use super::machine::Machine;
use super::world::{QUEUES, UUID, WINDOW_MEMORY, World};
use super::{checks, log};

/// How long everything may take to come to rest.
const REST: Duration = Duration::from_secs(600);

/// How long a change is waited for.
const CHANGE: Duration = Duration::from_secs(4);

/// Steps of simulated parts that are counted to the next disturbance, most of all, and how long they are waited for.
const STEPS: u64 = 300;
const STEPS_TIME: Duration = Duration::from_secs(2);

/// How long a back-end may be stuck. The agent gives it 30 s for an answer.
const STUCK: std::ops::Range<u64> = 20..100;

/// Appliances that live at the same time, at most.
const APPLIANCES_MAX: usize = 3;

/// What a schedule has come to.
#[derive(Debug, Default)]
pub(crate) struct Played {
    pub(crate) coverage: Coverage,
    pub(crate) actions: u64,
    pub(crate) requests: u64,
    pub(crate) failure: Option<String>,
}

/// What may be done to anybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    StartAppliance,
    KillAppliance,
    RebootAppliance,
    HangAgent,
    KillBackEnd,
    StickBackEnd,
    Connect,
    Vanish,
    Intrude,
    Yield,
    Change,
    Steps,
    Moment,
    Seconds,
}

impl Action {
    const fn name(self) -> &'static str {
        match self {
            Self::StartAppliance => "start an appliance",
            Self::KillAppliance => "kill an appliance",
            Self::RebootAppliance => "reboot an appliance",
            Self::HangAgent => "hang an agent",
            Self::KillBackEnd => "kill a back-end",
            Self::StickBackEnd => "stop a back-end for a time",
            Self::Connect => "connect a front-end",
            Self::Vanish => "kill the front-end",
            Self::Intrude => "connect a second front-end",
            Self::Yield => "yield",
            Self::Change => "until the bridge's life changes",
            Self::Steps => "some steps",
            Self::Moment => "a moment",
            Self::Seconds => "seconds",
        }
    }
}

/// What takes something away from somebody.
const DISTURBANCES: [Action; 8] = [
    Action::StartAppliance,
    Action::KillAppliance,
    Action::RebootAppliance,
    Action::HangAgent,
    Action::KillBackEnd,
    Action::StickBackEnd,
    Action::Vanish,
    Action::Intrude,
];

/// Which actions a schedule may have, and how often: each schedule has its own mixture.
fn mixture(world: &World) -> Vec<Action> {
    let mut mixture = vec![Action::Connect; 3];
    for action in DISTURBANCES {
        let most = if matches!(action, Action::HangAgent | Action::StickBackEnd) { 1 } else { 3 };
        let count = if world.random.percent(50) { world.random.below(most + 1) } else { 0 };
        mixture.extend(vec![action; count]);
    }
    for pace in [Action::Yield, Action::Change, Action::Steps, Action::Moment, Action::Seconds] {
        mixture.extend(vec![pace; world.random.below(6)]);
    }
    mixture
}

/// The front-end's process, while it lives.
struct Client {
    machine: Rc<Machine>,
    profile: Profile,
    /// The buffer that its successor may go on with.
    inflight: Rc<RefCell<Option<(Inflight, OwnedFd)>>>,
    task: JoinHandle<()>,
}

/// A machine, what its front-end was, and the buffer of its requests in flight, if it had one.
type Abandoned = (Rc<Machine>, Profile, Option<(Inflight, OwnedFd)>);

struct Player {
    world: Rc<World>,
    connecting: Rc<tokio::sync::Mutex<()>>,
    appliances: u32,
    client: Option<Client>,
    /// A machine whose front-end is gone, and which another one may serve.
    abandoned: Option<Abandoned>,
    coverage: Coverage,
    bridge: JoinHandle<anyhow::Result<()>>,
}

/// Plays the schedule of a seed, with so many actions.
pub(crate) fn play(seed: u64, actions: u64, script: &[Action]) -> Played {
    let directory = tempfile::tempdir().unwrap();
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().start_paused(true);
    #[cfg(tokio_unstable)]
    builder.rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()));
    let runtime = builder.build().unwrap();
    let _subscribed = tracing::subscriber::set_default(log::Lines);
    let local = LocalSet::new();
    let mut played = local.block_on(&runtime, async {
        log::begin();
        let world = World::new(seed, directory.path().to_owned());
        let mut player = Player::new(world);
        player.run(actions, script).await;
        player.end().await
    });
    drop(local);
    drop(runtime);
    played.failure = log::failure();
    played
}

fn options(world: &World) -> vvu_bridge::cli::Options {
    let directory = &world.directory;
    let uuid = UUID.map(|byte| format!("{byte:02x}")).concat();
    let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    let mut arguments = vec![
        "vvu-bridge".to_owned(),
        format!("--socket-path={}", path("front-end.sock")),
        format!("--appliance-dir={}", path("")),
        format!("--uuid={uuid}"),
        format!("--queues={QUEUES}"),
        format!("--vectors={}", world.vectors),
        format!("--window={WINDOW_MEMORY}"),
    ];
    if world.random.percent(15) {
        arguments.push("--relay".to_owned());
    }
    vvu_bridge::cli::Options::parse_from(arguments)
}

impl Player {
    fn new(world: Rc<World>) -> Self {
        let bridge = spawn_local(vvu_bridge::bridge::serve(options(&world)));
        Self {
            world,
            connecting: Rc::default(),
            appliances: 0,
            client: None,
            abandoned: None,
            coverage: Coverage::default(),
            bridge,
        }
    }

    async fn run(&mut self, actions: u64, script: &[Action]) {
        sleep(Duration::from_millis(1)).await;
        let mixture = mixture(&self.world);
        let disturbances: Vec<_> = mixture.iter().filter(|action| DISTURBANCES.contains(action)).copied().collect();
        self.perform(Action::StartAppliance).await;
        let mut last = Action::StartAppliance;
        for count in 0..actions {
            let scripted = usize::try_from(count).ok().and_then(|count| script.get(count));
            if scripted.is_none() && !script.is_empty() {
                break;
            }
            // Steps are counted to hit somebody in the middle of something.
            let likely = if last == Action::Steps { &disturbances } else { &mixture };
            let action = scripted.or_else(|| self.world.random.one_of(likely)).copied().unwrap_or(Action::Moment);
            self.perform(action).await;
            last = action;
            if self.has_failed() {
                return;
            }
        }
        self.rest().await;
    }

    fn has_failed(&self) -> bool {
        let ended = self.bridge.is_finished();
        if ended && log::failure().is_none() {
            log::note("the bridge has ended");
        }
        ended || log::failure().is_some()
    }

    async fn perform(&mut self, action: Action) {
        let (life, _) = log::life();
        self.coverage.note(&life, self.world.session.get(), action.name());
        match action {
            Action::StartAppliance => self.start_appliance(),
            Action::KillAppliance => self.with_appliance(|appliance| {
                appliance.world().disturb(&format!("appliance {} is killed", appliance.number));
                appliance.kill();
            }),
            Action::RebootAppliance => self.with_appliance(Appliance::reboot),
            Action::HangAgent => self.with_appliance(|appliance| appliance.hang()),
            Action::KillBackEnd => self.with_appliance(|appliance| {
                appliance.world().disturb(&format!("the back-end of appliance {} is killed", appliance.number));
                appliance.back_end.kill();
            }),
            Action::StickBackEnd => self.with_appliance(|appliance| {
                let world = appliance.world();
                world.disturb(&format!("the back-end of appliance {} is stuck", appliance.number));
                if let Some(back_end) = appliance.back_end.back_end() {
                    back_end.stick(Duration::from_secs(world.random.within(STUCK)));
                }
            }),
            Action::Connect => self.connect(),
            Action::Vanish => self.vanish(),
            Action::Intrude => self.intrude(),
            Action::Yield => {
                for _ in 0..self.world.random.within(1..60) {
                    yield_now().await;
                }
            }
            // So that what comes next hits a state that lasts for no more than a moment.
            Action::Change => drop(timeout(CHANGE, log::life_changes()).await),
            Action::Steps => self.world.steps(self.world.random.within(1..STEPS), STEPS_TIME).await,
            Action::Moment => sleep(self.world.random.time(Duration::from_millis(20))).await,
            Action::Seconds => sleep(self.world.random.time(Duration::from_secs(20))).await,
        }
    }

    fn start_appliance(&mut self) {
        if self.world.living().len() < APPLIANCES_MAX {
            self.appliances += 1;
            let appliance = Appliance::start(self.appliances, &self.world, &self.connecting);
            let mut all = self.world.appliances.borrow_mut();
            all.retain(|appliance| appliance.is_alive());
            all.push(appliance);
        }
    }

    fn with_appliance(&self, act: impl FnOnce(&Rc<Appliance>)) {
        if let Some(appliance) = self.world.random.one_of(&self.world.living()) {
            act(appliance);
        }
    }

    /// A front-end starts, if there is none: of a new driver VM, or of one whose front-end was lost.
    fn connect(&mut self) {
        if self.client.as_ref().is_some_and(|client| !client.task.is_finished()) {
            return;
        }
        let world = &self.world;
        let (machine, profile, inflight) = match self.abandoned.take() {
            Some(abandoned) if world.random.percent(70) => abandoned,
            _ => (Machine::new(world), Profile::new(world), None),
        };
        let again = !machine.is_idle() || world.requests() > 0;
        let kept = Rc::new(RefCell::new(None));
        world.note("# a front-end starts");
        let (world, machine_, kept_) = (Rc::clone(world), Rc::clone(&machine), Rc::clone(&kept));
        let task = spawn_local(async move {
            let mut front_end = FrontEnd::connect(&world, &machine_, profile, inflight).await;
            if again {
                front_end.resume_at_used();
            }
            let lived = live(&world, &mut front_end, &kept_).await;
            lived.expect("the bridge has ended the session");
            drop(front_end);
            world.dirty.forget();
            world.session.set("none");
        });
        self.client = Some(Client { machine, profile, inflight: kept, task });
    }

    /// The front-end's process is killed, in whatever it is doing.
    fn vanish(&mut self) {
        let Some(client) = self.client.take() else { return };
        let unfinished = !client.task.is_finished();
        client.task.abort();
        self.world.session.set("none");
        self.world.dirty.forget();
        self.world.disturb("the front-end is killed");
        // Without a buffer of the front-end's, nobody knows what was in flight.
        let inflight = client.inflight.take();
        if unfinished && (inflight.is_some() || !self.world.kind.inflight || client.machine.is_idle()) {
            self.abandoned = Some((client.machine, client.profile, inflight));
        }
    }

    fn intrude(&self) {
        if self.client.is_none() {
            return;
        }
        let path = self.world.directory.join("front-end.sock");
        self.world.note("# a second front-end connects");
        drop(std::os::unix::net::UnixStream::connect(path));
    }

    /// Nobody is disturbed any more: everything comes to an end, and the bridge is as it was in the beginning.
    async fn rest(&mut self) {
        self.world.note("# rest");
        self.world.rests.set(true);
        for appliance in self.world.living() {
            if !appliance.is_of_use() {
                self.world.disturb(&format!("appliance {} is of no use", appliance.number));
                appliance.kill();
            }
        }
        if self.world.living().is_empty() {
            self.start_appliance();
        }
        self.connect();
        let since = Instant::now();
        loop {
            sleep(Duration::from_secs(1)).await;
            if self.has_failed() {
                return;
            }
            let finished = self.client.as_ref().is_none_or(|client| client.task.is_finished());
            if finished && log::life().0.starts_with("no front-end, appliance ready") {
                break;
            }
            if self.world.living().iter().all(|appliance| !appliance.is_of_use()) {
                self.start_appliance();
            }
            assert!(
                since.elapsed() < REST,
                "no rest after {REST:?}: {}, front-end {}",
                log::life().0,
                self.world.session.get()
            );
        }
        // One that retires has this long.
        sleep(Duration::from_secs(60)).await;
        if !self.has_failed() {
            checks::nothing_is_mapped(&self.world);
        }
    }

    /// Everybody goes.
    async fn end(mut self) -> Played {
        if let Some(client) = self.client.take() {
            client.task.abort();
        }
        self.abandoned = None;
        self.world.appliances.borrow().iter().for_each(|appliance| appliance.kill());
        if self.bridge.is_finished() {
            let ended = (&mut self.bridge).await;
            if log::failure().is_none() {
                log::fail(&format!("the bridge has ended: {ended:?}"));
            }
        }
        self.bridge.abort();
        for _ in 0..20 {
            yield_now().await;
        }
        Played {
            actions: self.coverage.count(),
            coverage: std::mem::take(&mut self.coverage),
            requests: self.world.requests(),
            failure: None,
        }
    }
}

/// What a front-end does while nobody disturbs it, again and again.
async fn live(
    world: &Rc<World>,
    front_end: &mut FrontEnd,
    kept: &RefCell<Option<(Inflight, OwnedFd)>>,
) -> Result<(), Ended> {
    loop {
        front_end.start().await?;
        kept.replace(front_end.inflight_copy());
        for _ in 0..world.random.within(1..30) {
            front_end.step().await?;
        }
        if world.rests.get() {
            front_end.drain().await?;
        }
        if world.rests.get() || world.random.percent(20) {
            front_end.await_config().await?;
        }
        if world.random.percent(15) {
            // Nobody goes on with the buffer of a device that was reset.
            kept.take();
            front_end.reset().await?;
        } else {
            front_end.stop().await?;
        }
        if world.rests.get() || world.random.percent(20) {
            return Ok(());
        }
        if world.random.percent(50) {
            front_end.reset_rings();
        }
    }
}
