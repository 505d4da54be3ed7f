//! The command line, by QEMU's conventions for vhost-user back-end programs (QEMU documentation, "Vhost-user Protocol",
//! section "Backend program conventions").

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{ArgGroup, Parser, ValueEnum};
use uuid::Uuid;
use vvu_protocol::doorbell::MAX_VECTORS;
use vvu_protocol::window::{MEMORY_LEN_MAX, MEMORY_LEN_MIN};

/// Relays one vhost-user device into an appliance VM.
#[derive(Debug, Parser)]
#[command(name = "vvu-bridge", version)]
#[command(group = ArgGroup::new("front-end").args(["socket_path", "fd", "print_capabilities"]).required(true))]
pub struct Options {
    /// Listen for front-ends at this path.
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Use the socket with this descriptor number: a listening one for any number of front-ends, a connected one for one.
    #[arg(long, value_name = "FDNUM")]
    pub fd: Option<RawFd>,

    /// Make the sockets of the device set here: control.sock, window.sock, doorbell.sock. Who can open them is the
    /// appliance, so the directory should belong to one user alone.
    #[arg(long, value_name = "DIR", required_unless_present = "print_capabilities")]
    pub appliance_dir: Option<PathBuf>,

    /// Identity of the device set, as the appliance's configuration names it. Default: a new one.
    #[arg(long, value_name = "UUID")]
    pub uuid: Option<Uuid>,

    /// Class of the device; only --print-capabilities uses it.
    #[arg(long, value_enum, default_value_t = Class::Blk)]
    pub class: Class,

    /// Most queues that a front-end can use.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,

    /// Number of vectors of the appliance's doorbell device: one for each queue, and one for each kick eventfd that a
    /// front-end ever brings. Default: no more than the queues, and kicks are relayed.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_VECTORS)))]
    pub vectors: Option<u16>,

    /// Relay all kicks and calls, in place of handing the front-end's eventfds over to the appliance's VMM.
    #[arg(long)]
    pub relay: bool,

    /// Largest driver memory that can be served, in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 30,
          value_parser = clap::value_parser!(u64).range(MEMORY_LEN_MIN..=MEMORY_LEN_MAX))]
    pub window: u64,

    /// End when the parent process ends.
    #[arg(long)]
    pub exit_with_parent: bool,

    /// Print what this back-end can do, as JSON, and end.
    #[arg(long)]
    pub print_capabilities: bool,
}

/// Device classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Class {
    /// A block device.
    Blk,
}

impl Class {
    /// The type in QEMU's schema of capabilities (docs/interop/vhost-user.json).
    #[must_use]
    pub const fn capability_type(self) -> &'static str {
        match self {
            Self::Blk => "block",
        }
    }
}
