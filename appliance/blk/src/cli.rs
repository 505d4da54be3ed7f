//! The command line, by QEMU's conventions for vhost-user back-end programs.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use vvu_back_end::listener::Endpoint;
use vvu_back_end::rate_limit::Limits;
use vvu_back_end::threads::Threads;

use crate::daemon::{BackingFile, MAX_QUEUES, Options, Storage};
use crate::device::SERIAL_LEN;
use crate::image::Format;

/// What `--print-capabilities` prints: the device type, and the options of the conventions that the program has.
pub const CAPABILITIES: &str = r#"{"type": "block", "features": ["read-only", "blk-file"]}"#;

/// vhost-user-blk back-end: serves a disk image, raw or qcow2, or a block device to a virtual machine.
///
/// Serves one front-end at a time, and the next after it has left. SIGHUP looks at the size of a raw image again (a block
/// device is looked at when it changes), SIGUSR1 writes the counters to the log, SIGTERM ends.
#[derive(Debug, Parser)]
#[command(name = "vvu-blk", version)]
pub struct Cli {
    /// Create the vhost-user socket at PATH; a stale socket there is replaced.
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    socket_path: Option<PathBuf>,

    /// Use the socket that was inherited as descriptor N: a listening one, or one that is connected to the only front-end.
    #[arg(long, value_name = "N")]
    fd: Option<RawFd>,

    /// Image file or block device to serve.
    #[arg(long, visible_alias = "blk-file", value_name = "PATH", required_unless_present_any = ["print_capabilities", "null"])]
    image: Option<PathBuf>,

    /// In place of an image: a disk of SIZE bytes that keeps nothing (K, M, G, T are powers of 1024). Each request succeeds at
    /// once; one that reads leaves the driver's buffers as they are. For measuring what all the rest costs, and for nothing else.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with_all = ["image", "format", "backing", "io_alignment"])]
    null: Option<u64>,

    /// Format of the image. It is never guessed.
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    format: Format,

    /// Backing file of the image, as raw:PATH or qcow2:PATH; given again, the backing file of that, and so on. Only these
    /// are opened, whatever the image says, and never written to.
    #[arg(long, value_name = "FORMAT:PATH", value_parser = parse_backing)]
    backing: Vec<BackingFile>,

    /// Open the image read-only and refuse every write.
    #[arg(long)]
    read_only: bool,

    /// Number of request queues, each with a thread of its own.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    queues: u16,

    /// Serial number of the disk as the driver sees it: up to 20 printable ASCII characters.
    #[arg(long, value_name = "TEXT", default_value = "vvu-blk", value_parser = parse_serial)]
    serial: String,

    /// Align direct I/O to at least this many bytes, for storage that needs more than it reports [default: as reported].
    #[arg(long, value_name = "BYTES", value_parser = parse_alignment)]
    io_alignment: Option<u32>,

    /// Most requests in a second; 0 is no limit.
    #[arg(long, value_name = "N", default_value_t = 0)]
    iops: u64,

    /// Most bytes of data in a second; 0 is no limit.
    #[arg(long, value_name = "N", default_value_t = 0)]
    bandwidth: u64,

    /// Create a socket at PATH on which limits are changed and counters asked for while the program runs: JSON lines, as
    /// {"set-limits": {"operations_per_second": 100, "bytes_per_second": 0}} and {"query": {}}.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    #[command(flatten)]
    threads: Threads,

    /// Print what the program can do, as JSON, and exit.
    #[arg(long)]
    pub print_capabilities: bool,
}

impl Cli {
    /// What to serve.
    ///
    /// # Errors
    /// One line for the user, if neither `--socket-path` nor `--fd` was given.
    pub fn into_options(self) -> Result<Options, &'static str> {
        let endpoint = match (self.socket_path, self.fd) {
            (Some(path), _) => Endpoint::Path(path),
            (None, Some(fd)) => Endpoint::Descriptor(fd),
            (None, None) => return Err("no socket to serve: give --socket-path PATH or --fd N"),
        };
        let storage = match (self.image, self.null) {
            (Some(path), _) => Storage::Image(path),
            (None, Some(len)) => Storage::Null(len),
            (None, None) => return Err("no image to serve: give --image PATH"),
        };
        if self.format == Format::Raw && !self.backing.is_empty() {
            return Err("a raw image has no backing file: leave --backing out, or give --format qcow2");
        }
        if self.format != Format::Raw && self.io_alignment.is_some() {
            return Err("--io-alignment is for raw images: leave it out");
        }
        Ok(Options {
            endpoint,
            storage,
            format: self.format,
            backing: self.backing,
            read_only: self.read_only,
            queues: self.queues,
            serial: self.serial,
            io_alignment: self.io_alignment,
            limits: Limits { operations_per_second: self.iops, bytes_per_second: self.bandwidth },
            control: self.control,
            threads: self.threads,
        })
    }
}

fn parse_serial(text: &str) -> Result<String, String> {
    let printable = text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
    if text.is_empty() || text.len() > SERIAL_LEN || !printable {
        return Err(format!("expected 1 to {SERIAL_LEN} printable ASCII characters"));
    }
    Ok(text.to_owned())
}

fn parse_backing(text: &str) -> Result<BackingFile, String> {
    let expected = "expected raw:PATH or qcow2:PATH";
    let (format, path) = text.split_once(':').ok_or(expected)?;
    let format = Format::from_str(format, false).map_err(|_unknown| expected)?;
    if path.is_empty() {
        return Err(expected.to_owned());
    }
    Ok(BackingFile { format, path: path.into() })
}

fn parse_size(text: &str) -> Result<u64, &'static str> {
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T']);
    let factor = match text.get(digits.len()..) {
        Some("") => 1,
        Some("K") => 1 << 10,
        Some("M") => 1 << 20,
        Some("G") => 1 << 30,
        Some("T") => 1 << 40,
        _ => 0,
    };
    let size = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    size.filter(|size| *size > 0).ok_or("expected a number of bytes, or one with K, M, G or T behind it")
}

fn parse_alignment(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(bytes) if bytes.is_power_of_two() && (512..=65536).contains(&bytes) => Ok(bytes),
        _ => Err("expected a power of two from 512 to 65536".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use vvu_back_end::polling::PollMode;

    use super::*;

    fn options(line: &str) -> Result<Options, String> {
        let cli = Cli::try_parse_from(line.split(' ')).map_err(|error| error.to_string())?;
        cli.into_options().map_err(str::to_owned)
    }

    #[test]
    fn the_conventions_of_back_end_programs_hold() {
        let by_path = options("vvu-blk --socket-path=/run/s --blk-file=/dev/vda --read-only").unwrap();
        assert_eq!(by_path.endpoint, Endpoint::Path("/run/s".into()));
        assert_eq!(by_path.storage, Storage::Image("/dev/vda".into()));
        assert_eq!(by_path.threads, Threads::default());
        let null = options("vvu-blk --fd=3 --null 2G --poll always").unwrap();
        assert_eq!((null.storage, null.threads.poll), (Storage::Null(2 << 30), PollMode::Always));
        assert!(by_path.read_only);
        let layered = options("vvu-blk --fd=3 --image a --format=qcow2 --backing qcow2:b:c --backing raw:d").unwrap();
        let backing = |format, path: &str| BackingFile { format, path: path.into() };
        assert_eq!(layered.backing, [backing(Format::Qcow2, "b:c"), backing(Format::Raw, "d")]);
        assert_eq!(options("vvu-blk --fd=3 --image a").unwrap().endpoint, Endpoint::Descriptor(3));
        assert!(Cli::try_parse_from(["vvu-blk", "--print-capabilities"]).unwrap().print_capabilities);
        serde_json::from_str::<serde_json::Value>(CAPABILITIES).unwrap();
    }

    #[test]
    fn mistakes_are_named() {
        for (line, expected) in [
            ("vvu-blk --image a", "--socket-path"),
            ("vvu-blk --fd 3 --image a --null 1G", "--null"),
            ("vvu-blk --fd 3 --null 1GG", "number of bytes"),
            ("vvu-blk --fd 3 --null 0", "number of bytes"),
            ("vvu-blk --socket-path s", "--image"),
            ("vvu-blk --socket-path s --fd 3 --image a", "--fd"),
            ("vvu-blk --socket-path s --image a --queues 0", "--queues"),
            ("vvu-blk --socket-path s --image a --queues 65", "--queues"),
            ("vvu-blk --socket-path s --image a --serial 123456789012345678901", "1 to 20"),
            ("vvu-blk --socket-path s --image a --io-alignment 1000", "power of two"),
            ("vvu-blk --socket-path s --image a --backing raw:b", "--format qcow2"),
            ("vvu-blk --socket-path s --image a --format qcow2 --backing b", "raw:PATH"),
            ("vvu-blk --socket-path s --image a --format qcow2 --backing qed:b", "raw:PATH"),
            ("vvu-blk --socket-path s --image a --format qcow2 --io-alignment 512", "raw images"),
        ] {
            let message = options(line).unwrap_err();
            assert!(message.contains(expected), "{line}: {message}");
        }
    }
}
