//! The arguments of the appliance's own back-ends.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use vvu_appliance_config::{BlkOptions, Format, Limits, NetOptions, Poll, PortOptions, Threads};

/// What the block back-end uses.
#[derive(Debug)]
pub(super) struct BlkPlaces<'a> {
    pub(super) socket: &'a Path,
    pub(super) image: &'a Path,
    pub(super) backing: &'a [(Format, PathBuf)],
    pub(super) control: Option<&'a Path>,
}

pub(super) fn blk_arguments(options: &BlkOptions, places: &BlkPlaces<'_>) -> Vec<OsString> {
    let mut arguments = Arguments::default();
    arguments.put("--socket-path", places.socket);
    arguments.put("--image", places.image);
    if options.image.format != Format::Raw {
        arguments.put("--format", format_name(options.image.format));
    }
    for (format, path) in places.backing {
        let mut layer = OsString::from(format_name(*format));
        layer.push(":");
        layer.push(path);
        arguments.put("--backing", layer);
    }
    arguments.put("--queues", options.queues.to_string());
    arguments.put("--serial", &options.serial);
    if options.read_only {
        arguments.words.push("--read-only".into());
    }
    for (key, value) in limits(options.limits) {
        arguments.put(&format!("--{key}"), value);
    }
    arguments.threads(&options.threads);
    arguments.control(places.control);
    arguments.words
}

pub(super) fn net_arguments(
    options: &NetOptions,
    sockets: &[PathBuf],
    tap: Option<&str>,
    control: Option<&Path>,
) -> Vec<OsString> {
    let mut arguments = Arguments::default();
    for (port, socket) in options.ports.iter().zip(sockets) {
        arguments.put("--port", port_argument(port, socket));
    }
    if let Some(tap) = tap {
        arguments.put("--tap", tap);
    }
    arguments.put("--mtu", options.mtu.to_string());
    arguments.threads(&options.threads);
    arguments.control(control);
    arguments.words
}

fn port_argument(port: &PortOptions, socket: &Path) -> OsString {
    let mut argument = OsString::from("socket=");
    argument.push(socket);
    let mut put = |key: &str, value: &str| argument.push(format!(",{key}={value}"));
    put("mac", &port.mac);
    put("queues", &port.queues.to_string());
    if !port.link {
        put("link", "down");
    }
    if !port.filter.macs.is_empty() {
        put("macs", &port.filter.macs.join(";"));
    }
    if !port.filter.vlans.is_empty() {
        put("vlans", &port.filter.vlans.iter().map(ToString::to_string).collect::<Vec<_>>().join(";"));
    }
    for (key, value) in limits(port.limits) {
        put(key, &value);
    }
    argument
}

/// Limits that there are.
fn limits(limits: Limits) -> impl Iterator<Item = (&'static str, String)> {
    let all = [("iops", limits.operations_per_second), ("bandwidth", limits.bytes_per_second)];
    all.into_iter().filter(|(_, limit)| *limit > 0).map(|(key, limit)| (key, limit.to_string()))
}

const fn format_name(format: Format) -> &'static str {
    match format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    }
}

#[derive(Debug, Default)]
struct Arguments {
    words: Vec<OsString>,
}

impl Arguments {
    fn put(&mut self, key: &str, value: impl AsRef<OsStr>) {
        self.words.push(key.into());
        self.words.push(value.as_ref().to_owned());
    }

    fn threads(&mut self, threads: &Threads) {
        let mode = match threads.poll {
            Poll::Off => "off",
            Poll::Auto => "auto",
            Poll::Always => "always",
        };
        self.put("--poll", mode);
        self.put("--poll-window", threads.poll_window_us.to_string());
        if !threads.cpus.is_empty() {
            self.put("--cpus", threads.cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(","));
        }
    }

    fn control(&mut self, socket: Option<&Path>) {
        if let Some(socket) = socket {
            self.put("--control", socket);
        }
    }
}

#[cfg(test)]
mod tests {
    use vvu_appliance_config::{Layer, PortFilter};

    use super::*;

    fn text(arguments: &[OsString]) -> String {
        arguments.join(OsStr::new(" ")).into_string().unwrap()
    }

    fn blk_options() -> BlkOptions {
        BlkOptions {
            image: Layer { disk_serial: "d".into(), format: Format::Raw },
            backing: Vec::new(),
            read_only: false,
            queues: 4,
            serial: "s".into(),
            limits: Limits::default(),
            threads: Threads::default(),
        }
    }

    #[test]
    fn blk_is_started_as_configured() {
        let socket = Path::new("/run/b.sock");
        let places = BlkPlaces { socket, image: Path::new("/dev/vda"), backing: &[], control: None };
        let expected = "--socket-path /run/b.sock --image /dev/vda --queues 4 --serial s";
        let threads = "--poll auto --poll-window 0";
        assert_eq!(text(&blk_arguments(&blk_options(), &places)), format!("{expected} {threads}"));
        let pinned = Threads { poll: Poll::Always, poll_window_us: 50, cpus: vec![0, 2] };
        let pinned = BlkOptions { threads: pinned, ..blk_options() };
        let threads_pinned = "--poll always --poll-window 50 --cpus 0,2";
        assert_eq!(text(&blk_arguments(&pinned, &places)), format!("{expected} {threads_pinned}"));
        let read_only = BlkOptions { read_only: true, ..blk_options() };
        assert_eq!(text(&blk_arguments(&read_only, &places)), format!("{expected} --read-only {threads}"));
    }

    #[test]
    fn layers_limits_and_the_control_channel_are_passed_on() {
        let options = BlkOptions {
            image: Layer { disk_serial: "d".into(), format: Format::Qcow2 },
            limits: Limits { operations_per_second: 100, bytes_per_second: 0 },
            ..blk_options()
        };
        let backing = [(Format::Qcow2, "/dev/vdb".into()), (Format::Raw, "/dev/vdc".into())];
        let socket = Path::new("/run/b.sock");
        let control = Some(Path::new("/run/c.sock"));
        let places = BlkPlaces { socket, image: Path::new("/dev/vda"), backing: &backing, control };
        let expected = "--socket-path /run/b.sock --image /dev/vda --format qcow2 --backing qcow2:/dev/vdb \
            --backing raw:/dev/vdc --queues 4 --serial s --iops 100 --poll auto --poll-window 0 --control /run/c.sock";
        assert_eq!(text(&blk_arguments(&options, &places)), expected);
    }

    #[test]
    fn net_has_a_port_for_each_socket() {
        let plain = PortOptions {
            mac: "52:54:00:00:00:01".into(),
            queues: 1,
            link: true,
            filter: PortFilter::default(),
            limits: Limits::default(),
        };
        let full = PortOptions {
            mac: "52:54:00:00:00:02".into(),
            queues: 4,
            link: false,
            filter: PortFilter {
                macs: vec!["52:54:00:00:00:02".into(), "52:54:00:00:00:03".into()],
                vlans: vec![0, 7],
            },
            limits: Limits { operations_per_second: 5, bytes_per_second: 6 },
        };
        let options = NetOptions {
            ports: vec![plain, full],
            uplink: None,
            mtu: 9000,
            threads: Threads { poll: Poll::Auto, poll_window_us: 32, cpus: vec![1] },
        };
        let sockets = ["/run/0.sock".into(), "/run/1.sock".into()];
        let ports = "--port socket=/run/0.sock,mac=52:54:00:00:00:01,queues=1 \
            --port socket=/run/1.sock,mac=52:54:00:00:00:02,queues=4,link=down,\
            macs=52:54:00:00:00:02;52:54:00:00:00:03,vlans=0;7,iops=5,bandwidth=6";
        let threads = "--poll auto --poll-window 32 --cpus 1";
        assert_eq!(text(&net_arguments(&options, &sockets, None, None)), format!("{ports} --mtu 9000 {threads}"));
        let arguments = net_arguments(&options, &sockets, Some("vvu0"), Some(Path::new("/run/c.sock")));
        assert_eq!(text(&arguments), format!("{ports} --tap vvu0 --mtu 9000 {threads} --control /run/c.sock"));
    }
}
