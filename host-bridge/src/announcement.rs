//! What whoever has started this process is told, by systemd's notification protocol (sd_notify(3)). Without such a one nothing
//! happens.
//!
//! | line | meaning |
//! | --- | --- |
//! | `X_VVU_LISTENING=1` | all sockets are there |
//! | `X_VVU_APPLIANCE_ACTIVE=n` | appliance n is the one in use; appliances are counted from 1 |
//! | `X_VVU_PAUSE_US=t` | in the same message: how long a front-end that was moved there had no back-end, in microseconds |
//! | `X_VVU_APPLIANCE_LOST=n` | appliance n was dropped, whether it has failed or retired; nothing of it is used any more |
//! | `READY=1` | a front-end can be served, the first time |
//! | `STATUS=text` | the state in words |

use std::time::Duration;

use sd_notify::NotifyState;

/// Says each thing when it changes.
#[derive(Debug)]
pub(crate) struct Announcer {
    ready: bool,
    active: Option<u32>,
    status: &'static str,
    pause: Option<Duration>,
}

impl Announcer {
    /// All sockets are there.
    pub(crate) fn listening(status: &'static str) -> Self {
        notify(&[NotifyState::Custom("X_VVU_LISTENING=1"), NotifyState::Status(status)]);
        Self { ready: false, active: None, status, pause: None }
    }

    /// A front-end has a back-end again, after this time. It is said with the number of the appliance.
    pub(crate) fn moved(&mut self, pause: Duration) {
        self.pause = Some(pause);
    }

    /// Appliance `number` is in use.
    pub(crate) fn active(&mut self, number: u32) {
        let pause = self.pause.take();
        if pause.is_none() && self.active == Some(number) {
            return;
        }
        self.active = Some(number);
        let active = format!("X_VVU_APPLIANCE_ACTIVE={number}");
        match pause {
            Some(pause) => {
                tracing::info!(appliance = number, pause_us = pause.as_micros(), "front-end moved");
                let pause = format!("X_VVU_PAUSE_US={}", pause.as_micros());
                notify(&[NotifyState::Custom(&active), NotifyState::Custom(&pause)]);
            }
            None => notify(&[NotifyState::Custom(&active)]),
        }
        if !self.ready {
            self.ready = true;
            notify(&[NotifyState::Ready]);
        }
    }

    /// Appliance `number` was dropped.
    pub(crate) fn lost(&self, number: u32) {
        notify(&[NotifyState::Custom(&format!("X_VVU_APPLIANCE_LOST={number}"))]);
    }

    /// The state in words.
    pub(crate) fn status(&mut self, status: &'static str) {
        if self.status != status {
            self.status = status;
            tracing::info!("{status}");
            notify(&[NotifyState::Status(status)]);
        }
    }
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "notification socket");
    }
}
