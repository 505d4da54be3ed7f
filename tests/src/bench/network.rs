//! Figures: TCP throughput between driver VMs, and between a driver VM and the host, over each way that a packet can take.
//!
//! Two driver VMs have a network card for each way, and the ways take turns: in a round each carries the same job, so the
//! ratios are those of neighbouring runs. The next round begins with another way. What is outside is a server on the host.
//!
//! All of it runs in a network namespace of its own ([`in_a_namespace`]), in which TAP interfaces and bridges can be made
//! without rights on the host, and in which nothing can be left behind.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, Write};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use vvu_setup::Extra;

use super::{Spread, hand_in};
use crate::driver_vm::{DriverVm, DriverVmPlan, Network, kvm_is_usable};
use crate::iperf::{self, Direction, Throughput};
use crate::network::{Port, ServedSwitch};
use crate::packaged;
use crate::process::{Process, command_that_dies_with_us, output_of};
use crate::testbed::{Testbed, Turn};

/// Says that this process is in the namespace.
const NAMESPACE_VARIABLE: &str = "VVU_BENCH_IN_NAMESPACE";

/// How long a program on the host may take to listen.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// Length of a run whose figure is not used.
const WARM_UP: Duration = Duration::from_secs(1);

/// Memory of a driver VM in MiB.
const MEMORY_MIB: u32 = 256;

/// TAP interfaces: of the appliance, of the switch on the host, and two of the host's bridge.
const TAP_OF_APPLIANCE: &str = "vvu-appliance";
const TAP_OF_SWITCH: &str = "vvu-host";
const TAPS_OF_BRIDGE: [&str; 2] = ["vvu-left", "vvu-right"];
const BRIDGE: &str = "vvu-bridge";

/// What a person may choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetworkOptions {
    /// Rounds of each job, at least one.
    pub rounds: u32,
    /// Length of one run of iperf3.
    pub runtime: Duration,
    /// One JSON document on standard output instead of a table.
    pub json: bool,
}

/// A way of packets. Its number is that of the cards in the driver VMs, and part of its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Way {
    /// The switch in the appliance VM.
    Vvu,
    /// The same program as a process on the host.
    VvuNetOnHost,
    /// QEMU's own device on TAP interfaces, without vhost, which the host's kernel connects.
    QemuTap,
    /// QEMU's own device, between two QEMUs.
    QemuStream,
    /// QEMU's own device on its own IP stack.
    QemuUser,
    /// passt as a vhost-user back-end.
    Passt,
}

/// The ways, each at the place of its number.
const WAYS: [Way; 6] = [Way::Vvu, Way::VvuNetOnHost, Way::QemuTap, Way::QemuStream, Way::QemuUser, Way::Passt];

/// Who talks to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Job {
    BetweenDriverVms,
    ToOutside,
    FromOutside,
}

const JOBS: [Job; 3] = [Job::BetweenDriverVms, Job::ToOutside, Job::FromOutside];

/// One way in one job.
#[derive(Debug, Clone, Serialize)]
struct Row {
    job: Job,
    /// Whether checksums and segmentation are left to the device.
    offloads: bool,
    way: Way,
    mbit_per_second: Spread,
    /// vvu's throughput divided by this one's, within each round.
    ratio: Spread,
    /// Segments that were sent again: most of them were dropped on the way.
    retransmits: Spread,
}

/// The whole document.
#[derive(Debug, Serialize)]
struct Report {
    accelerator: &'static str,
    rounds: u32,
    seconds_per_run: f64,
    rows: Vec<Row>,
}

/// Both driver VMs and all that is between them.
struct Field {
    left: DriverVm,
    right: DriverVm,
    switches: [ServedSwitch; 2],
    _host: [Process; 2],
    ethtool: std::path::PathBuf,
}

impl Way {
    fn number(self) -> usize {
        WAYS.iter().position(|way| *way == self).unwrap_or_default()
    }

    /// Address of a station: 1 is outside, 2 and 3 are the driver VMs.
    fn address(self, station: u8) -> String {
        format!("10.8.{}.{station}", self.number() + 1)
    }

    fn mac(self, station: u8) -> String {
        format!("52:54:00:08:{:02x}:{station:02x}", self.number() + 1)
    }

    fn carries(self, job: Job) -> bool {
        match self {
            Self::Vvu | Self::VvuNetOnHost | Self::QemuTap => true,
            Self::QemuStream => job == Job::BetweenDriverVms,
            Self::QemuUser | Self::Passt => job != Job::BetweenDriverVms,
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vvu => "vvu",
            Self::VvuNetOnHost => "vvu-net on the host",
            Self::QemuTap => "QEMU, tap, vhost=off",
            Self::QemuStream => "QEMU, stream",
            Self::QemuUser => "QEMU, user",
            Self::Passt => "passt, vhost-user",
        })
    }
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BetweenDriverVms => "driver VM to driver VM",
            Self::ToOutside => "driver VM to outside",
            Self::FromOutside => "outside to driver VM",
        })
    }
}

/// Whether this process may run the benchmark.
pub fn is_in_a_namespace() -> bool {
    std::env::var_os(NAMESPACE_VARIABLE).is_some()
}

/// A command that runs `program` where it can run the benchmark. What the benchmark needs from the network is fetched now:
/// there it has none.
///
/// # Errors
/// If packages cannot be fetched.
pub fn in_a_namespace(program: &OsStr, arguments: impl Iterator<Item = OsString>) -> Result<Command> {
    for extra in [Extra::Network, Extra::Passt] {
        extra.root()?;
    }
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net", "--"]).arg(program).args(arguments);
    command.env(NAMESPACE_VARIABLE, "1");
    Ok(command)
}

/// Runs the benchmark and prints its report on standard output; progress goes to standard error.
///
/// # Errors
/// If this is not the benchmark's namespace, a machine does not come up, iperf3 fails, or the output is closed.
pub fn run(options: &NetworkOptions) -> Result<()> {
    ensure!(is_in_a_namespace(), "the benchmark needs a network namespace of its own");
    let testbed = Testbed::open("bench-network", Turn::Alone)?;
    let mut field = Field::start(&testbed)?;
    let mut rows = Vec::new();
    for offloads in [true, false] {
        field.set_offloads(offloads)?;
        for job in JOBS {
            eprintln!("bench: {job}, offloads {} ({} rounds)", word(offloads), options.rounds);
            rows.extend(field.compare(job, offloads, options)?);
        }
    }
    field.stop()?;
    let accelerator = if kvm_is_usable() { "kvm" } else { "tcg" };
    let report = Report { accelerator, rounds: options.rounds, seconds_per_run: options.runtime.as_secs_f64(), rows };
    let mut text = Vec::new();
    print_table(&report, &mut text)?;
    let repeat =
        format!("cargo xtask bench net --rounds {} --runtime {}", options.rounds, options.runtime.as_secs_f64());
    hand_in("net", "TCP over each way that a packet can take.", repeat, &report, text, options.json)
}

impl Field {
    fn start(testbed: &Testbed) -> Result<Self> {
        make_interfaces()?;
        let ports = [1, 2, 3, 4].map(|number| Port::new(testbed, number));
        let [left, right, host_left, host_right] = &ports;
        let uplink = format!("tap={TAP_OF_APPLIANCE}");
        let vvu = ServedSwitch::in_appliance(testbed, &[left, right], &["--uplink", &uplink])?;
        let host = ServedSwitch::on_host(testbed, &[host_left, host_right], &["--tap", TAP_OF_SWITCH])?;
        let server = start_server(testbed)?;
        let (passt, passt_socket) = start_passt(testbed)?;

        let stream = testbed.socket("stream.sock");
        let qemu = |way: Way, station, netdev: &str| Network::of_qemu(netdev, &way.mac(station));
        let tap = |name: &str| format!("tap,ifname={name},script=no,downscript=no,vhost=off");
        let stream = format!("stream,addr.type=unix,addr.path={},server", stream.display());
        let outside = Way::QemuUser.address(1);
        let user = format!("user,net={}/24,host={outside}", Way::QemuUser.address(0));
        let [left_tap, right_tap] = TAPS_OF_BRIDGE.map(tap);
        let plan = |name| DriverVmPlan::new(testbed, name).memory_mib(MEMORY_MIB, None);
        // In the order of the ways.
        let left = plan("left")
            .network(left.card())
            .network(host_left.card())
            .network(qemu(Way::QemuTap, 2, &left_tap))
            .network(qemu(Way::QemuStream, 2, &format!("{stream}=on")))
            .network(qemu(Way::QemuUser, 2, &user))
            .network(Network::at(&passt_socket, &Way::Passt.mac(2)));
        let right = plan("right")
            .network(right.card())
            .network(host_right.card())
            .network(qemu(Way::QemuTap, 3, &right_tap))
            .network(qemu(Way::QemuStream, 3, &format!("{stream}=off")));
        let (left, right) = (left.boot()?, right.boot()?);
        let ethtool = Extra::Network.root()?;
        let mut field = Self { left, right, switches: [vvu, host], _host: [server, passt], ethtool };
        field.connect()?;
        Ok(field)
    }

    /// Gives the cards their addresses, and has each way carry something.
    fn connect(&mut self) -> Result<()> {
        for way in WAYS {
            for (vm, station) in [(&mut self.left, 2), (&mut self.right, 3)] {
                if station == 2 || way.carries(Job::BetweenDriverVms) {
                    let (card, address) = (way.number(), way.address(station));
                    vm.run(&format!("ip link set eth{card} up && ip addr add {address}/24 dev eth{card}"))?;
                }
            }
        }
        iperf::serve(&mut self.right)?;
        // Neighbours are learnt, and emulators have translated what they will run.
        for way in WAYS {
            for job in JOBS.into_iter().filter(|job| way.carries(*job)) {
                self.measure(way, job, WARM_UP)?;
            }
        }
        Ok(())
    }

    /// Whether the drivers, and the kernel of the host with its TAP interfaces, leave checksums and segmentation to the device.
    fn set_offloads(&mut self, offloads: bool) -> Result<()> {
        let word = word(offloads);
        let features = format!("rx {word} tx {word} tso {word} gso {word} gro off");
        for (vm, station) in [(&mut self.left, 2), (&mut self.right, 3)] {
            for way in WAYS.iter().filter(|way| station == 2 || way.carries(Job::BetweenDriverVms)) {
                vm.run(&format!("ethtool -K eth{} {features}", way.number()))?;
            }
        }
        for tap in TAPS_OF_BRIDGE.into_iter().chain([TAP_OF_APPLIANCE, TAP_OF_SWITCH]) {
            let mut command = packaged::command(&self.ethtool, "usr/sbin/ethtool");
            output_of(command.args(["-K", tap]).args(features.split(' ')))?;
        }
        Ok(())
    }

    fn compare(&mut self, job: Job, offloads: bool, options: &NetworkOptions) -> Result<Vec<Row>> {
        let mut ways: Vec<Way> = WAYS.into_iter().filter(|way| way.carries(job)).collect();
        let mut rounds: Vec<[Throughput; WAYS.len()]> = Vec::new();
        for _ in 0..options.rounds.max(1) {
            let mut round = [Throughput { bits_per_second: f64::NAN, retransmits: 0 }; WAYS.len()];
            for way in &ways {
                let moved = self.measure(*way, job, options.runtime)?;
                round.iter_mut().skip(way.number()).take(1).for_each(|place| *place = moved);
            }
            rounds.push(round);
            ways.rotate_left(1);
        }
        let row = |way: Way| {
            let spread =
                |figure: &dyn Fn(&[Throughput; WAYS.len()]) -> f64| Spread::of(rounds.iter().map(figure).collect());
            Row {
                job,
                offloads,
                way,
                mbit_per_second: spread(&|round| rate(round, way) / 1e6),
                ratio: spread(&|round| rate(round, Way::Vvu) / rate(round, way)),
                retransmits: spread(&|round| round.get(way.number()).map_or(0, |moved| moved.retransmits) as f64),
            }
        };
        Ok(WAYS.into_iter().filter(|way| way.carries(job)).map(row).collect())
    }

    /// One connection.
    fn measure(&mut self, way: Way, job: Job, runtime: Duration) -> Result<Throughput> {
        let (station, direction) = match job {
            Job::BetweenDriverVms => (3, Direction::FromClient),
            Job::ToOutside => (1, Direction::FromClient),
            Job::FromOutside => (1, Direction::ToClient),
        };
        iperf::measure(&mut self.left, &way.address(station), direction, 1, runtime.as_secs())
            .with_context(|| format!("{way}, {job}"))
    }

    fn stop(self) -> Result<()> {
        self.left.power_off()?;
        self.right.power_off()?;
        self.switches.into_iter().try_for_each(ServedSwitch::stop)
    }
}

/// Makes what the host has of the ways.
fn make_interfaces() -> Result<()> {
    let bridged =
        TAPS_OF_BRIDGE.map(|tap| format!("tuntap add {tap} mode tap vnet_hdr; link set {tap} master {BRIDGE} up"));
    let routed = [(TAP_OF_APPLIANCE, Way::Vvu, "vnet_hdr"), (TAP_OF_SWITCH, Way::VvuNetOnHost, "vnet_hdr multi_queue")];
    let routed = routed.map(|(tap, way, flags)| {
        format!("tuntap add {tap} mode tap {flags}; addr add {}/24 dev {tap}; link set {tap} up", way.address(1))
    });
    let bridge = format!(
        "link add {BRIDGE} type bridge; addr add {}/24 dev {BRIDGE}; link set {BRIDGE} up",
        Way::QemuTap.address(1)
    );
    let all = ["link set lo up".to_owned(), bridge].into_iter().chain(bridged).chain(routed);
    for line in all.collect::<Vec<_>>().join("; ").split("; ") {
        output_of(command_that_dies_with_us("ip").args(line.split(' ')))?;
    }
    Ok(())
}

/// The server outside.
fn start_server(testbed: &Testbed) -> Result<Process> {
    let mut command = packaged::command(&Extra::Network.root()?, "usr/bin/iperf3");
    command.args(["--server", "--forceflush"]);
    let mut server = Process::spawn("iperf3", command, testbed.folder())?;
    server.await_line("iperf3's word", START_PATIENCE, |line| line.contains("Server listening").then_some(()))?;
    Ok(server)
}

/// passt, whose gateway is the host itself.
fn start_passt(testbed: &Testbed) -> Result<(Process, std::path::PathBuf)> {
    let socket = testbed.socket("passt.sock");
    let passt = packaged::command(&Extra::Passt.root()?, "usr/bin/passt");
    // What it says goes to standard error.
    let mut command = command_that_dies_with_us("sh");
    command.args(["-c", "exec \"$@\" 2>&1", "sh"]).arg(passt.get_program()).args(passt.get_args());
    let (outside, address) = (Way::Passt.address(1), Way::Passt.address(2));
    command.args(["--foreground", "--vhost-user", "--ipv4-only", "--no-dhcp", "--netmask", "24"]);
    command.args(["--address", &address, "--gateway", &outside, "--map-host-loopback", &outside]);
    command.arg("--socket").arg(&socket);
    let mut process = Process::spawn("passt", command, testbed.folder())?;
    process.await_line("passt's word", START_PATIENCE, |line| line.contains("You can start qemu").then_some(()))?;
    Ok((process, socket))
}

fn rate(round: &[Throughput; WAYS.len()], way: Way) -> f64 {
    round.get(way.number()).map_or(f64::NAN, |moved| moved.bits_per_second)
}

fn word(offloads: bool) -> &'static str {
    if offloads { "on" } else { "off" }
}

fn print_table(report: &Report, out: &mut impl Write) -> io::Result<()> {
    writeln!(
        out,
        "iperf3, one TCP connection, MTU 1500; VMs under {}; median [least..most] of {} rounds of {} s",
        report.accelerator, report.rounds, report.seconds_per_run
    )?;
    let mut title = None;
    for row in &report.rows {
        if title.replace((row.job, row.offloads)) != Some((row.job, row.offloads)) {
            writeln!(
                out,
                "\n{:<44} {:>22} {:>20} {:>18}",
                format!("{}, offloads {}", row.job, word(row.offloads)),
                "Mbit/s",
                "vvu ÷ this",
                "sent again"
            )?;
        }
        let Spread { median, least, most } = row.mbit_per_second;
        let rate = format!("{median:.0} [{least:.0}..{most:.0}]");
        let Spread { median, least, most } = row.ratio;
        let ratio = if row.way == Way::Vvu { String::new() } else { format!("{median:.2} [{least:.2}..{most:.2}]") };
        let Spread { median, least, most } = row.retransmits;
        let again = format!("{median:.0} [{least:.0}..{most:.0}]");
        writeln!(out, "  {:<42} {rate:>22} {ratio:>20} {again:>18}", row.way.to_string())?;
    }
    Ok(())
}
