//! What a driver VM is made of: the command line of its QEMU, and the sockets that are there before it starts.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use vvu_guest_image::KernelFlavour;
use vvu_witness::ledger::LEDGER_LEN;

use super::devices::{Network, Peripheral, SharedFolder};
use super::{BOOT_PATIENCE, DriverVm};
use crate::driver_image::DriverImage;
use crate::process::{Process, Watched};
use crate::testbed::{Testbed, target_dir};

/// QEMU 7.2's TCG now and then returns wrong flags from CMPXCHG16B, which the kernel's allocator uses if it is there.
const CPU_OF_OLDER_QEMU: &str = "max,cx16=off";

/// What the kernel is told. `no_timer_check`: under TCG on a busy host it would find that timer interrupts are too few, and
/// give up. `sysrq_always_enabled`: a test that waits in vain asks it which tasks are blocked. `init_on_alloc=0`: what a device
/// writes is not zeroed by the CPU before, which would enter it into a migration's dirty log in the device's stead.
const KERNEL_COMMAND_LINE: &str =
    "console=ttyS0 loglevel=4 panic=0 no_timer_check sysrq_always_enabled init_on_alloc=0";

/// How long QEMU waits before it tries again to reach a back-end that it has lost.
pub(super) const RECONNECT_MS: u32 = 100;

/// One vhost-user disk of the driver VM.
#[derive(Debug, Clone)]
pub struct Disk {
    socket: PathBuf,
    queues: Option<u16>,
    reconnect: bool,
    properties: Vec<&'static str>,
}

impl Disk {
    /// The disk behind `socket`, with as many queues as QEMU chooses (one per CPU).
    pub fn at(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), queues: None, reconnect: false, properties: Vec::new() }
    }

    /// Has QEMU connect again when the back-end has gone (`reconnect-ms`, which the older QEMU does not know).
    #[must_use]
    pub fn reconnecting(mut self) -> Self {
        self.reconnect = true;
        self
    }

    /// Has the driver's addresses translated by the machine's vIOMMU (`DriverVmPlan::iommu`).
    #[must_use]
    pub fn behind_iommu(mut self) -> Self {
        self.properties.extend(["disable-legacy=on", "iommu_platform=on", "ats=on"]);
        self
    }

    /// Has requests in flight migrate with the machine, instead of being waited for when it stops.
    #[must_use]
    pub fn migrating_in_flight(mut self) -> Self {
        self.properties.extend(["inflight-migration=on", "skip-get-vring-base-on-force-shutdown=on"]);
        self
    }

    /// Has rings of 1024 entries: most of a used ring is then in pages that the driver writes nothing to.
    #[must_use]
    pub fn long_rings(mut self) -> Self {
        self.properties.push("queue-size=1024");
        self
    }

    /// QMP arguments that plug the disk in: of `chardev-add` and of `device_add`.
    pub(super) fn plugged_as(&self, id: &str) -> [Value; 2] {
        let address = json!({ "type": "unix", "data": { "path": self.socket } });
        let socket = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        let queues = self.queues.unwrap_or(1);
        [
            json!({ "id": id, "backend": socket }),
            json!({
                "driver": "vhost-user-blk-pci", "id": id, "chardev": id, "bus": DISK_PORT, "num-queues": queues,
            }),
        ]
    }

    fn chardev(&self, id: &str) -> String {
        let reconnect = if self.reconnect { format!(",reconnect-ms={RECONNECT_MS}") } else { String::new() };
        format!("socket,id={id},path={}{reconnect}", self.socket.display())
    }

    fn device(&self, chardev: &str) -> String {
        let queues = self.queues.map(|queues| format!(",num-queues={queues}")).unwrap_or_default();
        let properties: String = self.properties.iter().map(|property| format!(",{property}")).collect();
        format!("vhost-user-blk-pci,chardev={chardev}{queues}{properties}")
    }

    /// Asks for `queues` request queues.
    #[must_use]
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = Some(queues);
        self
    }
}

/// What boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Boot {
    /// The kernel given to QEMU. SeaBIOS still starts every disk once before, to see whether it could boot from it.
    Kernel,
    /// The first sector of the first disk: the firmware itself reads through the back-end.
    FirstDisk,
}

/// A driver VM to be started.
#[derive(Debug, Clone)]
pub struct DriverVmPlan<'a> {
    testbed: &'a Testbed,
    name: String,
    qemu: PathBuf,
    cpu: &'static str,
    disks: Vec<Disk>,
    networks: Vec<Network>,
    shared_folders: Vec<SharedFolder>,
    peripherals: Vec<Peripheral>,
    cpus: u16,
    memory: Memory,
    boot: Boot,
    ledger: Option<PathBuf>,
    hot_plug: bool,
    iommu: bool,
}

/// Room for memory that is plugged in while the machine runs, in MiB, and the number of its pieces.
const HOT_PLUG_ROOM_MIB: u32 = 4096;
const HOT_PLUG_SLOTS: u32 = 4;

/// NUMA node without memory at boot, for the memory that is plugged in while the machine runs.
pub const PLUGGED_MEMORY_NODE: u32 = 1;

/// PCI Express port that a disk can be plugged into while the machine runs.
pub const DISK_PORT: &str = "disk-port";

/// PCI Express port for a memory device.
pub const MEMORY_PORT: &str = "memory-port";

/// Where the memory of a driver VM is, in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Memory {
    /// One file from address 0; at most `below_4g` below 4 GiB, the rest from there.
    OneFile { all: u32, below_4g: Option<u32> },
    /// Two NUMA nodes with a file each, one from address 0, one from 4 GiB.
    TwoFiles { each: u32 },
}

impl<'a> DriverVmPlan<'a> {
    /// A machine with one CPU, 384 MiB of memory and no device under the newer QEMU; `name` is for logs.
    pub fn new(testbed: &'a Testbed, name: &str) -> Self {
        Self {
            testbed,
            name: name.to_owned(),
            qemu: testbed.setup().qemu.clone(),
            cpu: "max",
            disks: Vec::new(),
            networks: Vec::new(),
            shared_folders: Vec::new(),
            peripherals: Vec::new(),
            cpus: 1,
            memory: Memory::OneFile { all: 384, below_4g: None },
            boot: Boot::Kernel,
            ledger: None,
            hot_plug: false,
            iommu: false,
        }
    }

    /// Shares a witness's ledger (`Witness::ledger`) with the machine.
    #[must_use]
    pub fn ledger(mut self, ledger: &Path) -> Self {
        self.ledger = Some(ledger.to_owned());
        self
    }

    /// Makes room for memory, and ports ([`DISK_PORT`], [`MEMORY_PORT`]) for devices, that are plugged in while the machine runs.
    #[must_use]
    pub fn hot_plug(mut self) -> Self {
        self.hot_plug = true;
        self
    }

    /// Puts the disks behind a vIOMMU that the kernel uses for all DMA, page by page.
    #[must_use]
    pub fn iommu(mut self) -> Self {
        self.iommu = true;
        self
    }

    /// Adds a disk; the first one is `/dev/vda`.
    #[must_use]
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Adds a network card; the first one is `eth0`.
    #[must_use]
    pub fn network(mut self, network: Network) -> Self {
        self.networks.push(network);
        self
    }

    /// Adds a file system.
    #[must_use]
    pub fn shared_folder(mut self, shared_folder: SharedFolder) -> Self {
        self.shared_folders.push(shared_folder);
        self
    }

    /// Adds another device.
    #[must_use]
    pub fn peripheral(mut self, peripheral: Peripheral) -> Self {
        self.peripherals.push(peripheral);
        self
    }

    /// Uses the distribution's own, older QEMU.
    #[must_use]
    pub fn older_qemu(mut self) -> Self {
        self.testbed.setup().qemu_distribution.clone_into(&mut self.qemu);
        self.cpu = CPU_OF_OLDER_QEMU;
        self
    }

    /// Sets the number of CPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u16) -> Self {
        self.cpus = cpus;
        self
    }

    /// Sets the memory in MiB, and how much of it lies below 4 GiB of the guest's address space (at most 2 GiB).
    #[must_use]
    pub fn memory_mib(mut self, all: u32, below_4g: Option<u32>) -> Self {
        self.memory = Memory::OneFile { all, below_4g };
        self
    }

    /// Gives the machine two NUMA nodes of `each` MiB, each with a memory file of its own: one below and one above 4 GiB.
    #[must_use]
    pub fn two_memory_files_mib(mut self, each: u32) -> Self {
        self.memory = Memory::TwoFiles { each };
        self
    }

    /// Boots the driver VM and waits for its shell.
    ///
    /// # Errors
    /// If QEMU does not start, the kernel panics, or the shell does not answer in [`BOOT_PATIENCE`].
    pub fn boot(self) -> Result<DriverVm> {
        let mut vm = self.start(&[])?;
        vm.await_shell()?;
        Ok(vm)
    }

    /// Starts a machine that waits for the state of another one, as the other end of [`DriverVm::migrate`]; the plan must be
    /// that of the other one but for sockets and ledger.
    ///
    /// # Errors
    /// If QEMU does not start.
    pub fn await_migration(self) -> Result<Incoming> {
        let socket = self.testbed.socket(&format!("{}.migration", self.name));
        // Left by an earlier migration to a machine of this name.
        let _ = std::fs::remove_file(&socket);
        let uri = format!("unix:{}", socket.display());
        let vm = self.start(&["-incoming", &uri])?;
        Ok(Incoming { vm, uri })
    }

    /// Boots from the first disk's first sector and returns without waiting: see [`DriverVm::await_console`].
    ///
    /// # Errors
    /// If QEMU does not start.
    pub fn boot_from_first_disk(mut self) -> Result<DriverVm> {
        self.boot = Boot::FirstDisk;
        self.start(&[])
    }

    fn start(self, more: &[&str]) -> Result<DriverVm> {
        let listen = |purpose: &str| {
            let path = self.testbed.socket(&format!("{}.{purpose}", self.name));
            // A socket of an earlier machine of the same name is in the way and of no use.
            let _ = std::fs::remove_file(&path);
            let listener = UnixListener::bind(&path).with_context(|| format!("cannot listen at {}", path.display()))?;
            Ok::<_, anyhow::Error>((path, listener))
        };
        let (console_path, console) = listen("console")?;
        let (shell_path, shell) = listen("shell")?;
        let (qmp_path, qmp) = listen("qmp")?;
        let folder = self.testbed.folder().to_owned();
        let mut arguments = self.arguments([&console_path, &shell_path, &qmp_path])?;
        arguments.extend(more.iter().map(OsString::from));
        let qemu = Process::start(&format!("{}-qemu", self.name), &self.qemu, arguments, &folder)?;

        let accept = |listener| accept_from(qemu.watched(), listener);
        let sockets = (|| Ok([accept(&console)?, accept(&shell)?, accept(&qmp)?]))();
        DriverVm::attach(self.name, qemu, sockets, &folder)
    }

    /// QEMU's command line; the sockets are console, shell and QMP.
    fn arguments(&self, sockets: [&PathBuf; 3]) -> Result<Vec<OsString>> {
        let mut line = CommandLine::default();
        line.option("-name", format!("vvu-test-{}", self.name));
        line.option("-nodefaults", "-no-user-config").option("-display", "none").option("-vga", "none");
        line.option("-accel", if kvm_is_usable() { "kvm" } else { "tcg,thread=multi" }).option("-cpu", self.cpu);
        line.option("-smp", self.cpus.to_string());
        self.memory.push_options(self.machine_properties(), self.hot_plug, &mut line);
        for (id, socket) in ["console", "shell", "qmp"].into_iter().zip(sockets) {
            line.option("-chardev", format!("socket,id={id},path={}", socket.display()));
        }
        line.option("-serial", "chardev:console").option("-serial", "chardev:shell");
        line.option("-mon", "chardev=qmp,mode=control");
        self.push_devices(&mut line);
        if self.boot == Boot::Kernel {
            let iommu = if self.iommu { " intel_iommu=on iommu.strict=1" } else { "" };
            // Memory that only holds what can move can be pulled out again.
            let movable = if self.hot_plug { " memhp_default_state=online_movable" } else { "" };
            let image = self.testbed.driver_image(self.image())?;
            // The stock kernel, unpacked already: whatever the appliances have, the driver VM needs its modules.
            let stock = target_dir()?.join(KernelFlavour::Stock.directory());
            line.option("-kernel", stock.join("vmlinux")).option("-initrd", image);
            line.option("-append", format!("{KERNEL_COMMAND_LINE}{iommu}{movable}"));
        }
        Ok(line.0)
    }

    /// What boots has the drivers of one class of devices beside disks.
    fn image(&self) -> DriverImage {
        if !self.networks.is_empty() {
            DriverImage::Network
        } else if !self.shared_folders.is_empty() {
            DriverImage::FileSystem
        } else if !self.peripherals.is_empty() {
            DriverImage::Peripherals
        } else {
            DriverImage::Disk
        }
    }

    fn machine_properties(&self) -> &'static str {
        if self.iommu { ",kernel-irqchip=split" } else { "" }
    }

    fn push_devices(&self, line: &mut CommandLine) {
        if self.iommu {
            // Before the devices that it translates for.
            line.option("-device", "intel-iommu,intremap=on,device-iotlb=on");
        }
        for (index, disk) in self.disks.iter().enumerate() {
            let bootindex = if self.boot == Boot::FirstDisk && index == 0 { ",bootindex=0" } else { "" };
            let chardev = format!("disk{index}");
            line.option("-chardev", disk.chardev(&chardev));
            line.option("-device", disk.device(&chardev) + bootindex);
        }
        for (index, network) in self.networks.iter().enumerate() {
            network.push_options(&format!("net{index}"), line);
        }
        for (index, shared_folder) in self.shared_folders.iter().enumerate() {
            shared_folder.push_options(&format!("fs{index}"), line);
        }
        for (index, peripheral) in self.peripherals.iter().enumerate() {
            peripheral.push_options(&format!("peripheral{index}"), line);
        }
        if let Some(ledger) = &self.ledger {
            let file = format!("mem-path={},size={LEDGER_LEN},share=on", ledger.display());
            line.option("-object", format!("memory-backend-file,id=ledger,{file}"));
            // A master's memory migrates with its machine.
            line.option("-device", "ivshmem-plain,memdev=ledger,master=on");
        }
        if self.hot_plug {
            for (chassis, port) in [DISK_PORT, MEMORY_PORT].into_iter().enumerate() {
                line.option("-device", format!("pcie-root-port,id={port},chassis={}", chassis + 1));
            }
        }
    }
}

/// A machine that waits for the state of another one.
#[derive(Debug)]
pub struct Incoming {
    pub(super) vm: DriverVm,
    pub(super) uri: String,
}

impl Memory {
    fn push_options(self, machine_properties: &str, hot_plug: bool, line: &mut CommandLine) {
        let room =
            if hot_plug { format!(",slots={HOT_PLUG_SLOTS},maxmem={HOT_PLUG_ROOM_MIB}M") } else { String::new() };
        let file = |id: &str, mib: u32| format!("memory-backend-memfd,id={id},size={mib}M,share=on");
        match self {
            Self::OneFile { all, below_4g } => {
                let below_4g = below_4g.map(|mib| format!(",max-ram-below-4g={mib}M")).unwrap_or_default();
                line.option("-m", format!("{all}M{room}")).option("-object", file("memory", all));
                if hot_plug {
                    line.option("-machine", format!("q35{below_4g}{machine_properties}"));
                    line.option("-numa", "node,nodeid=0,memdev=memory");
                    line.option("-numa", format!("node,nodeid={PLUGGED_MEMORY_NODE}"));
                } else {
                    line.option("-machine", format!("q35,memory-backend=memory{below_4g}{machine_properties}"));
                }
            }
            Self::TwoFiles { each } => {
                line.option("-machine", format!("q35,max-ram-below-4g={each}M{machine_properties}"));
                line.option("-m", format!("{}M{room}", 2 * each));
                for node in ["low", "high"] {
                    line.option("-object", file(node, each)).option("-numa", format!("node,memdev={node}"));
                }
            }
        }
    }
}

/// QEMU's options, one after the other.
#[derive(Default)]
pub(super) struct CommandLine(Vec<OsString>);

impl CommandLine {
    pub(super) fn option(&mut self, name: &str, value: impl Into<OsString>) -> &mut Self {
        self.0.extend([name.into(), value.into()]);
        self
    }
}

/// Whether this host can run a stock kernel under KVM: the device may open where the processor has no such mode.
pub fn kvm_is_usable() -> bool {
    let has_mode = std::fs::read_to_string("/proc/cpuinfo")
        .is_ok_and(|info| info.split_whitespace().any(|word| word == "vmx" || word == "svm"));
    has_mode && File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

fn accept_from(qemu: &Watched, listener: &UnixListener) -> Result<UnixStream> {
    qemu.await_before_end(listener, BOOT_PATIENCE)?;
    Ok(listener.accept()?.0)
}
