//! The command line: one definition for parser and help.

mod device;
mod machine;
mod values;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub(crate) use self::device::{BlkArgs, ExecArgs, NetArgs, SwitchArgs, UplinkArgs};
pub(crate) use self::machine::{DEFAULT_WINDOW, MachineArgs, RestartChoice};
pub(crate) use self::values::{DiskSpec, ImageFormat};
use crate::net_options::{Link, Macs, Vlans};
use crate::size::Size;

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
    /// Change what the driver VM of a running device may ask for
    Limit(LiveLimitArgs),
    /// Change the state of a running network device's link
    Link(LinkArgs),
    /// Change what a running network device lets pass
    Filter(FilterArgs),
    /// Test whether this host can serve devices, with a remedy for each shortcoming; exit code 0 only if it can
    Check(CheckArgs),
}

/// The device classes.
#[derive(Debug, Subcommand)]
pub(crate) enum Device {
    /// A virtio block device backed by an image file or a block device
    Blk(Box<BlkArgs>),
    /// A virtio network device
    Net(Box<NetArgs>),
    /// Several virtio network devices, connected to each other inside the appliance VM
    Switch(Box<SwitchArgs>),
    /// A device emulated by any program that speaks vhost-user
    Exec(Box<ExecArgs>),
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

/// Options of `vvu limit`.
#[derive(Debug, Args)]
pub(crate) struct LiveLimitArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,

    /// Number of the port, from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) port: u8,

    /// Requests, or packets both ways, that pass in a second; 0 is no limit [default: as it is]
    #[arg(long, value_name = "N", required_unless_present = "bandwidth")]
    pub(crate) iops: Option<u64>,

    /// Bytes that pass in a second; K, M, G, T are powers of 1024; 0 is no limit [default: as it is]
    #[arg(long, value_name = "SIZE")]
    pub(crate) bandwidth: Option<Size>,
}

/// Options of `vvu link`.
#[derive(Debug, Args)]
pub(crate) struct LinkArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,

    /// The state wanted
    pub(crate) state: Link,

    /// Number of the port, from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) port: u8,
}

/// Options of `vvu filter`.
#[derive(Debug, Args)]
pub(crate) struct FilterArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,

    /// Number of the port, from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) port: u8,

    /// Source addresses that the driver VM may send from: MAC;MAC or any [default: as it is]
    #[arg(long, value_name = "MAC;MAC", required_unless_present = "vlans")]
    pub(crate) macs: Option<Macs>,

    /// VLANs that pass, 0 being frames without a tag: N;N or any [default: as it is]
    #[arg(long, value_name = "N;N")]
    pub(crate) vlans: Option<Vlans>,
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

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::accel::AccelChoice;
    use crate::size::GIB;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_defaults_are_those_of_the_help() {
        let cli = Cli::parse_from(["vvu", "run", "blk", "--image", "d.img", "--socket", "d.sock"]);
        let Command::Run(Device::Blk(args)) = cli.command else { panic!("not blk") };
        let machine = args.machine;
        assert_eq!((args.queues, machine.cpus, machine.window, machine.memory), (1, 1, Size(4 * GIB), None));
        assert_eq!((machine.restart, machine.restart_limit), (RestartChoice::Always, "5/60".parse().unwrap()));
        assert_eq!((machine.accel, args.read_only, machine.json), (AccelChoice::Auto, false, false));
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
            ["--format", "vmdk"],
            ["--backing", "/no/format"],
            ["--iops", "-1"],
            ["--poll", "sometimes"],
            ["--poll-window", "1000001"],
            ["--queue-cpus", "0-1"],
            ["--restart", "sometimes"],
            ["--restart-limit", "0/60"],
        ] {
            let arguments = ["vvu", "run", "blk", "--image", "d.img", "--socket", "d.sock", bad[0], bad[1]];
            assert!(Cli::try_parse_from(arguments).is_err(), "{bad:?}");
        }
    }
}
