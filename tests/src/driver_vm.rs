//! The driver VM: stock QEMU, stock kernel, vhost-user devices, and a shell that the test talks to.
//!
//! Three sockets lead into the machine, all made before QEMU starts, so that nothing is lost: the console (first serial
//! port), the shell (second serial port) and QMP. Two threads turn console and shell into one queue of events, on which
//! [`DriverVm::run`] waits. A kernel panic or a hung task on the console fails whatever the test is waiting for, at once.
//!
//! The shell speaks lines. The test sends `<token> <command>`; PID 1 (`driver_init.sh`) answers `<<<token`, the command's
//! output, and `>>>token <exit status>`. Whatever else is on the line (firmware, a boot) is between commands and skipped.

use std::collections::VecDeque;
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::process::{Process, Watched};
use crate::qmp::Qmp;

mod devices;
mod migration;
mod plan;

pub use devices::{Network, Peripheral, SharedFolder};
pub use migration::Migration;
pub use plan::{DISK_PORT, Disk, DriverVmPlan, Incoming, MEMORY_PORT, PLUGGED_MEMORY_NODE, kvm_is_usable};

/// How long a boot may take: a few seconds under TCG on an idle machine, many times that on a busy one.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(180);

/// How long a command may take unless the test says otherwise.
pub const COMMAND_PATIENCE: Duration = Duration::from_secs(180);

/// Name of the disk that is plugged in while the machine runs, and of its connection.
const PLUGGED: &str = "plugged";

/// Console lines that an error text repeats.
const REPEATED_LINES: usize = 25;

/// Silence after which a lost kernel has said all that it had to say.
const LAST_WORDS_PATIENCE: Duration = Duration::from_secs(2);

/// What a kernel says when it has lost; nothing that comes after it is worth waiting for.
const LOST: [&str; 5] = ["Kernel panic", "Oops:", "BUG: ", "general protection fault", "blocked for more than"];

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
    to_console: UnixStream,
    to_shell: UnixStream,
    events: Receiver<Event>,
    last_console_lines: VecDeque<String>,
    token_seed: u64,
    commands: u64,
    boot_id: String,
}

impl DriverVm {
    /// Takes over a QEMU that has just been started; the sockets are console, shell and QMP.
    fn attach(name: String, qemu: Process, sockets: Result<[UnixStream; 3]>, folder: &Path) -> Result<Self> {
        let [console, shell, qmp] = sockets.with_context(|| last_words(&qemu))?;
        let (sender, events) = channel();
        let log = File::options().create(true).append(true).open(folder.join(format!("{name}-console.log")))?;
        let (to_console, to_shell, console_sender) = (console.try_clone()?, shell.try_clone()?, sender.clone());
        thread::spawn(move || forward(console, Some(log), Event::Console, &console_sender));
        thread::spawn(move || forward(shell, None, Event::Shell, &sender));
        Ok(Self {
            name,
            qemu,
            qmp: Qmp::greet(qmp)?,
            to_console,
            to_shell,
            events,
            last_console_lines: VecDeque::new(),
            token_seed: RandomState::new().build_hasher().finish(),
            commands: 0,
            boot_id: String::new(),
        })
    }

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
        let awaited = |what| format!("{what} of `{}` ({patience:.0?})", running.command);
        let (start, awaited) = (awaited("start"), awaited("end"));
        while self.shell_line(deadline, &start)? != begin {}
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

    /// Plugs a disk into the machine's free port ([`DISK_PORT`]) while it runs, and waits until the kernel has it.
    ///
    /// # Errors
    /// If QEMU refuses, or the kernel does not find it.
    pub fn plug_disk(&mut self, disk: &Disk, device: &str) -> Result<()> {
        let [chardev, properties] = disk.plugged_as(PLUGGED);
        self.qmp.execute_with("chardev-add", &chardev)?;
        self.qmp.execute_with("device_add", &properties)?;
        // The node comes a moment before the disk can be opened.
        self.run(&format!("until (: < {device}) 2> /dev/null; do sleep 0.1; done")).map(drop)
    }

    /// Unplugs that disk: asks the kernel to let go of it, waits until it has, and closes the connection to the back-end.
    ///
    /// # Errors
    /// If QEMU refuses, or the kernel does not let go.
    pub fn unplug_disk(&mut self) -> Result<()> {
        self.qmp.execute_with("device_del", &json!({ "id": PLUGGED }))?;
        self.qmp.await_event(|name, data| {
            let device = data.get("device").and_then(serde_json::Value::as_str);
            (name == "DEVICE_DELETED" && device == Some(PLUGGED)).then_some(())
        })?;
        self.qmp.execute_with("chardev-remove", &json!({ "id": PLUGGED })).map(drop)
    }

    /// Bytes of memory that the kernel has.
    ///
    /// # Errors
    /// If the machine is lost.
    pub fn memory_len(&mut self) -> Result<u64> {
        let kib = self.run("sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")?;
        Ok(kib.trim().parse::<u64>().context("no MemTotal")? << 10)
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
            Err(RecvTimeoutError::Timeout) => {
                let blocked = self.blocked_tasks();
                bail!("{}: no {awaited}\n{blocked}", self.name)
            }
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
        self.hear_last_words();
        bail!("{}'s kernel is lost\n{}", self.name, self.last_console())
    }

    /// Has the kernel write to the console which tasks are blocked, and where (its document sysrq.rst, keys 9 and w), and
    /// returns the console's last lines: for the text of an error.
    pub fn blocked_tasks(&mut self) -> String {
        for key in ["9", "w"] {
            // A machine that is too far gone for this fails the test in any case.
            let _ = self.qmp.execute_with("chardev-send-break", &json!({ "id": "console" }));
            let _ = self.to_console.write_all(key.as_bytes());
        }
        self.hear_last_words();
        self.last_console()
    }

    fn hear_last_words(&mut self) {
        while let Ok(Event::Console(line) | Event::Shell(line)) = self.events.recv_timeout(LAST_WORDS_PATIENCE) {
            self.last_console_lines.push_back(line);
        }
    }

    fn last_console(&self) -> String {
        let lines: Vec<&str> = self.last_console_lines.iter().map(String::as_str).collect();
        format!("last lines of the console:\n{}", lines.join("\n"))
    }
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
