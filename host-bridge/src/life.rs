//! The life of the bridge as a table: what happened, and what follows from it. Nothing here waits, or holds anything.
//!
//! Three states make up one [`Life`]: that of the front-end, that of the *active* appliance, whose back-end serves it, and that
//! of a *standby*, an appliance that is to take the active one's place. [`Life::handle`] is the only door from one state to
//! the next, and [`Life::activity`] says what there is to do in each. The active appliance:
//!
//! ```text
//!             comes              BACK_END_UP             attach
//!      none ────────► down ◄───────────────────► ready ─────────► attached ──────► drained
//!                                                  ▲                │ standby ready   │
//!                                                  │                │                 │ standby attached: it is the
//!                        BACK_END_UP, unmapped if  │                │ back-end or     │ active one, attached; the old
//!                           the front-end is gone  │                │ front-end ends  │ one retires
//!                                                  │                ▼                 │
//!                                                  └──────────── clearing ◄───────────┘ standby fails
//! ```
//!
//! From every state an appliance can be lost: it goes away, breaks the protocol or does not let go of a session in time. Then
//! the standby is the active one, or there is none. A standby that is ready takes the place of an active one that is
//! down or ready at once; from one that is attached it takes over after all vrings have been stopped. It never does from one
//! that is clearing: until the agent there has said that it holds nothing of the session, its back-end may still work
//! on the same driver memory and the same disk.
//!
//! The front-end lives on through all of that. It is taken on only when an appliance is ready, and it may end at any time.

use std::fmt;

/// Whether there is a front-end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrontEnd {
    /// There is none.
    None,
    /// One has the device.
    Connected,
}

/// The appliance in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Active {
    /// There is none.
    None,
    /// It boots, or has no back-end or no window. It holds nothing of a session.
    Down,
    /// It can be used, and holds nothing of a session.
    Ready,
    /// Its back-end has what the front-end has set, and requests are relayed.
    Attached,
    /// All vrings were stopped in order, for the standby.
    Drained,
    /// It may hold something of a session, and was told to let go of it.
    Clearing,
}

/// The appliance that is to take the active one's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standby {
    /// There is none.
    None,
    /// It boots, or has no back-end or no window.
    Down,
    /// It can be used.
    Ready,
}

/// Which appliance is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The one in use.
    Active,
    /// The one that is to take its place.
    Standby,
}

/// What has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// An appliance's VMM has connected to all three sockets.
    ApplianceCame,
    /// An appliance can be used from now on.
    ApplianceReady(Role),
    /// An appliance cannot be used any more, and may come back.
    ApplianceDown(Role),
    /// An appliance is of no use any more: it is gone, broke the protocol, or was too slow.
    ApplianceLost(Role),
    /// A front-end has connected.
    FrontEndCame,
    /// The front-end has disconnected, or has made a fault.
    FrontEndEnded,
    /// The active appliance's back-end has what the front-end has set.
    Attached,
    /// The back-end or the window went away from under the session; the appliance is there.
    BackEndLost,
    /// All vrings were stopped in order.
    Drained,
    /// The standby's back-end has what the front-end has set.
    Moved,
    /// The active appliance holds nothing of a session any more.
    Cleared,
}

/// What has to be done because of an event, in the order in which the effects come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// The appliance that came gets this role.
    Seat(Role),
    /// There is no place for the appliance that came.
    TurnAway,
    /// An appliance is dropped, with all that it had.
    Drop(Role),
    /// The active appliance, which the front-end does not use any more, clears its session away and is dropped then.
    Retire,
    /// The standby is the active appliance from now on.
    Promote,
    /// The active appliance is told that the session has ended there.
    Clear,
    /// The session is told that its back-end was lost.
    TellLoss,
    /// The session, and the front-end's connection, end.
    EndSession,
}

/// What there is to do in a state, until something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// Wait for an appliance. The front-end, if there is one, may end meanwhile.
    AwaitAppliance,
    /// Wait for a front-end.
    AwaitFrontEnd,
    /// Bring the active appliance's back-end to what the front-end has set.
    Attach,
    /// Relay requests.
    Serve,
    /// Stop all vrings in order.
    Drain,
    /// Bring the standby's back-end to what the front-end has set.
    Move,
    /// Wait until the active appliance holds nothing of the session; then undo its mappings if there is no front-end any
    /// more.
    AwaitCleared,
}

/// The state of everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    front_end: FrontEnd,
    active: Active,
    standby: Standby,
}

impl fmt::Display for Life {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let front_end = match self.front_end {
            FrontEnd::None => "no front-end",
            FrontEnd::Connected => "front-end connected",
        };
        let active = match self.active {
            Active::None => "none",
            Active::Down => "down",
            Active::Ready => "ready",
            Active::Attached => "attached",
            Active::Drained => "drained",
            Active::Clearing => "clearing",
        };
        let standby = match self.standby {
            Standby::None => "none",
            Standby::Down => "down",
            Standby::Ready => "ready",
        };
        write!(formatter, "{front_end}, appliance {active}, standby {standby}")
    }
}

impl Life {
    /// There is nobody yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { front_end: FrontEnd::None, active: Active::None, standby: Standby::None }
    }

    const fn has_front_end(&self) -> bool {
        matches!(self.front_end, FrontEnd::Connected)
    }

    /// Whether the active appliance is the one in use, and will be until something happens.
    #[must_use]
    pub const fn is_settled(&self) -> bool {
        matches!(
            (self.front_end, self.active),
            (FrontEnd::None, Active::Ready) | (FrontEnd::Connected, Active::Attached)
        )
    }

    /// What there is to do.
    #[must_use]
    pub const fn activity(&self) -> Activity {
        match (self.front_end, self.active, self.standby) {
            (_, Active::None | Active::Down, _) => Activity::AwaitAppliance,
            (_, Active::Clearing, _) => Activity::AwaitCleared,
            (FrontEnd::None, _, _) => Activity::AwaitFrontEnd,
            (FrontEnd::Connected, Active::Ready, _) => Activity::Attach,
            (FrontEnd::Connected, Active::Attached, Standby::Ready) => Activity::Drain,
            (FrontEnd::Connected, Active::Attached, _) => Activity::Serve,
            (FrontEnd::Connected, Active::Drained, _) => Activity::Move,
        }
    }

    /// The state in words, for whoever has started the bridge.
    #[must_use]
    pub const fn status(&self) -> &'static str {
        match (self.front_end, self.active) {
            (FrontEnd::None, Active::None) => "waiting for the appliance's VMM",
            (FrontEnd::None, Active::Down | Active::Clearing) => "waiting for the appliance",
            (FrontEnd::None, _) => "ready for a front-end",
            (FrontEnd::Connected, Active::None) => "front-end connected, waiting for the appliance's VMM",
            (FrontEnd::Connected, Active::Down | Active::Clearing) => "front-end connected, waiting for the appliance",
            (FrontEnd::Connected, _) => "front-end connected",
        }
    }

    /// Takes over what has happened, and says what has to be done about it. What cannot happen in a state changes nothing.
    pub fn handle(&mut self, event: Event) -> Vec<Effect> {
        let before = *self;
        let mut effects = match event {
            Event::ApplianceCame => self.seat(),
            Event::ApplianceReady(Role::Active) => self.active_ready(),
            Event::ApplianceReady(Role::Standby) => self.standby_ready(),
            Event::ApplianceDown(Role::Active) => self.active_down(),
            Event::ApplianceDown(Role::Standby) => self.standby_down(),
            Event::ApplianceLost(Role::Active) => self.active_lost(),
            Event::ApplianceLost(Role::Standby) => self.standby_lost(),
            Event::FrontEndCame => self.front_end_came(),
            Event::FrontEndEnded => self.front_end_ended(),
            Event::Attached => self.work_done(Activity::Attach, Active::Attached),
            Event::BackEndLost => self.back_end_lost(),
            // A standby that is gone by now is the next event.
            Event::Drained => self.work_done(Activity::Drain, Active::Drained),
            Event::Moved => self.moved(),
            Event::Cleared => self.work_done(Activity::AwaitCleared, Active::Ready),
        };
        self.promote(&mut effects);
        if *self != before {
            tracing::debug!(?event, "{before} -> {self}");
        }
        effects
    }

    fn seat(&mut self) -> Vec<Effect> {
        match (self.active, self.standby) {
            (Active::None, _) => {
                self.active = Active::Down;
                vec![Effect::Seat(Role::Active)]
            }
            (_, Standby::None) => {
                self.standby = Standby::Down;
                vec![Effect::Seat(Role::Standby)]
            }
            _ => vec![Effect::TurnAway],
        }
    }

    fn active_ready(&mut self) -> Vec<Effect> {
        // One that is clearing is ready when its session is cleared away, which is an event of its own.
        if self.active == Active::Down {
            self.active = Active::Ready;
        }
        Vec::new()
    }

    fn standby_ready(&mut self) -> Vec<Effect> {
        if self.standby == Standby::Down {
            self.standby = Standby::Ready;
        }
        Vec::new()
    }

    fn active_down(&mut self) -> Vec<Effect> {
        match (self.active, self.front_end) {
            // Its mappings are still there for the front-end that waits: they have to be undone if that one goes.
            (Active::Ready, FrontEnd::Connected) => self.clear(),
            (Active::Ready, FrontEnd::None) => {
                self.active = Active::Down;
                Vec::new()
            }
            // The session has noticed it, or is about to.
            _ => Vec::new(),
        }
    }

    fn standby_down(&mut self) -> Vec<Effect> {
        if self.standby != Standby::Ready {
            return Vec::new();
        }
        self.standby = Standby::Down;
        self.return_to_active()
    }

    fn active_lost(&mut self) -> Vec<Effect> {
        if self.active == Active::None {
            return Vec::new();
        }
        // One that was drained has told where each vring stands. One that is ready may have been attached in part.
        let unknown = self.has_front_end() && matches!(self.active, Active::Ready | Active::Attached);
        self.active = Active::None;
        let tell = unknown.then_some(Effect::TellLoss);
        tell.into_iter().chain([Effect::Drop(Role::Active)]).collect()
    }

    fn standby_lost(&mut self) -> Vec<Effect> {
        if self.standby == Standby::None {
            return Vec::new();
        }
        self.standby = Standby::None;
        [Effect::Drop(Role::Standby)].into_iter().chain(self.return_to_active()).collect()
    }

    /// The standby cannot take over from one that is drained. Its vrings may have run a little there.
    fn return_to_active(&mut self) -> Vec<Effect> {
        if self.active != Active::Drained {
            return Vec::new();
        }
        [Effect::TellLoss].into_iter().chain(self.clear()).collect()
    }

    fn front_end_came(&mut self) -> Vec<Effect> {
        if self.activity() == Activity::AwaitFrontEnd {
            self.front_end = FrontEnd::Connected;
        }
        Vec::new()
    }

    fn front_end_ended(&mut self) -> Vec<Effect> {
        if self.front_end == FrontEnd::None {
            return Vec::new();
        }
        self.front_end = FrontEnd::None;
        let mut effects = vec![Effect::EndSession];
        if matches!(self.active, Active::Ready | Active::Attached | Active::Drained) {
            effects.extend(self.clear());
        }
        effects
    }

    fn back_end_lost(&mut self) -> Vec<Effect> {
        if !matches!(self.active, Active::Ready | Active::Attached) || !self.has_front_end() {
            return Vec::new();
        }
        [Effect::TellLoss].into_iter().chain(self.clear()).collect()
    }

    fn moved(&mut self) -> Vec<Effect> {
        if self.activity() != Activity::Move {
            return Vec::new();
        }
        self.active = Active::Attached;
        self.standby = Standby::None;
        vec![Effect::Retire, Effect::Promote]
    }

    fn clear(&mut self) -> Vec<Effect> {
        self.active = Active::Clearing;
        vec![Effect::Clear]
    }

    fn work_done(&mut self, work: Activity, then: Active) -> Vec<Effect> {
        if self.activity() == work {
            self.active = then;
        }
        Vec::new()
    }

    /// Puts the standby into the active one's place, if that place is free or its holder can be replaced at once.
    fn promote(&mut self, effects: &mut Vec<Effect>) {
        let replaced = match (self.active, self.standby) {
            (Active::None, Standby::Down | Standby::Ready) => false,
            (Active::Down | Active::Ready, Standby::Ready) => true,
            _ => return,
        };
        if replaced {
            effects.push(Effect::Drop(Role::Active));
        }
        effects.push(Effect::Promote);
        self.active = if self.standby == Standby::Ready { Active::Ready } else { Active::Down };
        self.standby = Standby::None;
    }
}

impl Default for Life {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests;
