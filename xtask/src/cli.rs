//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vvu_guest_image::{KernelFlavour, Overlay};
use vvu_setup::SetupOptions;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Set-up, image, demo, tests and benchmarks of vvu")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Provide QEMU, kernel and packages in a private cache; the other commands do it when it is missing
    ///
    /// The cache is $VVU_CACHE, else $XDG_CACHE_HOME/vvu, else ~/.cache/vvu (about 450 MB). Nothing of the system is
    /// changed, and no rights are needed.
    Setup(Setup),
    /// Build the appliance image in target/appliance, or target/appliance-minimal, and list what is in it
    Image(Image),
    /// Put a back-end of others with its libraries into a directory, for `vvu run exec --overlay`
    ///
    /// It comes out of Debian's packages, or of the crate registry (then it is built, for tests: without optimisation).
    Overlay {
        /// The back-end
        #[arg(value_enum)]
        program: OverlayProgram,
        /// Directory to be made
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Show the main job: a driver VM's file system on a disk that an appliance VM emulates
    Demo {
        /// Leave the disk image in target/machine-tests/demo
        #[arg(long)]
        keep_image: bool,
    },
    /// Run every check: format, lints, documents, unit tests, image, whole machines
    Test(Test),
    /// Play bridge and agent against each other, without VMs, through random schedules
    Simulate(Simulate),
    /// Measure: disk or network in turn with other ways to serve it, the driver VM's pauses, the appliance VM's memory
    Bench(Bench),
    /// Compute what many devices cost on one host, from what one was measured to cost (docs/capacity.md)
    Capacity(Capacity),
    /// Kill parts at random under a verified load, over and over
    Soak(Soak),
}

#[derive(Debug, Args)]
pub(crate) struct Setup {
    /// Use this qemu-system-x86_64 (11 or later) instead of the one on PATH or a private one
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// Use this kernel image (bzImage, 6.12 or later) instead of a private one
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// That kernel's modules [default: beside the kernel, else /lib/modules/RELEASE]
    #[arg(long, value_name = "DIR", requires = "kernel")]
    modules: Option<PathBuf>,
}

impl From<Setup> for SetupOptions {
    fn from(options: Setup) -> Self {
        Self { qemu: options.qemu, kernel: options.kernel, modules: options.modules }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Image {
    /// The appliance's kernel
    #[arg(long, value_enum, value_name = "FLAVOUR", default_value_t = Kernel::Stock)]
    pub(crate) kernel: Kernel,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kernel {
    /// The distribution's, as its package has it
    Stock,
    /// One with nothing in it but what an appliance needs, built of the distribution's source, once, in some minutes
    Minimal,
}

impl From<Kernel> for KernelFlavour {
    fn from(kernel: Kernel) -> Self {
        match kernel {
            Kernel::Stock => Self::Stock,
            Kernel::Minimal => Self::Minimal,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Test {
    /// Leave out the image and the whole-machine tests
    #[arg(long)]
    pub(crate) no_machines: bool,
    /// Of the whole-machine tests, run those with this in their name
    #[arg(value_name = "NAME")]
    pub(crate) machine_filter: Option<String>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Simulate {
    /// Number of schedules
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub(crate) schedules: u64,
    /// Seed of the first one; each further one has the next number
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub(crate) seed: u64,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Soak {
    /// Number of kills, of which some come in pairs
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) iterations: u32,
    /// What is killed, and when, follows from this number [default: another one each time]
    #[arg(long, value_name = "S")]
    pub(crate) seed: Option<u64>,
    /// Print one JSON document at the end
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Capacity {
    /// Numbers of devices
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 100, 1000], value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(crate) devices: Vec<u64>,
    /// Window of each device in GiB
    #[arg(long, value_name = "GIB", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub(crate) window: u64,
    /// CPUs of the host [default: 64]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=65536))]
    pub(crate) cpus: Option<u64>,
    /// Memory of the host in GiB [default: 256]
    #[arg(long, value_name = "GIB", value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    pub(crate) memory: Option<u64>,
    /// What `cargo xtask bench boot --json` has written [default: docs/capacity.json]
    #[arg(long, value_name = "PATH")]
    pub(crate) figures: Option<PathBuf>,
    /// Print one JSON document instead of tables
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Bench {
    /// What is measured
    #[arg(value_enum, default_value_t = Figure::Disk)]
    pub(crate) figure: Figure,
    /// Rounds of each job, or of each kind of pause [default: 3, and 10 for pauses]; memory has none
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: Option<u32>,
    /// Seconds of each run of fio, iperf3 or vvu-bench [default: 4, and 0.5 for vvu-bench]
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub(crate) runtime: Option<Duration>,
    /// Size of the disk's image in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(64..))]
    pub(crate) image_size: u64,
    /// Which disk is compared with qemu-storage-daemon's
    #[arg(long, value_enum, default_value_t = Measured::Vvu)]
    pub(crate) measured: Measured,
    /// Kernel of the appliance VM [default: that of the image which $VVU_APPLIANCE names, else stock]
    #[arg(long, value_enum, value_name = "FLAVOUR")]
    pub(crate) kernel: Option<Kernel>,
    /// Make the figures of instructions the baseline
    #[arg(long)]
    pub(crate) accept: bool,
    /// Print one JSON document instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.filter(|time| !time.is_zero()).ok_or_else(|| "expected a number of seconds, as 4 or 0.5".to_owned())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OverlayProgram {
    /// Disk images of many formats
    QemuStorageDaemon,
    /// A file system
    Virtiofsd,
    /// Networks: DPDK's test program
    DpdkTestpmd,
    /// Virtio's own sockets
    VhostDeviceVsock,
    /// Random bytes, from the crate registry
    VhostDeviceRng,
}

impl From<OverlayProgram> for Overlay {
    fn from(program: OverlayProgram) -> Self {
        match program {
            OverlayProgram::QemuStorageDaemon => Self::QemuStorageDaemon,
            OverlayProgram::Virtiofsd => Self::Virtiofsd,
            OverlayProgram::DpdkTestpmd => Self::DpdkTestpmd,
            OverlayProgram::VhostDeviceVsock => Self::VhostDeviceVsock,
            OverlayProgram::VhostDeviceRng => Self::VhostDeviceRng,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Figure {
    /// Requests per second and latency
    Disk,
    /// TCP throughput between driver VMs and to the host, beside QEMU's own devices, passt, and vvu-net on the host
    Net,
    /// Memory of an appliance VM for each class of device, and the size of its image
    Memory,
    /// What one disk with an appliance VM costs until it is ready, and idle: steps, CPU, memory by kind, wake-ups
    Boot,
    /// What 1 to 16 disks with an appliance VM each cost together, beside what the model of capacity makes of one
    Devices,
    /// Instructions of the back-ends per request, counted by callgrind, beside a baseline, and the functions they are in
    Instructions,
    /// The block back-end on the host beside qemu-storage-daemon on the host: what there is without any VM
    Backend,
    /// What bridge and agent cost as processes of the host, without any VM: signals handed over, and relayed
    Loopback,
    /// The block back-end in an appliance VM beside the same program on the host
    Appliance,
    /// Control messages, memory maps and signals through the bridge
    Bridge,
    /// Single functions, by criterion: messages, places in the window, a round of a ring
    Functions,
    /// Frames from one port of the switch to another, on the host and in an appliance VM
    Packets,
    /// How long the driver VM waits when something behind its disk is lost or replaced, or when it migrates
    Pauses,
}

impl Figure {
    /// Whether programs of this workspace are started for it; else it builds itself what it needs.
    pub(crate) fn needs_programs(self) -> bool {
        !matches!(self, Self::Functions | Self::Instructions)
    }

    /// Whether an appliance VM is part of it.
    pub(crate) fn needs_image(self) -> bool {
        !matches!(self, Self::Backend | Self::Loopback)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Measured {
    /// The appliance VM behind the bridge
    Vvu,
    /// The appliance's back-end program, on the host: the difference is the price of the VM
    VvuBlk,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
