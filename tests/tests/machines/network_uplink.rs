//! A driver VM's way out of the appliance: through the switch, the appliance's TAP, bridge and network card.

use std::io;
use std::net::TcpListener;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use vvu_tests::driver_image::station;
use vvu_tests::driver_vm::{DriverVm, DriverVmPlan};
use vvu_tests::network::Port;
use vvu_tests::surroundings::Surroundings;
use vvu_tests::testbed::{Testbed, machine_test};
use vvu_tests::vvu_run::VvuRun;

/// The TAP of the host, and its address there.
const TAP: &str = "vvutap0";
const HOST: &str = "10.7.0.254";

/// Path: QEMU's user-mode network, and answers from there: DHCP's broadcasts, ICMP, and TCP to a server on the host.
#[test]
fn an_uplink_reaches_the_host() -> Result<()> {
    machine_test("an_uplink_reaches_the_host", |testbed| {
        let port = Port::new(testbed, 1);
        let run = start_with_uplink(testbed, &port)?;
        let mut vm = DriverVmPlan::new(testbed, "driver").network(port.card()).boot()?;
        reach_the_host(&mut vm)?;
        vm.power_off()?;
        run.stop().map(drop)
    })
}

/// Runs a switch with one port, whose uplink is QEMU's user-mode network.
pub(crate) fn start_with_uplink(testbed: &Testbed, port: &Port) -> Result<VvuRun> {
    let options = ["--socket", &port.socket().display().to_string(), "--mac", &port.mac(), "--uplink", "user"];
    VvuRun::start_class(testbed, "net", "net", &options.map(str::to_owned))
}

/// Has a driver VM get an address, ask for an echo, and move 8 MiB to a server on the host and back.
pub(crate) fn reach_the_host(vm: &mut DriverVm) -> Result<()> {
    let script = "#!/bin/sh\\ntest $1 != bound || ip addr add $ip/24 dev $interface\\n";
    vm.run(&format!("printf '{script}' > /tmp/bound && chmod +x /tmp/bound && ip link set eth0 up"))?;
    vm.run("udhcpc -i eth0 -n -q -t 20 -s /tmp/bound")?;
    vm.run("ping -c 3 -W 20 10.0.2.2")?;

    let listener = TcpListener::bind("127.0.0.1:0")?;
    let host_port = listener.local_addr()?.port();
    let echo = thread::spawn(move || -> io::Result<u64> {
        let (stream, _) = listener.accept()?;
        io::copy(&mut &stream, &mut &stream)
    });
    vm.run("head -c $((8 << 20)) /dev/urandom > /tmp/content")?;
    vm.run(&format!("nc 10.0.2.2 {host_port} < /tmp/content > /tmp/echo && cmp /tmp/content /tmp/echo"))?;
    let echoed = echo.join().map_err(|_| anyhow!("the host's server failed"))??;
    ensure!(echoed == 8 << 20, "the host's server has seen {echoed} bytes");
    Ok(())
}

/// Path: a TAP of the host, in a network namespace, where a program takes the driver VM's stream and checks it; with
/// segments of 64 KiB from the driver VM to the host's own network stack. Without a TAP there is nothing to test.
#[test]
fn an_uplink_is_a_tap_of_the_host() -> Result<()> {
    machine_test("an_uplink_is_a_tap_of_the_host", |testbed| {
        if let Some(reason) = Surroundings::no_tap_because()? {
            eprintln!("skipped: this machine lets nobody make a TAP, not even in a namespace: {reason}");
            return Ok(());
        }
        let (port, progress) = (Port::new(testbed, 1), testbed.folder().join("progress"));
        let outcome = testbed.folder().join("received");
        let server = format!(
            "sh -c \"exec '{}' stream-from 7000 '{}' > '{}' 2>&1\"",
            station()?.display(),
            progress.display(),
            outcome.display()
        );
        let surroundings = Surroundings::with_a_tap(TAP, &format!("{HOST}/24"), &server);
        let socket = port.socket().display().to_string();
        let uplink = format!("tap={TAP}");
        let options = ["--socket", &socket, "--mac", &port.mac(), "--uplink", &uplink].map(str::to_owned);
        let run = VvuRun::start_class_in(testbed, "net", &surroundings, "net", &options)?;
        let mut vm = DriverVmPlan::new(testbed, "driver").network(port.card()).boot()?;
        port.bring_up(&mut vm)?;
        vm.run(&format!("ping -c 3 -W 20 {HOST}"))?;
        vm.run("(sleep 5; touch /tmp/enough) &")?;
        let sent = vm.run(&format!("vvu-station stream-to {HOST}:7000 /tmp/enough"))?;
        let received = std::fs::read_to_string(&outcome).context("the host's program has said nothing")?;
        let bytes = sent.trim().strip_prefix("sent ").context("the driver VM's program says nothing")?;
        ensure!(received.trim() == format!("received {bytes}"), "{sent}, but {received}");
        eprintln!("{bytes} bytes");
        vm.power_off()?;
        run.stop().map(drop)
    })
}
