//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

use crate::bare::{BareLoad, Method};
use crate::disk::{Limit, Load, Pattern};
use crate::messages::Messages;
use crate::packets::Packets;

/// Plays front-end and driver against a vhost-user back-end, and measures it.
#[derive(Debug, Parser)]
#[command(name = "vvu-bench", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Keep a number of requests to a disk under way
    Load(LoadOptions),
    /// Read a file straight, with no back-end: what a back-end can reach at the most; prints JSON
    Bare(BareOptions),
    /// Send frames from one port of a switch to another; prints JSON
    Packets(PacketsOptions),
    /// Send control messages, one at a time, and have memory mapped; prints JSON
    Messages(MessagesOptions),
    /// Send a signal from one thread to another and back: what the system itself takes; prints JSON
    Hop {
        /// How long
        #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_seconds)]
        time: Duration,
    },
}

/// Options of reads without a back-end.
#[derive(Debug, Args)]
pub struct BareOptions {
    /// File or block device
    #[arg(long, value_name = "PATH")]
    file: PathBuf,
    /// How the kernel is asked
    #[arg(long, value_enum, default_value_t = MethodName::IoUring)]
    method: MethodName,
    /// Read blocks one after the other
    #[arg(long)]
    in_order: bool,
    /// Length of a request in bytes; k stands for 1024
    #[arg(long, value_name = "BYTES", default_value = "4k", value_parser = parse_bytes)]
    block: u32,
    /// Requests under way, 1 to 256
    #[arg(long, value_name = "N", default_value_t = 1)]
    depth: u16,
    /// How long
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_seconds)]
    time: Duration,
    /// Seconds at the beginning that are not measured
    #[arg(long, value_name = "SECONDS", default_value = "0.2", value_parser = parse_seconds)]
    warm_up: Duration,
    /// Look for completions all the time, instead of waiting for them
    #[arg(long)]
    polled: bool,
}

/// Ways to ask the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MethodName {
    /// One thread with an io_uring
    IoUring,
    /// A thread for each CPU with one pread(2) after the other
    Pread,
}

impl From<BareOptions> for BareLoad {
    fn from(options: BareOptions) -> Self {
        let BareOptions { file, method, in_order, block, depth, time, warm_up, polled } = options;
        let method = match method {
            MethodName::IoUring => Method::IoUring,
            MethodName::Pread => Method::Pread,
        };
        Self { file, method, random: !in_order, block, depth, polled, limit: Limit::Time(time), warm_up }
    }
}

/// Options of a load of frames.
#[derive(Debug, Args)]
pub struct PacketsOptions {
    /// Socket of the port that sends
    #[arg(long, value_name = "PATH")]
    from: PathBuf,
    /// Socket of the port that receives
    #[arg(long, value_name = "PATH")]
    to: PathBuf,
    /// Length of a frame in bytes, 60 to 1514
    #[arg(long, value_name = "BYTES", default_value_t = 60)]
    frame: u16,
    /// Frames that the sender has under way, 1 to 256
    #[arg(long, value_name = "N", default_value_t = 64)]
    depth: u16,
    /// How long
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_seconds)]
    time: Duration,
    /// Look at the rings all the time, instead of waiting for calls
    #[arg(long)]
    polled: bool,
    /// Report also what the process PID takes; may be given again
    #[arg(long, value_name = "PID")]
    watch: Vec<u32>,
}

impl From<PacketsOptions> for Packets {
    fn from(options: PacketsOptions) -> Self {
        let PacketsOptions { from, to, frame, depth, time, polled, watch } = options;
        Self { from, to, frame, depth, time, polled, watched: watch }
    }
}

/// Options of a load of messages.
#[derive(Debug, Args)]
pub struct MessagesOptions {
    /// Socket of the vhost-user back-end
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// How long each kind of message is sent
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_seconds)]
    time: Duration,
    /// Memory that is mapped, in bytes
    #[arg(long, value_name = "BYTES", default_value = "65536k", value_parser = parse_bytes)]
    memory: u32,
}

impl From<MessagesOptions> for Messages {
    fn from(options: MessagesOptions) -> Self {
        Self { socket: options.socket, time: options.time, memory: options.memory as usize }
    }
}

/// Options of a load of a disk.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("limit").required(true))]
pub struct LoadOptions {
    /// Socket of the vhost-user back-end
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// What is read or written
    #[arg(long, value_enum, default_value_t = PatternName::Randread)]
    pattern: PatternName,
    /// Length of a request in bytes; k stands for 1024
    #[arg(long, value_name = "BYTES", default_value = "4k", value_parser = parse_bytes)]
    block: u32,
    /// Requests under way in each queue, 1 to 256
    #[arg(long, value_name = "N", default_value_t = 1)]
    depth: u16,
    /// Queues, each with a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1)]
    queues: u16,
    /// Seconds that are measured
    #[arg(long, value_name = "SECONDS", group = "limit", value_parser = parse_seconds)]
    time: Option<Duration>,
    /// Requests that are measured
    #[arg(long, value_name = "N", group = "limit", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Seconds at the beginning that are not measured
    #[arg(long, value_name = "SECONDS", default_value = "0.2", value_parser = parse_seconds)]
    warm_up: Duration,
    /// Look at the ring all the time, instead of waiting for calls
    #[arg(long)]
    polled: bool,
    /// Do not use indirect descriptors
    #[arg(long)]
    direct: bool,
    /// Report also what the process PID takes; may be given again
    #[arg(long, value_name = "PID")]
    watch: Vec<u32>,
    /// Print all that was measured, as JSON, instead of one line
    #[arg(long)]
    pub json: bool,
}

/// Patterns, by the names that fio gives them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PatternName {
    /// Reads one block after the other
    Read,
    /// Writes one block after the other
    Write,
    /// Reads blocks in no order
    Randread,
    /// Writes blocks in no order
    Randwrite,
}

impl From<PatternName> for Pattern {
    fn from(name: PatternName) -> Self {
        Self {
            writes: matches!(name, PatternName::Write | PatternName::Randwrite),
            random: matches!(name, PatternName::Randread | PatternName::Randwrite),
        }
    }
}

impl LoadOptions {
    /// The load.
    #[must_use]
    pub fn load(self) -> Load {
        let limit = self.time.map(Limit::Time);
        Load {
            socket: self.socket,
            pattern: self.pattern.into(),
            block: self.block,
            depth: self.depth,
            queues: self.queues,
            polled: self.polled,
            direct: self.direct,
            limit: limit.unwrap_or_else(|| Limit::Count(self.count.unwrap_or(1))),
            warm_up: self.warm_up,
            watched: self.watch,
        }
    }
}

fn parse_bytes(text: &str) -> Result<u32, String> {
    let (number, unit) = text.strip_suffix(['k', 'K']).map_or((text, 1), |number| (number, 1024));
    let bytes = number.parse::<u32>().ok().and_then(|number| number.checked_mul(unit));
    bytes.ok_or_else(|| "expected a number of bytes, as 4096 or 4k".to_owned())
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| "expected a number of seconds, as 2 or 0.5".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_load_is_as_it_was_asked_for() {
        let words = "vvu-bench load --socket s --pattern write --block 128k --depth 7 --count 9 --polled --warm-up 0";
        let Command::Load(options) = Cli::try_parse_from(words.split(' ')).unwrap().command else { panic!() };
        let load = options.load();
        assert_eq!((load.block, load.depth, load.limit, load.polled), (131_072, 7, Limit::Count(9), true));
        assert_eq!((load.pattern, load.warm_up), (Pattern { writes: true, random: false }, Duration::ZERO));
        let no_limit = Cli::try_parse_from("vvu-bench load --socket s".split(' ')).unwrap_err();
        assert!(no_limit.to_string().contains("--time"), "{no_limit}");
        for wrong in ["--block 4x", "--time -1", "--count 0", "--time 1 --count 1"] {
            let words = format!("vvu-bench load --socket s {wrong}");
            assert!(Cli::try_parse_from(words.split(' ')).is_err(), "{wrong}");
        }
    }
}
