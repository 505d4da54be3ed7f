//! The bridge at work: it makes its sockets, takes on front-ends and appliances, and does what [`Life`] says.
//!
//! Everything that happens is an event for [`Life::handle`], whose effects are carried out at once; then [`Life::activity`] says
//! what to wait for or to work at next. Meanwhile device sets come and go: what becomes of them is taken over when the work at
//! hand is done, or when it can be interrupted. The work fails by itself if its appliance goes.
//!
//! The bridge ends when it is told to, or with the only front-end that it was given (`--fd`). An appliance that goes away or
//! breaks the protocol is dropped, and the front-end waits for the next one.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::LocalSet;
use tokio::time::{Instant, timeout};
use uuid::Uuid;
use vvu_protocol::window::Layout;
use vvu_socket::MessageSocket;

use crate::announcement::Announcer;
use crate::appliance::sets::{DeviceSets, Model, SetEvent};
use crate::appliance::{Appliance, ApplianceError, CLEAR_TIMEOUT};
use crate::cli::Options;
use crate::front_end::FrontEnds;
use crate::life::{Activity, Effect, Event, Life, Role};
use crate::session::{Blame, Interrupted, Session, SessionError};

/// How long an appliance that is dropped may take to give driver memory back, before another one gets it.
const TAKE_BACK_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs the bridge to its end.
///
/// # Errors
/// What the user did wrong, or a failure of the system.
pub fn run(options: Options) -> anyhow::Result<()> {
    if options.exit_with_parent {
        let term = rustix::process::Signal::TERM;
        rustix::process::set_parent_process_death_signal(Some(term)).context("cannot ask for the parent's end")?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    LocalSet::new().block_on(&runtime, serve_until_told(options))
}

async fn serve_until_told(options: Options) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        result = serve(options) => result,
        _ = terminate.recv() => { tracing::info!("ends: SIGTERM"); Ok(()) }
        _ = interrupt.recv() => { tracing::info!("ends: SIGINT"); Ok(()) }
    }
}

/// Serves until the only front-end that it was given is gone, else for ever. Needs a tokio `LocalSet`, whose clock is all the
/// time there is; simulations run it beside the other parts.
///
/// # Errors
/// As [`run`].
pub async fn serve(options: Options) -> anyhow::Result<()> {
    let directory = options.appliance_dir.context("--appliance-dir is missing")?;
    let uuid = options.uuid.unwrap_or_else(Uuid::new_v4);
    let layout = Layout::new(options.window)?;
    let front_ends = match (options.socket_path, options.fd) {
        (Some(path), _) => FrontEnds::bind(&path)?,
        (None, Some(number)) => FrontEnds::inherit(number)?,
        (None, None) => bail!("--socket-path or --fd is missing"),
    };
    let (window, queues) = (layout.len(), options.queues);
    let vectors = options.vectors.unwrap_or(queues);
    if vectors < queues {
        bail!("--vectors {vectors} are too few for --queues {queues}: each queue needs one");
    }
    let handed_over = (!options.relay).then_some(vectors);
    let sets = DeviceSets::bind(&directory, Model { uuid: *uuid.as_bytes(), queues, handed_over, layout })?;
    tracing::info!(%uuid, directory = %directory.display(), window, queues, "listening");
    Bridge::new(sets, front_ends).run().await
}

/// What an activity has come to.
enum Outcome {
    /// There is something to take from the device sets.
    Interrupted,
    /// This has happened.
    Happened(Event),
    /// A front-end has connected, or there will be none any more.
    FrontEnd(Option<UnixStream>),
    /// The work has failed, and with which appliance, if there was one.
    Failed(Option<u32>, SessionError),
}

/// The active appliance was told to let go of its session.
#[derive(Debug)]
struct Clearing {
    deadline: Instant,
    told: Result<(), ApplianceError>,
}

/// Who is there, and since when.
struct Bridge {
    life: Life,
    sets: DeviceSets,
    front_ends: FrontEnds,
    session: Option<Session>,
    active: Option<Appliance>,
    standby: Option<Appliance>,
    /// One that has just come and has no role yet.
    newcomer: Option<Appliance>,
    clearing: Option<Clearing>,
    /// Front-ends so far.
    session_count: u32,
    /// The protocol's session numbers so far, over all appliances: each attachment has one.
    attachment_count: u32,
    /// Since when the front-end has no back-end, if it had one.
    paused: Option<Instant>,
    announcer: Announcer,
}

impl Bridge {
    fn new(sets: DeviceSets, front_ends: FrontEnds) -> Self {
        let life = Life::new();
        Self {
            life,
            sets,
            front_ends,
            session: None,
            active: None,
            standby: None,
            newcomer: None,
            clearing: None,
            session_count: 0,
            attachment_count: 0,
            paused: None,
            announcer: Announcer::listening(life.status()),
        }
    }

    async fn run(mut self) -> anyhow::Result<()> {
        loop {
            self.take_set_events().await;
            self.announce();
            match self.perform().await? {
                Outcome::Interrupted => {}
                Outcome::Happened(event) => self.handle(event, None).await,
                Outcome::FrontEnd(Some(stream)) => self.take_on(stream).await,
                Outcome::FrontEnd(None) => return Ok(()),
                Outcome::Failed(number, error) => self.failed(number, error).await,
            }
        }
    }

    fn announce(&mut self) {
        if let Some(active) = self.active.as_ref().filter(|_| self.life.is_settled()) {
            self.announcer.active(active.number);
        }
        self.announcer.status(self.life.status());
    }

    /// Does what there is to do, until something has come of it.
    async fn perform(&mut self) -> anyhow::Result<Outcome> {
        match self.life.activity() {
            Activity::AwaitAppliance => self.await_appliance().await,
            Activity::AwaitFrontEnd => self.await_front_end().await,
            Activity::AwaitCleared => self.await_cleared().await,
            Activity::Attach => self.attach(Role::Active).await,
            Activity::Move => self.attach(Role::Standby).await,
            Activity::Serve => self.serve().await,
            Activity::Drain => self.drain().await,
        }
    }

    async fn await_appliance(&mut self) -> anyhow::Result<Outcome> {
        let Self { sets, front_ends, session, .. } = self;
        if session.is_none() && front_ends.are_used_up() {
            return Ok(Outcome::FrontEnd(None));
        }
        let interrupt = Notify::new();
        let turned_away = session.is_some().then_some(front_ends);
        let waited = async {
            tokio::select! {
                () = interrupt.notified() => Outcome::Interrupted,
                error = hung_up(session.as_mut()) => Outcome::Failed(None, error),
            }
        };
        alongside(sets, turned_away, &interrupt, waited).await
    }

    async fn await_front_end(&mut self) -> anyhow::Result<Outcome> {
        let Self { sets, front_ends, .. } = self;
        let interrupt = Notify::new();
        let next = async {
            tokio::select! {
                biased;
                () = interrupt.notified() => Ok(Outcome::Interrupted),
                stream = front_ends.next() => stream.map(Outcome::FrontEnd),
            }
        };
        alongside(sets, None, &interrupt, next).await?
    }

    async fn await_cleared(&mut self) -> anyhow::Result<Outcome> {
        let Self { sets, front_ends, session, active, clearing, .. } = self;
        let appliance = active.as_mut().context("there is no appliance to clear")?;
        let number = appliance.number;
        let clearing = clearing.as_mut().context("the appliance was not told to clear")?;
        if let Err(error) = std::mem::replace(&mut clearing.told, Ok(())) {
            return Ok(Outcome::Failed(Some(number), error.into()));
        }
        let (deadline, turned_away) = (clearing.deadline, session.is_some().then_some(front_ends));
        let cleared = async {
            match session.as_mut() {
                // The same front-end comes back to what is mapped.
                Some(session) => tokio::select! {
                    cleared = appliance.cleared(deadline) => cleared.map_err(Into::into),
                    error = session.hung_up() => Err(error),
                },
                None => async {
                    appliance.cleared(deadline).await?;
                    appliance.unmap().await
                }
                .await
                .map_err(Into::into),
            }
        };
        let cleared = alongside(sets, turned_away, &Notify::new(), cleared).await?;
        sets.found_ready(number);
        Ok(outcome(Event::Cleared, number, cleared))
    }

    async fn attach(&mut self, role: Role) -> anyhow::Result<Outcome> {
        self.attachment_count = self.attachment_count.checked_add(1).context("session numbers are used up")?;
        let Self { sets, front_ends, session, active, standby, attachment_count, .. } = self;
        let (appliance, event) = match role {
            Role::Active => (active, Event::Attached),
            Role::Standby => (standby, Event::Moved),
        };
        let (session, appliance) = session.as_mut().zip(appliance.as_mut()).context("there is nothing to attach")?;
        appliance.session = *attachment_count;
        let attached = session.attach(*attachment_count, appliance);
        let attached = alongside(sets, Some(front_ends), &Notify::new(), attached).await?;
        Ok(outcome(event, appliance.number, attached))
    }

    async fn serve(&mut self) -> anyhow::Result<Outcome> {
        let Self { sets, front_ends, session, active, .. } = self;
        let (session, appliance) = session.as_mut().zip(active.as_mut()).context("there is nothing to serve")?;
        let interrupt = Notify::new();
        let served = session.serve(appliance, interrupt.notified());
        match alongside(sets, Some(front_ends), &interrupt, served).await? {
            Ok(Interrupted) => Ok(Outcome::Interrupted),
            Err(error) => Ok(Outcome::Failed(Some(appliance.number), error)),
        }
    }

    async fn drain(&mut self) -> anyhow::Result<Outcome> {
        let Self { sets, front_ends, session, active, paused, .. } = self;
        let (session, appliance) = session.as_mut().zip(active.as_mut()).context("there is nothing to drain")?;
        paused.get_or_insert_with(Instant::now);
        let drained = alongside(sets, Some(front_ends), &Notify::new(), session.drain(appliance)).await?;
        Ok(outcome(Event::Drained, appliance.number, drained))
    }

    async fn take_on(&mut self, stream: UnixStream) {
        let socket = match MessageSocket::new(stream) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%error, "front-end turned away");
                return;
            }
        };
        self.session_count = self.session_count.wrapping_add(1);
        tracing::info!(session = self.session_count, "front-end connected");
        self.session = Some(Session::new(self.session_count, socket));
        self.handle(Event::FrontEndCame, None).await;
    }

    /// Says who has to go after a failure of the work at hand. If it was the appliance, the device set may know better why.
    async fn failed(&mut self, number: Option<u32>, error: SessionError) {
        let activity = self.life.activity();
        let ended = matches!(error, SessionError::Closed | SessionError::Socket(_));
        // A standby that cannot take over is no reason to give the front-end up: the active appliance is still there.
        if ended || (error.blame() == Blame::FrontEnd && activity != Activity::Move) {
            return self.end_session(error).await;
        }
        self.take_set_events().await;
        let Some(role) = number.and_then(|number| self.role(number)) else { return };
        if role == Role::Active && error.blame() == Blame::BackEnd && activity != Activity::Drain {
            tracing::warn!(appliance = number, "{error}; the front-end waits");
            self.handle(Event::BackEndLost, None).await;
        } else {
            self.handle(Event::ApplianceLost(role), Some(error.into())).await;
        }
    }

    async fn end_session(&mut self, error: SessionError) {
        let session = self.session_count;
        match error {
            SessionError::Closed => tracing::info!(session, "front-end disconnected"),
            error => tracing::warn!(session, "session ended: {:#}", anyhow::Error::from(error)),
        }
        self.handle(Event::FrontEndEnded, None).await;
    }

    /// Takes over what has become of the device sets.
    async fn take_set_events(&mut self) {
        while let Some(event) = self.sets.take() {
            match event {
                SetEvent::Came(appliance) => {
                    self.newcomer = Some(*appliance);
                    self.handle(Event::ApplianceCame, None).await;
                }
                SetEvent::Ready(number) => {
                    if let Some(role) = self.role(number) {
                        self.handle(Event::ApplianceReady(role), None).await;
                    }
                }
                SetEvent::Down(number) => {
                    if let Some(role) = self.role(number) {
                        self.handle(Event::ApplianceDown(role), None).await;
                    }
                }
                SetEvent::Ended(number, error) => {
                    let error = error.map(anyhow::Error::from);
                    match self.role(number) {
                        Some(role) => {
                            let error = error.unwrap_or_else(|| anyhow::anyhow!("one of its devices ended early"));
                            self.handle(Event::ApplianceLost(role), Some(error)).await;
                        }
                        None => self.release(number, error).await,
                    }
                }
            }
        }
    }

    fn role(&self, number: u32) -> Option<Role> {
        let is_it = |appliance: &Option<Appliance>| appliance.as_ref().is_some_and(|it| it.number == number);
        if is_it(&self.active) {
            return Some(Role::Active);
        }
        is_it(&self.standby).then_some(Role::Standby)
    }

    /// Hands an event to [`Life`] and carries its effects out. `reason` says why an appliance is lost.
    async fn handle(&mut self, event: Event, mut reason: Option<anyhow::Error>) {
        if matches!(event, Event::Attached | Event::Moved)
            && let Some(since) = self.paused.take()
        {
            self.announcer.moved(since.elapsed());
        }
        for effect in self.life.handle(event) {
            match effect {
                Effect::Seat(Role::Active) => self.active = self.newcomer.take(),
                Effect::Seat(Role::Standby) => self.standby = self.newcomer.take(),
                Effect::TurnAway => {
                    if let Some(Appliance { number, .. }) = self.newcomer.take() {
                        self.release(number, Some(anyhow::anyhow!("there is no place for it"))).await;
                    }
                }
                Effect::Drop(role) => self.drop_appliance(role, reason.take()).await,
                Effect::Retire => {
                    if let Some(appliance) = self.active.take() {
                        self.sets.retire(appliance);
                    }
                }
                Effect::Promote => self.active = self.standby.take(),
                Effect::Clear => self.clear().await,
                Effect::TellLoss => {
                    self.session.iter_mut().for_each(Session::lost);
                    self.paused.get_or_insert_with(Instant::now);
                }
                Effect::EndSession => (self.session, self.paused) = (None, None),
            }
        }
    }

    async fn clear(&mut self) {
        let Some(appliance) = self.active.as_mut() else { return };
        let told = appliance.disconnect().await;
        self.clearing = Some(Clearing { deadline: Instant::now() + CLEAR_TIMEOUT, told });
    }

    async fn drop_appliance(&mut self, role: Role, reason: Option<anyhow::Error>) {
        let appliance = match role {
            Role::Active => self.active.take(),
            Role::Standby => self.standby.take(),
        };
        let Some(mut appliance) = appliance else { return };
        // It may still run. Where it does not, this fails at once.
        let _ = timeout(TAKE_BACK_TIMEOUT, appliance.window.unmap_all()).await;
        let number = appliance.number;
        drop(appliance);
        self.release(number, reason).await;
    }

    /// Ends what is left of an appliance.
    async fn release(&mut self, number: u32, reason: Option<anyhow::Error>) {
        match reason {
            Some(error) => tracing::warn!(appliance = number, "appliance dropped: {error:#}"),
            None => tracing::info!(appliance = number, "appliance dropped: another one has taken its place"),
        }
        self.sets.release(number).await;
        self.announcer.lost(number);
    }
}

fn outcome(success: Event, number: u32, result: Result<(), SessionError>) -> Outcome {
    match result {
        Ok(()) => Outcome::Happened(success),
        Err(error) => Outcome::Failed(Some(number), error),
    }
}

async fn hung_up(session: Option<&mut Session>) -> SessionError {
    match session {
        Some(session) => session.hung_up().await,
        None => std::future::pending().await,
    }
}

/// Works to the end of `work`. Meanwhile device sets come and go: `interrupt` is notified when there is something to take from
/// them, before `work` gets to know of it. Other front-ends than the one at work are turned away.
async fn alongside<T>(
    sets: &mut DeviceSets,
    turned_away: Option<&mut FrontEnds>,
    interrupt: &Notify,
    work: impl Future<Output = T>,
) -> anyhow::Result<T> {
    let turning_away = async {
        match turned_away {
            Some(front_ends) => front_ends.turn_away().await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(work, turning_away);
    loop {
        tokio::select! {
            biased;
            stepped = sets.step() => {
                stepped?;
                if sets.has_event() {
                    interrupt.notify_one();
                }
            }
            done = &mut work => return Ok(done),
            failed = &mut turning_away => failed?,
        }
    }
}
