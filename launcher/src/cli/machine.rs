//! Options of the appliance VM and its surroundings, the same for every class of device.

use std::path::PathBuf;

use clap::Args;
use vvu_appliance_config::MAX_QUEUES;

use super::values::{memory_size, window_size};
use crate::accel::AccelChoice;
use crate::restart_policy::RestartLimit;
use crate::size::{GIB, Size};

/// Window of a device whose operator names none.
pub(crate) const DEFAULT_WINDOW: Size = Size(4 * GIB);

/// Most CPUs of an appliance: one for each queue at most.
const MAX_CPUS: u16 = MAX_QUEUES;

/// What every `vvu run` can be told.
#[derive(Debug, Args)]
pub(crate) struct MachineArgs {
    /// Where `vvu status` and the other commands find this run; a stale socket is replaced [default: SOCKET.ctl]
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,

    /// Whether an appliance VM or a bridge that dies after the device was ready is started again
    #[arg(long, value_name = "WHEN", default_value = "always")]
    pub(crate) restart: RestartChoice,

    /// End the run instead when more restarts than N within SECONDS would be needed
    #[arg(long, value_name = "N/SECONDS", default_value = "5/60")]
    pub(crate) restart_limit: RestartLimit,

    /// Largest driver VM memory that can be served, for each port; K, M, G, T are powers of 1024
    #[arg(long, value_name = "SIZE", default_value_t = DEFAULT_WINDOW, value_parser = window_size)]
    pub(crate) window: Size,

    /// The appliance VM's own memory [default: 128M plus a 256th of each port's window; 64M more for programs of others]
    #[arg(long, value_name = "SIZE", value_parser = memory_size)]
    pub(crate) memory: Option<Size>,

    /// CPUs of the appliance VM, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_CPUS)))]
    pub(crate) cpus: u16,

    /// How the appliance VM is run; auto takes KVM where it is usable
    #[arg(long, value_name = "ACCEL", default_value = "auto")]
    pub(crate) accel: AccelChoice,

    /// Directory of the appliance image [default: $VVU_APPLIANCE, else /usr/share/vvu/appliance]
    #[arg(long, value_name = "DIR")]
    pub(crate) appliance: Option<PathBuf>,

    /// Further words for the kernel command line of the appliance VM, for debugging
    #[arg(long, value_name = "TEXT")]
    pub(crate) append: Option<String>,

    /// QEMU 11 or newer for the appliance VM [default: $VVU_QEMU, else qemu-system-x86_64 on PATH]
    #[arg(long, value_name = "PATH")]
    pub(crate) qemu: Option<PathBuf>,

    /// The bridge [default: vvu-bridge beside vvu, else on PATH]
    #[arg(long, value_name = "PATH")]
    pub(crate) bridge: Option<PathBuf>,

    /// Have the bridge relay every kick and call, in place of handing the eventfds of the driver VM's VMM over to the appliance's:
    /// for comparison, or where one VMM is not to hold what the other one signals with
    #[arg(long)]
    pub(crate) relay: bool,

    /// Also write the logs to appliance.log, bridge.log and qemu.log in this directory
    #[arg(long, value_name = "DIR")]
    pub(crate) log_dir: Option<PathBuf>,

    /// Filter of the bridge's and the appliance's logs, in the syntax of tracing's EnvFilter
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub(crate) log: String,

    /// Print one JSON object per line on standard output instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

/// When to restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum RestartChoice {
    /// Within the limit.
    Always,
    /// The run ends with the first death.
    Never,
}
