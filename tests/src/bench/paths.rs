//! Figures: what lies between a front-end and our back-end, under the same load.
//!
//! [`loopback`] has no VM: it shows at native speed what bridge and agent cost, on a disk that keeps nothing, so that nothing
//! else is measured. [`appliance`] has the appliance VM; where that is emulated (TCG), its counts say more than its times.

use anyhow::Result;
use vvu_bench::report::Report;

use super::back_ends::{DISK_LEN, Storage};
use super::side_by_side::{Point, Runs, Way, all_points, measure, report};
use super::ways::{Signals, straight, through_appliance, through_loopback};
use super::{fill, finish_report};
use crate::backend::ServedImage;
use crate::image_file::create;
use crate::testbed::{Testbed, Turn};

/// Straight, relayed and handed over between processes of the host.
///
/// # Errors
/// If a program does not come up, a load fails, or the output is closed.
pub fn loopback(runs: Runs) -> Result<()> {
    let testbed = Testbed::open("bench-loopback", Turn::Alone)?;
    let mut document = Report::new(
        "loopback",
        "vvu-blk with a disk that keeps nothing, straight and behind bridge and agent as processes of the host; random reads by \
         `vvu-bench load`, in turns; median of the rounds. Ratios, each of one round: \
         **IOPS** [least..most]; latency; processor time of load and back-end together."
            .to_owned(),
        format!("cargo xtask bench loopback --rounds {} --runtime {}", runs.rounds, runs.runtime.as_secs_f64()),
    );
    let (first, _process) = straight(&testbed, &Storage::Null, "off")?;
    let (handed_over, _processes) = through_loopback(&testbed, &Storage::Null, "off", Signals::HandedOver)?;
    let (relayed, _more) = through_loopback(&testbed, &Storage::Null, "off", Signals::Relayed)?;
    let ways = [first, Way { against: Some(0), ..handed_over }, Way { against: Some(0), ..relayed }];
    report(&mut document, &measure(&ways, None, &all_points("null", "randread"), runs)?, true)?;
    finish_report(&document)
}

/// Straight on the host, and behind an appliance VM with signals handed over and relayed.
///
/// # Errors
/// As [`loopback`].
pub fn appliance(runs: Runs) -> Result<()> {
    let testbed = Testbed::open("bench-appliance", Turn::Alone)?;
    let image = create(&testbed.folder().join("disk.img"), DISK_LEN)?;
    fill(&image, DISK_LEN)?;
    let mut document = Report::new(
        "appliance",
        "vvu-blk on the host, and the same program in an appliance VM behind the bridge, on one image; random reads by \
         `vvu-bench load` on the host, in turns; median of the rounds. Ratios, each of one round: \
         **IOPS** [least..most]; latency; processor time of load and back-end together."
            .to_owned(),
        format!("cargo xtask bench appliance --rounds {} --runtime {}", runs.rounds, runs.runtime.as_secs_f64()),
    );
    let served = ServedImage::writable(&image).read_only().shared();
    let (first, _process) = straight(&testbed, &Storage::File(&image), "auto")?;
    let (handed_over, one) = through_appliance(&testbed, &served, "auto", Signals::HandedOver)?;
    let (relayed, other) = through_appliance(&testbed, &served, "auto", Signals::Relayed)?;
    let ways = [first, Way { against: Some(0), ..handed_over }, Way { against: Some(0), ..relayed }];
    let interrupts: Vec<Point> = all_points("file", "randread").into_iter().filter(|point| !point.polled).collect();
    report(&mut document, &measure(&ways, None, &interrupts, runs)?, true)?;
    one.stop()?;
    other.stop()?;
    testbed.remove_images()?;
    finish_report(&document)
}
