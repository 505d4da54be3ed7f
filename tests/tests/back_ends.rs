//! Back-ends that others wrote, as their packages have them, behind `vvu run exec`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vvu_guest_image::{Overlay, build_overlay};
use vvu_tests::driver_vm::{Disk, DriverVmPlan, SharedFolder};
use vvu_tests::files::Files;
use vvu_tests::image_file::create;
use vvu_tests::process::output_of;
use vvu_tests::testbed::{Testbed, machine_test};
use vvu_tests::vvu_run::VvuRun;

const MIB: u64 = 1 << 20;

/// How long a program may take to answer over a channel.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);

/// Makes the overlay of a back-end; it goes away with the testbed.
fn overlay(testbed: &Testbed, overlay: Overlay) -> Result<PathBuf> {
    let directory = testbed.socket("overlay");
    let root = overlay.root().with_context(|| format!("no packages of {overlay}"))?;
    build_overlay(&root, &[overlay.program()], &directory).with_context(|| format!("no overlay of {overlay}"))?;
    Ok(directory)
}

/// Asks QEMU's monitor behind a channel one question.
fn ask_monitor(socket: &std::path::Path, question: &str) -> Result<serde_json::Value> {
    let stream = UnixStream::connect(socket).with_context(|| format!("cannot reach {}", socket.display()))?;
    stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
    let (mut to, mut from) = (stream.try_clone()?, BufReader::new(stream));
    let mut line = String::new();
    from.read_line(&mut line)?;
    ensure!(line.contains("\"QMP\""), "the monitor greets with {line}");
    for request in ["qmp_capabilities", question] {
        writeln!(to, "{}", serde_json::json!({ "execute": request }))?;
        line.clear();
        from.read_line(&mut line)?;
    }
    let answer: serde_json::Value = serde_json::from_str(&line).with_context(|| format!("the monitor says {line}"))?;
    answer.get("return").cloned().with_context(|| format!("the monitor says {line}"))
}

/// Path: QEMU's own block layer in the appliance, which alone reads the qcow2 image and its backing file; the driver VM's
/// file system lies in both; the daemon's monitor answers on the host, over a channel. Then the image as the host reads it.
#[test]
fn qemu_storage_daemon_serves_qcow2_with_a_backing_file() -> Result<()> {
    machine_test("qemu_storage_daemon_serves_qcow2_with_a_backing_file", |testbed| {
        let setup = testbed.setup();
        let base = create(&testbed.folder().join("base.img"), 64 * MIB)?;
        std::fs::OpenOptions::new().write(true).open(&base)?.write_all(&[0x5a; 4096])?;
        let image = testbed.folder().join("qcow2.img");
        let made = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
        output_of(Command::new(&setup.qemu_img).args(made).arg(&base).arg(&image).arg("128M"))?;
        // It grows, and the appliance's disk does not.
        std::fs::OpenOptions::new().write(true).open(&image)?.set_len(160 * MIB)?;

        let node = |name: &str, driver: &str| format!("driver={driver},node-name={name},filename={{disk:{name}}}");
        let program: Vec<String> = [
            Overlay::QemuStorageDaemon.program(),
            "--chardev",
            "socket,id=monitor,path={channel:monitor},server=on,wait=off",
            "--monitor",
            "chardev=monitor",
            "--blockdev",
            &(node("top", "host_device") + ",cache.direct=on,discard=unmap"),
            "--blockdev",
            &(node("base", "host_device") + ",cache.direct=on,read-only=on"),
            "--blockdev",
            "driver=qcow2,node-name=disk,file=top,backing=base,discard=unmap",
            "--export",
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable=on",
        ]
        .map(str::to_owned)
        .into();
        let options = [
            format!("--overlay={}", overlay(testbed, Overlay::QemuStorageDaemon)?.display()),
            format!("--disk=top={}", image.display()),
            format!("--disk=base={},ro", base.display()),
            "--channel=monitor".to_owned(),
            "--memory=320M".to_owned(),
        ];
        let run = VvuRun::start_program(testbed, "disk", &options, &program)?;
        let mut vm = DriverVmPlan::new(testbed, "driver").disk(Disk::at(run.socket())).boot()?;
        vm.run("head -c 4096 /dev/vda | tr -d Z | cmp - /dev/null").context("the backing file is not read")?;
        let files = Files::write_on_new_file_system(&mut vm, "/dev/vda")?;
        Files::unmount(&mut vm)?;
        vm.reboot()?;
        files.mount_and_verify(&mut vm, "/dev/vda")?;
        Files::unmount(&mut vm)?;
        let nodes = ask_monitor(&run.socket().with_extension("sock.monitor"), "query-named-block-nodes")?;
        let names: Vec<_> = nodes.as_array().into_iter().flatten().filter_map(|node| node.get("node-name")).collect();
        ensure!(["top", "base", "disk"].iter().all(|name| names.iter().any(|found| *found == name)), "{names:?}");
        vm.power_off()?;
        run.stop()?;

        output_of(Command::new(&setup.qemu_img).args(["check", "-q", "-f", "qcow2"]).arg(&image))?;
        let flat = testbed.folder().join("flat.img");
        let convert = ["convert", "-f", "qcow2", "-O", "raw"];
        output_of(Command::new(&setup.qemu_img).args(convert).arg(&image).arg(&flat))?;
        files.verify_in_image(setup, &flat, testbed.folder())
    })
}

/// Path: a file system that lives in the appliance, over FUSE in vrings: files of many sizes, links, directories, direct
/// I/O checked block by block; again after a new mount, and after a reboot of the driver VM.
#[test]
fn virtiofsd_shares_a_file_system_of_the_appliance() -> Result<()> {
    machine_test("virtiofsd_shares_a_file_system_of_the_appliance", |testbed| {
        let program = [Overlay::Virtiofsd.program(), "--socket-path={socket}", "--shared-dir=/tmp", "--sandbox=none"];
        let options = [
            format!("--overlay={}", overlay(testbed, Overlay::Virtiofsd)?.display()),
            // What is shared is in the appliance's memory.
            "--memory=512M".to_owned(),
        ];
        let run = VvuRun::start_program(testbed, "folder", &options, &program.map(str::to_owned))?;
        let folder = SharedFolder::at(run.socket(), "vvu");
        let mut vm = DriverVmPlan::new(testbed, "driver").shared_folder(folder).boot()?;
        vm.run("mount -t virtiofs vvu /mnt")?;
        vm.run("cp -a /usr/bin/fio /etc /mnt && cmp /usr/bin/fio /mnt/fio && diff -r /etc /mnt/etc")?;
        vm.run("mkdir -p /mnt/a/b && head -c 12345678 /dev/urandom > /mnt/a/b/file && ln /mnt/a/b/file /mnt/a/hard")?;
        vm.run("ln -s b/file /mnt/a/soft && mkfifo /mnt/a/pipe && mv /mnt/a/b /mnt/a/c && ln -sf c/file /mnt/a/soft")?;
        vm.run(
            "fio --name=direct --filename=/mnt/direct --direct=1 --ioengine=libaio --rw=randwrite --bsrange=4k-256k \
             --iodepth=8 --size=16M --verify=crc32c --verify_fatal=1",
        )?;
        let look =
            "cd /mnt && find . | sort | xargs ls -ldn | awk '{print $1,$2,$5,$NF}' && sha256sum a/hard a/soft direct";
        let seen = vm.run(look)?;
        vm.run("umount /mnt && mount -t virtiofs vvu /mnt")?;
        ensure!(vm.run(look)? == seen, "after a new mount the files differ");
        vm.reboot()?;
        vm.run("mount -t virtiofs vvu /mnt")?;
        ensure!(vm.run(look)? == seen, "after a reboot the files differ");
        vm.run("rm -r /mnt/a && umount /mnt")?;
        vm.power_off()?;
        run.stop().map(drop)
    })
}
