//! Random kills at random moments under a load that is verified, over and over.
//!
//! One `vvu run`, one driver VM at a time, one witness. Each iteration takes away one part, or one and another one while
//! the first is being repaired; then everything must be as if nothing had happened: every write that was acknowledged is
//! there, no old one has come back, and no process holds more than before. What is taken away, and when, follows from
//! seed and iteration alone, so a failure is repeated by its seed (as far as machines that run at their own pace repeat).

use std::io::{self, Write};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use vvu_witness::dice::Dice;

use crate::backend::ServedImage;
use crate::driver_vm::{Disk, DriverVm, DriverVmPlan};
use crate::footprint::Footprint;
use crate::image_file::create;
use crate::loss::{self, Loss};
use crate::testbed::{Testbed, Turn};
use crate::vvu_run::VvuRun;
use crate::witness::{Load, Witness, check_kernel_log};

/// Longest time under load before a kill.
const DELAY_MAX_MS: u64 = 1500;

/// Longest time between two kills of one iteration: a repair takes less, so some of the second ones come too late to
/// disturb it, and most do not.
const SECOND_DELAY_MAX_MS: u64 = 12_000;

/// Length of the image in bytes.
const IMAGE_LEN: u64 = 16 << 20;

/// Many requests are a FLUSH: those after it are done before it, so a kill meets a ring whose requests end out of order.
const LOAD: Load = Load { blocks: 2048, writers: 16, flush_one_in: 8 };

/// What a person may choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SoakOptions {
    /// Number of iterations.
    pub iterations: u32,
    /// What happens follows from it.
    pub seed: u64,
    /// One JSON document on standard output at the end.
    pub json: bool,
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(untagged)]
enum Victim {
    Behind(Loss),
    DriverVmm(DriverVmm),
}

/// The driver VM's QEMU, killed with SIGKILL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum DriverVmm {
    DriverVmm,
}

/// What one iteration does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Plan {
    victim: Victim,
    after_ms: u64,
    /// A part that is lost while the first loss is being repaired, and the time between them.
    second: Option<(Loss, u64)>,
}

impl Plan {
    /// What iteration number `iteration` of the run `seed` does.
    fn of(seed: u64, iteration: u32) -> Self {
        let mut dice = Dice::new(seed.wrapping_add(u64::from(iteration).rotate_left(32)));
        let appliance = if dice.below(2) == 0 { Loss::Appliance } else { Loss::AppliancePanic };
        let victim = match dice.below(4) {
            0 => Victim::Behind(Loss::BackEnd),
            1 => Victim::Behind(appliance),
            2 => Victim::Behind(Loss::Bridge),
            _ => Victim::DriverVmm(DriverVmm::DriverVmm),
        };
        let after_ms = dice.below(DELAY_MAX_MS);
        let mut other = || if dice.below(2) == 0 { Loss::Appliance } else { Loss::Bridge };
        let (other, delay) = (other(), dice.below(SECOND_DELAY_MAX_MS));
        // A back-end is repaired in a moment: its second loss would be another iteration.
        let second = match victim {
            Victim::Behind(Loss::Appliance | Loss::AppliancePanic | Loss::Bridge) if dice.below(3) == 0 => {
                Some((other, delay))
            }
            _ => None,
        };
        Self { victim, after_ms, second }
    }
}

/// One iteration that held.
#[derive(Debug, Clone, Serialize)]
struct Held {
    iteration: u32,
    #[serde(flatten)]
    plan: Plan,
    /// Longest time in which the driver VM saw no request completed; none if it was the victim.
    pause_ms: Option<u64>,
    seconds: f64,
}

/// The whole result.
#[derive(Debug, Serialize)]
struct Report {
    seed: u64,
    iterations: u32,
    held: Vec<Held>,
    requests: u64,
    failure: Option<String>,
}

/// Runs the iterations; progress goes to standard error.
///
/// # Errors
/// If an iteration does not hold; the text says which one, and how to repeat it.
pub fn run(options: &SoakOptions) -> Result<()> {
    let testbed = Testbed::open("soak", Turn::Shared)?;
    eprintln!("soak: {} iterations, seed {}", options.iterations, options.seed);
    let mut report =
        Report { seed: options.seed, iterations: options.iterations, held: Vec::new(), requests: 0, failure: None };
    let result = iterate(&testbed, options, &mut report);
    report.failure = result.as_ref().err().map(|error| format!("{error:#}"));
    if options.json {
        serde_json::to_writer_pretty(io::stdout().lock(), &report)?;
        writeln!(io::stdout()).context("cannot write the report")?;
    }
    if result.is_err() {
        testbed.print_logs();
    }
    let SoakOptions { iterations, seed, .. } = options;
    result.with_context(|| format!("repeat it with: cargo xtask soak --iterations {iterations} --seed {seed}"))
}

fn iterate(testbed: &Testbed, options: &SoakOptions, report: &mut Report) -> Result<()> {
    let mut soak = Soak::start(testbed, options.seed)?;
    for iteration in 1..=options.iterations {
        let plan = Plan::of(options.seed, iteration);
        let start = Instant::now();
        let pause = soak.iteration(&plan).with_context(|| format!("iteration {iteration}: {plan:?}"))?;
        let seconds = start.elapsed().as_secs_f64();
        let pause_ms = pause.map(|pause| u64::try_from(pause.as_millis()).unwrap_or(u64::MAX));
        eprintln!("soak: {iteration}/{}: {plan:?}: held, pause {pause:.0?}, {seconds:.1} s", options.iterations);
        report.held.push(Held { iteration, plan, pause_ms, seconds });
    }
    report.requests = soak.finish()?;
    Ok(())
}

/// The machines.
struct Soak<'a> {
    testbed: &'a Testbed,
    image: PathBuf,
    run: VvuRun,
    witness: Witness,
    /// None only while it is replaced.
    vm: Option<DriverVm>,
    footprints: Vec<Footprint>,
    requests: u64,
}

impl<'a> Soak<'a> {
    fn start(testbed: &'a Testbed, seed: u64) -> Result<Self> {
        let image = create(&testbed.folder().join("disk.img"), IMAGE_LEN)?;
        let run = VvuRun::start_with(testbed, "disk", &ServedImage::writable(&image), &loss::OPTIONS)?;
        let witness = Witness::new(testbed, "witness", seed, LOAD)?;
        let (vm, footprints, requests) = (None, Vec::new(), 0);
        let mut soak = Self { testbed, image, run, witness, vm, footprints, requests };
        soak.boot()?;
        let [vvu, bridge, appliance] = soak.holders().map(|(_, pid)| Footprint::of(pid));
        soak.footprints = vec![vvu?, bridge?, appliance?.without_eventfds()];
        Ok(soak)
    }

    /// Boots a driver VM on the image as the last one has left it, and starts the load.
    fn boot(&mut self) -> Result<()> {
        let disk = Disk::at(self.run.socket()).reconnecting();
        let plan = DriverVmPlan::new(self.testbed, "driver").disk(disk).ledger(self.witness.ledger());
        let vm = self.vm.insert(plan.boot()?);
        // The device serves one front-end at a time: that of the last machine, and all that it had asked for, is gone.
        self.witness.verify_image(&self.image)?;
        self.witness.start(vm, "/dev/vda")?;
        self.witness.await_turnover(vm)
    }

    fn iteration(&mut self, plan: &Plan) -> Result<Option<Duration>> {
        let vm = self.vm.as_mut().context("there is no driver VM")?;
        self.witness.await_turnover(vm)?;
        self.witness.take_longest_gap()?;
        sleep(Duration::from_millis(plan.after_ms));
        let pause = match plan.victim {
            Victim::Behind(loss) => Some(self.lose(loss, plan.second)?),
            Victim::DriverVmm(_) => {
                self.requests += self.witness.completions()?;
                self.vm.take().context("there is no driver VM")?.kill()?;
                self.boot()?;
                None
            }
        };
        for (before, (name, pid)) in self.footprints.iter().zip(self.holders()) {
            before.await_again(name, pid)?;
        }
        Ok(pause)
    }

    fn lose(&mut self, loss: Loss, second: Option<(Loss, u64)>) -> Result<Duration> {
        let vm = self.vm.as_mut().context("there is no driver VM")?;
        // The appliance VMs that are lost: a bridge takes its own along.
        let mut lost = match loss {
            Loss::BackEnd => Vec::new(),
            _ => vec![self.run.appliance().pid()],
        };
        loss.strike(&mut self.run)?;
        if let Some((second, after_ms)) = second {
            sleep(Duration::from_millis(after_ms));
            if self.run.find_again()? {
                lost.push(self.run.appliance().pid());
                second.strike(&mut self.run)?;
            }
        }
        if loss == Loss::BackEnd {
            loss.await_repair(&mut self.run)?;
        }
        self.run.await_serving(&lost)?;
        self.witness.await_turnover(vm)?;
        self.witness.verify(vm)?;
        check_kernel_log(vm)?;
        self.witness.take_longest_gap()
    }

    /// The processes whose footprints count.
    fn holders(&self) -> [(&'static str, u32); 3] {
        [
            ("vvu", self.run.vvu().pid()),
            ("the bridge", self.run.bridge().pid()),
            ("the appliance's QEMU", self.run.appliance().pid()),
        ]
    }

    fn finish(mut self) -> Result<u64> {
        let mut vm = self.vm.take().context("there is no driver VM")?;
        let stopped = self.witness.stop(&mut vm)?;
        ensure!(stopped.flushes > 0, "{stopped:?}");
        vm.power_off()?;
        self.witness.verify_image(&self.image)?;
        self.run.stop()?;
        std::fs::remove_file(&self.image).context("cannot remove the image")?;
        Ok(self.requests + stopped.requests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_its_plans_and_kills_everything() {
        let plans: Vec<Plan> = (1..=200).map(|iteration| Plan::of(5, iteration)).collect();
        assert_eq!(plans, (1..=200).map(|iteration| Plan::of(5, iteration)).collect::<Vec<_>>());
        assert_ne!(plans, (1..=200).map(|iteration| Plan::of(6, iteration)).collect::<Vec<_>>());
        for victim in Loss::ALL.map(Victim::Behind).into_iter().chain([Victim::DriverVmm(DriverVmm::DriverVmm)]) {
            let count = plans.iter().filter(|plan| plan.victim == victim).count();
            assert!(count > 10, "{victim:?}: {count} of 200");
        }
        assert!(plans.iter().filter(|plan| plan.second.is_some()).count() > 10);
    }
}
