//! `/init` of the appliance image.

use std::convert::Infallible;
use std::path::Path;

use anyhow::{Context, Result, bail};
use tokio::task::{JoinSet, LocalSet};
use vvu_agent::boot;
use vvu_agent::device_sets::bring_up;
use vvu_agent::modules::{Modules, Stage};
use vvu_agent::reaper::{Reaper, Scope};

fn main() -> Result<()> {
    if !rustix::process::getpid().is_init() {
        bail!("this program is PID 1 of an appliance VM, and does nothing elsewhere");
    }
    let Err(error) = run();
    // The VM is of no use any more. A line on the console is all that can be left behind.
    eprintln!("vvu-agent: {error:#}");
    Ok(boot::power_off()?)
}

fn run() -> Result<Infallible> {
    boot::mount_file_systems()?;
    let modules = Modules::read(Path::new("/etc/modules.list"), Path::new("/lib/modules"))?;
    modules.load(Stage::Boot)?;
    let config = boot::read_config()?;
    boot::start_log(&config.log)?;
    // No program that is started from here on gains rights by being executed.
    rustix::thread::set_no_new_privs(true).context("cannot give up new privileges")?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot wait for events")?;
    LocalSet::new().block_on(&runtime, async {
        let (reaper, reaper_task) = Reaper::new(Scope::AllChildren).context("cannot wait for processes")?;
        let mut tasks = JoinSet::new();
        tokio::task::spawn_local(async move {
            if let Err(error) = reaper_task.run().await {
                tracing::error!("cannot wait for processes: {error}");
            }
        });
        for set in bring_up(&config, &modules, &reaper).await? {
            tasks.spawn_local(set.serve());
        }
        while let Some(ended) = tasks.join_next().await {
            let Err(error) = ended.context("a device set's task failed")?;
            tracing::error!("device set ended: {:#}", anyhow::Error::new(error));
        }
        bail!("no device set is left")
    })
}
