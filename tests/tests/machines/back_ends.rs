//! Back-ends that others wrote, as their packages have them, behind `vvu run exec`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vvu_guest_image::{Overlay, build_overlay};
use vvu_tests::driver_vm::{Disk, DriverVm, DriverVmPlan, Network, Peripheral, SharedFolder};
use vvu_tests::files::Files;
use vvu_tests::image_file::create;
use vvu_tests::process::output_of;
use vvu_tests::qmp::Qmp;
use vvu_tests::testbed::{Testbed, machine_test};
use vvu_tests::vvu_run::VvuRun;

const MIB: u64 = 1 << 20;

/// How long a file system's suite may take.
const SUITE_PATIENCE: Duration = Duration::from_secs(400);

/// Random file operations that are checked.
const FILE_OPERATIONS: u32 = 2000;

/// Bytes that go through a socket of virtio's own and back.
const ECHOED: usize = 1 << 20;

/// How long a program may take to answer over a channel.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);

/// Makes the overlay of a back-end; it goes away with the testbed.
fn overlay(testbed: &Testbed, overlay: Overlay) -> Result<PathBuf> {
    let directory = testbed.socket(&format!("{overlay}.overlay"));
    let root = overlay.root().with_context(|| format!("no packages of {overlay}"))?;
    build_overlay(&root, &overlay.files(), &directory).with_context(|| format!("no overlay of {overlay}"))?;
    Ok(directory)
}

/// Asks QEMU's monitor behind a channel one question.
fn ask_monitor(socket: &Path, question: &str) -> Result<serde_json::Value> {
    let stream = UnixStream::connect(socket).with_context(|| format!("cannot reach {}", socket.display()))?;
    Qmp::greet(stream)?.execute(question)
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
        let program = [Overlay::Virtiofsd.program(), "--socket-path={socket}", "--shared-dir=.", "--sandbox=none"];
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
        vm.run("rm -r /mnt/a")?;
        let fsx = format!("fsx -q -N {FILE_OPERATIONS} -S 7 -P /tmp /mnt/fsx");
        vm.run_within(SUITE_PATIENCE, &fsx).context("the file system loses data")?;
        check_posix_rules(&mut vm, "/mnt")?;
        vm.run("umount /mnt")?;
        vm.power_off()?;
        run.stop().map(drop)
    })
}

/// Runs the POSIX suite, of which all must hold but what is about device nodes, which nobody in the appliance may make, and
/// about programs that run: the suite copies `sleep`, which is busybox here and ends at once under another name.
fn check_posix_rules(vm: &mut DriverVm, mount_point: &str) -> Result<()> {
    vm.run("printf '%s\\n' root:x:0:0::/:/bin/sh nobody:x:65534:65534::/:/bin/sh tests:x:1001:1001::/:/bin/sh > /etc/passwd")?;
    vm.run("printf '%s\\n' root:x:0: nobody:x:65534: tests:x:1001: > /etc/group")?;
    vm.run(
        "printf '%s\\n' '[features]' 'posix_fallocate = {}' 'utimensat = {}' 'utime_now = {}' '[settings]' 'naptime = 0.01' \
         '[dummy_auth]' 'entries = [[\"nobody\", \"nobody\"], [\"tests\", \"tests\"]]' > /tmp/suite.toml",
    )?;
    // It fails as a whole, for those that are about device nodes.
    let suite = format!("chmod 755 {mount_point}; pjdfstest -c /tmp/suite.toml -p {mount_point} > /tmp/suite.log 2>&1");
    let running = vm.start(&suite)?;
    vm.finish(running, SUITE_PATIENCE)?;
    let failed = vm.run(
        "grep 'FAILED *$' /tmp/suite.log | grep -v '::block \\|::char \\|::etxtbsy '; grep ^Summary /tmp/suite.log",
    )?;
    let summary = failed.strip_prefix("Summary: ").with_context(|| format!("not as POSIX says:\n{failed}"))?;
    let passed = summary.split(", ").find_map(|part| part.strip_suffix(" passed")?.parse::<u32>().ok());
    ensure!(passed.is_some_and(|passed| passed > 300), "{summary}");
    Ok(())
}

/// Path: two back-ends that others wrote, each in an appliance VM of its own, for one driver VM. Bytes of the appliance's
/// random source; and a connection from a host program through a channel to a server in the driver VM, which gives back what
/// it gets.
#[test]
fn vhost_devices_give_random_bytes_and_connections() -> Result<()> {
    machine_test("vhost_devices_give_random_bytes_and_connections", |testbed| {
        let program = [Overlay::VhostDeviceRng.program(), "--socket-path={socket-stem}"].map(str::to_owned);
        let options =
            [format!("--overlay={}", overlay(testbed, Overlay::VhostDeviceRng)?.display()), "--queues=1".to_owned()];
        let rng = VvuRun::start_program(testbed, "rng", &options, &program)?;
        let device = "guest-cid=4,socket={socket},uds-path={channel:connections}";
        let program = [Overlay::VhostDeviceVsock.program(), "--vm", device].map(str::to_owned);
        let options = [
            format!("--overlay={}", overlay(testbed, Overlay::VhostDeviceVsock)?.display()),
            "--queues=3".to_owned(),
            "--channel=connections".to_owned(),
        ];
        let vsock = VvuRun::start_program(testbed, "vsock", &options, &program)?;
        let mut vm = DriverVmPlan::new(testbed, "driver")
            .peripheral(Peripheral::rng(rng.socket()))
            .peripheral(Peripheral::vsock(vsock.socket()))
            .boot()?;
        let current = vm.run("cat /sys/class/misc/hw_random/rng_current")?;
        ensure!(current.trim() == "virtio_rng.0", "the kernel's source of random bytes is {current}");
        vm.run("dd if=/dev/hwrng of=/tmp/random bs=1k count=64 iflag=fullblock 2> /dev/null")?;
        let packed: u64 = vm.run("gzip -c /tmp/random | wc -c")?.trim().parse()?;
        ensure!(packed > 64 << 10, "64 KiB of random bytes are worth {packed}");

        let server = "socat -dd VSOCK-LISTEN:1234 EXEC:cat 2> /tmp/server.log &";
        vm.run(&format!("{server} until grep -q listening /tmp/server.log; do sleep 0.1; done"))?;
        echo_through(&vsock.socket().with_extension("sock.connections"))?;
        vm.power_off()?;
        vsock.stop()?;
        rng.stop().map(drop)
    })
}

/// Connects to port 1234 of the driver VM and compares what comes back with what was sent.
fn echo_through(channel: &Path) -> Result<()> {
    let mut to = UnixStream::connect(channel).with_context(|| format!("cannot reach {}", channel.display()))?;
    to.set_read_timeout(Some(ANSWER_PATIENCE))?;
    let mut from = BufReader::new(to.try_clone()?);
    to.write_all(b"CONNECT 1234\n")?;
    let mut line = String::new();
    from.read_line(&mut line)?;
    ensure!(line.starts_with("OK "), "the device says {line}");
    let sent: Vec<u8> = (0..ECHOED).map(|at| u8::try_from(at % 251).unwrap_or_default()).collect();
    let expected = sent.clone();
    let sender = std::thread::spawn(move || to.write_all(&sent).map(|()| to));
    let mut received = vec![0; ECHOED];
    from.read_exact(&mut received).context("not all comes back")?;
    ensure!(received == expected, "what comes back is not what was sent");
    match sender.join() {
        Ok(to) => to?.shutdown(Shutdown::Both).context("cannot hang up"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Path: DPDK in the appliance, a poll-mode program that maps the driver VM's memory its own way: it answers requests for
/// addresses and echoes.
#[test]
fn dpdk_answers_on_a_network_card() -> Result<()> {
    machine_test("dpdk_answers_on_a_network_card", |testbed| {
        let program = [
            Overlay::DpdkTestpmd.program(),
            "--no-huge",
            "-m",
            "100",
            "--no-pci",
            "--no-telemetry",
            "--iova-mode=va",
            "--lcores=0@0,1@0",
            "-d",
            "librte_net_vhost.so.25",
            "-d",
            "librte_mempool_ring.so.25",
            "--vdev",
            "net_vhost0,iface={socket},queues=1",
            "--",
            "--forward-mode=icmpecho",
            "--auto-start",
            "--total-num-mbufs=4096",
            "--nb-cores=1",
            "--port-topology=loop",
            // Else it ends when its standard input does.
            "--stats-period=86400",
        ];
        let options = [
            format!("--overlay={}", overlay(testbed, Overlay::DpdkTestpmd)?.display()),
            "--queues=2".to_owned(),
            "--memory=512M".to_owned(),
        ];
        let run = VvuRun::start_program(testbed, "net", &options, &program.map(str::to_owned))?;
        let card = Network::at(run.socket(), "52:54:00:00:00:01");
        let mut vm = DriverVmPlan::new(testbed, "driver").network(card).boot()?;
        vm.run("ip link set eth0 up && ip addr add 10.7.0.1/24 dev eth0")?;
        vm.run("ping -c 3 -W 10 10.7.0.2")?;
        // Each answer is awaited; a lost one fails the test.
        let says = vm.run("ping -c 50 -i 0.02 -s 1400 -W 10 10.7.0.3")?;
        ensure!(says.contains(" 0% packet loss"), "{says}");
        // MAC address of the card at the other end, which DPDK's vhost driver makes of its letters.
        ensure!(vm.run("ip neigh")?.contains("56:48:4f:53:54"), "somebody else has answered");
        vm.power_off()?;
        run.stop().map(drop)
    })
}
