//! What an operator asks of a run over the control socket.

use std::future::pending;
use std::path::PathBuf;
use std::time::Duration;

use vvu_appliance_config::{ApplianceConfig, Device, Format};

use super::{Run, in_ms};
use crate::control::{ImageStatus, LivePids, PortStatus, Reply, Request, Status};
use crate::control_socket::{Asked, Replies};
use crate::fleet::Member;
use crate::image::Image;
use crate::live::{self, Change, Prepared};
use crate::plan::{Class, Disk};
use crate::programs::{self, ApplianceFiles};
use crate::resize::Resize;
use crate::supervisor::{ApplianceId, Handover, Input, PortId, Replaced};

/// Longest time for a back-end to tell its counters.
const COUNTERS_LIMIT: Duration = Duration::from_secs(5);

/// How a change of the device came out.
#[derive(Debug)]
pub(super) enum Changed {
    /// The disk has this size in bytes.
    Size(u64),
    /// The back-end was asked for other settings.
    Settings(Box<Settled>),
}

/// The answer to a change of settings, and who waits for it.
#[derive(Debug)]
pub(super) struct Settled {
    /// Whose back-end was asked.
    appliance: ApplianceId,
    port: PortId,
    /// The configuration with the change.
    config: ApplianceConfig,
    agreed: anyhow::Result<()>,
    replies: Replies,
}

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
            Request::Status {} => self.tell_status(replies),
            Request::Upgrade { appliance } => self.replace(appliance, replies),
            Request::Restart {} => self.replace(None, replies),
            Request::Resize { size_bytes, shrink } => self.resize(size_bytes, shrink, replies),
            Request::Limit { port, operations_per_second, bytes_per_second } => {
                self.change(port, Change::Limits { operations_per_second, bytes_per_second }, replies);
            }
            Request::Link { port, up } => self.change(port, Change::Link { up }, replies),
            Request::Filter { port, macs, vlans } => self.change(port, Change::Filter { macs, vlans }, replies),
        }
    }

    fn replace(&mut self, directory: Option<PathBuf>, replies: Replies) {
        let directory = directory.unwrap_or_else(|| self.plan.machine.appliance.directory.clone());
        let files = self
            .changeable()
            .and_then(|_| programs::find_appliance(Some(&directory)).map_err(|error| format!("{error:#}")));
        match files {
            Ok(appliance) => {
                self.wanted = Some(Wanted { appliance, replies });
                let stand_by = self.plan.can_stand_by;
                let how = if stand_by { Handover::StandBy } else { Handover::InTurn };
                self.inputs.push_back(Input::Replace(how));
            }
            Err(why) => replies.send(Reply::failed(why)),
        }
    }

    /// Whether the appliance VM in use stays that for the time being; else why not. A standby that boots while the device
    /// changes would not notice.
    fn changeable(&self) -> Result<ApplianceId, String> {
        let in_use = self.supervisor.may_replace()?;
        match self.changing {
            Some(_) => Err("another change of the device is under way; wait for its end".to_owned()),
            None => Ok(in_use),
        }
    }

    fn resize(&mut self, size_bytes: u64, shrink: bool, replies: Replies) {
        match self.changeable().and_then(|id| Ok((self.fleet.qmp(id), self.resizable(size_bytes)?))) {
            Ok((qmp, image)) => {
                let resize = Resize { image, size_bytes, shrink, qmp };
                // It talks to QEMU, which may take its time, and it is not taken back if nobody waits any more.
                self.changing = Some(tokio::spawn(async move {
                    let (reply, size) = resize.run().await;
                    replies.send(reply);
                    size.map(Changed::Size)
                }));
            }
            Err(why) => replies.send(Reply::failed(why)),
        }
    }

    /// Changes the settings of a port.
    fn change(&mut self, port: PortId, change: Change, replies: Replies) {
        let prepared = self.changeable().and_then(|id| Ok((id, change.prepare(&self.plan.config, port)?)));
        match prepared {
            Ok((appliance, Prepared { request, config })) => {
                let channel = self.control_channel(appliance);
                // It talks to the appliance, which may take its time.
                self.changing = Some(tokio::spawn(async move {
                    let agreed = live::ask(&channel, &request).await;
                    Some(Changed::Settings(Box::new(Settled { appliance, port, config, agreed, replies })))
                }));
            }
            Err(why) => replies.send(Reply::failed(why)),
        }
    }

    /// The control channel of an appliance VM's back-end; nowhere if it has none.
    fn control_channel(&self, id: ApplianceId) -> PathBuf {
        self.plan.control_channel().map(|number| self.fleet.channel(number, id)).unwrap_or_default()
    }

    /// What has changed is the run's from now on, also for restarts.
    pub(super) fn take_over(&mut self, changed: Option<Changed>) {
        match changed {
            Some(Changed::Size(size_bytes)) => {
                if let Some(disk) = self.plan.disks.first_mut() {
                    disk.image.size_bytes = size_bytes;
                }
            }
            Some(Changed::Settings(settled)) => self.settle(*settled),
            None => {}
        }
    }

    fn settle(&mut self, settled: Settled) {
        let Settled { appliance, port, config, agreed, replies } = settled;
        let still_in_use = self.supervisor.in_use() == Some(appliance);
        replies.send(match (agreed, live::settings(&config, port)) {
            (Err(error), _) => Reply::failed(format!("nothing was changed: {error:#}")),
            // The next one has started without the change.
            (Ok(()), Some(settings)) if still_in_use => {
                self.plan.config = config;
                Reply::Changed { port, settings }
            }
            (Ok(()), _) => Reply::failed("nothing was changed: the appliance VM is gone; try again"),
        });
    }

    /// The image of the disk that is served, if that can have another size.
    fn resizable(&self, size_bytes: u64) -> Result<Image, String> {
        let device = self.plan.config.back_ends.first().map(|back_end| &back_end.device);
        match (device, self.plan.disks.first()) {
            (Some(Device::Blk(options)), Some(disk)) if options.image.format == Format::Raw => Ok(disk.image.clone()),
            (Some(Device::Blk(_)), Some(disk)) => {
                let path = &disk.image.path;
                Err(format!(
                    "a qcow2 image keeps its size while it is served; end the run, then: qemu-img resize -f qcow2 {path} {size_bytes}"
                ))
            }
            _ => Err(format!("a device of class {} has no size", self.plan.class.name())),
        }
    }

    /// The new image is the run's, also for restarts.
    pub(super) fn adopt_image(&mut self) {
        if let Some(wanted) = &self.wanted {
            self.plan.machine.appliance = wanted.appliance.clone();
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

    /// Tells the state, with the counters of the back-end if there is one that answers.
    fn tell_status(&self, replies: Replies) {
        let mut status = self.status();
        let counts = self.plan.class != Class::Exec;
        let channel = self.supervisor.in_use().filter(|_| counts).map(|id| self.control_channel(id));
        // It talks to the appliance, which may take its time. There are no more of these than peers of the control socket.
        tokio::spawn(async move {
            if let Some(channel) = channel {
                let counted = tokio::time::timeout(COUNTERS_LIMIT, live::counters(&channel)).await;
                match counted {
                    Ok(Ok(counters)) => status.add_counters(counters),
                    Ok(Err(error)) => status.counters_missing = Some(format!("{error:#}")),
                    Err(_) => status.counters_missing = Some("the back-end does not answer".to_owned()),
                }
            }
            replies.send(Reply::Status(Box::new(status)));
        });
    }

    fn status(&self) -> Status {
        let (plan, in_use) = (&self.plan, self.supervisor.in_use());
        Status {
            state: self.supervisor.word().to_owned(),
            class: plan.class.name().to_owned(),
            text: self.ports.first().map(|port| port.status_text.clone()).unwrap_or_default(),
            pids: LivePids {
                vvu: std::process::id(),
                bridge: self.fleet.pid(Member::Bridge(PortId(0))),
                qemu: in_use.and_then(|id| self.fleet.pid(Member::Appliance(id))),
            },
            appliance: in_use.and_then(|id| self.fleet.appliance(id)),
            standby: self.supervisor.booting().and_then(|id| self.fleet.appliance(id)),
            restarts: self.supervisor.restarts(),
            last_pause_us: self.last_pause_us,
            uptime_ms: self.elapsed_ms(),
            image: plan.disks.first().filter(|_| plan.class == Class::Blk).map(image_status),
            disks: plan.disks.iter().map(image_status).collect(),
            socket: plan.socket().to_owned(),
            ports: self.port_ids().filter_map(|port| self.port_status(port)).collect(),
            uplink_counters: None,
            counters_missing: None,
            channels: self.channel_facts(),
            appliance_dir: plan.machine.appliance.directory.clone(),
            runtime_dir: self.directory.text().to_owned(),
        }
    }

    fn port_status(&self, number: PortId) -> Option<PortStatus> {
        let (state, port) = (self.ports.get(number.index())?, self.plan.ports.get(number.index())?);
        Some(PortStatus {
            port: number,
            socket: port.socket.clone(),
            queues: port.queues,
            mac: port.mac.map(|mac| mac.to_string()),
            settings: live::settings(&self.plan.config, number),
            counters: None,
            bridge: self.fleet.pid(Member::Bridge(number)),
            text: state.status_text.clone(),
        })
    }
}

fn image_status(disk: &Disk) -> ImageStatus {
    ImageStatus {
        path: disk.image.path.clone(),
        size_bytes: disk.image.size_bytes,
        read_only: disk.image.read_only,
        shared: disk.lock.is_none(),
    }
}
