//! What a driver VM and its VMM may do with the device at any time, each under a load that knows what the disk must hold.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vvu_tests::backend::{Backend, Served, ServedImage};
use vvu_tests::driver_vm::{Disk, DriverVm, DriverVmPlan, MEMORY_PORT, PLUGGED_MEMORY_NODE};
use vvu_tests::image_file::create;
use vvu_tests::loss::{self, Loss};
use vvu_tests::testbed::{Testbed, machine_test};
use vvu_tests::vvu_run::VvuRun;
use vvu_tests::witness::{Load, Witness, check_kernel_log};

const MIB: u64 = 1 << 20;

fn image(testbed: &Testbed, name: &str, len: u64) -> Result<PathBuf> {
    create(&testbed.folder().join(format!("{name}.img")), len)
}

fn serve(testbed: &Testbed, name: &str, len: u64) -> Result<(Served, PathBuf)> {
    let image = image(testbed, name, len)?;
    let served = Backend::chosen()?.serve(testbed, name, &ServedImage::writable(&image))?;
    Ok((served, image))
}

/// Path: memory that QEMU plugs in under load (virtio-mem that grows and shrinks, then a DIMM), through the new memory
/// table, into the appliance's window; requests whose buffers are in that memory; then a second device that is plugged in,
/// used, pulled out under load and plugged in again.
#[test]
fn memory_and_disks_are_plugged_in_under_load() -> Result<()> {
    machine_test("memory_and_disks_are_plugged_in_under_load", |testbed| {
        let (served, _) = serve(testbed, "disk", 1024 * MIB)?;
        let mut witness = Witness::new(testbed, "witness", 4, Load::default())?;
        let plan = DriverVmPlan::new(testbed, "driver").disk(Disk::at(served.socket())).hot_plug();
        let mut vm = plan.ledger(witness.ledger()).boot()?;
        witness.start(&mut vm, "/dev/vda")?;
        witness.await_turnover(&mut vm)?;

        let before = vm.memory_len()?;
        plug_memory(&mut vm, "vm", &json!({ "driver": "virtio-mem-pci", "bus": MEMORY_PORT }))?;
        for size in [64 * MIB, 128 * MIB, 0] {
            let resize = json!({ "path": "/machine/peripheral/vm", "property": "requested-size", "value": size });
            vm.qmp().execute_with("qom-set", &resize)?;
            await_memory(&mut vm, before + size)?;
            witness.await_turnover(&mut vm)?;
            if size > 0 {
                use_plugged_memory(&mut vm, &witness)?;
            }
        }
        plug_memory(&mut vm, "dimm", &json!({ "driver": "pc-dimm" }))?;
        await_memory(&mut vm, before + 256 * MIB)?;
        use_plugged_memory(&mut vm, &witness)?;
        witness.await_turnover(&mut vm)?;

        let (second, _) = serve(testbed, "second", 64 * MIB)?;
        let plugged = Disk::at(second.socket());
        for _ in 0..2 {
            vm.plug_disk(&plugged, "/dev/vdb")?;
            vm.run("dd if=/dev/urandom of=/dev/vdb bs=1M count=4 oflag=direct conv=fsync")?;
            // Pulled out under this load; its requests fail, and no other one does.
            vm.run("(while dd if=/dev/vdb of=/dev/null bs=64k count=64 iflag=direct; do :; done) > /dev/null 2>&1 &")?;
            vm.unplug_disk()?;
            vm.run("while test -b /dev/vdb; do sleep 0.1; done; dmesg -c > /dev/null")?;
            witness.await_turnover(&mut vm)?;
        }
        let stopped = witness.stop(&mut vm)?;
        ensure!(stopped.flushes > 0, "{stopped:?}");
        vm.power_off()?;
        second.stop()?;
        served.stop()
    })
}

/// Plugs in a memory device with up to 256 MiB of shared memory of its own.
fn plug_memory(vm: &mut DriverVm, id: &str, device: &Value) -> Result<()> {
    let memory = format!("{id}-memory");
    let object = json!({ "qom-type": "memory-backend-memfd", "id": memory, "size": 256 * MIB, "share": true });
    vm.qmp().execute_with("object-add", &object)?;
    let mut device = device.clone();
    let properties = device.as_object_mut().context("a device is named by its properties")?;
    for (name, value) in [("id", json!(id)), ("memdev", json!(memory)), ("node", json!(PLUGGED_MEMORY_NODE))] {
        properties.insert(name.to_owned(), value);
    }
    vm.qmp().execute_with("device_add", &device).map(drop)
}

/// Waits until the kernel has this much memory, within what it needs itself to keep account of it.
fn await_memory(vm: &mut DriverVm, len: u64) -> Result<()> {
    let (least, most) = ((len - 8 * MIB) >> 10, (len + 8 * MIB) >> 10);
    let total = "$(sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)";
    vm.run(&format!("until t={total}; [ $t -ge {least} ] && [ $t -le {most} ]; do sleep 0.1; done")).map(drop)
}

/// Writes and reads back with buffers on the NUMA node that has no other memory than what was plugged in.
fn use_plugged_memory(vm: &mut DriverVm, witness: &Witness) -> Result<()> {
    let offset = witness.disk_len();
    vm.run(&format!(
        "fio --name=memory --filename=/dev/vda --offset={offset} --size=8M --direct=1 --ioengine=libaio --rw=write \
         --bs=64k --iodepth=32 --numa_mem_policy=bind:{PLUGGED_MEMORY_NODE} --verify=crc32c --verify_fatal=1"
    ))?;
    check_kernel_log(vm)
}

/// Path: a driver VM whose disk is behind a vIOMMU: each request's addresses are translated by what the bridge carries from
/// QEMU (IOTLB messages), page by page and gone after the request; first with a load, then after a reboot, and after the
/// back-end was lost and had to ask for every translation again.
#[test]
fn a_disk_behind_an_iommu_translates_each_request() -> Result<()> {
    machine_test("a_disk_behind_an_iommu_translates_each_request", |testbed| {
        let image = image(testbed, "disk", 64 * MIB)?;
        let mut run = VvuRun::start_with(testbed, "disk", &ServedImage::writable(&image), &loss::OPTIONS)?;
        // Each request is a question to QEMU: few of them are enough, and slow.
        let mut witness = Witness::new(testbed, "witness", 6, Load { blocks: 512, ..Load::default() })?;
        let disk = Disk::at(run.socket()).behind_iommu();
        let mut vm = DriverVmPlan::new(testbed, "driver").disk(disk).iommu().ledger(witness.ledger()).boot()?;
        let group = vm.run("readlink -f /sys/block/vda/device/../iommu_group")?;
        ensure!(group.contains("/iommu_groups/"), "the disk is behind no IOMMU: {group}");
        witness.start(&mut vm, "/dev/vda")?;
        witness.await_turnover(&mut vm)?;
        let pause = witness.pause_of(&mut vm, || {
            Loss::BackEnd.strike(&mut run)?;
            Loss::BackEnd.await_repair(&mut run)
        })?;
        eprintln!("back-end killed: {pause:.0?}");
        witness.stop(&mut vm)?;
        vm.reboot()?;
        witness.start(&mut vm, "/dev/vda")?;
        witness.await_turnover(&mut vm)?;
        witness.stop(&mut vm)?;
        vm.power_off()?;
        witness.verify_image(&image)?;
        run.stop().map(drop)
    })
}

/// Path: `vvu resize` through bridge, appliance and the back channel to the driver's block layer, under load; larger, and
/// with the consent of the operator smaller; the size stays when the appliance is lost.
#[test]
fn a_disk_changes_its_size_under_load() -> Result<()> {
    machine_test("a_disk_changes_its_size_under_load", |testbed| {
        let image = image(testbed, "disk", 32 * MIB)?;
        let mut run = VvuRun::start_with(testbed, "disk", &ServedImage::writable(&image), &loss::OPTIONS)?;
        let mut witness = Witness::new(testbed, "witness", 7, Load::default())?;
        let plan = DriverVmPlan::new(testbed, "driver").disk(Disk::at(run.socket()));
        let mut vm = plan.ledger(witness.ledger()).boot()?;
        witness.start(&mut vm, "/dev/vda")?;
        for len in [96 * MIB, 64 * MIB + 512] {
            run.resize(len)?;
            await_disk_len(&mut vm, len)?;
            witness.await_turnover(&mut vm)?;
        }
        let last = 64 * MIB / 512;
        vm.run(&format!("dd if=/dev/zero of=/dev/vda bs=512 seek={last} count=1 oflag=direct"))?;
        vm.run_refused(&format!("dd if=/dev/zero of=/dev/vda bs=512 seek={} count=1 oflag=direct", last + 1))?;

        witness.pause_of(&mut vm, || {
            Loss::Appliance.strike(&mut run)?;
            Loss::Appliance.await_repair(&mut run)
        })?;
        await_disk_len(&mut vm, 64 * MIB + 512)?;
        witness.stop(&mut vm)?;
        vm.power_off()?;
        run.stop()?;
        ensure!(image.metadata()?.len() == 64 * MIB + 512, "the image has another length");
        witness.verify_image(&image)
    })
}

/// Waits until the driver VM's disk has this length.
fn await_disk_len(vm: &mut DriverVm, len: u64) -> Result<()> {
    vm.run(&format!("until [ $(cat /sys/block/vda/size) = {} ]; do sleep 0.1; done", len / 512)).map(drop)
}

/// Path: the machine's own ways to begin again under load: its kernel's reboot, its reset button, and the end of its VMM
/// without a word; each time the host finds in the image what was acknowledged, and the next boot goes on with it.
#[test]
fn a_driver_vm_begins_again_under_load() -> Result<()> {
    machine_test("a_driver_vm_begins_again_under_load", |testbed| {
        let (served, image) = serve(testbed, "disk", 16 * MIB)?;
        let mut witness = Witness::new(testbed, "witness", 8, Load { writers: 32, ..Load::default() })?;
        let boot = |witness: &Witness| {
            let plan = DriverVmPlan::new(testbed, "driver").disk(Disk::at(served.socket()));
            plan.ledger(witness.ledger()).boot()
        };
        let mut vm = boot(&witness)?;
        for again in [DriverVm::reboot, DriverVm::reset] {
            witness.start(&mut vm, "/dev/vda")?;
            witness.await_turnover(&mut vm)?;
            again(&mut vm)?;
            witness.verify_image(&image)?;
        }
        witness.start(&mut vm, "/dev/vda")?;
        witness.await_turnover(&mut vm)?;
        vm.kill()?;
        let mut vm = boot(&witness)?;
        witness.verify_image(&image)?;
        witness.start(&mut vm, "/dev/vda")?;
        witness.await_turnover(&mut vm)?;
        witness.stop(&mut vm)?;
        vm.power_off()?;
        served.stop()
    })
}
