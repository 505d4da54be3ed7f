//! The data path: what a driver VM can do with a disk that an appliance VM emulates.
//!
//! Each test names the path that it proves. `VVU_TEST_BACKEND=qemu-storage-daemon` (or `vvu-blk`) runs the same tests
//! against a back-end on the host.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use vvu_tests::backend::{Backend, Served, ServedImage};
use vvu_tests::driver_vm::{Disk, DriverVm, DriverVmPlan};
use vvu_tests::evidence;
use vvu_tests::files::Files;
use vvu_tests::image_file::{allocated, create, file_system_state, sha256};
use vvu_tests::testbed::{Testbed, machine_test, workspace_program};
use vvu_tests::vvu_run::VvuRun;
use vvu_tests::witness::{Load, Witness};

const MIB: u64 = 1 << 20;

/// Starts of a device by its driver, and by a VMM that goes on after a stop.
const DRIVER_STARTS: u16 = 25;
const STARTS_UNDER_LOAD: u16 = 6;

fn image(testbed: &Testbed, len: u64) -> Result<PathBuf> {
    create(&testbed.folder().join("disk.img"), len)
}

fn serve(testbed: &Testbed, image: &ServedImage) -> Result<Served> {
    Backend::chosen()?.serve(testbed, "disk", image)
}

/// The same, with further options of `vvu run`.
fn serve_with(testbed: &Testbed, image: &ServedImage, options: &[&str]) -> Result<Served> {
    match Backend::chosen()? {
        Backend::Vvu => Ok(Served::Vvu(Box::new(VvuRun::start_with(testbed, "disk", image, options)?))),
        on_host => on_host.serve(testbed, "disk", image),
    }
}

/// A bridge for `--bridge` that knows of no more vectors of the doorbell device than these, whatever `vvu run` says to it.
fn bridge_with_vectors(testbed: &Testbed, vectors: u16) -> Result<String> {
    let (path, bridge) = (testbed.folder().join("bridge"), workspace_program("vvu-bridge", "VVU_BRIDGE_BIN")?);
    let replace = format!("shift; [ \"$last\" != --vectors ] || word={vectors}; set -- \"$@\" \"$word\"; last=$word");
    fs::write(&path, format!("#!/bin/sh\nfor word do {replace}; done\nexec '{}' \"$@\"\n", bridge.display()))?;
    fs::set_permissions(&path, Permissions::from_mode(0o700))?;
    Ok(path.display().to_string())
}

/// How often the bridge has run meanwhile, if there is one.
fn bridge_ran_during(served: &Served, work: impl FnOnce() -> Result<()>) -> Result<Option<u64>> {
    let Served::Vvu(run) = served else { return work().map(|()| None) };
    let before = evidence::context_switches(run.bridge().pid())?;
    work()?;
    Ok(Some(evidence::context_switches(run.bridge().pid())? - before))
}

fn driver_vm<'a>(testbed: &'a Testbed, served: &Served) -> DriverVmPlan<'a> {
    DriverVmPlan::new(testbed, "driver").disk(Disk::at(served.socket()))
}

/// The bridge maps nothing of the driver VM's memory, and the appliance's QEMU maps all of it: so data takes one path.
fn prove_who_maps_driver_memory(served: &Served, vm: &DriverVm) -> Result<()> {
    let Served::Vvu(run) = served else { return Ok(()) };
    let memory = evidence::guest_memory(vm.qemu().pid())?;
    let by_bridge = evidence::bytes_mapped_of(run.bridge().pid(), &memory)?;
    let by_appliance = evidence::bytes_mapped_of(run.appliance().pid(), &memory)?;
    let len: u64 = memory.iter().map(|map| map.len).sum();
    ensure!(by_bridge == 0, "the bridge maps {by_bridge} bytes of the driver VM's memory");
    ensure!(by_appliance >= len, "the appliance's QEMU maps {by_appliance} of {len} bytes of the driver VM's memory");
    Ok(())
}

/// Path: firmware, then Linux's virtio_blk and ext4, through vhost-user, bridge, appliance and its disk into the image,
/// three device starts long (boot, reboot, the reset button during I/O); then the image as the host reads it.
#[test]
fn a_file_system_survives_reboots() -> Result<()> {
    machine_test("a_file_system_survives_reboots", |testbed| {
        let image = image(testbed, 256 * MIB)?;
        let served = serve(testbed, &ServedImage::writable(&image))?;
        let mut vm = driver_vm(testbed, &served).boot()?;
        let files = Files::write_on_new_file_system(&mut vm, "/dev/vda")?;
        Files::unmount(&mut vm)?;
        files.mount_and_verify(&mut vm, "/dev/vda")?;
        prove_who_maps_driver_memory(&served, &vm)?;

        Files::unmount(&mut vm)?;
        vm.reboot()?;
        files.mount_and_verify(&mut vm, "/dev/vda")?;

        vm.run("(while true; do dd if=/dev/zero of=/mnt/filler bs=1M count=16 oflag=direct; done) > /dev/null 2>&1 &")?;
        vm.reset()?;
        files.mount_and_verify(&mut vm, "/dev/vda")?;
        Files::unmount(&mut vm)?;
        vm.run("e2fsck -f -n /dev/vda")?;
        vm.power_off()?;

        served.stop()?;
        ensure!(file_system_state(testbed.setup(), &image)? == "clean");
        files.verify_in_image(testbed.setup(), &image, testbed.folder())
    })
}

/// Path: a device that starts and stops over and over, each time with new kick and call eventfds, a fresh ring and a first
/// request that nobody may lose; at first by its driver, then by its VMM under load, until the doorbell device has no vector
/// left: then the bridge relays, until there is another appliance VM.
#[test]
fn the_driver_comes_and_goes() -> Result<()> {
    machine_test("the_driver_comes_and_goes", |testbed| {
        let image = image(testbed, 16 * MIB)?;
        // One for the relay, for starts by firmware and by the kernel's boot, and for the first ones under load.
        let bridge = bridge_with_vectors(testbed, 1 + 2 + DRIVER_STARTS + STARTS_UNDER_LOAD / 2)?;
        let mut served = serve_with(testbed, &ServedImage::writable(&image), &["--bridge", &bridge])?;
        let mut witness = Witness::new(testbed, "witness", 10, Load::default())?;
        let mut vm = driver_vm(testbed, &served).ledger(witness.ledger()).boot()?;
        let device = vm.run("basename $(readlink -f /sys/block/vda/device)")?;
        let device = device.trim();
        let driver = "/sys/bus/virtio/drivers/virtio_blk";
        for round in 0..DRIVER_STARTS {
            vm.run(&format!("echo {device} > {driver}/unbind && echo {device} > {driver}/bind"))
                .and_then(|_| vm.run("dd if=/dev/vda of=/dev/null bs=64k count=4 iflag=direct"))
                .with_context(|| format!("start {round} of the device"))?;
        }
        witness.start(&mut vm, "/dev/vda")?;
        let ran = bridge_ran_during(&served, || witness.await_turnover(&mut vm))?;
        ensure!(ran.is_none_or(|count| count == 0), "the bridge has run {ran:?} times with vectors left");
        for _ in 0..STARTS_UNDER_LOAD {
            vm.qmp().execute("stop")?;
            vm.qmp().execute("cont")?;
            witness.await_turnover(&mut vm)?;
        }
        let ran = bridge_ran_during(&served, || witness.await_turnover(&mut vm))?;
        ensure!(ran.is_none_or(|count| count > 0), "vectors have not run out");
        if let Served::Vvu(run) = &mut served {
            let log = fs::read_to_string(testbed.folder().join("disk-logs/bridge.log"))?;
            ensure!(log.matches("are used up").count() == 1, "the operator is told once:\n{log}");
            run.restart()?;
            witness.await_turnover(&mut vm)?;
        }
        let ran = bridge_ran_during(&served, || witness.await_turnover(&mut vm))?;
        ensure!(ran.is_none_or(|count| count == 0), "the bridge has run {ran:?} times with a new appliance");
        witness.stop(&mut vm)?;
        vm.power_off()?;
        served.stop()?;
        witness.verify_image(&image)
    })
}

/// Path: four request queues, each with its own kick and call, each used from the CPU that it belongs to. No thread of the bridge
/// runs for any request, and the appliance's kernel has most of the driver memory at hand.
#[test]
fn all_four_queues_carry_requests() -> Result<()> {
    machine_test("all_four_queues_carry_requests", |testbed| {
        let image = image(testbed, 64 * MIB)?;
        let mut served = serve(testbed, &ServedImage::writable(&image).queues(4))?;
        let disk = Disk::at(served.socket()).queues(4);
        let mut vm = DriverVmPlan::new(testbed, "driver").disk(disk).cpus(4).boot()?;
        let queues = vm.run("ls /sys/block/vda/mq | wc -l")?;
        ensure!(queues.trim() == "4", "the driver has {queues} queues");

        let before = queue_interrupts(&mut vm)?;
        let ran = bridge_ran_during(&served, || {
            vm.run(
                "fio --name=queues --filename=/dev/vda --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=4 \
                 --numjobs=4 --cpus_allowed=0-3 --cpus_allowed_policy=split --size=16M --offset_increment=16M \
                 --io_size=4M --verify=crc32c --verify_fatal=1",
            )?;
            // 100,000 requests.
            vm.run(
                "fio --name=many --filename=/dev/vda --direct=1 --ioengine=libaio --rw=randread --bs=512 --iodepth=32 \
                 --numjobs=4 --cpus_allowed=0-3 --cpus_allowed_policy=split --number_ios=25000",
            )
            .map(drop)
        })?;
        ensure!(ran.is_none_or(|count| count == 0), "the bridge has run {ran:?} times while requests went by");
        let after = queue_interrupts(&mut vm)?;
        ensure!(before.len() == 4 && after.len() == 4, "interrupts of {} queues", after.len());
        for (queue, (before, after)) in before.iter().zip(&after).enumerate() {
            ensure!(after > before, "queue {queue} had no interrupt");
        }
        vm.power_off()?;
        if let Served::Vvu(run) = &mut served {
            let counters = run.await_counters()?;
            let moved = counters.bytes_read + counters.bytes_written;
            ensure!(counters.registered_bytes > moved / 2, "of {moved} bytes: {counters:?}");
        }
        served.stop()
    })
}

/// Interrupts so far of each of the disk's request queues, over all CPUs (`virtioN-req.M` in `/proc/interrupts`).
fn queue_interrupts(vm: &mut DriverVm) -> Result<Vec<u64>> {
    let table = vm.run("cat /proc/interrupts")?;
    let rows = table.lines().filter(|row| row.contains("-req."));
    Ok(rows.map(|row| row.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()).sum()).collect())
}

/// Path: the read-only feature, from `vvu run --read-only` to the driver's block layer, and the image left alone; with kicks and
/// calls that pass through the bridge.
#[test]
fn a_read_only_disk_refuses_writes() -> Result<()> {
    machine_test("a_read_only_disk_refuses_writes", |testbed| {
        let image = image(testbed, 16 * MIB)?;
        File::options().write(true).open(&image)?.write_all_at(&[0x5a; 8192], MIB)?;
        let before = sha256(&image)?;
        let served = serve_with(testbed, &ServedImage::writable(&image).read_only(), &["--relay"])?;
        let mut vm = driver_vm(testbed, &served).boot()?;
        ensure!(vm.run("cat /sys/block/vda/ro")?.trim() == "1");
        vm.run_refused("dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct")?;
        // Linux refuses by itself; whether the device would, too, shows once Linux is told that it may write.
        vm.run_refused(
            "/usr/sbin/blockdev --setrw /dev/vda && dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct",
        )?;
        let mut read = String::new();
        let ran = bridge_ran_during(&served, || {
            read = vm.run("sha256sum /dev/vda")?;
            Ok(())
        })?;
        ensure!(ran != Some(0), "nobody has relayed a kick or a call");
        ensure!(read.starts_with(&before), "the driver VM reads {read}, the image has {before}");
        vm.power_off()?;
        served.stop()?;
        ensure!(sha256(&image)? == before, "the image of a read-only disk changed");
        Ok(())
    })
}

/// Path: requests of 64 KiB to 1 MiB whose buffers lie on both sides of the hole below 4 GiB, so that one memory file is
/// listed as several regions and appears in the window as one span.
#[test]
fn large_requests_use_memory_below_and_above_4_gib() -> Result<()> {
    machine_test("large_requests_use_memory_below_and_above_4_gib", |testbed| {
        const HALF_MIB: u32 = 256;
        const BUFFERS_MIB: u32 = 300;
        let image = image(testbed, 512 * MIB)?;
        let served = serve(testbed, &ServedImage::writable(&image))?;
        let mut vm = driver_vm(testbed, &served).memory_mib(2 * HALF_MIB, Some(HALF_MIB)).boot()?;
        let above_4g = vm.run("cat /proc/iomem")?;
        ensure!(above_4g.contains("100000000-10fffffff : System RAM"), "memory is elsewhere:\n{above_4g}");

        // The buffers together are larger than either half, so they use both.
        let command = format!(
            "fio --name=large --filename=/dev/vda --direct=1 --ioengine=libaio --rw=randwrite --bsrange=64k-1m \
             --bs_unaligned=0 --iodepth={BUFFERS_MIB} --size=320M --verify=crc32c --verify_fatal=1"
        );
        vm.run(&command)?;
        prove_who_maps_driver_memory(&served, &vm)?;
        vm.power_off()?;
        served.stop()
    })
}

/// Path: requests of 64 KiB to 1 MiB of which each second page lies in another memory file, one below and one above 4 GiB:
/// two spans of the window, and both in every request.
#[test]
fn large_requests_cross_memory_regions() -> Result<()> {
    machine_test("large_requests_cross_memory_regions", |testbed| {
        const BUFFERS_MIB: u64 = 32;
        let image = image(testbed, 128 * MIB)?;
        let served = serve(testbed, &ServedImage::writable(&image))?;
        let mut vm = driver_vm(testbed, &served).two_memory_files_mib(256).boot()?;
        vm.run("mkdir /interleaved && mount -t tmpfs -o size=64M,mpol=interleave:0-1 tmpfs /interleaved")?;
        vm.run("truncate -s 40M /interleaved/buffers")?;
        let command = format!(
            "fio --name=crossing --filename=/dev/vda --direct=1 --ioengine=libaio --rw=randwrite --bsrange=64k-1m \
             --iodepth={BUFFERS_MIB} --iomem=mmapshared:/interleaved/buffers --size=96M --verify=crc32c --verify_fatal=1"
        );
        vm.run(&command)?;
        // The file of buffers is still there and tells where its pages are.
        for node in [0, 1] {
            let meminfo = vm.run(&format!("grep Shmem: /sys/devices/system/node/node{node}/meminfo"))?;
            let kib: u64 = meminfo.split_whitespace().nth(3).unwrap_or_default().parse()?;
            ensure!(kib >= BUFFERS_MIB * 1024 * 2 / 5, "node {node} holds only {kib} KiB of the buffers");
        }
        prove_who_maps_driver_memory(&served, &vm)?;
        vm.power_off()?;
        served.stop()
    })
}

/// Path: DISCARD and WRITE_ZEROES, by block and by file system, down to the blocks that the image takes on the host.
#[test]
fn discard_gives_space_back() -> Result<()> {
    machine_test("discard_gives_space_back", |testbed| {
        let image = image(testbed, 128 * MIB)?;
        let served = serve(testbed, &ServedImage::writable(&image))?;
        let mut vm = driver_vm(testbed, &served).boot()?;
        vm.run("dd if=/dev/urandom of=/dev/vda bs=1M count=64 oflag=direct")?;
        let kept = vm.run("dd if=/dev/vda bs=1M count=16 iflag=direct 2>/dev/null | sha256sum")?;
        let full = allocated(&image)?;
        ensure!(full >= 64 * MIB, "64 MiB were written, the image takes {full} bytes");

        vm.run("/usr/sbin/blkdiscard --offset 16MiB --length 32MiB /dev/vda")?;
        let discarded = allocated(&image)?;
        ensure!(discarded + 31 * MIB <= full, "32 MiB were discarded, the image went from {full} to {discarded} bytes");
        vm.run("/usr/sbin/blkdiscard --zeroout --offset 48MiB --length 16MiB /dev/vda")?;
        vm.run("dd if=/dev/vda bs=1M skip=16 count=48 iflag=direct 2>/dev/null | cmp -n $((48<<20)) - /dev/zero")?;
        let still = vm.run("dd if=/dev/vda bs=1M count=16 iflag=direct 2>/dev/null | sha256sum")?;
        ensure!(still == kept, "a discard touched its neighbours");

        vm.run("mkfs.ext4 -q -F /dev/vda && mount -t ext4 /dev/vda /mnt")?;
        vm.run("dd if=/dev/urandom of=/mnt/file bs=1M count=48 && sync")?;
        let full = allocated(&image)?;
        vm.run("rm /mnt/file && sync && fstrim -v /mnt")?;
        let trimmed = allocated(&image)?;
        ensure!(trimmed + 47 * MIB <= full, "48 MiB were trimmed, the image went from {full} to {trimmed} bytes");
        Files::unmount(&mut vm)?;
        vm.power_off()?;
        served.stop()
    })
}

/// Path: a capacity that is no multiple of anything but the sector, to its last sector and not beyond.
#[test]
fn a_disk_of_odd_size_is_used_to_its_end() -> Result<()> {
    machine_test("a_disk_of_odd_size_is_used_to_its_end", |testbed| {
        const SECTORS: u64 = 24 * 2048 + 5;
        let image = image(testbed, SECTORS * 512)?;
        let served = serve(testbed, &ServedImage::writable(&image))?;
        let mut vm = driver_vm(testbed, &served).boot()?;
        let capacity = vm.run("cat /sys/block/vda/size")?;
        ensure!(capacity.trim() == SECTORS.to_string(), "the driver sees {capacity} sectors, the image has {SECTORS}");
        let last = SECTORS - 1;
        vm.run(&format!("yes vvu | head -c 512 | dd of=/dev/vda bs=512 seek={last} count=1 oflag=direct"))?;
        vm.run(&format!(
            "yes vvu | head -c 512 > /tmp/e; dd if=/dev/vda bs=512 skip={last} iflag=direct | cmp - /tmp/e"
        ))?;
        vm.run_refused(&format!("dd if=/dev/zero of=/dev/vda bs=512 seek={SECTORS} count=1 oflag=direct"))?;
        vm.power_off()?;
        served.stop()?;
        let mut sector = [0; 512];
        File::open(&image)?.read_exact_at(&mut sector, last * 512)?;
        ensure!(sector == *b"vvu\n".repeat(128), "the host reads another last sector");
        ensure!(image.metadata()?.len() == SECTORS * 512, "the image changed its size");
        Ok(())
    })
}

/// Path: the same file system under the distribution's own QEMU, which knows nothing of the device set.
#[test]
fn the_distributions_older_qemu_is_a_driver_vmm() -> Result<()> {
    machine_test("the_distributions_older_qemu_is_a_driver_vmm", |testbed| {
        let image = image(testbed, 128 * MIB)?;
        let served = serve(testbed, &ServedImage::writable(&image))?;
        let mut vm = driver_vm(testbed, &served).older_qemu().boot()?;
        let files = Files::write_on_new_file_system(&mut vm, "/dev/vda")?;
        Files::unmount(&mut vm)?;
        vm.reboot()?;
        files.mount_and_verify(&mut vm, "/dev/vda")?;
        Files::unmount(&mut vm)?;
        vm.power_off()?;
        served.stop()?;
        files.verify_in_image(testbed.setup(), &image, testbed.folder())
    })
}

/// Path: firmware alone. SeaBIOS loads the disk's first sector through the back-end, whose program reads another one with
/// the firmware's disk service and prints it on the console.
#[test]
fn firmware_boots_from_the_disk() -> Result<()> {
    machine_test("firmware_boots_from_the_disk", |testbed| {
        const MESSAGE_SECTOR: u64 = 3000;
        const MESSAGE: &str = "firmware has read sector 3000";
        let image = image(testbed, 4 * MIB)?;
        let disk = File::options().write(true).open(&image)?;
        disk.write_all_at(&boot_sector(MESSAGE_SECTOR), 0)?;
        disk.write_all_at(format!("\r\n{MESSAGE}\r\n\0").as_bytes(), MESSAGE_SECTOR * 512)?;
        let served = serve(testbed, &ServedImage::writable(&image))?;
        let mut vm = driver_vm(testbed, &served).boot_from_first_disk()?;
        vm.await_console(MESSAGE).context("SeaBIOS did not boot from the disk")?;
        vm.qmp().execute("system_reset")?;
        vm.await_console(MESSAGE).context("SeaBIOS did not boot from the disk after a reset")?;
        vm.kill()?;
        served.stop()
    })
}

/// A boot sector whose program reads `sector` with INT 13h, function 42h, and prints its text on the first serial port.
fn boot_sector(sector: u64) -> Vec<u8> {
    const PACKET_AT: usize = 0x30;
    let program: [u8; 0x2c] = [
        0x31, 0xc0, //       xor ax, ax
        0x8e, 0xd8, //       mov ds, ax
        0x8e, 0xc0, //       mov es, ax
        0xfc, //             cld
        0xbe, 0x30, 0x7c, // mov si, packet
        0xb4, 0x42, //       mov ah, 42h          ; extended read; dl still names the boot disk
        0xcd, 0x13, //       int 13h
        0x72, 0x19, //       jc halt
        0xbe, 0x00, 0x7e, // mov si, 7e00h
        0xac, //             next: lodsb
        0x84, 0xc0, //       test al, al
        0x74, 0x11, //       jz halt
        0x88, 0xc3, //       mov bl, al
        0xba, 0xfd, 0x03, // mov dx, 3fdh         ; line status
        0xec, //             busy: in al, dx
        0xa8, 0x20, //       test al, 20h         ; transmitter empty
        0x74, 0xfb, //       jz busy
        0x88, 0xd8, //       mov al, bl
        0xb2, 0xf8, //       mov dl, f8h          ; data, at 3f8h
        0xee, //             out dx, al
        0xeb, 0xea, //       jmp next
        0xf4, //             halt: hlt
        0xeb, 0xfd, //       jmp halt
    ];
    // Disk address packet: its size, a zero, one sector, to 0000:7e00, from `sector`.
    let packet = [0x10, 0, 1, 0, 0x00, 0x7e, 0, 0];
    let mut bytes = Vec::from(program);
    bytes.resize(PACKET_AT, 0);
    bytes.extend(packet);
    bytes.extend(sector.to_le_bytes());
    bytes.resize(510, 0);
    bytes.extend([0x55, 0xaa]);
    bytes
}
