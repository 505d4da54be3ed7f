//! Figures: what an appliance VM takes of the host's memory, for each class of device, and how large its image is.
//!
//! One driver VM has a device of each class and uses it; then all of them are looked at together. What several processes
//! share (QEMU's code, mostly) counts whole in the resident size of each, and in parts in the proportional one.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;
use vvu_guest_image::{Overlay, build_overlay};

use crate::backend::ServedImage;
use crate::driver_vm::{Disk, DriverVm, DriverVmPlan, Network, SharedFolder, kvm_is_usable};
use crate::evidence::{self, FileMap};
use crate::image_file::create;
use crate::network::Port;
use crate::testbed::{Testbed, Turn};
use crate::vvu_run::{VvuRun, appliance_dir};

/// Length of each disk in bytes.
const DISK_LEN: u64 = 256 << 20;

/// What the driver VM writes to each disk and to the shared folder, in MiB.
const WRITTEN_MIB: u32 = 32;

/// One class of device.
#[derive(Debug, Serialize)]
struct Row {
    class: &'static str,
    /// Of the appliance's QEMU, the driver VM's memory not counted, which it maps, too.
    resident_bytes: u64,
    proportional_bytes: u64,
    /// Of the resident size, what is the appliance VM's own memory; the rest is QEMU's.
    guest_bytes: u64,
    /// Of the bridge; a switch has one for each port.
    bridge_resident_bytes: u64,
    /// Of the programs that are added to the image with their libraries.
    overlay_bytes: u64,
    seconds_to_ready: f64,
}

/// The whole document.
#[derive(Debug, Serialize)]
struct Report {
    accelerator: &'static str,
    kernel_bytes: u64,
    initramfs_bytes: u64,
    rows: Vec<Row>,
}

/// A device that runs.
struct Device {
    class: &'static str,
    run: VvuRun,
    overlay_bytes: u64,
}

/// Runs the benchmark and prints its report on standard output; progress goes to standard error.
///
/// # Errors
/// If a machine does not come up, or the output is closed.
pub fn run(json: bool) -> Result<()> {
    let testbed = Testbed::open("bench-memory", Turn::Alone)?;
    let ports = [1, 2].map(|number| Port::new(&testbed, number));
    let devices = start(&testbed, &ports)?;
    let socket = |index: usize| devices.get(index).map(|device| device.run.socket()).context("too few devices");
    let mut plan = DriverVmPlan::new(&testbed, "driver")
        .disk(Disk::at(socket(0)?))
        .disk(Disk::at(socket(3)?))
        .network(Network::at(socket(1)?, "52:54:00:00:00:09"))
        .shared_folder(SharedFolder::at(socket(4)?, "folder"));
    for port in &ports {
        plan = plan.network(port.card());
    }
    let mut vm = plan.boot()?;
    eprintln!("bench: a driver VM uses {} devices", devices.len());
    use_all(&mut vm)?;

    let driver_memory = evidence::guest_memory(vm.qemu().pid())?;
    let rows = devices.iter().map(|device| device.measured(&driver_memory)).collect::<Result<Vec<_>>>()?;
    vm.power_off()?;
    for device in devices {
        device.run.stop()?;
    }
    testbed.remove_images()?;
    let image_len = |name: &str| anyhow::Ok(fs::metadata(appliance_dir()?.join(name))?.len());
    let report = Report {
        accelerator: if kvm_is_usable() { "kvm" } else { "tcg" },
        kernel_bytes: image_len("vmlinux")?,
        initramfs_bytes: image_len("initrd")?,
        rows,
    };
    let mut text = Vec::new();
    print_table(&report, &mut text)?;
    let repeat = "cargo xtask bench memory".to_owned();
    super::hand_in("memory", "What appliance VMs take of the host's memory.", repeat, &report, text, json)
}

/// One device of each class, with the memory that its class has unless the operator says otherwise: a disk, a network, a
/// switch with two ports, a disk and a folder by programs of others.
fn start(testbed: &Testbed, ports: &[Port; 2]) -> Result<[Device; 5]> {
    eprintln!("bench: one appliance VM for each class of device");
    let image = |name: &str| create(&testbed.folder().join(name), DISK_LEN);
    let own = |class, run| Device { class, run, overlay_bytes: 0 };
    let disk = VvuRun::start(testbed, "blk", &ServedImage::writable(&image("blk.img")?))?;
    let socket = testbed.socket("net.sock").display().to_string();
    let net =
        VvuRun::start_class(testbed, "net", "net", &["--socket", &socket, "--uplink", "user"].map(str::to_owned))?;
    let switch = ports.iter().flat_map(|port| ["--port".to_owned(), port.socket().display().to_string()]);
    let switch = VvuRun::start_class(testbed, "switch", "switch", &switch.collect::<Vec<_>>())?;

    let daemon = [
        "--blockdev",
        "driver=host_device,node-name=disk,filename={disk:disk},cache.direct=on,discard=unmap",
        "--export",
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable=on",
    ];
    let daemon_disk = format!("--disk=disk={}", image("daemon.img")?.display());
    let daemon = program(testbed, "exec: qemu-storage-daemon", Overlay::QemuStorageDaemon, &[daemon_disk], &daemon)?;
    let folder = ["--socket-path={socket}", "--shared-dir=/tmp", "--sandbox=none"];
    let folder = program(testbed, "exec: virtiofsd", Overlay::Virtiofsd, &[], &folder)?;
    Ok([own("blk", disk), own("net", net), own("switch, 2 ports", switch), daemon, folder])
}

fn program(
    testbed: &Testbed,
    class: &'static str,
    overlay: Overlay,
    options: &[String],
    arguments: &[&str],
) -> Result<Device> {
    let name = overlay.to_string();
    let directory: PathBuf = testbed.socket(&format!("{name}.overlay"));
    let files = build_overlay(&overlay.root()?, &[overlay.program()], &directory)?;
    let options: Vec<_> = [format!("--overlay={}", directory.display())].into_iter().chain(options.to_vec()).collect();
    let program: Vec<_> = [overlay.program()].iter().chain(arguments).map(|word| (*word).to_owned()).collect();
    let run = VvuRun::start_program(testbed, &name, &options, &program)?;
    Ok(Device { class, run, overlay_bytes: files.iter().map(|file| file.size_bytes).sum() })
}

/// Has the driver VM move something over each device.
fn use_all(vm: &mut DriverVm) -> Result<()> {
    for disk in ["/dev/vda", "/dev/vdb"] {
        vm.run(&format!("dd if=/dev/zero of={disk} bs=1M count={WRITTEN_MIB} oflag=direct"))?;
    }
    vm.run("mount -t virtiofs folder /mnt")?;
    vm.run(&format!("dd if=/dev/zero of=/mnt/file bs=1M count={WRITTEN_MIB} && rm /mnt/file"))?;
    vm.run("ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0 && ping -c 3 -W 20 10.0.2.2")?;
    // Both ports of the switch end in one machine, which would keep to itself what it sends to itself.
    vm.run("for card in eth1 eth2; do ip link set $card up; done; udhcpc -i eth1 -n -q -t 3 -T 1 || true").map(drop)
}

impl Device {
    fn measured(&self, driver_memory: &[FileMap]) -> Result<Row> {
        let (resident_bytes, proportional_bytes) = evidence::memory_without(self.run.appliance().pid(), driver_memory)?;
        let mut guest = evidence::guest_memory(self.run.appliance().pid())?;
        guest.retain(|map| !driver_memory.iter().any(|other| other.file == map.file));
        let (bridge_resident_bytes, _) = evidence::memory_without(self.run.bridge().pid(), driver_memory)?;
        Ok(Row {
            class: self.class,
            resident_bytes,
            proportional_bytes,
            guest_bytes: guest.iter().map(|map| map.resident).sum(),
            bridge_resident_bytes,
            overlay_bytes: self.overlay_bytes,
            seconds_to_ready: self.run.time_to_ready().as_secs_f64(),
        })
    }
}

fn print_table(report: &Report, out: &mut impl Write) -> io::Result<()> {
    let mb = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    writeln!(
        out,
        "image: kernel {}, initramfs {}; VMs under {}\n",
        mb(report.kernel_bytes),
        mb(report.initramfs_bytes),
        report.accelerator
    )?;
    writeln!(
        out,
        "{:<28} {:>10} {:>10} {:>14} {:>10} {:>10} {:>12}",
        "appliance VM for", "RSS", "PSS", "VM's memory", "a bridge", "overlay", "ready after"
    )?;
    for row in &report.rows {
        writeln!(
            out,
            "{:<28} {:>10} {:>10} {:>14} {:>10} {:>10} {:>12}",
            row.class,
            mib(row.resident_bytes),
            mib(row.proportional_bytes),
            mib(row.guest_bytes),
            mib(row.bridge_resident_bytes),
            mb(row.overlay_bytes),
            format!("{:.1} s", row.seconds_to_ready),
        )?;
    }
    Ok(())
}
