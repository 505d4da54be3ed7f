//! `vvu-loopback`: parses, runs the machine, and turns an error into one line and an exit code.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, oneshot};
use tracing_subscriber::EnvFilter;
use vvu_loopback::doorbell::Doorbells;
use vvu_loopback::guest::{self, Machine};
use vvu_loopback::registers::Bus;
use vvu_loopback::vmm::{Vmm, VmmError};
use vvu_loopback::window::Mappings;

/// Stands for an appliance VM beside a bridge, without a VM: for tests and benchmarks.
///
/// Start vvu-bridge and a vhost-user back-end, then this; the front-end connects to the bridge. It ends when the bridge closes
/// its sockets. A second one beside the first is an upgrade: the bridge moves the front-end over to it.
#[derive(Debug, Parser)]
#[command(name = "vvu-loopback", version)]
struct Options {
    /// Directory with the bridge's sockets: its --appliance-dir.
    #[arg(long, visible_alias = "appliance-dir", value_name = "DIR")]
    bridge: PathBuf,

    /// Socket of the back-end, which may come and go.
    #[arg(long, value_name = "SOCKET")]
    back_end: PathBuf,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vvu-loopback: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn runtime() -> anyhow::Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("cannot wait for events")
}

fn run(Options { bridge, back_end }: Options) -> anyhow::Result<()> {
    let back_end = std::path::absolute(&back_end).with_context(|| format!("socket {}", back_end.display()))?;
    let (started, start) = oneshot::channel();
    let (ended, mut end) = oneshot::channel();
    std::thread::Builder::new()
        .name("vmm".to_owned())
        .spawn(move || {
            let outcome = serve(&bridge, started);
            // Who waits for it has ended if this fails.
            let _ = ended.send(outcome);
        })
        .context("cannot start a thread")?;
    runtime()?.block_on(async {
        tokio::select! {
            // The VMM's word counts: the guest fails when it has ended.
            biased;
            outcome = &mut end => outcome.context("the VMM's thread has ended")?,
            error = async {
                let Ok(machine) = start.await else { return std::future::pending().await };
                let Err(error) = guest::run(machine, back_end).await;
                error
            } => match error {
                // It has lost its VMM, which says why.
                guest::GuestError::Control(_) | guest::GuestError::DeviceSet(_) => {
                    let outcome = tokio::time::timeout(std::time::Duration::from_secs(1), &mut end).await;
                    outcome.map_or_else(|_| Err(error.into()), |outcome| outcome.context("the VMM's thread")?)
                }
                other => Err(other.into()),
            },
        }
    })
}

/// The VMM, from beginning to end.
fn serve(bridge: &Path, started: oneshot::Sender<Machine>) -> anyhow::Result<()> {
    let (sender, exits) = mpsc::unbounded_channel();
    let (doorbells, mappings) = (Doorbells::default(), Mappings::default());
    let (bus, for_guest) = (Bus(sender), (doorbells.clone(), mappings.clone()));
    let ended = runtime()?.block_on(async {
        let (vmm, uuid) = Vmm::connect(bridge, exits, doorbells, mappings).await?;
        let (doorbells, mappings) = for_guest;
        let memory = vmm.memory()?;
        // If nobody waits for it any more, its end of the bus is closed.
        let _ = started.send(Machine { uuid, bus, memory, doorbells, mappings });
        Ok::<_, VmmError>(vmm.run().await)
    });
    match ended {
        Ok(None) => Ok(()),
        Ok(Some(error)) | Err(error) if error.is_dismissal() => {
            tracing::info!("ends: {error}");
            Ok(())
        }
        Ok(Some(error)) | Err(error) => Err(error.into()),
    }
}
