//! The driver VM: stock QEMU, stock kernel, `vhost-user-blk-pci`, and a shell that the test talks to.
//!
//! Three sockets lead into the machine, all made before QEMU starts, so that nothing is lost: the console (first serial
//! port), the shell (second serial port) and QMP. Two threads turn console and shell into one queue of events, on which
//! [`DriverVm::run`] waits. A kernel panic or a hung task on the console fails whatever the test is waiting for, at once.
//!
//! The shell speaks lines. The test sends `<token> <command>`; PID 1 (`driver_init.sh`) answers `<<<token`, the command's
//! output, and `>>>token <exit status>`. Whatever else is on the line (firmware, a boot) is between commands and skipped.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::process::{Process, Watched};
use crate::qmp::Qmp;
use crate::testbed::Testbed;

/// How long a boot may take: a few seconds under TCG on an idle machine, many times that on a busy one.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(180);

/// How long a command may take unless the test says otherwise.
pub const COMMAND_PATIENCE: Duration = Duration::from_secs(180);

/// QEMU 7.2's TCG now and then returns wrong flags from CMPXCHG16B, which the kernel's allocator uses if it is there.
const CPU_OF_OLDER_QEMU: &str = "max,cx16=off";

/// Console lines that an error text repeats.
const REPEATED_LINES: usize = 25;

/// Silence after which a lost kernel has said all that it had to say.
const LAST_WORDS_PATIENCE: Duration = Duration::from_secs(2);

/// What a kernel says when it has lost; nothing that comes after it is worth waiting for.
const LOST: [&str; 5] = ["Kernel panic", "Oops:", "BUG: ", "general protection fault", "blocked for more than"];

/// One vhost-user disk of the driver VM.
#[derive(Debug, Clone)]
pub struct Disk {
    socket: PathBuf,
    queues: Option<u16>,
}

impl Disk {
    /// The disk behind `socket`, with as many queues as QEMU chooses (one per CPU).
    pub fn at(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), queues: None }
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
    cpus: u16,
    memory: Memory,
    boot: Boot,
}

/// Where the memory of a driver VM is, in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Memory {
    /// One file from address 0; at most `below_4g` below 4 GiB, the rest from there.
    OneFile { all: u32, below_4g: Option<u32> },
    /// Two NUMA nodes with a file each, one from address 0, one from 4 GiB.
    TwoFiles { each: u32 },
}

impl<'a> DriverVmPlan<'a> {
    /// A machine with one CPU, 384 MiB of memory and no disk under the newer QEMU; `name` is for logs.
    pub fn new(testbed: &'a Testbed, name: &str) -> Self {
        Self {
            testbed,
            name: name.to_owned(),
            qemu: testbed.setup().qemu.clone(),
            cpu: "max",
            disks: Vec::new(),
            cpus: 1,
            memory: Memory::OneFile { all: 384, below_4g: None },
            boot: Boot::Kernel,
        }
    }

    /// Adds a disk; the first one is `/dev/vda`.
    #[must_use]
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
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
        let mut vm = self.start()?;
        vm.await_shell()?;
        Ok(vm)
    }

    /// Boots from the first disk's first sector and returns without waiting: see [`DriverVm::await_console`].
    ///
    /// # Errors
    /// If QEMU does not start.
    pub fn boot_from_first_disk(mut self) -> Result<DriverVm> {
        self.boot = Boot::FirstDisk;
        self.start()
    }

    fn start(self) -> Result<DriverVm> {
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
        let folder = self.testbed.folder();
        let arguments = self.arguments([&console_path, &shell_path, &qmp_path]);
        let qemu = Process::start(&format!("{}-qemu", self.name), &self.qemu, arguments, folder)?;

        let accept = |listener| accept_from(qemu.watched(), listener).with_context(|| last_words(&qemu));
        let (console, shell, qmp) = (accept(&console)?, accept(&shell)?, Qmp::greet(accept(&qmp)?)?);
        let (sender, events) = channel();
        let log = File::options().create(true).append(true).open(folder.join(format!("{}-console.log", self.name)))?;
        let (to_shell, console_sender) = (shell.try_clone()?, sender.clone());
        thread::spawn(move || forward(console, Some(log), Event::Console, &console_sender));
        thread::spawn(move || forward(shell, None, Event::Shell, &sender));
        let token_seed = RandomState::new().build_hasher().finish();
        Ok(DriverVm {
            name: self.name,
            qemu,
            qmp,
            to_shell,
            events,
            last_console_lines: VecDeque::new(),
            token_seed,
            commands: 0,
            boot_id: String::new(),
        })
    }

    /// QEMU's command line; the sockets are console, shell and QMP.
    fn arguments(&self, sockets: [&PathBuf; 3]) -> Vec<OsString> {
        let mut line = CommandLine::default();
        line.option("-name", format!("vvu-test-{}", self.name));
        line.option("-nodefaults", "-no-user-config").option("-display", "none").option("-vga", "none");
        line.option("-accel", if kvm_is_usable() { "kvm" } else { "tcg,thread=multi" }).option("-cpu", self.cpu);
        line.option("-smp", self.cpus.to_string());
        self.memory.push_options(&mut line);
        for (id, socket) in ["console", "shell", "qmp"].into_iter().zip(sockets) {
            line.option("-chardev", format!("socket,id={id},path={}", socket.display()));
        }
        line.option("-serial", "chardev:console").option("-serial", "chardev:shell");
        line.option("-mon", "chardev=qmp,mode=control");
        for (index, disk) in self.disks.iter().enumerate() {
            let queues = disk.queues.map(|queues| format!(",num-queues={queues}")).unwrap_or_default();
            let bootindex = if self.boot == Boot::FirstDisk && index == 0 { ",bootindex=0" } else { "" };
            line.option("-chardev", format!("socket,id=disk{index},path={}", disk.socket.display()));
            line.option("-device", format!("vhost-user-blk-pci,chardev=disk{index}{queues}{bootindex}"));
        }
        if self.boot == Boot::Kernel {
            line.option("-kernel", &self.testbed.setup().kernel).option("-initrd", self.testbed.driver_image());
            line.option("-append", "console=ttyS0 loglevel=4 panic=0 hung_task_panic=0 random.trust_cpu=on");
        }
        line.0
    }
}

impl Memory {
    fn push_options(self, line: &mut CommandLine) {
        let file = |id: &str, mib: u32| format!("memory-backend-memfd,id={id},size={mib}M,share=on");
        match self {
            Self::OneFile { all, below_4g } => {
                let below_4g = below_4g.map(|mib| format!(",max-ram-below-4g={mib}M")).unwrap_or_default();
                line.option("-machine", format!("q35,memory-backend=memory{below_4g}"));
                line.option("-m", format!("{all}M")).option("-object", file("memory", all));
            }
            Self::TwoFiles { each } => {
                line.option("-machine", format!("q35,max-ram-below-4g={each}M")).option("-m", format!("{}M", 2 * each));
                for node in ["low", "high"] {
                    line.option("-object", file(node, each)).option("-numa", format!("node,memdev={node}"));
                }
            }
        }
    }
}

/// QEMU's options, one after the other.
#[derive(Default)]
struct CommandLine(Vec<OsString>);

impl CommandLine {
    fn option(&mut self, name: &str, value: impl Into<OsString>) -> &mut Self {
        self.0.extend([name.into(), value.into()]);
        self
    }
}

/// What happens in a driver VM, as far as a test waits for it.
#[derive(Debug)]
enum Event {
    Console(String),
    Shell(String),
    Closed,
}

/// A command that runs in the driver VM.
#[must_use = "a command is only known to have worked once it is finished"]
#[derive(Debug)]
pub struct Running {
    token: String,
    command: String,
}

/// A running driver VM. Dropping it kills it.
#[derive(Debug)]
pub struct DriverVm {
    name: String,
    qemu: Process,
    qmp: Qmp,
    to_shell: UnixStream,
    events: Receiver<Event>,
    last_console_lines: VecDeque<String>,
    token_seed: u64,
    commands: u64,
    boot_id: String,
}

impl DriverVm {
    /// The VM's QEMU.
    pub fn qemu(&self) -> &Watched {
        self.qemu.watched()
    }

    /// The VM's QMP session.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Runs a one-line shell command and returns its output (standard output and error).
    ///
    /// # Errors
    /// If it fails, takes longer than [`COMMAND_PATIENCE`], or the machine is lost.
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.run_within(COMMAND_PATIENCE, command)
    }

    /// As [`DriverVm::run`], with another time limit.
    ///
    /// # Errors
    /// As [`DriverVm::run`].
    pub fn run_within(&mut self, patience: Duration, command: &str) -> Result<String> {
        let running = self.start(command)?;
        match self.finish(running, patience)? {
            (0, output) => Ok(output),
            (status, output) => bail!("{}: `{command}` ended with status {status}:\n{output}", self.name),
        }
    }

    /// Runs a one-line shell command that is expected to fail, and returns its output.
    ///
    /// # Errors
    /// If it succeeds, takes longer than [`COMMAND_PATIENCE`], or the machine is lost.
    pub fn run_refused(&mut self, command: &str) -> Result<String> {
        let running = self.start(command)?;
        match self.finish(running, COMMAND_PATIENCE)? {
            (0, output) => bail!("{}: `{command}` succeeded although it must not:\n{output}", self.name),
            (_, output) => Ok(output),
        }
    }

    /// Starts a one-line shell command and returns at once.
    ///
    /// # Errors
    /// If the command has several lines or the machine is gone.
    pub fn start(&mut self, command: &str) -> Result<Running> {
        if command.contains('\n') {
            bail!("a command for a driver VM is one line: {command:?}");
        }
        self.commands += 1;
        let token = format!("{:016x}.{}", self.token_seed, self.commands);
        self.send(&format!("{token} {command}"))?;
        Ok(Running { token, command: command.to_owned() })
    }

    /// Waits for a command to end; returns its exit status and output.
    ///
    /// # Errors
    /// If it takes longer than `patience`, or the machine is lost.
    pub fn finish(&mut self, running: Running, patience: Duration) -> Result<(i32, String)> {
        let (begin, end) = (format!("<<<{}", running.token), format!(">>>{} ", running.token));
        let deadline = Instant::now() + patience;
        let awaited = format!("end of `{}` ({patience:.0?})", running.command);
        while self.shell_line(deadline, &awaited)? != begin {}
        let mut output = String::new();
        loop {
            let line = self.shell_line(deadline, &awaited)?;
            if let Some(status) = line.strip_prefix(&end) {
                // The shell puts a newline of its own before the end marker.
                let output = output.strip_suffix('\n').unwrap_or(&output);
                return Ok((status.parse().context("the shell's exit status is no number")?, output.to_owned()));
            }
            output.push_str(&line);
            output.push('\n');
        }
    }

    /// Restarts the machine through its kernel: firmware, then Linux again, in the same QEMU.
    ///
    /// # Errors
    /// If the shell is not back within [`BOOT_PATIENCE`].
    pub fn reboot(&mut self) -> Result<()> {
        let _never_ends = self.start("reboot -f")?;
        self.await_shell()
    }

    /// Presses the reset button: nothing in the machine is asked.
    ///
    /// # Errors
    /// If the shell is not back within [`BOOT_PATIENCE`].
    pub fn reset(&mut self) -> Result<()> {
        self.qmp.execute("system_reset")?;
        self.await_shell()
    }

    /// Has the kernel power the machine off, and waits for QEMU's end.
    ///
    /// # Errors
    /// If QEMU still runs after [`COMMAND_PATIENCE`] or ends with an error.
    pub fn power_off(mut self) -> Result<()> {
        let _never_ends = self.start("sync; poweroff -f")?;
        let status = self.qemu.await_end(COMMAND_PATIENCE)?;
        if !status.success() {
            bail!("{}'s QEMU ended with {status}", self.name);
        }
        while let Ok(event) = self.events.try_recv() {
            self.note(event)?;
        }
        Ok(())
    }

    /// Kills QEMU with SIGKILL: nothing of the machine or of its VMM gets to say goodbye.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn kill(mut self) -> Result<()> {
        self.qemu.kill()
    }

    /// Waits for text on the console.
    ///
    /// # Errors
    /// If it does not come within [`BOOT_PATIENCE`], or the machine is lost.
    pub fn await_console(&mut self, text: &str) -> Result<String> {
        let deadline = Instant::now() + BOOT_PATIENCE;
        loop {
            if let Event::Console(line) = self.event(deadline, text)? {
                let found = line.contains(text).then(|| line.clone());
                self.note(Event::Console(line))?;
                if let Some(line) = found {
                    return Ok(line);
                }
            }
        }
    }

    fn send(&mut self, line: &str) -> Result<()> {
        writeln!(self.to_shell, "{line}").with_context(|| format!("{}'s shell is gone", self.name))
    }

    /// Waits for the line with which PID 1 opens the shell of a boot that was not seen before.
    fn await_shell(&mut self) -> Result<()> {
        let deadline = Instant::now() + BOOT_PATIENCE;
        loop {
            let line = self.shell_line(deadline, "shell after a boot")?;
            if let Some(boot_id) = line.strip_prefix("vvu-driver-ready ").filter(|id| *id != self.boot_id) {
                self.boot_id = boot_id.to_owned();
                return Ok(());
            }
        }
    }

    fn shell_line(&mut self, deadline: Instant, awaited: &str) -> Result<String> {
        loop {
            match self.event(deadline, awaited)? {
                Event::Shell(line) => return Ok(line),
                other => self.note(other)?,
            }
        }
    }

    fn event(&mut self, deadline: Instant, awaited: &str) -> Result<Event> {
        match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::Closed) | Err(RecvTimeoutError::Disconnected) => {
                bail!("{} ended before {awaited}\n{}\n{}", self.name, last_words(&self.qemu), self.last_console())
            }
            Ok(event) => Ok(event),
            Err(RecvTimeoutError::Timeout) => bail!("{}: no {awaited}\n{}", self.name, self.last_console()),
        }
    }

    fn note(&mut self, event: Event) -> Result<()> {
        let Event::Console(line) = event else { return Ok(()) };
        let lost = LOST.iter().any(|text| line.contains(text));
        if self.last_console_lines.len() == REPEATED_LINES {
            self.last_console_lines.pop_front();
        }
        self.last_console_lines.push_back(line);
        if !lost {
            return Ok(());
        }
        // What follows says where it happened.
        while let Ok(Event::Console(line) | Event::Shell(line)) = self.events.recv_timeout(LAST_WORDS_PATIENCE) {
            self.last_console_lines.push_back(line);
        }
        bail!("{}'s kernel is lost\n{}", self.name, self.last_console())
    }

    fn last_console(&self) -> String {
        let lines: Vec<&str> = self.last_console_lines.iter().map(String::as_str).collect();
        format!("last lines of the console:\n{}", lines.join("\n"))
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

fn last_words(qemu: &Process) -> String {
    let path = qemu.log();
    match crate::process::last_lines(path, REPEATED_LINES) {
        Ok(lines) => format!("last lines of {}:\n{lines}", path.display()),
        Err(error) => format!("{error:#}"),
    }
}

fn forward(stream: UnixStream, mut log: Option<File>, event: fn(String) -> Event, sender: &Sender<Event>) {
    for line in BufReader::new(stream).split(b'\n') {
        let Ok(line) = line else { break };
        let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
        if let Some(log) = &mut log {
            // The log is a convenience; the test sees the line in any case.
            let _ = writeln!(log, "{line}");
        }
        if sender.send(event(line)).is_err() {
            return;
        }
    }
    let _ = sender.send(Event::Closed);
}
