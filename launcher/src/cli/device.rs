//! Options of the device classes.

use std::path::PathBuf;

use clap::Args;
use vvu_appliance_config::{Limits, MAX_POLL_WINDOW_US, MAX_QUEUES, MTU_RANGE, Poll, Threads};

use super::machine::MachineArgs;
use super::values::{Backing, DiskSpec, ImageFormat, channel, serial};
use crate::mac::Mac;
use crate::net_options::{Link, Macs, PortSpec, Uplink, Vlans, pairs};
use crate::size::Size;

/// Vrings of a program's device, enough for every class but network devices with many queues.
const EXEC_VRINGS: u16 = 8;

/// Default of `--poll-window`, in microseconds.
const DEFAULT_POLL_WINDOW_US: u32 = 32;

/// Most that a driver VM may ask for.
#[derive(Debug, Args)]
pub(crate) struct LimitArgs {
    /// Requests, or packets both ways, that pass in a second; 0 is no limit
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) iops: u64,

    /// Bytes that pass in a second; K, M, G, T are powers of 1024; 0 is no limit
    #[arg(long, value_name = "SIZE", default_value_t = Size(0))]
    pub(crate) bandwidth: Size,
}

impl LimitArgs {
    /// What the agent is told.
    pub(crate) fn limits(&self) -> Limits {
        Limits { operations_per_second: self.iops, bytes_per_second: self.bandwidth.0 }
    }
}

/// How the threads of the device's queues work.
#[derive(Debug, Args)]
pub(crate) struct ThreadArgs {
    /// When a queue's thread looks for requests by itself, instead of being notified: off, never; auto, for a while that adapts to
    /// what it finds; always, without end, which takes a CPU of the appliance for each queue
    #[arg(long, value_name = "MODE", default_value = "auto")]
    poll: PollChoice,

    /// Longest time that auto looks before the thread sleeps, in microseconds
    #[arg(long, value_name = "MICROSECONDS", default_value_t = DEFAULT_POLL_WINDOW_US,
          value_parser = clap::value_parser!(u32).range(..=i64::from(MAX_POLL_WINDOW_US)))]
    poll_window: u32,

    /// CPUs of the appliance, from 0 to below --cpus, that the queues' threads run on, one after the other, as 0,1
    /// [default: where the appliance's kernel wants]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    queue_cpus: Vec<u16>,
}

/// Value of `--poll`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum PollChoice {
    /// Never.
    Off,
    /// For a while.
    Auto,
    /// Without end.
    Always,
}

impl ThreadArgs {
    /// What the agent is told of an appliance with so many CPUs.
    ///
    /// # Errors
    /// A CPU is named that the appliance does not have.
    pub(crate) fn threads(&self, cpus: u16) -> anyhow::Result<Threads> {
        if let Some(cpu) = self.queue_cpus.iter().find(|cpu| **cpu >= cpus) {
            anyhow::bail!(
                "--queue-cpus names CPU {cpu}, the appliance has 0 to {}; raise --cpus",
                cpus.saturating_sub(1)
            );
        }
        let poll = match self.poll {
            PollChoice::Off => Poll::Off,
            PollChoice::Auto => Poll::Auto,
            PollChoice::Always => Poll::Always,
        };
        Ok(Threads { poll, poll_window_us: self.poll_window, cpus: self.queue_cpus.clone() })
    }
}

/// Options of `vvu run blk`.
#[derive(Debug, Args)]
pub(crate) struct BlkArgs {
    /// Image file or block device that holds the disk
    #[arg(long, value_name = "PATH")]
    pub(crate) image: PathBuf,

    /// Where the driver VM's VMM will find the vhost-user socket; a stale socket is replaced
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,

    /// Open the image read-only and refuse every write
    #[arg(long)]
    pub(crate) read_only: bool,

    /// Do not lock the image, so that a second vvu can have it open for a live migration of the driver VM; you promise that
    /// nothing else opens it, and that one of the two VMs at most runs at any time
    #[arg(long)]
    pub(crate) share_image: bool,

    /// Format of the image, which is never asked itself. With raw its bytes are served as they are even if they look like a
    /// disk container [default: raw, and containers are refused]
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<ImageFormat>,

    /// What the qcow2 image does not hold is read from here, what that does not hold from the next one; never written, and
    /// only what is named here is opened. raw:PATH or qcow2:PATH
    #[arg(long, value_name = "FORMAT:PATH")]
    pub(crate) backing: Vec<Backing>,

    /// Request queues offered to the driver VM, 1 to 64; best one per CPU of the driver VM
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub(crate) queues: u16,

    /// Serial number that the driver VM sees, up to 20 printable ASCII characters [default: from the image's file name]
    #[arg(long, value_name = "TEXT", value_parser = serial)]
    pub(crate) serial: Option<String>,

    #[command(flatten)]
    pub(crate) limits: LimitArgs,

    #[command(flatten)]
    pub(crate) threads: ThreadArgs,

    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// Where frames leave the appliance.
#[derive(Debug, Args)]
pub(crate) struct UplinkArgs {
    /// The network outside: tap=INTERFACE (a TAP of the host that exists and that this user owns), user (QEMU's user-mode
    /// network), or netdev=VALUE with any value of QEMU's -netdev, without its id
    #[arg(long, value_name = "UPLINK")]
    pub(crate) uplink: Option<Uplink>,

    /// Largest packet in bytes without its Ethernet header
    #[arg(long, value_name = "BYTES", default_value_t = 1500,
          value_parser = clap::value_parser!(u16).range(i64::from(*MTU_RANGE.start())..=i64::from(*MTU_RANGE.end())))]
    pub(crate) mtu: u16,
}

/// Options of `vvu run net`.
#[derive(Debug, Args)]
pub(crate) struct NetArgs {
    /// Where the driver VM's VMM will find the vhost-user socket; a stale socket is replaced
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,

    #[command(flatten)]
    pub(crate) uplink: UplinkArgs,

    /// MAC address of the driver VM's network card [default: one made from the socket's path and this host's id]
    #[arg(long, value_name = "MAC")]
    pub(crate) mac: Option<Mac>,

    /// Queue pairs offered to the driver VM, 1 to 31; best one per CPU of the driver VM
    #[arg(long, value_name = "N", default_value = "1", value_parser = pairs)]
    pub(crate) queues: u16,

    /// Whether the link is up at the start
    #[arg(long, value_name = "STATE", default_value = "up")]
    pub(crate) link: Link,

    /// Source addresses that the driver VM may send from: MAC;MAC or any
    #[arg(long, value_name = "MAC;MAC", default_value = "any", hide_default_value = true)]
    pub(crate) macs: Macs,

    /// VLANs that pass, 0 being frames without a tag: N;N or any
    #[arg(long, value_name = "N;N", default_value = "any", hide_default_value = true)]
    pub(crate) vlans: Vlans,

    #[command(flatten)]
    pub(crate) limits: LimitArgs,

    #[command(flatten)]
    pub(crate) threads: ThreadArgs,

    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// Options of `vvu run switch`.
#[derive(Debug, Args)]
pub(crate) struct SwitchArgs {
    /// A vhost-user socket with what can be said of it, up to 8 times:
    /// `PATH[,mac=MAC][,queues=N][,link=down][,macs=MAC;MAC][,vlans=N;N][,iops=N][,bandwidth=SIZE]`
    #[arg(long = "port", value_name = "PORT", required = true)]
    pub(crate) ports: Vec<PortSpec>,

    #[command(flatten)]
    pub(crate) uplink: UplinkArgs,

    #[command(flatten)]
    pub(crate) threads: ThreadArgs,

    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// Options of `vvu run exec`.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// Where the driver VM's VMM will find the vhost-user socket; a stale socket is replaced
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,

    /// Directory that is added to the appliance's root directory: the program, its libraries, its files
    #[arg(long, value_name = "DIR")]
    pub(crate) overlay: PathBuf,

    /// A disk for the program, `NAME=PATH[,ro][,size=SIZE]`: {disk:NAME} in the command is its device node. A file is locked, and
    /// made at least SIZE long, which images that grow need
    #[arg(long = "disk", value_name = "DISK")]
    pub(crate) disks: Vec<DiskSpec>,

    /// A stream to the program: who connects to SOCKET.NAME on the host is connected to the unix socket {channel:NAME} on
    /// which the program listens
    #[arg(long = "channel", value_name = "NAME", value_parser = channel)]
    pub(crate) channels: Vec<String>,

    /// Vrings of the device, all kinds together, 1 to 64: two for each pair of a network device, two or more for a file system
    #[arg(long, value_name = "N", default_value_t = EXEC_VRINGS, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub(crate) queues: u16,

    #[command(flatten)]
    pub(crate) machine: MachineArgs,

    /// The program and its arguments; {socket} stands for the vhost-user socket on which it shall listen, {socket-stem} for the
    /// same without the 0 at its end, which some programs add themselves
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}
