//! What is lost, replaced or moved behind a driver VM's network card is a pause for its connections, never an end.

use anyhow::{Context, Result, ensure};
use vvu_tests::driver_vm::{DriverVm, DriverVmPlan};
use vvu_tests::loss::{self, Loss};
use vvu_tests::network::stream::Stream;
use vvu_tests::network::wire::{End, Wire};
use vvu_tests::network::{Port, ServedSwitch};
use vvu_tests::testbed::{Testbed, machine_test, machine_test_alone};
use vvu_tests::vvu_run::VvuRun;

/// Memory of a driver VM, in MiB.
const MEMORY_MIB: u32 = 256;

fn plan<'a>(testbed: &'a Testbed, port: &Port, name: &str) -> DriverVmPlan<'a> {
    DriverVmPlan::new(testbed, name).memory_mib(MEMORY_MIB, None).network(port.card().reconnecting())
}

fn boot(testbed: &Testbed, port: &Port, name: &str) -> Result<DriverVm> {
    let mut vm = plan(testbed, port, name).boot()?;
    port.bring_up(&mut vm)?;
    Ok(vm)
}

/// Path: each part behind two network cards is lost under a TCP stream, and comes back: the rings go on where they were, and
/// TCP sends again what was on the way. Of the two bridges, it is the sender's that is lost. Then the appliance VM is
/// replaced by `vvu upgrade`.
#[test]
fn a_stream_outlives_every_loss() -> Result<()> {
    machine_test("a_stream_outlives_every_loss", |testbed| {
        let (left, right) = (Port::new(testbed, 1), Port::new(testbed, 2));
        let mut served = ServedSwitch::start(testbed, &[&left, &right], &loss::OPTIONS)?;
        let run = served.run().context("a back-end on the host has no appliance")?;
        let (mut vm, mut peer) = (boot(testbed, &left, "left")?, boot(testbed, &right, "right")?);
        vm.run(&format!("ping -c 1 -W 20 {}", right.address()))?;
        let stream = Stream::start(&mut vm, &mut peer, &right.address())?;
        for loss in Loss::ALL {
            loss.strike(run)?;
            loss.await_repair(run)?;
            let took = stream.await_progress(&mut peer).with_context(|| loss.to_string())?;
            eprintln!("{loss}: the stream goes on after {took:.1?}");
        }
        let replaced = run.upgrade()?;
        let took = stream.await_progress(&mut peer).context("upgrade")?;
        eprintln!("upgrade: {:.0?}, the stream goes on after {took:.1?}", replaced.pause()?);
        let sent = stream.finish(&mut vm, &mut peer)?;
        eprintln!("{sent} bytes");
        vm.power_off()?;
        peer.power_off()?;
        served.stop()
    })
}

/// Path: a driver VM migrates under a TCP stream from a switch to another appliance, and back; the appliances' uplinks are
/// joined by a cable, as two hosts would be. Its first frame from the new place is the announcement by which the other
/// switch learns where it is now: QEMU has the back-end send it, the guest being told nothing. Alone, as
/// the disk's migration is.
#[test]
fn a_stream_follows_a_driver_vm_that_migrates() -> Result<()> {
    machine_test_alone("a_stream_follows_a_driver_vm_that_migrates", |testbed| {
        let wire = Wire::lay(testbed)?;
        let (mover, peer) = (Port::new(testbed, 1), Port::new(testbed, 2));
        // The same station behind another socket.
        let elsewhere = mover.clone().at(&testbed.socket("elsewhere.sock"));
        let serve = |name: &str, ports: &[&Port], end| {
            let mut options: Vec<String> = ports.iter().flat_map(|port| ["--port".to_owned(), port.spec()]).collect();
            options.extend(["--uplink".to_owned(), wire.uplink(end)]);
            VvuRun::start_class(testbed, name, "switch", &options)
        };
        let here = serve("here", &[&mover, &peer], End::Here)?;
        let there = serve("there", &[&elsewhere], End::There)?;
        let plan = |port: &Port, name: &str| {
            let card = port.card().without_announcing();
            DriverVmPlan::new(testbed, name).memory_mib(MEMORY_MIB, None).network(card)
        };
        let mut vm = plan(&mover, "mover").boot()?;
        mover.bring_up(&mut vm)?;
        let mut other = boot(testbed, &peer, "peer")?;
        let stream = Stream::start(&mut vm, &mut other, &peer.address())?;
        ensure!(wire.seen(End::Here, &mover.mac()).announcements == 0, "announced before it has moved");

        for (name, to, end) in [("moved", &elsewhere, End::There), ("back", &mover, End::Here)] {
            let before = wire.seen(end, &mover.mac());
            let (moved, migration) = vm.migrate(plan(to, name).await_migration()?)?;
            vm = moved;
            let took = stream.await_progress(&mut other).with_context(|| name.to_owned())?;
            other.run(&format!("ping -c 2 -W 20 {}", mover.address()))?;
            let after = wire.seen(end, &mover.mac());
            eprintln!("{name}: {migration:?}, the stream goes on after {took:.1?}; {before:?}, {after:?}");
            ensure!(after.announcements > before.announcements, "{name}: not announced: {after:?}");
            if end == End::There {
                ensure!(after.frames > 100 + before.frames, "{name}: the stream does not go over the wire: {after:?}");
            }
        }
        let sent = stream.finish(&mut vm, &mut other)?;
        eprintln!("{sent} bytes");
        vm.power_off()?;
        other.power_off()?;
        here.stop()?;
        there.stop().map(drop)
    })
}
