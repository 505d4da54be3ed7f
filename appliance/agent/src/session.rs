//! The life of a device set: it waits for a back-end, then for a front-end, relays requests, and clears away.
//!
//! # Theory of operation
//!
//! The status field of the control device holds one bit of each side; together they are the state (control profile,
//! "Sessions"). This side sets BACK_END_UP when the back-end is ready, and clears it when the back-end has failed; the
//! device sets FRONT_END_UP when a front-end has come, and clears both when it has gone. `state` is the one door for changes.
//!
//! ```text
//!             back-end ready            front-end comes
//!   ┌─► down ─────────────────► ready ───────────────────► connected ──┐
//!   │     ▲                       │ back-end fails             │ │      │
//!   │     └───────────────────────┼────────────────────────────┘ │      │
//!   │        front-end gone       ▼        back-end fails        │      │
//!   └───────────────────────── orphaned ◄────────────────────────┘      │
//!   └───────────────────────────────────────────────────────────────────┘
//! ```
//!
//! *Down* lasts until nothing of the session before is left in the back-end. *Ready* holds a connection to the back-end on
//! which nothing but GET_FEATURES was said; *down* follows at once if a front-end has come and gone between two looks.
//! *Orphaned* lasts until the device has taken note; the next back-end is made ready meanwhile, since a driver VM is waiting
//! for it.
//!
//! *Connected*, four tasks run beside each other, and end together:
//!
//! ```text
//!                           ┌── channel 0 ──► front_end ────► back-end's socket        one request, one answer
//!   control device ◄──► router ── channel 1 ◄── back_channel ◄── back-end's requests   one request, one answer
//!                           └── channel 2 ──► device_state ◄──► pipe                   one part, one answer
//! ```
//!
//! Each task is a straight line of code for its channel: it waits for what comes, does it, answers. None waits for another
//! one: while the back-end is busy with a request of the front-end, its own requests go on, and the other way round (it may
//! well need the answer to one before it answers the other). What a task takes from the front-end's channel to start with (a
//! socket, a pipe) lies in a slot for it. Nothing is buffered but one message for each direction of a channel; a back-end
//! that asks faster than it is answered finds its socket full.
//!
//! Bridge and back-end may send anything. The router drops a frame of another session; one that cannot be decoded, or comes
//! when it is not the bridge's turn, ends the session; a back-end that answers wrongly or too late is ended. The control device
//! itself failing is the end of the device set, and so is a back-end that fails too often.

use std::convert::Infallible;
use std::rc::Rc;

use tracing::{error, warn};
use vvu_protocol::control::Status;

use crate::back_end::BackEndLink;
use crate::control::{ControlError, ControlPort};
use crate::doorbell::{Doorbell, SignalsInUse};
use crate::in_one_line;
use crate::supervisor::{GaveUp, Supervise, Supervisor};
use crate::uuid::Uuid;
use crate::window::{Window, WindowNode};

mod back_channel;
mod device_state;
mod end;
mod front_end;
mod refusal;
mod router;
mod signals;
mod slot;
mod state;
mod vrings;

pub use front_end::REQUEST_TIMEOUT;

use back_channel::BackChannelTask;
use device_state::{DeviceStateTask, Transfers};
use end::{End, Fault};
use front_end::FrontEndTask;
use router::Router;
use slot::Slot;
use state::{State, StateDoor};

/// Why a device set is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum DeviceSetError {
    /// The control device has failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The back-end has.
    #[error(transparent)]
    GaveUp(#[from] GaveUp),
}

/// One emulated device.
#[derive(Debug)]
pub struct DeviceSet<P, D, S = Supervisor, W = WindowNode> {
    port: P,
    doorbell: D,
    window: W,
    supervisor: S,
    state: StateDoor,
}

impl<P: ControlPort, D: Doorbell, S: Supervise, W: Window> DeviceSet<P, D, S, W> {
    /// Puts a device set together. Its status is down.
    pub const fn new(uuid: Uuid, port: P, doorbell: D, window: W, supervisor: S) -> Self {
        Self { port, doorbell, window, supervisor, state: StateDoor::new(uuid) }
    }

    /// Which set this is.
    pub const fn uuid(&self) -> Uuid {
        self.state.uuid()
    }

    /// Serves one front-end after the other, for ever.
    ///
    /// # Errors
    /// [`DeviceSetError`]. The status is down if the control device still does what it should.
    pub async fn serve(&mut self) -> Result<Infallible, DeviceSetError> {
        let mut link = self.supervisor.ready().await?;
        loop {
            self.port.set_back_end_up(true)?;
            self.state.set(State::Ready);
            let end = self.session(link).await?;
            link = self.clear_away(&end).await?;
        }
    }

    /// Takes what comes, so that the device does not find its queues full, and does nothing: for a set whose back-end was given
    /// up, beside others that go on.
    ///
    /// # Errors
    /// [`ControlError`] if the control device fails.
    pub async fn stay_down(mut self) -> Result<Infallible, ControlError> {
        loop {
            self.port.event().await?;
            tokio::task::consume_budget().await;
        }
    }

    /// From ready to the end of the session. All that belongs to it is gone when this returns.
    async fn session(&mut self, link: BackEndLink) -> Result<End, ControlError> {
        let Self { port, doorbell, window, state, .. } = self;
        let uuid = state.uuid();
        let (router, [front_end, back_end, device_state]) = Router::new(port, state);
        let back_channels = Rc::new(Slot::default());
        let transfers = Rc::new(Transfers::default());
        let front_end = FrontEndTask::new(
            uuid,
            front_end,
            link,
            doorbell,
            window,
            Rc::clone(&back_channels),
            Rc::clone(&transfers),
        );
        let back_channel = BackChannelTask::new(uuid, back_end, back_channels);
        let device_state = DeviceStateTask::new(uuid, device_state, transfers);
        // Each is polled whenever one has something to do; the order only says whose word counts if two end at once.
        let end = tokio::select! {
            biased;
            end = router.run() => end,
            end = front_end.run() => Ok(end),
            end = back_channel.run() => Ok(end),
            end = device_state.run() => Ok(end),
        };
        doorbell.keep_only(&SignalsInUse::default());
        end
    }

    /// From the end of a session to a device set that is down, with the next back-end ready. Device and back-end do their part
    /// at the same time.
    async fn clear_away(&mut self, end: &End) -> Result<BackEndLink, DeviceSetError> {
        let Self { port, supervisor, state, .. } = self;
        if !matches!(end, End::FrontEndGone) {
            warn!(set = %state.uuid(), "{}", in_one_line(end));
            port.set_back_end_up(false)?;
            state.set(State::Orphaned);
        }
        let next_back_end = async {
            match end.fault() {
                Fault::BackEndClosed => supervisor.lost().await,
                Fault::BackEnd => supervisor.end().await,
                Fault::NotBackEnd => {}
            }
            supervisor.ready().await.map_err(DeviceSetError::from)
        };
        let front_end_gone = async {
            while port.config()?.status.contains(Status::FRONT_END_UP) {
                port.config_change().await?;
            }
            state.set(State::Down);
            Ok(())
        };
        match tokio::try_join!(next_back_end, front_end_gone) {
            Ok((link, ())) => Ok(link),
            Err(error) => {
                error!(set = %self.uuid(), "{}", in_one_line(&error));
                Err(error)
            }
        }
    }
}
