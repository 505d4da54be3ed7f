//! `/init` of the appliance image.

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::path::Path;

use anyhow::{Context, Result, bail};
use tokio::task::{JoinSet, LocalSet};
use vvu_agent::boot;
use vvu_agent::device_sets::{RealDeviceSet, bring_up};
use vvu_agent::modules::{Modules, Stage};
use vvu_agent::orderly_end::OrderlyEnd;
use vvu_agent::reaper::{Reaper, Scope};
use vvu_agent::session::DeviceSetError;
use vvu_appliance_config::BootTimes;

fn main() -> Result<()> {
    if !rustix::process::getpid().is_init() {
        bail!("this program is PID 1 of an appliance VM, and does nothing elsewhere");
    }
    if let Err(error) = run() {
        // The VM is of no use any more. A line on the console is all that can be left behind.
        eprintln!("vvu-agent: {error:#}");
    }
    Ok(boot::power_off()?)
}

/// Serves until that is over in order.
fn run() -> Result<()> {
    let mut times = BootTimes { agent: boot::uptime_ms(), ..BootTimes::default() };
    boot::mount_file_systems()?;
    let modules = Modules::read(Path::new("/etc/modules.list"), Path::new("/lib/modules"))?;
    modules.load(Stage::Boot)?;
    let config = boot::read_config()?;
    boot::start_log(&config.log)?;
    tracing::info!(version = %env!("CARGO_PKG_VERSION"), kernel = %boot::kernel_release(), "agent starts");
    boot::prepare_for_programs(&config)?;
    if boot::has_uplink(&config) {
        Modules::read(Path::new("/etc/modules-net.list"), Path::new("/lib/modules"))?.load(Stage::Boot)?;
    }
    times.modules = boot::uptime_ms();
    // No program that is started from here on gains rights by being executed.
    rustix::thread::set_no_new_privs(true).context("cannot give up new privileges")?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot wait for events")?;
    LocalSet::new().block_on(&runtime, async {
        let (reaper, reaper_task) = Reaper::new(Scope::AllChildren).context("cannot wait for processes")?;
        let mut serving = JoinSet::new();
        tokio::task::spawn_local(async move {
            if let Err(error) = reaper_task.run().await {
                tracing::error!("cannot wait for processes: {error}");
            }
        });
        let machine = bring_up(&config, &modules, &reaper, &mut times).await?;
        // Whatever the log's filter is: the launcher reads it.
        eprintln!("{times}");
        for (name, channel) in machine.channels {
            tokio::task::spawn_local(async move {
                let Err(error) = channel.run().await;
                tracing::error!("channel {name} has failed: {error}");
            });
        }
        for mut set in machine.sets {
            serving.spawn_local(async move {
                let error = set.serve().await.err();
                (set, error)
            });
        }
        let wanted = tokio::select! {
            Err(error) = run_sets(&mut serving) => return Err(error),
            wanted = end_wanted(machine.orderly_end.as_ref()) => wanted,
        };
        wanted.context("the channel for the end has failed")?;
        // Front-ends go first: a program that ends is asked for nothing any more.
        serving.shutdown().await;
        if let Some(end) = machine.orderly_end {
            end.end_program().await;
        }
        rustix::fs::sync();
        Ok(())
    })
}

async fn end_wanted(orderly_end: Option<&OrderlyEnd>) -> io::Result<()> {
    match orderly_end {
        Some(end) => end.wanted().await,
        None => pending().await,
    }
}

/// Waits until no device set serves any more. What is left of one stays down beside the others.
async fn run_sets(serving: &mut JoinSet<(RealDeviceSet, Option<DeviceSetError>)>) -> Result<Infallible> {
    let mut down = JoinSet::new();
    while let Some(ended) = serving.join_next().await {
        let (set, Some(error)) = ended.context("a device set's task failed")? else { continue };
        let error = anyhow::Error::new(error).context(format!("device set {}", set.uuid()));
        if serving.is_empty() {
            return Err(error.context("no device set is left"));
        }
        tracing::error!("{error:#}");
        down.spawn_local(set.stay_down());
    }
    bail!("no device set is left")
}
