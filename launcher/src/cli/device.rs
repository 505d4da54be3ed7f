//! Options of the device classes.

use std::path::PathBuf;

use clap::Args;
use vvu_appliance_config::MAX_QUEUES;

use super::machine::MachineArgs;
use super::values::{ImageFormat, serial};

/// Options of `vvu run blk`.
#[derive(Debug, Args)]
pub(crate) struct BlkArgs {
    /// Raw image file or block device that holds the disk
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

    /// Serve the image's bytes as they are even if they look like a disk container such as qcow2
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<ImageFormat>,

    /// Request queues offered to the driver VM, 1 to 64; best one per CPU of the driver VM
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub(crate) queues: u16,

    /// Serial number that the driver VM sees, up to 20 printable ASCII characters [default: from the image's file name]
    #[arg(long, value_name = "TEXT", value_parser = serial)]
    pub(crate) serial: Option<String>,

    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}
