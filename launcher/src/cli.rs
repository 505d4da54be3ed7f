//! The command line: one definition for parser and help.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use vvu_appliance_config::{MAX_QUEUES, MAX_SERIAL_LEN};
use vvu_protocol::window;

use crate::accel::AccelChoice;
use crate::restart_policy::RestartLimit;
use crate::size::{GIB, MIB, Size};

/// Window of a device whose operator names none.
pub(crate) const DEFAULT_WINDOW: Size = Size(4 * GIB);

/// Smallest appliance memory in bytes; below this its kernel and initial RAM file system do not unpack.
const MIN_MEMORY_BYTES: u64 = 96 * MIB;

/// Largest appliance memory in bytes.
const MAX_MEMORY_BYTES: u64 = 64 * GIB;

/// Most CPUs of an appliance: one for each queue at most.
const MAX_CPUS: u16 = MAX_QUEUES;

/// Virtio devices whose emulation runs in a VM of its own.
#[derive(Debug, Parser)]
#[command(name = "vvu", version, max_term_width = 120)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve one device until SIGINT or SIGTERM
    #[command(subcommand)]
    Run(Device),
    /// Tell the state of a running device
    Status(StatusArgs),
    /// Replace the appliance VM of a running device by one from another image, while the driver VM goes on
    Upgrade(UpgradeArgs),
    /// Replace the appliance VM of a running device by a new one from the same image, while the driver VM goes on
    Restart(RestartArgs),
    /// Change the size of a running device's disk
    Resize(ResizeArgs),
    /// Test whether this host can serve devices, with a remedy for each shortcoming; exit code 0 only if it can
    Check(CheckArgs),
}

/// The device classes.
#[derive(Debug, Subcommand)]
pub(crate) enum Device {
    /// A virtio block device backed by a raw image file or a block device
    Blk(Box<BlkArgs>),
}

/// Options of `vvu run blk`.
#[derive(Debug, Args)]
pub(crate) struct BlkArgs {
    /// Raw image file or block device that holds the disk
    #[arg(long, value_name = "PATH")]
    pub(crate) image: PathBuf,

    /// Where the driver VM's VMM will find the vhost-user socket; a stale socket is replaced
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,

    /// Where `vvu status` and the other commands find this run; a stale socket is replaced [default: SOCKET.ctl]
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,

    /// Whether an appliance VM or a bridge that dies after the device was ready is started again
    #[arg(long, value_name = "WHEN", default_value = "always")]
    pub(crate) restart: RestartChoice,

    /// End the run instead when more restarts than N within SECONDS would be needed
    #[arg(long, value_name = "N/SECONDS", default_value = "5/60")]
    pub(crate) restart_limit: RestartLimit,

    /// Open the image read-only and refuse every write
    #[arg(long)]
    pub(crate) read_only: bool,

    /// Do not lock the image, so that a second vvu can have it open for a live migration of the driver VM; you promise that
    /// nothing else opens it, and that one of the two VMs at most runs at any time
    #[arg(long)]
    pub(crate) share_image: bool,

    /// Serve the image's bytes as they are even if they look like a disk container such as qcow2
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<ImageFormat>,

    /// Request queues offered to the driver VM, 1 to 64; best one per CPU of the driver VM
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub(crate) queues: u16,

    /// Largest driver VM memory that can be served; K, M, G, T are powers of 1024
    #[arg(long, value_name = "SIZE", default_value_t = DEFAULT_WINDOW, value_parser = window_size)]
    pub(crate) window: Size,

    /// The appliance VM's own memory [default: 160M plus a 64th of the window]
    #[arg(long, value_name = "SIZE", value_parser = memory_size)]
    pub(crate) memory: Option<Size>,

    /// CPUs of the appliance VM, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_CPUS)))]
    pub(crate) cpus: u16,

    /// How the appliance VM is run; auto takes KVM where it is usable
    #[arg(long, value_name = "ACCEL", default_value = "auto")]
    pub(crate) accel: AccelChoice,

    /// Serial number that the driver VM sees, up to 20 printable ASCII characters [default: from the image's file name]
    #[arg(long, value_name = "TEXT", value_parser = serial)]
    pub(crate) serial: Option<String>,

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

/// Which run a command is about, and how it answers.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The vhost-user socket of the device, as given to vvu run
    pub(crate) socket: PathBuf,

    /// The control socket of the run, if it was started with --control [default: SOCKET.ctl]
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,

    /// Print JSON, one object per line, instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `vvu status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// Options of `vvu upgrade`.
#[derive(Debug, Args)]
pub(crate) struct UpgradeArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,

    /// Directory of the new appliance image, used for restarts as well from then on [default: the one in use, read anew]
    #[arg(long, value_name = "DIR")]
    pub(crate) appliance: Option<PathBuf>,
}

/// Options of `vvu restart`.
#[derive(Debug, Args)]
pub(crate) struct RestartArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// Options of `vvu resize`.
#[derive(Debug, Args)]
pub(crate) struct ResizeArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,

    /// New size of the disk, a multiple of 512 bytes; K, M, G, T are powers of 1024. A file is made that large; a block
    /// device must have the size already
    pub(crate) size: Size,

    /// Cut the file off if it is larger; what lies behind the new end is lost
    #[arg(long)]
    pub(crate) shrink: bool,
}

/// When to restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum RestartChoice {
    /// Within the limit.
    Always,
    /// The run ends with the first death.
    Never,
}

/// Options of `vvu check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// QEMU to test [default: $VVU_QEMU, else qemu-system-x86_64 on PATH]
    #[arg(long, value_name = "PATH")]
    pub(crate) qemu: Option<PathBuf>,

    /// Directory of the appliance image [default: $VVU_APPLIANCE, else /usr/share/vvu/appliance]
    #[arg(long, value_name = "DIR")]
    pub(crate) appliance: Option<PathBuf>,

    /// The bridge [default: vvu-bridge beside vvu, else on PATH]
    #[arg(long, value_name = "PATH")]
    pub(crate) bridge: Option<PathBuf>,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

/// Formats of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ImageFormat {
    /// The bytes of the file are the bytes of the disk.
    Raw,
}

fn window_size(text: &str) -> Result<Size, String> {
    let size = in_range(text, window::MEMORY_LEN_MIN, window::MEMORY_LEN_MAX)?;
    if size.0.is_multiple_of(window::ALIGNMENT) {
        Ok(size)
    } else {
        Err(format!("not a multiple of {}", Size(window::ALIGNMENT)))
    }
}

fn memory_size(text: &str) -> Result<Size, String> {
    let size = in_range(text, MIN_MEMORY_BYTES, MAX_MEMORY_BYTES)?;
    if size.0.is_multiple_of(MIB) { Ok(size) } else { Err("not a whole number of mebibytes".to_owned()) }
}

fn in_range(text: &str, min: u64, max: u64) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error: crate::size::SizeError| error.to_string())?;
    let allowed = min..=max;
    if allowed.contains(&size.0) { Ok(size) } else { Err(format!("expected {} to {}", Size(min), Size(max))) }
}

fn serial(text: &str) -> Result<String, String> {
    let printable = text.bytes().all(|byte| byte.is_ascii_graphic());
    if text.is_empty() || text.len() > MAX_SERIAL_LEN || !printable {
        return Err(format!("expected 1 to {MAX_SERIAL_LEN} printable ASCII characters without spaces"));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_defaults_are_those_of_the_help() {
        let cli = Cli::parse_from(["vvu", "run", "blk", "--image", "d.img", "--socket", "d.sock"]);
        let Command::Run(Device::Blk(args)) = cli.command else { panic!("not blk") };
        assert_eq!((args.queues, args.cpus, args.window, args.memory), (1, 1, Size(4 * GIB), None));
        assert_eq!((args.restart, args.restart_limit), (RestartChoice::Always, "5/60".parse().unwrap()));
        assert_eq!((args.accel, args.read_only, args.json), (AccelChoice::Auto, false, false));
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for bad in [
            ["--queues", "0"],
            ["--queues", "65"],
            ["--cpus", "0"],
            ["--window", "1M"],
            ["--window", "2T"],
            ["--window", "33554433"],
            ["--memory", "8M"],
            ["--memory", "134217729"],
            ["--serial", "with space"],
            ["--serial", ""],
            ["--accel", "hvf"],
            ["--format", "qcow2"],
            ["--restart", "sometimes"],
            ["--restart-limit", "0/60"],
        ] {
            let arguments = ["vvu", "run", "blk", "--image", "d.img", "--socket", "d.sock", bad[0], bad[1]];
            assert!(Cli::try_parse_from(arguments).is_err(), "{bad:?}");
        }
    }
}
