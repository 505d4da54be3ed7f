//! The appliance VM's QEMU command line. Pure: facts in, argument vector out.
//!
//! The machine holds the three devices of each device set, the disks, a serial port, and nothing else that QEMU can leave
//! out. Node and device descriptions are written as JSON where QEMU takes JSON; in the other options a comma inside a
//! value is doubled, which is QEMU's escape.

use serde_json::{Value, json};
use vvu_appliance_config::{CHANNEL_PORT_PREFIX, FW_CFG_NAME};
use vvu_protocol::doorbell::vector_count;

use crate::accel::Accel;
use crate::image::{Image, ImageKind};
use crate::plan::{Channel, Disk, Nic, Port};
use crate::size::Size;
use crate::supervisor::{ApplianceId, PortId};

/// `-sandbox`: a seccomp filter against everything that this QEMU has no business doing.
pub(crate) const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// Name of the configuration document in the runtime directory.
pub(crate) const CONFIG_FILE: &str = "appliance.json";

/// Socket of the control device, created by the bridge in its directory.
const CONTROL_SOCKET: &str = "control.sock";

/// Socket of the window device.
const WINDOW_SOCKET: &str = "window.sock";

/// Socket of the doorbell device.
const DOORBELL_SOCKET: &str = "doorbell.sock";

/// A bridge's sockets in its directory; one that was killed leaves them behind.
pub(crate) const BRIDGE_SOCKETS: [&str; 3] = [CONTROL_SOCKET, WINDOW_SOCKET, DOORBELL_SOCKET];

/// The longest name of a socket in the runtime directory; socket paths are limited by the system.
pub(crate) const LONGEST_SOCKET_NAME: &str = "port-7/doorbell.sock";

/// Name of a bridge's directory in the runtime directory.
pub(crate) fn port_dir(port: PortId) -> String {
    format!("port-{port}")
}

/// Name of an appliance VM's QMP socket in the runtime directory.
pub(crate) fn qmp_socket(appliance: ApplianceId) -> String {
    format!("qmp-{appliance}.sock")
}

/// Name of the socket of an appliance VM's channel in the runtime directory; channels are counted from 0.
pub(crate) fn channel_socket(channel: usize, appliance: ApplianceId) -> String {
    format!("ch{channel}-{appliance}.sock")
}

/// The device models that an appliance VM can be built of.
pub(crate) const REQUIRED_DEVICES: [&str; 7] = [
    "vhost-user-test-device-pci",
    "ivshmem-doorbell",
    "intel-iommu",
    "virtio-blk-pci",
    "virtio-net-pci",
    "virtio-serial-pci",
    "virtserialport",
];

/// Virtio device id of the control device: an id that QEMU knows and no Linux driver claims.
const CONTROL_VIRTIO_ID: u32 = 21;

/// Virtio device id of the window device: virtio-pmem (virtio 1.3, section 5.19).
const WINDOW_VIRTIO_ID: u32 = 27;

/// Name of the first image's format node, to which the disk is attached.
pub(crate) const DISK_NODE: &str = "disk";

/// What the kernel is told. `panic=-1` reboots at once, which `-no-reboot` turns into the end of QEMU; `iommu=pt` keeps
/// DMA untranslated while VFIO gets its IOMMU groups; `cryptomgr.notests` leaves out self-tests of ciphers that nothing
/// in the appliance uses, a good part of the boot under TCG; `no_timer_check` leaves out a test of the timer interrupt that
/// fails on a busy host without KVM, and then panics.
///
/// The rest keeps an idle appliance asleep: the kernel would look twice a second whether the TSC agrees with another clock and
/// whether memory is to be compacted, every second for counters, every two for pressure and memory of control groups, which there
/// are none of, and every four for a CPU that hangs.
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 intel_iommu=on iommu=pt cryptomgr.notests \
    no_timer_check tsc=nowatchdog nowatchdog psi=0 cgroup_disable=memory sysctl.vm.compaction_proactiveness=0 \
    sysctl.vm.stat_interval=60";

/// How QEMU submits the disk's requests to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DiskIo {
    /// O_DIRECT: past the host's page cache.
    pub(crate) direct: bool,
    /// QEMU's `aio=` value.
    pub(crate) aio: &'static str,
}

/// Ways to submit requests, best first; `aio=native` exists only with O_DIRECT.
pub(crate) const DISK_IO_WAYS: [DiskIo; 5] = [
    DiskIo { direct: true, aio: "io_uring" },
    DiskIo { direct: true, aio: "native" },
    DiskIo { direct: true, aio: "threads" },
    DiskIo { direct: false, aio: "io_uring" },
    DiskIo { direct: false, aio: "threads" },
];

/// Everything the command line depends on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ApplianceVm<'a> {
    /// KVM or TCG.
    pub(crate) accel: Accel,
    /// The appliance's own memory.
    pub(crate) memory: Size,
    /// Virtual CPUs.
    pub(crate) cpus: u16,
    /// Ports, a device set each.
    pub(crate) ports: &'a [Port],
    /// Its number in the run, for the names of its own files.
    pub(crate) id: ApplianceId,
    /// Further words for the kernel's command line.
    pub(crate) append: Option<&'a str>,
    /// Runtime directory with the bridge's sockets and the configuration document.
    pub(crate) runtime_dir: &'a str,
    /// Kernel of the appliance.
    pub(crate) kernel: &'a str,
    /// Initial RAM file system of the appliance.
    pub(crate) initrd: &'a str,
    /// Disks.
    pub(crate) disks: &'a [Disk],
    /// Network card.
    pub(crate) nic: Option<&'a Nic>,
    /// Channels.
    pub(crate) channels: &'a [Channel],
}

impl ApplianceVm<'_> {
    /// The arguments, without the program's name.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        self.push_frame(&mut arguments);
        self.push_machine(&mut arguments);
        self.push_boot(&mut arguments);
        for (number, port) in (0..).zip(self.ports) {
            self.push_device_set(&mut arguments, PortId(number), port);
        }
        self.push_disks(&mut arguments);
        self.push_nic(&mut arguments);
        self.push_channels(&mut arguments);
        arguments
    }

    fn push_frame(&self, arguments: &mut Vec<String>) {
        push(arguments, &["-nodefaults", "-no-user-config", "-no-reboot"]);
        push(arguments, &["-display", "none"]);
        push(arguments, &["-sandbox", SANDBOX]);
        push(arguments, &["-run-with", "exit-with-parent=on"]);
        let socket = self.in_runtime_dir(&qmp_socket(self.id)).replace(',', ",,");
        push(arguments, &["-qmp", &format!("unix:{socket},server=on,wait=off")]);
        let uuid = self.ports.first().map(|port| port.uuid.as_str()).unwrap_or_default();
        push(arguments, &["-name", &option("", &[("guest", &format!("vvu-{uuid}")), ("debug-threads", "on")])]);
    }

    fn push_machine(&self, arguments: &mut Vec<String>) {
        // Without all that a q35 machine can do without.
        let absent = ["usb", "vmport", "smbus", "sata", "hpet", "i8042"].map(|part| format!(",{part}=off")).concat();
        let mut machine = format!("q35,memory-backend=ram{absent}");
        let memory = format!("{}", self.memory);
        let (accel, cpu, iommu) = match self.accel {
            Accel::Kvm => {
                // Interrupt remapping needs the IOAPIC in QEMU.
                machine.push_str(",kernel-irqchip=split");
                ("kvm", "host", json!({ "driver": "intel-iommu", "intremap": "on" }))
            }
            Accel::Tcg => ("tcg,thread=multi", "max", json!({ "driver": "intel-iommu" })),
        };
        push(arguments, &["-machine", &machine, "-accel", accel, "-cpu", cpu]);
        push(arguments, &["-smp", &self.cpus.to_string(), "-m", &memory]);
        // Shared, because the bridge maps the control queues.
        let backend = json!({ "qom-type": "memory-backend-memfd", "id": "ram", "size": self.memory.0, "share": true });
        push(arguments, &["-object", &backend.to_string()]);
        // Before every other device: a device only gets behind the IOMMU if that exists already.
        push(arguments, &["-device", &iommu.to_string()]);
    }

    fn push_boot(&self, arguments: &mut Vec<String>) {
        let words = self.append.map(|more| format!("{KERNEL_COMMAND_LINE} {more}"));
        let words = words.as_deref().unwrap_or(KERNEL_COMMAND_LINE);
        push(arguments, &["-kernel", self.kernel, "-initrd", self.initrd, "-append", words]);
        let config = option("", &[("name", FW_CFG_NAME), ("file", &self.in_runtime_dir(CONFIG_FILE))]);
        push(arguments, &["-fw_cfg", &config]);
        push(arguments, &["-chardev", "stdio,id=console,signal=off"]);
        push(arguments, &["-device", &json!({ "driver": "isa-serial", "chardev": "console" }).to_string()]);
    }

    fn push_device_set(&self, arguments: &mut Vec<String>, number: PortId, port: &Port) {
        for (id, socket) in [("control", CONTROL_SOCKET), ("window", WINDOW_SOCKET), ("doorbell", DOORBELL_SOCKET)] {
            let path = self.in_runtime_dir(&format!("{}/{socket}", port_dir(number)));
            push(arguments, &["-chardev", &option("socket", &[("id", &format!("{id}-{number}")), ("path", &path)])]);
        }
        let chardev = |id: &str| format!("{id}-{number}");
        let devices = [
            json!({ "driver": "vhost-user-test-device-pci", "chardev": chardev("control"),
                    "virtio-id": CONTROL_VIRTIO_ID, "num_vqs": 2, "vq_size": 64, "config_size": 64 }),
            json!({ "driver": "vhost-user-test-device-pci", "chardev": chardev("window"),
                    "virtio-id": WINDOW_VIRTIO_ID, "num_vqs": 1, "vq_size": 64, "config_size": 16 }),
            json!({ "driver": "ivshmem-doorbell", "chardev": chardev("doorbell"), "vectors": vector_count(port.vrings) }),
        ];
        for device in devices {
            push(arguments, &["-device", &device.to_string()]);
        }
    }

    fn push_disks(&self, arguments: &mut Vec<String>) {
        if !self.disks.is_empty() {
            push(arguments, &["-object", &json!({ "qom-type": "iothread", "id": "disk-io" }).to_string()]);
        }
        for (number, Disk { serial, image, io, .. }) in self.disks.iter().enumerate() {
            let node = if number == 0 { DISK_NODE.to_owned() } else { format!("{DISK_NODE}-{number}") };
            let file = format!("{node}-file");
            for node in [protocol_node(image, *io, &file), format_node(image, &node, &file)] {
                push(arguments, &["-blockdev", &node.to_string()]);
            }
            // Errors of the host's storage go to the driver VM; the appliance VM is never stopped because of them.
            let disk = json!({
                "driver": "virtio-blk-pci", "drive": node, "serial": serial, "iothread": "disk-io",
                "num-queues": self.cpus, "disable-legacy": "on", "werror": "report", "rerror": "report",
                "logical_block_size": image.logical_block_bytes,
                "physical_block_size": image.physical_block_bytes,
            });
            push(arguments, &["-device", &disk.to_string()]);
        }
    }

    fn push_nic(&self, arguments: &mut Vec<String>) {
        let Some(nic) = self.nic else { return };
        // No boot ROM: it would only be looked for.
        let card = json!({
            "driver": "virtio-net-pci", "netdev": Nic::ID, "mac": nic.mac.to_string(), "disable-legacy": "on", "romfile": "",
        });
        push(arguments, &["-netdev", &nic.netdev, "-device", &card.to_string()]);
    }

    /// A virtio-serial port for each channel. QEMU listens, and takes one at a time.
    fn push_channels(&self, arguments: &mut Vec<String>) {
        if self.channels.is_empty() {
            return;
        }
        // Port 0 is kept for a console.
        let bus = json!({
            "driver": "virtio-serial-pci", "id": "channels", "disable-legacy": "on", "max_ports": self.channels.len() + 1,
        });
        push(arguments, &["-device", &bus.to_string()]);
        for (number, channel) in self.channels.iter().enumerate() {
            let id = format!("channel-{number}");
            let path = self.in_runtime_dir(&channel_socket(number, self.id));
            let chardev = option("socket", &[("id", &id), ("path", &path), ("server", "on"), ("wait", "off")]);
            let name = format!("{CHANNEL_PORT_PREFIX}{}", channel.name);
            let port = json!({ "driver": "virtserialport", "bus": "channels.0", "chardev": id, "name": name });
            push(arguments, &["-chardev", &chardev, "-device", &port.to_string()]);
        }
    }

    fn in_runtime_dir(&self, name: &str) -> String {
        format!("{}/{name}", self.runtime_dir)
    }
}

/// The node that opens the image, in the form of QMP's `blockdev-add`. The lock on it is `vvu`'s (see `image_lock`).
///
/// Two appliance VMs of a run have it open at once while one replaces the other. They agree about its content because both
/// go to the same place in the same way, past the page cache or through it, and a raw image has nothing that QEMU keeps
/// in memory: what the one wrote and completed, the other reads, and the flush at the first one's end finds nothing stale.
pub(crate) fn protocol_node(image: &Image, io: DiskIo, name: &str) -> Value {
    let driver = match image.kind {
        ImageKind::File => "file",
        ImageKind::BlockDevice => "host_device",
    };
    json!({
        "driver": driver, "node-name": name, "filename": image.path, "aio": io.aio, "locking": "off",
        "cache": { "direct": io.direct, "no-flush": false },
        "discard": "unmap", "read-only": image.read_only, "auto-read-only": false,
    })
}

/// The node that takes the file as it is: no format is ever guessed from bytes that a driver VM wrote.
fn format_node(image: &Image, name: &str, file: &str) -> Value {
    json!({
        "driver": "raw", "node-name": name, "file": file,
        "discard": "unmap", "read-only": image.read_only,
    })
}

/// A QEMU option value: an optional leading word, then `key=value` with commas inside the values doubled.
fn option(head: &str, pairs: &[(&str, &str)]) -> String {
    let fields = pairs.iter().map(|(key, value)| format!("{key}={}", value.replace(',', ",,")));
    let head = (!head.is_empty()).then(|| head.to_owned());
    head.into_iter().chain(fields).collect::<Vec<_>>().join(",")
}

fn push(arguments: &mut Vec<String>, more: &[&str]) {
    arguments.extend(more.iter().map(|&argument| argument.to_owned()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::MIB;

    fn disk(serial: &str) -> Disk {
        let image = Image {
            path: "/images/a,b \"c\".img".to_owned(),
            kind: ImageKind::File,
            size_bytes: MIB,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            read_only: true,
        };
        Disk { serial: serial.to_owned(), image, lock: None, io: DISK_IO_WAYS[0] }
    }

    fn port(vrings: u16) -> Port {
        let uuid = "6f1c1c0e-2b57-4a55-9d0f-0d6d1f7f3a11".to_owned();
        Port { socket: "/run/d.sock".to_owned(), uuid, queues: vrings, vrings, mac: None }
    }

    fn arguments(accel: Accel) -> Vec<String> {
        arguments_of(accel, &[port(4)], &[disk("one")])
    }

    fn arguments_of(accel: Accel, ports: &[Port], disks: &[Disk]) -> Vec<String> {
        vm(accel, ports, disks).arguments()
    }

    fn vm<'a>(accel: Accel, ports: &'a [Port], disks: &'a [Disk]) -> ApplianceVm<'a> {
        ApplianceVm {
            accel,
            memory: Size(224 * MIB),
            cpus: 2,
            ports,
            id: ApplianceId(3),
            append: Some("debug"),
            runtime_dir: "/run/user/0/vvu/a,b",
            kernel: "/a/vmlinux",
            initrd: "/a/initrd",
            disks,
            nic: None,
            channels: &[],
        }
    }

    /// A machine with all that there can be.
    fn full() -> Vec<String> {
        let netdev = "tap,id=uplink,ifname=tap0".to_owned();
        let nic = Nic { netdev, mac: "52:54:00:12:34:56".parse().unwrap(), can_be_shared: false };
        let channels = ["control", "qmp"].map(|name| Channel { name: name.to_owned(), link: None });
        let (ports, disks) = ([port(4)], [disk("one")]);
        ApplianceVm { nic: Some(&nic), channels: &channels, ..vm(Accel::Tcg, &ports, &disks) }.arguments()
    }

    /// All values of an option, in order.
    fn values<'a>(arguments: &'a [String], name: &str) -> Vec<&'a str> {
        arguments.windows(2).filter(|pair| pair[0] == name).map(|pair| pair[1].as_str()).collect()
    }

    fn devices(arguments: &[String]) -> Vec<Value> {
        values(arguments, "-device").into_iter().map(|text| serde_json::from_str(text).unwrap()).collect()
    }

    #[test]
    fn the_machine_has_nothing_but_what_it_needs() {
        let arguments = arguments(Accel::Tcg);
        assert_eq!(arguments[..3], ["-nodefaults", "-no-user-config", "-no-reboot"]);
        assert_eq!(values(&arguments, "-sandbox"), [SANDBOX]);
        assert_eq!(values(&arguments, "-run-with"), ["exit-with-parent=on"]);
        let drivers: Vec<_> = devices(&arguments).iter().map(|device| device["driver"].clone()).collect();
        assert_eq!(
            drivers,
            [
                "intel-iommu",
                "isa-serial",
                "vhost-user-test-device-pci",
                "vhost-user-test-device-pci",
                "ivshmem-doorbell",
                "virtio-blk-pci"
            ]
        );
        assert_eq!(devices(&arguments)[4]["vectors"], 259);
    }

    #[test]
    fn every_device_is_among_the_ones_that_are_checked() {
        let all = devices(&full());
        let used: Vec<_> = all.iter().map(|device| device["driver"].as_str().unwrap()).collect();
        for required in REQUIRED_DEVICES {
            assert!(used.contains(&required), "{required} is checked but not used");
        }
    }

    #[test]
    fn each_appliance_has_a_qmp_socket_of_its_own() {
        let arguments = arguments(Accel::Tcg);
        assert_eq!(values(&arguments, "-qmp"), ["unix:/run/user/0/vvu/a,,b/qmp-3.sock,server=on,wait=off"]);
        let last = ApplianceId(u32::MAX);
        for name in [qmp_socket(last), channel_socket(7, last), format!("{}/{DOORBELL_SOCKET}", port_dir(PortId(7)))] {
            assert!(name.len() <= LONGEST_SOCKET_NAME.len(), "{name}");
        }
    }

    #[test]
    fn further_words_come_last_on_the_kernels_command_line() {
        let arguments = arguments(Accel::Tcg);
        assert_eq!(values(&arguments, "-append"), [format!("{KERNEL_COMMAND_LINE} debug")]);
    }

    #[test]
    fn kvm_gets_interrupt_remapping_and_a_split_irqchip() {
        let arguments = arguments(Accel::Kvm);
        assert_eq!((values(&arguments, "-accel"), values(&arguments, "-cpu")), (vec!["kvm"], vec!["host"]));
        assert!(values(&arguments, "-machine")[0].contains("kernel-irqchip=split"));
        assert_eq!(devices(&arguments)[0], json!({ "driver": "intel-iommu", "intremap": "on" }));
    }

    #[test]
    fn tcg_translates_in_one_thread_per_cpu() {
        let arguments = arguments(Accel::Tcg);
        assert_eq!((values(&arguments, "-accel"), values(&arguments, "-cpu")), (vec!["tcg,thread=multi"], vec!["max"]));
        assert!(!values(&arguments, "-machine")[0].contains("irqchip"));
    }

    #[test]
    fn commas_in_paths_are_doubled_where_qemu_splits_at_them() {
        let arguments = arguments(Accel::Tcg);
        let chardevs = values(&arguments, "-chardev");
        assert!(
            chardevs.contains(&"socket,id=control-0,path=/run/user/0/vvu/a,,b/port-0/control.sock"),
            "{chardevs:?}"
        );
        let config = "name=opt/org.vvu/appliance.json,file=/run/user/0/vvu/a,,b/appliance.json";
        assert_eq!(values(&arguments, "-fw_cfg"), [config]);
    }

    #[test]
    fn the_network_card_and_the_channels_come_last() {
        let arguments = full();
        assert_eq!(values(&arguments, "-netdev"), ["tap,id=uplink,ifname=tap0"]);
        let all = devices(&arguments);
        let [card, bus, control, qmp] = &all[all.len() - 4..] else { panic!("{all:?}") };
        assert_eq!((&card["driver"], &card["mac"]), (&"virtio-net-pci".into(), &"52:54:00:12:34:56".into()));
        assert_eq!((&bus["driver"], &bus["max_ports"]), (&"virtio-serial-pci".into(), &3.into()));
        assert_eq!((&control["chardev"], &control["name"]), (&"channel-0".into(), &"org.vvu.control".into()));
        assert_eq!((&qmp["chardev"], &qmp["name"]), (&"channel-1".into(), &"org.vvu.qmp".into()));
        let chardev = "socket,id=channel-1,path=/run/user/0/vvu/a,,b/ch1-3.sock,server=on,wait=off";
        assert_eq!(values(&arguments, "-chardev").last(), Some(&chardev));
    }

    #[test]
    fn each_port_has_a_device_set_and_each_disk_its_nodes() {
        let arguments = arguments_of(Accel::Tcg, &[port(3), port(5)], &[disk("one"), disk("two")]);
        let all = devices(&arguments);
        let doorbells: Vec<_> = all.iter().filter(|device| device["driver"] == "ivshmem-doorbell").collect();
        assert_eq!(doorbells[1], &json!({ "driver": "ivshmem-doorbell", "chardev": "doorbell-1", "vectors": 260 }));
        let sockets = values(&arguments, "-chardev").concat();
        assert!(sockets.contains("id=window-1,path=/run/user/0/vvu/a,,b/port-1/window.sock"), "{sockets}");
        let disks: Vec<_> = all.iter().filter(|device| device["driver"] == "virtio-blk-pci").collect();
        let names: Vec<_> = disks.iter().map(|disk| (&disk["drive"], &disk["serial"])).collect();
        assert_eq!(names, [(&"disk".into(), &"one".into()), (&"disk-1".into(), &"two".into())]);
        let nodes = values(&arguments, "-blockdev");
        for name in ["\"disk-file\"", "\"disk\"", "\"disk-1-file\"", "\"disk-1\""] {
            assert_eq!(
                nodes.iter().filter(|node| node.contains(&format!("\"node-name\":{name}"))).count(),
                1,
                "{name}"
            );
        }
    }

    #[test]
    fn the_image_is_raw_read_only_as_wanted_and_named_verbatim() {
        let arguments = arguments(Accel::Tcg);
        let nodes: Vec<Value> =
            values(&arguments, "-blockdev").into_iter().map(|text| serde_json::from_str(text).unwrap()).collect();
        assert_eq!(nodes[0]["filename"], "/images/a,b \"c\".img");
        assert_eq!(nodes[0]["cache"]["direct"], true);
        assert_eq!(nodes[0]["locking"], "off", "two appliance VMs open it while one replaces the other");
        assert_eq!(nodes[1]["driver"], "raw");
        assert!(nodes.iter().all(|node| node["read-only"] == true));
    }

    #[test]
    fn the_memory_is_the_same_in_both_places() {
        let arguments = arguments(Accel::Tcg);
        let backend: Value = serde_json::from_str(values(&arguments, "-object")[0]).unwrap();
        assert_eq!(backend["size"], 224 * MIB);
        assert_eq!(backend["share"], true);
        assert_eq!(values(&arguments, "-m"), ["224M"]);
    }

    #[test]
    fn native_aio_is_never_tried_without_o_direct() {
        assert!(DISK_IO_WAYS.iter().all(|way| way.direct || way.aio != "native"));
    }
}
