//! The main job in front of a person's eyes: a real disk for a real VM, emulated in a VM of its own.
//!
//! It is a test that is filmed: every step checks what it shows, and the last line is printed only if all of it held.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::backend::ServedImage;
use crate::counters::BlkCounters;
use crate::driver_vm::{Disk, DriverVm, DriverVmPlan};
use crate::evidence::{self, Moved};
use crate::files::Files;
use crate::image_file::{allocated, create, file_system_state};
use crate::process::output_of;
use crate::testbed::{Testbed, Turn};
use crate::vvu_run::VvuRun;

/// Length of the demo's disk.
const IMAGE_LEN: u64 = 512 << 20;

/// Memory of the demo's driver VM in MiB.
const DRIVER_MEMORY_MIB: u32 = 384;

/// What a person may choose.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DemoOptions {
    /// Leaves the disk image where the logs are.
    pub keep_image: bool,
}

/// What was seen while both VMs ran.
struct Seen {
    driver_memory: u64,
    mapped_by_bridge: u64,
    mapped_by_appliance: u64,
    bridge: Moved,
    appliance: Moved,
    bridge_has_image: bool,
    appliance_own_memory: u64,
}

/// Runs the demo and tells its story on standard output.
///
/// # Errors
/// The first thing that did not hold.
pub fn run(options: &DemoOptions) -> Result<()> {
    let start = Instant::now();
    let testbed = Testbed::open("demo", Turn::Alone)?;
    println!("vvu: a disk whose emulation runs in a VM of its own");
    println!("everything here is real: two VMs, stock QEMU, stock kernels, one image file");
    let result = play(&testbed, start);
    if result.is_err() {
        println!("\nThis did not work; the logs are in {}", testbed.folder().display());
    } else if !options.keep_image {
        fs::remove_file(testbed.folder().join("disk.img")).context("cannot remove the image")?;
    }
    result
}

fn play(testbed: &Testbed, start: Instant) -> Result<()> {
    let mut story = Story::begin();

    story.step("Create a disk image");
    let image = create(&testbed.folder().join("disk.img"), IMAGE_LEN)?;
    story.note(&format!("{}: {}, nothing in it", image.display(), bytes(IMAGE_LEN)));

    story.step("vvu run blk: start bridge and appliance VM");
    let mut run = VvuRun::start(testbed, "vvu", &ServedImage::writable(&image))?;
    let time_to_ready = run.time_to_ready();
    story.note(&format!("ready after {:.1} s at {}", time_to_ready.as_secs_f64(), run.socket().display()));
    story.note(&format!("bridge is process {}, the appliance's QEMU {}", run.bridge().pid(), run.appliance().pid()));

    story.step("Boot a driver VM with -device vhost-user-blk-pci on that socket");
    let plan = DriverVmPlan::new(testbed, "driver").memory_mib(DRIVER_MEMORY_MIB, None);
    let mut vm = plan.disk(Disk::at(run.socket())).boot()?;
    story.note(&format!("{}, Linux {}", qemu_version(testbed)?, vm.run("uname -r")?.trim()));
    story.note(&format!("its kernel found {}", vm.run("lsblk -n -d -o NAME,SIZE,TYPE /dev/vda")?.trim()));

    story.step("In the driver VM: mkfs.ext4, mount, write files, sync, unmount, mount again, read back");
    let bridge_ran = || evidence::context_switches(run.bridge().pid());
    let before = bridge_ran()?;
    let files = Files::write_on_new_file_system(&mut vm, "/dev/vda")?;
    Files::unmount(&mut vm)?;
    files.mount_and_verify(&mut vm, "/dev/vda")?;
    let bridge_switches = bridge_ran()? - before;
    story.note(&format!("{} files, {}; SHA-256 of each is the same", files.count(), bytes(files.total_len())));

    story.step("Reboot the driver VM and verify again");
    Files::unmount(&mut vm)?;
    vm.reboot()?;
    files.mount_and_verify(&mut vm, "/dev/vda")?;
    story.note("firmware started the device, then Linux did; SHA-256 of each file is the same");

    story.step("Look at who did what, from the host");
    Files::unmount(&mut vm)?;
    let seen = observe(&run, &vm, &image)?;
    vm.power_off()?;
    let counters = run.await_counters()?;
    tell_who_did_what(&story, &seen, &counters)?;
    story.note(&format!("while the files were written and read, the bridge's threads ran {bridge_switches} times"));
    ensure!(bridge_switches * 10 < counters.kicks, "the bridge ran {bridge_switches} times: it relays signals");

    story.step("End the device with SIGTERM");
    run.stop()?;
    story.note("bridge, appliance VM, sockets and runtime directory are gone, exit code 0");

    story.step("Read the image on the host, with debugfs and no VM");
    files.verify_in_image(testbed.setup(), &image, testbed.folder())?;
    let state = file_system_state(testbed.setup(), &image)?;
    ensure!(state == "clean", "the file system in the image is {state}");
    story.note(&format!("the same {} files, the same SHA-256; the file system is {state}", files.count()));

    print_picture(&seen, &counters, &image)?;
    println!(
        "\nAll of it held: a stock VM used a disk that an appliance VM emulated ({:.0} s, ready after {:.1} s).",
        start.elapsed().as_secs_f64(),
        time_to_ready.as_secs_f64()
    );
    Ok(())
}

fn observe(run: &VvuRun, vm: &DriverVm, image: &Path) -> Result<Seen> {
    let memory = evidence::guest_memory(vm.qemu().pid())?;
    let (appliance_own_memory, _) = evidence::memory_without(run.appliance().pid(), &memory)?;
    ensure!(evidence::has_open(run.appliance().pid(), image)?, "the appliance VM does not have the image open");
    Ok(Seen {
        bridge_has_image: evidence::has_open(run.bridge().pid(), image)?,
        driver_memory: memory.iter().map(|map| map.len).sum(),
        mapped_by_bridge: evidence::bytes_mapped_of(run.bridge().pid(), &memory)?,
        mapped_by_appliance: evidence::bytes_mapped_of(run.appliance().pid(), &memory)?,
        bridge: evidence::moved(run.bridge().pid())?,
        appliance: evidence::moved(run.appliance().pid())?,
        appliance_own_memory,
    })
}

fn tell_who_did_what(story: &Story, seen: &Seen, counters: &BlkCounters) -> Result<()> {
    let Seen { driver_memory, mapped_by_bridge, mapped_by_appliance, bridge, appliance, .. } = seen;
    let calls = bridge.read_calls + bridge.write_calls;
    let of_driver_memory = |mapped: u64| format!("{} of {}", bytes(mapped), bytes(*driver_memory));
    story.note("               maps of driver memory    bytes moved");
    story.note(&format!(
        "bridge         {:<24} {} of messages, events and log; the image is {}",
        of_driver_memory(*mapped_by_bridge),
        bytes(calls),
        if seen.bridge_has_image { "open" } else { "not open" },
    ));
    story.note(&format!(
        "appliance VM   {:<24} {} read, {} written on the host's storage",
        of_driver_memory(*mapped_by_appliance),
        bytes(appliance.storage_read),
        bytes(appliance.storage_written),
    ));
    story.note(&format!(
        "  its vvu-blk  {:<24} {} read, {} written; {} without a copy ({} of it registered), {} bounced",
        "",
        bytes(counters.bytes_read),
        bytes(counters.bytes_written),
        bytes(counters.zero_copy_bytes),
        bytes(counters.registered_bytes),
        bytes(counters.bounced_bytes)
    ));
    ensure!(counters.registered_bytes > 0, "no driver memory is registered with the appliance's kernel");
    ensure!(*mapped_by_bridge == 0, "the bridge maps driver memory");
    ensure!(!seen.bridge_has_image, "the bridge has the image open");
    ensure!(mapped_by_appliance >= driver_memory, "the appliance VM does not map all of the driver VM's memory");
    let moved = counters.bytes_read + counters.bytes_written;
    ensure!(calls < moved / 2, "the bridge moved {calls} bytes, the back-end {moved}: data goes through the bridge");
    Ok(())
}

fn print_picture(seen: &Seen, counters: &BlkCounters, image: &Path) -> Result<()> {
    println!(
        "
    driver VM                       host                        appliance VM
 +------------------+            +------------------+           +------------------+
 | ext4 on /dev/vda | vhost-user | vvu-bridge       |  control  | vvu-agent        |
 |        |         |<---------->| maps {mapped:<8}    |<--------->|   |              |
 |        |         |   socket   | of driver memory |  device   |   |              |
 |      memory <----+------------+------------------+-----------+-> vvu-blk        |
 |   {memory:>9}      |            |                  |  window   |   {zero_copy:>9}      |
 |                  |            |                  |           |   without a copy |
 | {kicks:>6} kicks ----+------------+-> handed over ---+-----------+->                |
 |        calls <---+------------+-- handed over <--+-----------+-- {calls:>6} calls   |
 +------------------+            +------------------+  doorbell +---------+--------+
                                                                          |
                                                                {image} on the host
                                                                {allocated} of {len} used",
        mapped = bytes(seen.mapped_by_bridge),
        memory = bytes(seen.driver_memory),
        zero_copy = bytes(counters.zero_copy_bytes),
        kicks = counters.kicks,
        calls = counters.calls,
        image = image.file_name().unwrap_or_default().to_string_lossy(),
        allocated = bytes(allocated(image)?),
        len = bytes(IMAGE_LEN),
    );
    println!("\n The appliance VM's own memory on the host: {}.", bytes(seen.appliance_own_memory));
    Ok(())
}

fn qemu_version(testbed: &Testbed) -> Result<String> {
    let text = output_of(Command::new(&testbed.setup().qemu).arg("--version"))?;
    Ok(text.lines().next().unwrap_or_default().replace("QEMU emulator version", "QEMU"))
}

/// A number of bytes for a person, in powers of 1024.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["B", "KiB", "MiB", "GiB"];
    let mut unit = 0;
    let mut whole = count;
    let mut tenths = 0;
    while whole >= 1024 && unit + 1 < UNITS.len() {
        tenths = whole % 1024 * 10 / 1024;
        whole /= 1024;
        unit += 1;
    }
    let unit = UNITS.get(unit).copied().unwrap_or_default();
    if whole < 100 && unit != "B" { format!("{whole}.{tenths} {unit}") } else { format!("{whole} {unit}") }
}

/// Numbered steps with the time that has passed.
struct Story {
    start: Instant,
    steps: u32,
}

impl Story {
    fn begin() -> Self {
        Self { start: Instant::now(), steps: 0 }
    }

    fn step(&mut self, text: &str) {
        self.steps += 1;
        println!("\n{:>5.1} s  {}. {text}", self.start.elapsed().as_secs_f64(), self.steps);
    }

    fn note(&self, text: &str) {
        println!("            {text}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        let sizes = [0, 1023, 1536, 10 << 20, 384 << 20, (5 << 30) + (1 << 29)].map(bytes);
        assert_eq!(sizes, ["0 B", "1023 B", "1.5 KiB", "10.0 MiB", "384 MiB", "5.5 GiB"]);
    }
}
