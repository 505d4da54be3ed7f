//! What a driver VM and its VMM may do with the device at any time, each under a load that knows what the disk must hold.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vvu_tests::backend::{Backend, Served, ServedImage};
use vvu_tests::driver_vm::{Disk, DriverVm, DriverVmPlan, MEMORY_PORT, PLUGGED_MEMORY_NODE};
use vvu_tests::image_file::create;
use vvu_tests::testbed::{Testbed, machine_test};
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
