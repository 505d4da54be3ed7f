//! Networks between driver VMs whose cards an appliance VM emulates.
//!
//! Each test names the path that it proves. `VVU_TEST_BACKEND=vvu-net` runs the same tests against the same back-end on the
//! host.

use anyhow::{Result, ensure};
use vvu_tests::driver_vm::{DriverVm, DriverVmPlan};
use vvu_tests::iperf::{self, Direction};
use vvu_tests::network::statistics::packet_sizes;
use vvu_tests::network::{Port, ServedSwitch};
use vvu_tests::testbed::{Testbed, machine_test};

/// Memory of a driver VM that only talks, in MiB; half of what the kernel finds is for files, those of the image included.
const MEMORY_MIB: u32 = 320;

/// Seconds of a measurement that only has to carry something.
const SHORT: u64 = 2;

fn plan<'a>(testbed: &'a Testbed, port: &Port, name: &str) -> DriverVmPlan<'a> {
    DriverVmPlan::new(testbed, name).memory_mib(MEMORY_MIB, None).network(port.card())
}

/// Boots a driver VM behind a port, with its card up.
fn boot(testbed: &Testbed, port: &Port, name: &str) -> Result<DriverVm> {
    let mut vm = plan(testbed, port, name).boot()?;
    port.bring_up(&mut vm)?;
    Ok(vm)
}

/// Sends random bytes over TCP, and checks that they arrive as they were.
fn send_and_compare(from: &mut DriverVm, to: &mut DriverVm, address: &str, mib: u32) -> Result<()> {
    const SUM: &str = "wc -c && sha256sum < /tmp/content";
    let sent = from.run(&format!("head -c $(({mib} << 20)) /dev/urandom > /tmp/content; cat /tmp/content | {SUM}"))?;
    // Busybox's nc hangs up when its own input ends, and this one's does not.
    to.run("rm -f /tmp/received /tmp/open && mkfifo /tmp/open")?;
    to.run("(nc -l -p 7000 <> /tmp/open > /tmp/content; touch /tmp/received) > /dev/null 2>&1 &")?;
    from.run(&format!("until nc {address} 7000 < /tmp/content; do sleep 0.2; done"))?;
    let received = to.run(&format!("until test -e /tmp/received; do sleep 0.1; done; cat /tmp/content | {SUM}"))?;
    ensure!(received == sent, "sent {sent}, received {received}");
    Ok(())
}

/// Path: a frame from driver VM to driver VM through the switch and no further: ARP, ICMP, TCP both ways, what arrives
/// being what was sent; with all offloads as packets of up to 64 KiB that nobody cuts, and with none as frames with whole
/// checksums.
#[test]
fn two_driver_vms_talk_through_the_switch() -> Result<()> {
    machine_test("two_driver_vms_talk_through_the_switch", |testbed| {
        let (left, right) = (Port::new(testbed, 1), Port::new(testbed, 2));
        let served = ServedSwitch::start(testbed, &[&left, &right], &[])?;
        let (mut vm, mut peer) = (boot(testbed, &left, "left")?, boot(testbed, &right, "right")?);
        let address = right.address();
        vm.run(&format!("ping -c 3 -W 20 {address}"))?;
        iperf::serve(&mut peer)?;

        for (offloads, at_least, at_most) in [("on", 8 << 10, 65_535), ("off", 500, 1514)] {
            for machine in [&mut vm, &mut peer] {
                machine.run(&format!(
                    "ethtool -K eth0 rx {offloads} tx {offloads} tso {offloads} gso {offloads} gro off"
                ))?;
            }
            for direction in [Direction::FromClient, Direction::ToClient] {
                let sizes = packet_sizes(&mut vm, "eth0", |vm| {
                    let moved = iperf::measure(vm, &address, direction, 1, SHORT)?;
                    eprintln!("offloads {offloads}, {direction:?}: {:.0} Mbit/s", moved.bits_per_second / 1e6);
                    Ok(())
                })?;
                let [sent, received] = sizes;
                let size = if direction == Direction::FromClient { sent } else { received };
                ensure!(
                    (at_least..=at_most).contains(&size),
                    "offloads {offloads}, {direction:?}: {size} bytes a packet"
                );
            }
            send_and_compare(&mut vm, &mut peer, &address, 8)?;
            send_and_compare(&mut peer, &mut vm, &left.address(), 8)?;
        }
        vm.power_off()?;
        peer.power_off()?;
        served.stop()
    })
}
