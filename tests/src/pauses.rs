//! Figures: how long a driver VM waits for its disk when something behind it is lost or replaced, or when it is moved.
//!
//! The pause is what the driver VM sees: the longest time in which none of 16 writers had a request completed. On a machine
//! without KVM most of it is the boot of an appliance VM, at the speed of an emulator.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::backend::{Backend, Served, ServedImage};
use crate::bench::Spread;
use crate::bench::hand_in;
use crate::driver_vm::{Disk, DriverVm, DriverVmPlan, kvm_is_usable};
use crate::image_file::create;
use crate::loss::{self, Loss};
use crate::testbed::{Testbed, Turn};
use crate::vvu_run::VvuRun;
use crate::witness::{Load, Witness, check_kernel_log};

/// Length of the image in bytes.
const IMAGE_LEN: u64 = 64 << 20;

/// What a person may choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PausesOptions {
    /// How often each event happens, at least once.
    pub rounds: u32,
    /// One JSON document on standard output instead of a table.
    pub json: bool,
}

/// One kind of event.
#[derive(Debug, Clone, Serialize)]
struct Row {
    event: String,
    /// As the driver VM saw it.
    seen_ms: Spread,
    /// As the bridge measured it (upgrade), or QEMU (migration: the time in which the machine stood still).
    measured_ms: Option<Spread>,
}

/// The whole document.
#[derive(Debug, Serialize)]
struct Report {
    accelerator: &'static str,
    rounds: u32,
    rows: Vec<Row>,
}

/// Runs the benchmark and prints its report on standard output; progress goes to standard error.
///
/// # Errors
/// If something does not come back, or the driver VM sees an error.
pub fn run(options: &PausesOptions) -> Result<()> {
    let testbed = Testbed::open("pauses", Turn::Alone)?;
    let mut rows = behind_one_socket(&testbed, options.rounds)?;
    rows.push(migrations(&testbed, options.rounds)?);
    let accelerator = if kvm_is_usable() { "kvm" } else { "tcg" };
    let report = Report { accelerator, rounds: options.rounds, rows };
    let mut text = Vec::new();
    print_table(&report, &mut text)?;
    let repeat = format!("cargo xtask bench pauses --rounds {}", options.rounds);
    hand_in(
        "pauses",
        "How long the driver VM waits when something behind its disk is lost.",
        repeat,
        &report,
        text,
        options.json,
    )
}

/// Losses and upgrades, all in one driver VM.
fn behind_one_socket(testbed: &Testbed, rounds: u32) -> Result<Vec<Row>> {
    let image = create(&testbed.folder().join("losses.img"), IMAGE_LEN)?;
    let mut run = VvuRun::start_with(testbed, "disk", &ServedImage::writable(&image), &loss::OPTIONS)?;
    let mut witness = Witness::new(testbed, "witness", 1, Load::default())?;
    let disk = Disk::at(run.socket()).reconnecting();
    let mut vm = DriverVmPlan::new(testbed, "driver").disk(disk).ledger(witness.ledger()).boot()?;
    witness.start(&mut vm, "/dev/vda")?;
    let mut losses = Loss::ALL.map(|loss| (loss, Vec::new()));
    let (mut seen_upgrades, mut measured) = (Vec::new(), Vec::new());
    // In turns: the machine may be faster in one minute than in the next.
    for round in 1..=rounds {
        for (loss, seen) in &mut losses {
            let pause = witness.pause_of(&mut vm, || {
                loss.strike(&mut run)?;
                loss.await_repair(&mut run)
            })?;
            eprintln!("pauses: {loss}, {round} of {rounds}: {pause:.0?}");
            seen.push(in_ms(pause));
        }
        let pause = witness.pause_of(&mut vm, || {
            measured.push(in_ms(run.upgrade()?.pause()?));
            Ok(())
        })?;
        eprintln!("pauses: upgrade, {round} of {rounds}: {pause:.0?}");
        seen_upgrades.push(in_ms(pause));
    }
    let row_of =
        |(loss, seen): (Loss, _)| Row { event: loss.to_string(), seen_ms: Spread::of(seen), measured_ms: None };
    let mut rows: Vec<Row> = losses.into_iter().map(row_of).collect();
    let (seen_ms, measured_ms) = (Spread::of(seen_upgrades), Some(Spread::of(measured)));
    rows.push(Row { event: "vvu upgrade".to_owned(), seen_ms, measured_ms });
    check_kernel_log(&mut vm)?;
    witness.stop(&mut vm)?;
    vm.power_off()?;
    run.stop()?;
    std::fs::remove_file(&image).context("cannot remove the image")?;
    Ok(rows)
}

/// Live migrations between two runs on one image, to and fro.
fn migrations(testbed: &Testbed, rounds: u32) -> Result<Row> {
    let image = create(&testbed.folder().join("migrations.img"), IMAGE_LEN)?;
    let served = ServedImage::writable(&image).shared();
    let sides = [Backend::Vvu.serve(testbed, "a", &served)?, Backend::Vvu.serve(testbed, "b", &served)?];
    let [here, there] = &sides;
    let plan = |name: &str, side: &Served| DriverVmPlan::new(testbed, name).disk(Disk::at(side.socket()));
    let mut witness = Witness::new(testbed, "migrating", 2, Load::default())?;
    let mut vm: DriverVm = plan("migrating", here).ledger(witness.ledger()).boot()?;
    witness.start(&mut vm, "/dev/vda")?;
    let (mut seen, mut measured) = (Vec::new(), Vec::new());
    for (round, side) in (1..=rounds).zip([there, here].into_iter().cycle()) {
        witness.await_turnover(&mut vm)?;
        witness.take_longest_gap()?;
        let name = format!("migrated-{round}");
        let ledger = witness.next_ledger(testbed, &name)?;
        let incoming = plan(&name, side).ledger(&ledger).await_migration()?;
        let (moved, migration) = vm.migrate(incoming)?;
        vm = moved;
        witness.follow(&ledger)?;
        witness.await_turnover(&mut vm)?;
        // The machine's clock stands still with it.
        let pause = witness.take_longest_gap()? + migration.downtime;
        eprintln!("pauses: migration, {round} of {rounds}: {pause:.0?}, {migration:?}");
        seen.push(in_ms(pause));
        measured.push(in_ms(migration.downtime));
    }
    check_kernel_log(&mut vm)?;
    witness.stop(&mut vm)?;
    vm.power_off()?;
    for side in sides {
        side.stop()?;
    }
    std::fs::remove_file(&image).context("cannot remove the image")?;
    let (seen_ms, measured_ms) = (Spread::of(seen), Some(Spread::of(measured)));
    Ok(Row { event: "live migration".to_owned(), seen_ms, measured_ms })
}

fn in_ms(pause: Duration) -> f64 {
    pause.as_secs_f64() * 1000.0
}

fn print_table(report: &Report, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "Accelerator: {}. {} rounds each. Median [least..most] in ms.\n", report.accelerator, report.rounds)?;
    writeln!(out, "| event | pause, seen by the driver VM | as measured by the bridge or QEMU |")?;
    writeln!(out, "| --- | --- | --- |")?;
    let text = |spread: &Spread| format!("{:.0} [{:.0}..{:.0}]", spread.median, spread.least, spread.most);
    for row in &report.rows {
        let measured = row.measured_ms.as_ref().map_or_else(String::new, text);
        writeln!(out, "| {} | {} | {measured} |", row.event, text(&row.seen_ms))?;
    }
    Ok(())
}
