//! What network cards can do beyond carrying frames, what an operator changes while they run, and what a hostile driver can
//! do to them.
//!
//! Each driver VM has two cards: `eth0` as QEMU makes one of a vhost-user socket, configuration space and control queue being
//! QEMU's own; and `eth1`, of which QEMU knows nothing but that it is a virtio device, so that all of it is the back-end's.
//! Both have four pairs of queues.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vvu_tests::driver_vm::{DriverVm, DriverVmPlan};
use vvu_tests::iperf::{self, Direction};
use vvu_tests::network::statistics::{packet_sizes, sending_kicks, statistic};
use vvu_tests::network::{Port, ServedSwitch};
use vvu_tests::testbed::{Testbed, machine_test};
use vvu_tests::vvu_run::VvuRun;

const PAIRS: u16 = 4;

/// Of each machine; their masks are their numbers from 1, being two.
const CPUS: u16 = 2;

const MTU: u16 = 9000;

/// Where the echo of `vvu-station` listens.
const ECHO: u16 = 7;

/// Seconds of a measurement.
const SHORT: u64 = 2;

/// A driver VM with its two cards, which are behind ports `number` and `number` + 2.
struct Machine {
    vm: DriverVm,
    cards: [Port; 2],
}

/// Ports of a switch, as `vvu` numbers them: the left machine's and the right one's `eth0`, then the `eth1`.
const LEFT: [u8; 2] = [0, 2];

impl Machine {
    fn boot(testbed: &Testbed, name: &str, cards: [Port; 2]) -> Result<Self> {
        let [first, second] = &cards;
        let plan = DriverVmPlan::new(testbed, name).memory_mib(320, None).cpus(CPUS);
        let mut vm = plan.network(first.card().mtu(MTU)).network(second.whole_card()).boot()?;
        // Both cards are in one network: each answers for itself alone.
        vm.run("echo 1 > /proc/sys/net/ipv4/conf/all/arp_ignore; echo 2 > /proc/sys/net/ipv4/conf/all/arp_announce")?;
        vm.run("ip link set lo up")?;
        let mut machine = Self { vm, cards };
        for card in 0..2 {
            machine.bring_up(card)?;
            let mtu = machine.vm.run(&format!("cat /sys/class/net/eth{card}/mtu"))?;
            ensure!(mtu.trim() == MTU.to_string(), "eth{card} was told an MTU of {mtu}");
            let mac = machine.vm.run(&format!("cat /sys/class/net/eth{card}/address"))?;
            ensure!(mac.trim() == machine.port(card).mac(), "eth{card} has the address {mac}");
        }
        machine.vm.run(&format!("vvu-station echo {ECHO} > /tmp/heard 2>&1 &"))?;
        Ok(machine)
    }

    fn bring_up(&mut self, card: usize) -> Result<()> {
        let address = self.address(card);
        self.vm.run(&format!("ip link set eth{card} up && ip addr add {address}/24 dev eth{card}")).map(drop)
    }

    /// The port behind a card.
    fn port(&self, card: usize) -> &Port {
        let [first, second] = &self.cards;
        if card == 0 { first } else { second }
    }

    /// The IPv4 address of a card; the cards of each kind have a subnet of their own.
    fn address(&self, card: usize) -> String {
        self.address_in(0, card)
    }

    /// The same in a VLAN.
    fn address_in(&self, vlan: u8, card: usize) -> String {
        format!("10.{vlan}.{card}.{}", self.port(card).number())
    }

    /// Sends pings until one is answered, for the addresses have to be found out first, and then some that all are.
    fn reach(&mut self, address: &str) -> Result<()> {
        self.vm.run(&format!("ping -c 1 -W 20 {address}"))?;
        self.vm.run(&format!("ping -c 2 -i 0.2 -W 20 {address}")).map(drop)
    }

    /// Checks that nothing comes back from there.
    fn reach_not(&mut self, address: &str) -> Result<()> {
        self.vm.run_refused(&format!("ping -c 2 -i 0.2 -W 1 {address}")).map(drop)
    }
}

/// Path: all of what is above, over one switch: four pairs of queues on each card, frames of 9000 bytes, segments of 64 KiB
/// for TCP and UDP that nobody cuts; links, filters and limits that change while frames pass; and a hostile driver on one
/// card, while the others of the same switch go on.
#[test]
fn cards_with_all_they_can_do_share_a_switch() -> Result<()> {
    machine_test("cards_with_all_they_can_do_share_a_switch", |testbed| {
        let ports = [1, 2, 3, 4].map(|number| Port::new(testbed, number).pairs(PAIRS));
        let all: Vec<&Port> = ports.iter().collect();
        let mut served = ServedSwitch::start(testbed, &all, &["--mtu", &MTU.to_string()])?;
        let [a, b, c, d] = ports;
        let mut left = Machine::boot(testbed, "left", [a, c])?;
        let mut right = Machine::boot(testbed, "right", [b, d])?;
        iperf::serve(&mut right.vm)?;
        for card in 0..2 {
            left.reach(&right.address(card))?;
            queues(&mut left, &mut right, card).context("queues")?;
            large_packets(&mut left, &mut right, card).context("large packets")?;
        }
        datagrams_are_cut_last(&mut left, &mut right).context("segmentation of datagrams")?;
        if let Some(run) = served.run() {
            links(run, &mut left, &mut right).context("links")?;
            filters(run, &mut left, &mut right).context("filters")?;
            limits(run, &mut left, &mut right).context("limits")?;
            hostile_driver(run, &mut left, &mut right).context("hostile driver")?;
        }
        left.vm.power_off()?;
        right.vm.power_off()?;
        served.stop()
    })
}

/// Many flows use all queues of both machines: those of sending follow the CPU, those of receiving the flow.
fn queues(left: &mut Machine, right: &mut Machine, card: usize) -> Result<()> {
    let name = format!("eth{card}");
    for machine in [&mut *left, &mut *right] {
        machine.vm.run(&format!("ethtool -L {name} combined 1 && ethtool -L {name} combined {PAIRS}"))?;
    }
    let addresses = [right.address(card), left.address(card)];
    for (machine, address) in [left, right].into_iter().zip(addresses) {
        let before = sending_kicks(&mut machine.vm, &name, PAIRS)?;
        for cpu in 1..=CPUS {
            // A queue that the driver has just begun to use is in service a moment later.
            let flows = format!("taskset {cpu} vvu-station flows {address}:{ECHO} 64");
            machine
                .vm
                .run(&format!("for try in 1 2 3 4 5; do test $({flows}) = {PAIRS} && break; done; test $try != 5"))?;
        }
        let after = sending_kicks(&mut machine.vm, &name, PAIRS)?;
        ensure!(before.iter().zip(&after).all(|(before, after)| after > before), "{name}: {before:?}, {after:?}");
    }
    Ok(())
}

/// Frames as long as the MTU go in one piece, and TCP in pieces of which a frame holds none.
fn large_packets(left: &mut Machine, right: &mut Machine, card: usize) -> Result<()> {
    const PINGS: u64 = 10;
    let (name, address) = (format!("eth{card}"), right.address(card));
    let before = statistic(&mut left.vm, &name, "tx_packets")?;
    // With IPv4's and ICMP's headers as long as the MTU.
    left.vm.run(&format!("ping -c {PINGS} -i 0.2 -W 20 -s {} {address}", MTU - 28))?;
    let sent = statistic(&mut left.vm, &name, "tx_packets")? - before;
    ensure!(sent < 2 * PINGS, "{PINGS} packets of {MTU} bytes went in {sent} frames");

    right.vm.run(&format!("ethtool -K {name} gro off"))?;
    left.vm.run(&format!("ethtool -K {name} gro off"))?;
    for direction in [Direction::FromClient, Direction::ToClient] {
        let sizes = packet_sizes(&mut left.vm, &name, |vm| {
            let moved = iperf::measure(vm, &address, direction, 1, SHORT)?;
            eprintln!("{name}, {direction:?}: {:.0} Mbit/s", moved.bits_per_second / 1e6);
            Ok(())
        })?;
        let [sent, received] = sizes;
        let size = if direction == Direction::FromClient { sent } else { received };
        eprintln!("{name}, {direction:?}: {size} bytes a packet");
        ensure!((2 * u64::from(MTU)..=65_549).contains(&size), "{direction:?}: {size} bytes a packet");
    }
    Ok(())
}

/// A packet of 45 datagrams goes whole from card to card where both can have it whole, and in frames where the receiver
/// cannot: QEMU has no such feature for its own card.
fn datagrams_are_cut_last(left: &mut Machine, right: &mut Machine) -> Result<()> {
    const LEN: u64 = 1400;
    const COUNT: u64 = 45;
    const ROUNDS: u64 = 8;
    let whole = COUNT * LEN..=65_549;
    // Linux does not use it before it is told to.
    left.vm.run("ethtool -K eth1 tx-udp-segmentation on")?;
    for (card, received_as) in [(1, whole), (0, LEN..=LEN + 100)] {
        let (address, receiver) = (right.address(card), format!("eth{card}"));
        // From eth1 in any case, and back the same way.
        let from = left.address(1);
        let there_and_back = |change: &str| {
            [
                format!("ip route {change} {address}/32 dev eth1 src {from}"),
                format!("ip route {change} {from}/32 dev {receiver} src {address}"),
            ]
        };
        let [there, back] = there_and_back("replace");
        left.vm.run(&there)?;
        right.vm.run(&back)?;
        let [_, size] = packet_sizes(&mut right.vm, &receiver, |_| {
            left.vm.run(&format!("vvu-station segments {address}:{ECHO} {LEN} {COUNT} {ROUNDS}")).map(drop)
        })?;
        eprintln!("datagrams to {receiver}: {size} bytes a packet");
        ensure!(received_as.contains(&size), "{receiver} has received {size} bytes a packet");
        let [there, back] = there_and_back("del");
        left.vm.run(&there)?;
        right.vm.run(&back)?;
    }
    Ok(())
}

/// A link that goes down takes all frames along, and the carrier where the driver can see it; and it comes back.
fn links(run: &VvuRun, left: &mut Machine, right: &mut Machine) -> Result<()> {
    for _ in 0..2 {
        for (card, port) in LEFT.into_iter().enumerate() {
            run.set_link(port, "down")?;
            if card == 1 {
                left.vm.run("until test $(cat /sys/class/net/eth1/carrier) = 0; do sleep 0.1; done")?;
            }
            right.reach_not(&left.address(card))?;
            // The other card's is another link.
            right.reach(&left.address(1 - card))?;
            run.set_link(port, "up")?;
            if card == 1 {
                left.vm.run("until test $(cat /sys/class/net/eth1/carrier) = 1; do sleep 0.1; done")?;
            }
            right.reach(&left.address(card))?;
        }
    }
    Ok(())
}

/// What a filter does not name does not pass from the moment on that it is set, and passes when it is lifted.
fn filters(run: &VvuRun, left: &mut Machine, right: &mut Machine) -> Result<()> {
    for (card, port) in LEFT.into_iter().enumerate() {
        for vlan in [7, 8] {
            for machine in [&mut *left, &mut *right] {
                let (name, address) = (format!("eth{card}.{vlan}"), machine.address_in(vlan, card));
                machine.vm.run(&format!("vconfig add eth{card} {vlan} && ip link set {name} up"))?;
                machine.vm.run(&format!("ip addr add {address}/24 dev {name}"))?;
            }
        }
        let there = right.address(card);
        let [seventh, eighth] = [7, 8].map(|vlan| right.address_in(vlan, card));
        left.reach(&eighth)?;
        run.set_filter(port, &["--vlans", "0;7"])?;
        left.reach(&seventh)?;
        left.reach(&there)?;
        left.reach_not(&eighth)?;
        run.set_filter(port, &["--macs", "52:54:00:00:00:77"])?;
        left.reach_not(&there)?;
        run.set_filter(port, &["--macs", &format!("52:54:00:00:00:77;{}", left.port(card).mac())])?;
        left.reach(&there)?;
        left.reach_not(&eighth)?;
        run.set_filter(port, &["--macs", "any", "--vlans", "any"])?;
        left.reach(&eighth)?;
    }
    Ok(())
}

/// TCP goes as fast as the limit lets it, and much faster when it is lifted.
fn limits(run: &VvuRun, left: &mut Machine, right: &mut Machine) -> Result<()> {
    /// In bytes each second: much less than an emulated machine carries.
    const LIMIT: u32 = 1 << 20;
    let address = right.address(0);
    let mut rate = |direction| {
        let moved = iperf::measure(&mut left.vm, &address, direction, 1, 2 * SHORT)?;
        eprintln!("{direction:?}: {:.1} Mbit/s", moved.bits_per_second / 1e6);
        Ok::<_, anyhow::Error>(moved.bits_per_second / 8.0 / f64::from(LIMIT))
    };
    run.set_limit(LEFT[0], &["--bandwidth", "1M"])?;
    let sending = rate(Direction::FromClient)?;
    ensure!((0.6..=1.1).contains(&sending), "{sending:.2} of the limit");
    let receiving = rate(Direction::ToClient)?;
    ensure!((0.2..=1.1).contains(&receiving), "{receiving:.2} of the limit");
    run.set_limit(LEFT[0], &["--bandwidth", "0"])?;
    let free = rate(Direction::FromClient)?;
    ensure!(free > 3.0, "without a limit {free:.2} of what it was");
    Ok(())
}

/// A driver that breaks the rules on one card breaks its own rings and nothing else: the other cards go on, the appliance and
/// its back-end live, and the card works again for a driver that behaves.
fn hostile_driver(run: &mut VvuRun, left: &mut Machine, right: &mut Machine) -> Result<()> {
    /// Ways to break a ring, and what the back-end says of each; it says so of ten in ten seconds.
    const ATTACKS: [(&str, &str); 10] = [
        ("loop", "circular or too long"),
        ("wild-address", "not driver memory"),
        ("huge-length", "not driver memory"),
        ("next-outside", "outside of a table"),
        ("nested-table", "inside an indirect table"),
        ("head-outside", "head 256 is outside"),
        ("index-too-far", "avail index"),
        ("half-a-header", "less than a header"),
        ("wild-buffer", "not driver memory"),
        ("command-loop", "circular or too long"),
    ];
    let before = run.status()?;
    let device = left.vm.run("basename $(readlink -f /sys/class/net/eth1/device/..)")?;
    let device = device.trim();
    right.vm.run(&format!("ping -i 0.2 -W 20 {} > /tmp/pings 2>&1 &", left.address(0)))?;
    run.forget_events();
    for (name, says) in ATTACKS {
        left.vm.run(&format!("vvu-station attack {device} {name}")).with_context(|| name)?;
        if name == "wild-buffer" {
            // Nobody looks at the buffers before there is something for them: a question to all, who has this address.
            right.reach_not("10.0.1.99")?;
        }
        run.await_console(&["ring is broken", says]).with_context(|| name)?;
    }
    left.vm.run(&format!("vvu-station commands {device}"))?;
    let to = format!("{} {}:{ECHO}", right.port(1).mac(), right.address(1));
    left.vm.run(&format!("vvu-station malformed {device} {to}"))?;
    let heard = right.vm.run("until grep -q end /tmp/heard; do sleep 0.1; done; cat /tmp/heard")?;
    ensure!(heard.trim() == "mark end", "what has passed: {heard}");

    left.vm.run(&format!("echo 0 > /sys/bus/pci/devices/{device}/enable"))?;
    left.vm.run(&format!("echo {device} > /sys/bus/pci/drivers/virtio-pci/bind"))?;
    left.vm.run("until test -e /sys/class/net/eth1; do sleep 0.1; done")?;
    left.bring_up(1)?;
    left.reach(&right.address(1))?;
    let pings = right.vm.run("killall -INT ping; until grep transmitted /tmp/pings; do sleep 0.1; done")?;
    ensure!(pings.contains(" 0% packet loss"), "meanwhile: {pings}");
    let after = run.status()?;
    ensure!(before.appliance == after.appliance && before.restarts == after.restarts, "{before:?}, then {after:?}");
    for (port, (before, after)) in (0..).zip(before.ports.iter().zip(&after.ports)) {
        let broken = |status: &Value| status.pointer("/counters/broken").and_then(Value::as_u64);
        let (before, after) = (broken(before).context("no counters")?, broken(after).context("no counters")?);
        let expected = if port == LEFT[1] { ATTACKS.len() as u64 } else { 0 };
        ensure!(after - before == expected, "{} rings of port {port} were broken", after - before);
    }
    Ok(())
}
