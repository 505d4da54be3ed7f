//! What an operator asks of a run over the control socket.

use std::future::pending;
use std::path::PathBuf;

use super::{Run, in_ms};
use crate::control::{ImageStatus, LivePids, Reply, Request, Status};
use crate::control_socket::{Asked, Replies};
use crate::fleet::Member;
use crate::programs::{self, ApplianceFiles};
use crate::resize::Resize;
use crate::supervisor::{Input, Replaced};

/// A replacement of the appliance VM, and who waits for it.
#[derive(Debug)]
pub(super) struct Wanted {
    /// The image that the new one boots.
    pub(super) appliance: ApplianceFiles,
    replies: Replies,
}

impl Wanted {
    /// Tells a step on the way.
    pub(super) fn progress(&self, step: &str, text: String) {
        self.replies.send(Reply::Progress { step: step.to_owned(), text });
    }
}

/// Waits until nobody waits any more for what is wanted.
pub(super) async fn gone(wanted: Option<&Wanted>) {
    match wanted {
        Some(wanted) => wanted.replies.gone().await,
        None => pending().await,
    }
}

impl Run<'_> {
    pub(super) fn asked(&mut self, asked: Asked) {
        let Asked { request, replies } = asked;
        match request {
            Request::Status {} => replies.send(Reply::Status(Box::new(self.status()))),
            Request::Upgrade { appliance } => self.replace(appliance, replies),
            Request::Restart {} => self.replace(None, replies),
            Request::Resize { size_bytes, shrink } => self.resize(size_bytes, shrink, replies),
        }
    }

    fn replace(&mut self, directory: Option<PathBuf>, replies: Replies) {
        let directory = directory.unwrap_or_else(|| self.plan.appliance.directory.clone());
        let files = self
            .changeable()
            .and_then(|_| programs::find_appliance(Some(&directory)).map_err(|error| format!("{error:#}")));
        match files {
            Ok(appliance) => {
                self.wanted = Some(Wanted { appliance, replies });
                self.inputs.push_back(Input::Replace);
            }
            Err(why) => replies.send(Reply::failed(why)),
        }
    }

    /// Whether the appliance VM in use stays that for the time being; else why not. A standby that boots while the disk
    /// changes its size would not notice.
    fn changeable(&self) -> Result<PathBuf, String> {
        self.supervisor.may_replace()?;
        if self.resizing.is_some() {
            return Err("a resize is under way; wait for its end".to_owned());
        }
        self.qmp_in_use().ok_or_else(|| "no appliance VM is in use".to_owned())
    }

    fn resize(&mut self, size_bytes: u64, shrink: bool, replies: Replies) {
        match self.changeable() {
            Ok(qmp) => {
                let resize = Resize { image: self.plan.image.clone(), size_bytes, shrink, qmp };
                // It talks to QEMU, which may take its time, and it is not taken back if nobody waits any more.
                self.resizing = Some(tokio::spawn(async move {
                    let (reply, size) = resize.run().await;
                    replies.send(reply);
                    size
                }));
            }
            Err(why) => replies.send(Reply::failed(why)),
        }
    }

    /// The new image is the run's, also for restarts.
    pub(super) fn adopt_image(&mut self) {
        if let Some(wanted) = &self.wanted {
            self.plan.appliance = wanted.appliance.clone();
        }
    }

    /// The replacement is over.
    pub(super) fn answer(&mut self, result: Result<Replaced, String>) {
        let Some(wanted) = self.wanted.take() else { return };
        wanted.replies.send(match result {
            Ok(Replaced { appliance, pause_us, took }) => Reply::Replaced { appliance, pause_us, took_ms: in_ms(took) },
            Err(why) => Reply::failed(format!("the appliance VM was not replaced: {why}")),
        });
    }

    fn status(&self) -> Status {
        let (plan, in_use) = (&self.plan, self.supervisor.in_use());
        Status {
            state: self.supervisor.word().to_owned(),
            text: self.status_text.clone(),
            pids: LivePids {
                vvu: std::process::id(),
                bridge: self.fleet.pid(Member::Bridge),
                qemu: in_use.and_then(|id| self.fleet.pid(Member::Appliance(id))),
            },
            appliance: in_use.and_then(|id| self.fleet.appliance(id)),
            standby: self.supervisor.booting().and_then(|id| self.fleet.appliance(id)),
            restarts: self.supervisor.restarts(),
            last_pause_us: self.last_pause_us,
            uptime_ms: self.elapsed_ms(),
            image: ImageStatus {
                path: plan.image.path.clone(),
                size_bytes: plan.image.size_bytes,
                read_only: plan.image.read_only,
                shared: plan.image_lock.is_none(),
            },
            socket: plan.socket.clone(),
            appliance_dir: plan.appliance.directory.clone(),
            runtime_dir: self.directory.text().to_owned(),
        }
    }
}
